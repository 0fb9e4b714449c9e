"""Mixtures whose experts read each other: what their YAML says, what is wrong with it, and their row.

Nothing here imports torch: a YAML is checked before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from mixmerge import registry
from mixmerge.document import Node, Report, given, show
from mixmerge.document.sections import Strict
from mixmerge.errors import Fault, MixmergeError
from mixmerge.latent.options import BridgeOptions
from mixmerge.latent.records import Depths
from mixmerge.latent.settings import HASHED, RouteOptions, TrainOptions
from mixmerge.mixture.schema import MixtureSpec
from mixmerge.mixture.wholes import Asked, Fitted, Fitting, Whole, check_parts, inner

if TYPE_CHECKING:
    from mixmerge.batch.setup import Defaults, Setup
    from mixmerge.mixture.wiring import Mixture

CHUNK = 32
_ENGINES = ("transformers", "latent")
_MADE_ALREADY = (
    *("mode", "chunk", "depths", "bridge", "route", "too_long"),
    *("data", "keep", "split", "samples", "train", "seed"),
)
_PAIR = (
    "2 or more, or a list of pairs [PRIMARY, PEER]: each a layer, a share from 0.0 to 1.0, or last of a peer"
)


class LatentOptions(Strict):
    """What ``compose: {kind: latent}`` says: either what ``mixmerge fit`` is to make, or the ``folder`` it made.

    Args:
        folder: that ``mixmerge fit`` wrote.
        mode: how peers follow the answer: ``prompt``: they read the prompt alone; ``chunked``: they are shown the
            answer every ``chunk`` tokens of the primary; ``lockstep``: after each.
        chunk: of ``chunked``; by default 32.
        depths: where the primary reads and where its peers are read: Q, for Q equal stacks; or pairs.
        bridge: width, heads and start of what is trained between the experts.
        route: who is active, and who answers.
        too_long: what a peer does with a prompt that is longer than its context: ``refuse`` it, or read its end.
        data: a source of rows with prompts and answers, or several.
        keep: a source of rows, or several, of which the primary is to say what it says alone: its own tasks, or texts
            like them. Their answers need not be right. Who answers may not be what is learned.
        split: which part of the data, where it has parts.
        samples: rows of each source at most; which ones depends on them and the seed.
        train: how the glue learns.
        encoder: of a fitted one, where the text encoder of its router is: a folder or hub id.
        dtype: of the experts in memory when they answer; ``auto``: as they are stored.
        seed: of fitting.
    """

    folder: str | None = Field(default=None, min_length=1)
    mode: Literal["prompt", "chunked", "lockstep"] = "prompt"
    chunk: int | None = Field(default=None, ge=1)
    depths: Any = 4
    bridge: BridgeOptions = BridgeOptions()
    route: RouteOptions = RouteOptions()
    too_long: Literal["refuse", "left"] = "refuse"
    data: str | list[str] | None = None
    keep: str | list[str] | None = None
    split: str | None = Field(default=None, min_length=1)
    samples: int | None = Field(default=None, ge=1)
    train: TrainOptions = TrainOptions()
    encoder: str | None = Field(default=None, min_length=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    seed: int = Field(default=0, ge=0, lt=2**32)

    @field_validator("depths", mode="after")
    @classmethod
    def _are_depths(cls, value: Any) -> Any:
        wrong = _wrong_depths(value)
        if wrong:
            raise ValueError(wrong)
        return value

    @property
    def places(self) -> Depths:
        """``depths`` as experts take them."""
        return self.depths if isinstance(self.depths, int) else tuple((one[0], one[1]) for one in self.depths)

    @property
    def sources(self) -> list[str]:
        """Of ``data``."""
        return _listed(self.data)

    @property
    def kept(self) -> list[str]:
        """Sources of ``keep``."""
        return _listed(self.keep)


def _listed(given: str | list[str] | None) -> list[str]:
    return [given] if isinstance(given, str) else list(given or ())


def _wrong_depths(value: Any) -> str:
    """What is wrong with depths, whatever the experts; "" if nothing is."""
    if isinstance(value, int) and not isinstance(value, bool):
        return "" if value >= 2 else f"expected {_PAIR}; got {value}"
    if not isinstance(value, (list, tuple)) or not value:
        return f"expected {_PAIR}"
    for at, pair in enumerate(value):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            return f"pair {at + 1}: expected [PRIMARY, PEER]"
        primary, peer = pair
        if not _is_depth(primary) or (primary == 1.0 and isinstance(primary, float)):
            what = "a layer below the last, or a share from 0.0 to below 1.0: something must follow it"
            return f"pair {at + 1}: a primary reads at {what}; got {primary!r}"
        if peer != "last" and not _is_depth(peer):
            return f"pair {at + 1}: a peer is read at a layer, a share from 0.0 to 1.0, or last; got {peer!r}"
    return ""


def _is_depth(value: Any) -> bool:
    if isinstance(value, float):
        return 0 <= value <= 1
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def check_latent(asked: Asked, report: Report) -> None:
    """Everything that can be known to be wrong before a file is opened; of a block with faults, what is right of it."""
    check_parts(asked, _ENGINES, report)
    if len(asked.names) == 1:
        what = "the mixture has one expert, and nobody for it to read"
        report.fault(asked.top["experts"], what, "Two or more")
    compose, entries, told = asked.top["compose"], asked.entries("compose"), asked.told(LatentOptions)
    if told.folder is not None:
        _no_effect(entries, _MADE_ALREADY, "on a fitted glue", report, run="Remove it, or remove folder")
        return
    _no_effect(entries, ("encoder",), "before it is fitted", report, run="Say it in route: {encoder: ...}")
    if told.mode != "chunked" and not asked.unread(told, "mode"):
        _no_effect(entries, ("chunk",), f"in {told.mode} mode", report)
    if not told.sources and not asked.unread(told, "data"):
        report.fault(compose, "the glue learns from rows, and the key data is missing", "data: FILE")
    routed = given(dict(asked.top), "router") is not None
    _check_route(asked, told, entries, routed=routed, report=report)
    _check_training(asked, told, entries, routed=routed, report=report)


def _no_effect(
    entries: dict[str, Node], keys: Sequence[str], where: str, report: Report, *, run: str = "Remove it"
) -> None:
    for key in keys:
        node = given(entries, key)
        if node is not None:
            report.fault(node, f"has no effect {where}", run=run)


def _check_route(
    asked: Asked, told: LatentOptions, entries: dict[str, Node], *, routed: bool, report: Report
) -> None:
    if routed:
        _no_effect(entries, ("route",), "beside a router of the mixture's own", report)
        return
    node = given(entries, "route")
    inside = {} if node is None else inner(node)
    route, names = told.route, asked.names
    if route.primary is not None and names and route.primary not in names:
        what = f"the mixture has no expert {show(route.primary)}"
        report.fault(inside["primary"], what, registry.choices(route.primary, list(names)))
    if route.kind == "fixed":
        keys = ("k", "encoder", "features", "hidden", "noise", "temperature")
        _no_effect(inside, keys, "on a fixed routing: all experts are active", report)
        if route.primary is None:
            report.fault(node or asked.top["compose"], "the key primary is missing: who answers", "NAME")
        return
    if names and route.k > len(names):
        # where nothing is said, all there are is what three would be
        if given(inside, "k") is not None:
            report.fault(inside["k"], f"there are only {len(names)} experts", f"2 to {len(names)}")
    elif route.k < 2:
        report.fault(inside["k"], "with one active expert nobody is read", f"2 to {max(2, len(names))}")
    if route.encoder != HASHED:
        _no_effect(inside, ("features",), "on a text encoder", report)
    if any(width < 1 for width in route.hidden):
        report.fault(inside["hidden"], f"has a width below 1: {route.hidden}", "Widths of 1 or more")


def _check_training(
    asked: Asked, told: LatentOptions, entries: dict[str, Node], *, routed: bool, report: Report
) -> None:
    node = given(entries, "train")
    inside = {} if node is None else inner(node)
    weights = inner(inside["weights"]) if given(inside, "weights") is not None else {}
    if routed or told.route.kind == "fixed":
        _no_effect(weights, ("entropy", "balance", "consistency"), "where no router learns", report)
    elif asked.names and told.route.k >= len(asked.names):
        _no_effect(weights, ("consistency",), "where all experts are active: routings do not differ", report)
    if not told.kept and not asked.unread(told, "keep"):
        _no_effect(weights, ("keep",), "without rows to keep", report, run="keep: FILE")
        _no_effect(inside, ("keep_batch_size",), "without rows to keep", report, run="keep: FILE")
    elif told.kept and not routed and told.route.kind == "learned" and told.route.primary is None:
        what = "has rows to be answered as they are without peers, and who answers is what is learned"
        run = "Say primary in route, or give the mixture a router of its own"
        report.fault(entries["keep"], what, run=run)
    if told.train.holdout == 0:
        _no_effect(inside, ("patience", "evaluate_every"), "without rows that are held out", report)


def check_fitted(spec: MixtureSpec, answers: bool) -> None:
    """Look for the glue that ``mixmerge fit`` made, and whether it is of these experts.

    Raises:
        MixmergeError: it is not fitted, its folder is gone, or it is of other experts.
    """
    told = LatentOptions.model_validate(spec.compose.options)
    if told.folder is None:
        what = "the glue between its experts is not fitted yet"
        run = "mixmerge fit MIXTURE.yaml OUT"
        raise MixmergeError(Fault("compose", what, "A folder that mixmerge fit made", run))
    from mixmerge.latent.files import check_experts, load_latent

    card = load_latent(told.folder)
    if card.names != tuple(spec.experts):
        what = f"the glue in {told.folder} is of {', '.join(card.names)}, and the mixture of {', '.join(spec.experts)}"
        raise MixmergeError(Fault("experts", what, "The experts it was fitted with", "Fit the mixture again"))
    if (card.route is None) != (spec.router is not None):
        if card.route is None:
            what, run = (
                "the glue was fitted with a router of the mixture's own, and there is none",
                "Add router",
            )
        else:
            what, run = (
                "the glue was fitted with a router in it, and the mixture has another",
                "Remove router",
            )
        raise MixmergeError(Fault("router", what, run=run))
    if answers:
        from mixmerge.mixture.answering import expert_set

        check_experts(card, expert_set(spec))


def _setup(mixture: Mixture, defaults: Defaults) -> Setup:
    from mixmerge.mixture.latent_setup import setup_of_latent

    return setup_of_latent(mixture, defaults)


def _fit(spec: MixtureSpec, out: Path, how: Fitting) -> Fitted:
    from mixmerge.mixture.latent_fitting import fit_latent

    return fit_latent(spec, out, how)


LATENT = Whole(
    options=LatentOptions,
    instead="",
    mark="latent.json",
    folders=("folder", "encoder", "route.encoder"),
    files=("data", "keep"),
    check=check_latent,
    ready=check_fitted,
    setup=_setup,
    fit=_fit,
)
