"""A fitted glue as a folder: what it is (``latent.json``), its values, and how it learned. Never an expert's weights.

``latent.json`` has the hash of every expert, the hash of the values, and one over itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mixmerge.checkpoint.identity import canonical_hash, digest
from mixmerge.checkpoint.locate import locate
from mixmerge.checkpoint.reader import read_json
from mixmerge.errors import CheckpointError, Fault, MixmergeError, collecting
from mixmerge.experts import Expert, identity
from mixmerge.experts.encoding import TextEncoder
from mixmerge.latent.glue import Glue
from mixmerge.latent.options import BridgeOptions
from mixmerge.latent.records import Depths, Mode, Shape
from mixmerge.latent.router import Encode, HashedText, LatentRouter, Routing
from mixmerge.latent.settings import ELSEWHERE, HASHED, RouteOptions

CARD, VALUES, TRAINING, CURVES = "latent.json", "glue.safetensors", "training.json", "training.png"
FORMAT, VERSION = "mixmerge-latent", 1
_GLUE, _ROUTER = "glue.", "router."
_AGAIN = "Fit the mixture again"


@dataclass(frozen=True)
class LatentCard:
    """What a glue is.

    Args:
        experts: in the mixture's order, with their hashes.
        mode, chunk: how peers follow an answer, as it was trained and as it answers.
        depths: as the mixture says them.
        bridge: options of the bridges.
        route: who is active; None: the mixture has a router of its own.
        too_long: what a peer does with a prompt that is longer than its context: ``refuse`` or ``left``.
        features: of a text, as the router takes them; 0 where it has none.
        encoder: hash of the text encoder; "" where there is none.
        parameters: numbers in the values.
        nbytes, sha256: of the values' file.
    """

    experts: tuple[Shape, ...]
    mode: Mode
    chunk: int
    depths: Depths
    bridge: BridgeOptions
    route: RouteOptions | None
    too_long: str
    features: int = 0
    encoder: str = ""
    parameters: int = 0
    nbytes: int = 0
    sha256: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(one.name for one in self.experts)

    @property
    def primary(self) -> str | None:
        """Who always answers; None: that is decided for each prompt."""
        return None if self.route is None else self.route.primary

    @property
    def hash(self) -> str:
        """SHA-256 over all of it, and so over every byte of the values."""
        return canonical_hash(self.facts())

    def facts(self) -> dict[str, Any]:
        """As JSON values."""
        found: dict[str, Any] = {
            **{key: value for key, value in vars(self).items() if key not in ("bridge", "route")},
            "experts": [asdict(one) for one in self.experts],
            "bridge": self.bridge.model_dump(mode="json"),
            "route": None if self.route is None else self.route.model_dump(mode="json"),
        }
        plain: dict[str, Any] = json.loads(json.dumps(found))
        return plain

    def blank(self, *, seed: int = 0) -> tuple[Glue, LatentRouter | None]:
        """Glue and router as they are before they learn; the same for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            router = None
            if self.route is not None and self.route.kind == "learned":
                said = self.route.primary
                primary = None if said is None else self.names.index(said)
                router = LatentRouter(self.features, len(self.experts), self.route, primary=primary)
            glue = Glue(self.experts, self.depths, self.bridge, primary=self.primary, seed=seed)
        return glue, router


def expert_hash(expert: Expert) -> str:
    """What tells experts apart, or one from itself changed: small files, headers and samples of the weights.

    What is on the hub is downloaded. Engine and options do not count.

    Raises:
        CheckpointError: it cannot be found or read.
    """
    where = f"experts.{expert.name}"
    model = locate(expert.model, None, where=where)
    adapter = None if expert.adapter is None else locate(expert.adapter, None, where=where)
    return identity(Expert("", str(model), adapter=None if adapter is None else str(adapter)))


