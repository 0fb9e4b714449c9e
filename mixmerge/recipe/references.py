"""Names of models: ``PATH[@REVISION][+ADAPTER[@REVISION]]``, or the same spelled out as a mapping."""

from __future__ import annotations

from dataclasses import dataclass

from mixmerge.document import Node, Report, read_mapping, read_text, show, unknown_keys
from mixmerge.errors import Fault, RecipeError

_GRAMMAR = "A model is PATH[@REVISION][+ADAPTER[@REVISION]]"
_SPELL_OUT = "A path that has + or @ in it is written as {model: {path: ...}}"


@dataclass(frozen=True)
class ModelRef:
    """A model folder or hub id, and optionally a LoRA adapter on top of it.

    Two references are the same model if they are spelled the same, as in mergekit.

    Args:
        path: folder or hub id of the model.
        revision: branch, tag or commit on the hub.
        adapter: folder or hub id of a PEFT adapter.
        adapter_revision: the adapter's revision.
    """

    path: str
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None

    @classmethod
    def parse(cls, reference: str, *, where: str = "model") -> ModelRef:
        """Read the short form.

        Raises:
            RecipeError: more than one ``+`` or ``@``, an empty part, or spaces at an end.
        """
        parts = reference.split("+")
        if len(parts) > 2:
            raise RecipeError(Fault(where, f"{show(reference)} has more than one +", _GRAMMAR, _SPELL_OUT))
        model = _split(parts[0], where)
        adapter = _split(parts[1], where) if len(parts) == 2 else (None, None)
        return cls(*model, *adapter)

    def __str__(self) -> str:
        model = _join(self.path, self.revision)
        return model if self.adapter is None else f"{model}+{_join(self.adapter, self.adapter_revision)}"

    def canonical(self) -> str | dict[str, dict[str, str]]:
        """The short form if it can be read back, else the long one."""
        try:
            if ModelRef.parse(str(self)) == self:
                return str(self)
        except RecipeError:
            pass  # a path with + or @ in it
        spelled = {"model": _spell(self.path, self.revision)}
        if self.adapter is not None:
            spelled["lora"] = _spell(self.adapter, self.adapter_revision)
        return spelled


def _join(path: str, revision: str | None) -> str:
    return path if revision is None else f"{path}@{revision}"


def _spell(path: str, revision: str | None) -> dict[str, str]:
    return {"path": path} if revision is None else {"path": path, "revision": revision}


def _split(part: str, where: str) -> tuple[str, str | None]:
    pieces = part.split("@")
    if len(pieces) > 2:
        raise RecipeError(Fault(where, f"{show(part)} has more than one @", _GRAMMAR, _SPELL_OUT))
    if not all(pieces):
        raise RecipeError(Fault(where, f"{show(part)} has an empty part", _GRAMMAR))
    if any(piece != piece.strip() for piece in pieces):
        raise RecipeError(Fault(where, f"{show(part)} has spaces at an end", _GRAMMAR))
    return pieces[0], pieces[1] if len(pieces) == 2 else None


def read_ref(node: Node, report: Report) -> ModelRef | None:
    """A reference in either form; None (and a fault) if it is neither."""
    if isinstance(node.value, dict):
        return _long_form(node, node.value, report)
    short = read_text(node, report, "a model folder or hub id")
    if short is None:
        return None
    try:
        return ModelRef.parse(short)
    except RecipeError as error:
        report.take(error, node)
        return None


def _long_form(node: Node, entries: dict[str, Node], report: Report) -> ModelRef | None:
    known = ["model", "lora", "override_architecture"]
    unknown_keys(entries, known, report)
    if "override_architecture" in entries:
        report.warn(
            entries["override_architecture"],
            "has no effect: the layout is derived from the tensors' names, whatever the architecture",
        )
    if "model" not in entries:
        report.fault(node, "the key model is missing", "It is written {model: {path: ...}}")
        return None
    model = _part(entries["model"], report)
    lora = entries.get("lora")
    adapter = _part(lora, report) if lora is not None and lora.value is not None else (None, None)
    return ModelRef(*model, *adapter) if model and adapter else None


def _part(node: Node, report: Report) -> tuple[str, str | None] | None:
    if not isinstance(node.value, dict):
        short = read_text(node, report, "a path or {path: ..., revision: ...}")
        if short is None:
            return None
        try:
            return _split(short, node.path)
        except RecipeError as error:
            report.take(error, node)
            return None
    entries = read_mapping(node, report, "path and revision")
    unknown_keys(entries, ["path", "revision"], report)
    if "path" not in entries:
        report.fault(node, "the key path is missing", "It is written {path: ..., revision: ...}")
        return None
    revision = entries.get("revision")
    has_revision = revision is not None and revision.value is not None
    path = _filled(entries["path"], report)
    at = _filled(revision, report) if revision is not None and has_revision else None
    return None if path is None or (has_revision and at is None) else (path, at)


def _filled(node: Node, report: Report) -> str | None:
    value = read_text(node, report, "text")
    if value is not None and (not value or value != value.strip()):
        report.fault(node, f"{show(value)} is empty or has spaces at an end")
        return None
    return value
