"""Mixtures whose experts answer as one whole: the kinds of them, each a row of what such a mixture needs.

A kind has a file of its own with its row, and a line in ``WHOLES``; a package of yours adds one by an entry point of
the group ``mixmerge.whole``. Nothing of a kind is loaded before a mixture names it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pydantic import ValidationError

from mixmerge import registry
from mixmerge.document import Node, Report, given, show
from mixmerge.document.sections import Strict
from mixmerge.document.tree import to_data

if TYPE_CHECKING:
    from mixmerge.batch.setup import Defaults, Setup
    from mixmerge.mixture.schema import ComposeSpec, ExpertSpec, MixtureSpec
    from mixmerge.mixture.wiring import Mixture

S = TypeVar("S", bound=Strict)

WHOLES: dict[str, str] = {
    "adapters": "mixmerge.mixture.adapters:ADAPTERS",
    "latent": "mixmerge.mixture.latent:LATENT",
    "logits": "mixmerge.mixture.logits:LOGITS",
}
NAME = "mixture"  # of the whole among its experts


class Progress(Protocol):
    """Is told how far something is."""

    def __call__(self, what: str, done: int, steps: int, note: str = "", /) -> None:
        """``note`` says how it goes, such as a loss or a rate."""


@dataclass(frozen=True)
class Asked:
    """A mixture's YAML, as far as it could be read.

    Args:
        top: the whole of it.
        names: of all experts.
        experts: those that could be read.
        compose: None if it could not be read.
    """

    top: Mapping[str, Node]
    names: Sequence[str]
    experts: Mapping[str, ExpertSpec]
    compose: ComposeSpec | None

    def entries(self, key: str) -> dict[str, Node]:
        """The keys below one of the top; none if it is no mapping."""
        return inner(self.top[key]) if key in self.top else {}

    def told(self, options: type[S]) -> S:
        """The keys of ``compose`` beside the kind; of a block with faults those that are right, each by itself."""
        if self.compose is not None:
            return options.model_validate(self.compose.options)
        kept: dict[str, Any] = {}
        for key, node in self.entries("compose").items():
            try:
                options.model_validate({key: to_data(node)})
            except ValidationError:
                continue
            kept[key] = to_data(node)
        return options.model_validate(kept)

    def unread(self, told: Strict, *keys: str) -> bool:
        """Whether any of these keys of ``compose`` is there and is not what it should be, which was said of it."""
        entries = self.entries("compose")
        return any(key not in told.model_fields_set and given(entries, key) is not None for key in keys)


@dataclass(frozen=True)
class Fitting:
    """How a mixture is fitted: as ``mixture.gluing.fit`` takes it."""

    overwrite: bool
    device: str
    progress: Progress


@dataclass(frozen=True)
class Fitted:
    """What was fitted.

    Args:
        path: the folder.
        what: ``router``, ``network``, ...
        kind: of the router, the gate, ...
        experts: names.
        facts: more of it, as JSON values.
        notes: lines that say the facts to a person.
    """

    path: Path
    what: str
    kind: str
    experts: tuple[str, ...]
    facts: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "what": self.what,
            "kind": self.kind,
            "experts": list(self.experts),
            **self.facts,
        }


@dataclass(frozen=True)
class Whole:
    """A kind of mixture whose experts answer as one.

    Args:
        options: keys of ``compose`` beside the kind. One of them is ``folder``, with ``.`` for the YAML's own, if
            ``mixmerge fit`` writes anything of this kind.
        instead: what does the work of router and policy, as a sentence; "" if a mixture of this kind may have them.
        mark: file in the folder that ``mixmerge fit`` wrote by which it is known; "" if there is none.
        folders: keys of ``compose`` that are folders or hub ids: of the hub, they stay in their repository;
            ``route.encoder`` is a key of the mapping ``route``.
        files: keys of ``compose`` that are files, lists of them, or files by name.
        check: says what is wrong before a file is opened.
        ready: raises MixmergeError if the mixture has to be fitted first, or what was fitted is gone or of other
            experts; told whether its experts are to answer.
        setup: what answers. Who is fitted to route has the mixture's router and policy.
        fit: fits what is needed and writes it as one folder, whole or not at all.
    """

    options: type[Strict]
    instead: str
    mark: str
    folders: tuple[str, ...]
    files: tuple[str, ...]
    check: Callable[[Asked, Report], None]
    ready: Callable[[MixtureSpec, bool], None]
    setup: Callable[[Mixture, Defaults], Setup]
    fit: Callable[[MixtureSpec, Path, Fitting], Fitted]


def whole_of(kind: object) -> Whole | None:
    """The row of a kind of composition; None if answers of single experts are composed."""
    if not isinstance(kind, str) or kind not in registry.table("whole"):
        return None
    found: Whole = registry.find("whole", kind)
    return found


def is_marked(folder: Path) -> bool:
    """Whether something that was fitted lies in a folder, as far as names of files tell."""
    marks = [registry.find("whole", kind).mark for kind in registry.table("whole")]
    return any((folder / mark).is_file() for mark in marks if mark)


def inner(node: Node) -> dict[str, Node]:
    """Keys of a mapping."""
    return node.value if isinstance(node.value, dict) else {}


def check_parts(asked: Asked, engines: Sequence[str], report: Report) -> None:
    """What is wrong with experts as parts of a whole, whichever.

    Args:
        asked: the YAML.
        engines: that an expert may name: those that read the same folders.
        report: gets the faults.
    """
    for name, one in asked.experts.items():
        node = asked.entries("experts")[name]
        if name == NAME:
            report.fault(node, f"{show(name)} is what all experts as one are called", "Another name")
        if one.endpoint is not None:
            what = "an expert behind an endpoint cannot be part of a network"
            report.fault(node, what, "model, or adapter and base")
        elif one.engine is not None and one.engine not in engines:
            what = f"{one.engine} cannot run a network of several experts"
            report.fault(node, what, "Leave engine out")
        if one.options:
            what = "options has no effect on a part of a network"
            report.fault(node, what, "compose: {dtype: ...}", "Remove it")