def check_experts(card: LatentCard, experts: Iterable[Expert]) -> None:
    """Refuse experts that are not those the glue was fitted with.

    Raises:
        MixmergeError: one is missing, is too many, cannot be found or is another; all of them at once.
    """
    wanted = {one.name: one.hash for one in card.experts}
    given = {one.name: one for one in experts}
    faults: list[Fault] = []
    if set(wanted) != set(given):
        what = f"the glue is of {', '.join(wanted)}, and the mixture of {', '.join(given)}"
        faults.append(Fault("experts", what, "The experts it was fitted with", _AGAIN))
    for name in (one for one in given if one in wanted):
        with collecting(faults):
            found = expert_hash(given[name])
            if found != wanted[name]:
                what = "is not the expert that the glue was fitted with, or was changed since"
                more = f"Its fingerprint begins with {found[:12]}, that of the glue with {wanted[name][:12]}"
                faults.append(Fault(f"experts.{name}", what, more, _AGAIN))
    if faults:
        raise MixmergeError(faults)


def save_latent(folder: Path, card: LatentCard, glue: Glue, router: LatentRouter | None) -> LatentCard:
    """Write values and card into a folder; the card as it was written.

    Raises:
        MixmergeError: a value is not finite.
    """
    if card.encoder and card.route is not None:
        card = replace(card, route=card.route.model_copy(update={"encoder": ELSEWHERE}))
    state = values_of(glue, router)
    wrong = sorted(name for name, one in state.items() if not one.isfinite().all())
    if wrong:
        what = f"{wrong[0]} holds NaN or Inf"
        raise MixmergeError(Fault("compose.train", what, run="Try a smaller learning_rate"))
    save_file({name: one.cpu().contiguous() for name, one in state.items()}, folder / VALUES)
    written = replace(
        card,
        parameters=sum(one.numel() for one in state.values()),
        nbytes=(folder / VALUES).stat().st_size,
        sha256=digest([folder / VALUES]),
    )
    whole = {"format": FORMAT, "version": VERSION, "hash": written.hash, **written.facts()}
    (folder / CARD).write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return written


def values_of(glue: Glue, router: LatentRouter | None) -> dict[str, Tensor]:
    """Every value of both by name."""
    parts: tuple[tuple[str, nn.Module | None], ...] = ((_GLUE, glue), (_ROUTER, router))
    return {
        f"{prefix}{name}": value.detach().clone()
        for prefix, part in parts
        if part is not None
        for name, value in part.state_dict().items()
    }


def put_values(state: Mapping[str, Tensor], glue: Glue, router: LatentRouter | None) -> None:
    """The opposite of ``values_of``.

    Raises:
        KeyError, RuntimeError: the values are of another glue.
    """
    if router is None and any(name.startswith(_ROUTER) for name in state):
        raise KeyError("values of a router, and there is none")
    for prefix, part in ((_GLUE, glue), (_ROUTER, router)):
        if part is not None:
            own = {name.removeprefix(prefix): one for name, one in state.items() if name.startswith(prefix)}
            part.load_state_dict(own)


def load_latent(folder: str | Path) -> LatentCard:
    """What the glue in a folder is.

    Raises:
        CheckpointError: there is none; its card is damaged, was changed, or is of another version.
    """
    path = Path(folder) / CARD
    if not path.is_file():
        run = "mixmerge fit MIXTURE.yaml OUT"
        raise CheckpointError(Fault(str(folder), "holds no glue", f"A folder with {CARD}", run))
    raw = read_json(path)
    if raw.get("format") != FORMAT:
        raise CheckpointError(Fault(str(path), "is not a glue's card", f"format: {FORMAT}"))
    if raw.get("version") != VERSION:
        what = f"is of version {raw.get('version')!r}"
        raise CheckpointError(Fault(str(path), what, f"This mixmerge reads version {VERSION}", _AGAIN))
    try:
        card = _card({key: value for key, value in raw.items() if key not in ("format", "version", "hash")})
    except (KeyError, TypeError, ValueError, AttributeError, ValidationError) as error:
        what = "is damaged: a fact of it is missing or wrong"
        raise CheckpointError(Fault(str(path), what, run=_AGAIN)) from error
    if card.hash != raw.get("hash"):
        raise CheckpointError(Fault(str(path), "was changed after it was written", run=_AGAIN))
    return card


def _card(raw: dict[str, Any]) -> LatentCard:
    depths = raw["depths"]
    route = raw["route"]
    card = LatentCard(
        **{
            **raw,
            "experts": tuple(Shape(**one) for one in raw["experts"]),
            "depths": depths if isinstance(depths, int) else tuple((one[0], one[1]) for one in depths),
            "bridge": BridgeOptions.model_validate(raw["bridge"]),
            "route": None if route is None else RouteOptions.model_validate(route),
        }
    )
    numbers = (card.chunk, card.features, card.parameters, card.nbytes)
    texts = [card.encoder, card.sha256, *(one.hash for one in card.experts)]
    whole = all(type(one) is int and one >= 0 for one in numbers) and all(type(one) is str for one in texts)
    known = card.mode in get_args(Mode) and card.too_long in ("refuse", "left")
    if not (whole and known and card.chunk and len(set(card.names)) == len(card.names)):
        raise ValueError("facts that contradict each other")
    if card.primary is not None and card.primary not in card.names:
        raise ValueError("a primary that is no expert")
    return card


def load_glue(folder: str | Path, card: LatentCard, *, device: str = "cpu") -> Glue:
    """The bridges, in evaluation mode.

    Args:
        folder: that ``load_latent`` read the card of.
        card: it.
        device: a torch device.

    Raises:
        CheckpointError: the values are missing, damaged, or were changed.
    """
    return _loaded(Path(folder), card)[0].to(device)


def load_routing(
    folder: str | Path, card: LatentCard, *, encoder: str | None = None, device: str = "cpu"
) -> Routing | None:
    """Who is active for a prompt; None: the mixture's own router says so.

    Args:
        folder, card: as ``load_glue``.
        encoder: where the text encoder is, if the router reads by one: the card does not say it.
        device: a torch device.

    Raises:
        CheckpointError: as ``load_glue``; or the encoder is not said, or not the one that the glue was fitted with.
    """
    if card.route is None:
        return None
    if card.route.kind == "fixed":
        return Routing(card.names, None, None, primary=card.route.primary)
    router = _loaded(Path(folder), card)[1]
    place = (encoder or ELSEWHERE) if card.encoder else HASHED
    if place == ELSEWHERE:
        what = "its router reads by a text encoder, and where that is is not said"
        raise CheckpointError(Fault(str(folder), what, run="compose: {encoder: PATH} in mixture.yaml"))
    if card.encoder and encoder_hash(place) != card.encoder:
        what = f"{place} is not the text encoder that the glue was fitted with"
        raise CheckpointError(Fault("compose.encoder", what, "The same one", _AGAIN))
    encode = encode_of(place, card.route.features, device=device)
    return Routing(card.names, None if router is None else router.to(device), encode)


def encoder_hash(place: str) -> str:
    """Of a text encoder; "" of hashed features, which are not a model."""
    if place == HASHED:
        return ""
    return identity(Expert("", str(locate(place, None, where="compose.route.encoder"))))


def encode_of(place: str, features: int, *, device: str) -> Encode:
    """What reads texts for a router."""
    if place == HASHED:
        return HashedText(features)
    return TextEncoder(locate(place, None, where="compose.route.encoder"), device=device)


def _loaded(folder: Path, card: LatentCard) -> tuple[Glue, LatentRouter | None]:
    path = folder / VALUES
    if not path.is_file():
        raise CheckpointError(Fault(str(path), "is missing", run=_AGAIN))
    if digest([path]) != card.sha256:
        what = "was changed after it was written: its hash differs"
        raise CheckpointError(Fault(str(path), what, run=_AGAIN))
    try:
        glue, router = card.blank()
        put_values(load_file(path), glue, router)
    except (SafetensorError, KeyError, RuntimeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(Fault(str(path), f"is damaged: {reason}", run=_AGAIN)) from error
    for part in (glue, router):
        if part is not None:
            part.eval().requires_grad_(False)
    return glue, router
