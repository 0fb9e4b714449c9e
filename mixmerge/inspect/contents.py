"""What is in a model folder, and in an adapter on top of it: from config and headers, no tensor data read."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mixmerge.checkpoint.adapter import AdapterDelta, read_adapter
from mixmerge.checkpoint.adapter_names import HEADS, BaseNames
from mixmerge.checkpoint.header import TensorHeader
from mixmerge.checkpoint.locate import locate
from mixmerge.checkpoint.reader import Checkpoint, open_checkpoint
from mixmerge.errors import CheckpointError, Fault, MixmergeError
from mixmerge.inspect.names import By, groups, stacks

_WHERE = "model"
_OWN_HEADS = (*HEADS, "score", "classifier", "qa_outputs")
_HAVE_HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining")


class Reference(Protocol):
    """What names a model: ``mixmerge.recipe.ModelRef``, as ``ModelRef.parse("MODEL+ADAPTER")`` gives it."""

    @property
    def path(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def adapter(self) -> str | None: ...
    @property
    def adapter_revision(self) -> str | None: ...


@dataclass(frozen=True)
class _Folder:
    path: str
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True)
class Input:
    """One opened model.

    Args:
        name: as the user wrote it.
        checkpoint: its headers.
        adapter: the adapter's folder.
        deltas: what the adapter changes, by the name of the tensor.
    """

    name: str
    checkpoint: Checkpoint
    adapter: Path | None
    deltas: Mapping[str, AdapterDelta]


@dataclass(frozen=True)
class File:
    """A weight file."""

    name: str
    nbytes: int


@dataclass(frozen=True)
class Group:
    """Tensors of one row of the table: a layer, a kind of module, or one tensor.

    Args:
        shape: of the tensor, where the row is one.
        dtypes: parameters by dtype, in safetensors' names.
    """

    name: str
    tensors: int
    parameters: int
    nbytes: int
    dtypes: dict[str, int]
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class AdapterContents:
    """What an adapter changes.

    Args:
        path: its folder.
        kinds: changed tensors by kind: lowrank, dora, bias, replace, same.
        ranks: changed tensors by rank.
        scales: changed tensors by the factor on B A (alpha / r, or alpha / sqrt(r)).
        modules: changed tensors by the module's last name.
        parameters: stored in the adapter.
        nbytes: of these.
    """

    path: str
    kinds: dict[str, int]
    ranks: dict[int, int]
    scales: dict[float, int]
    modules: dict[str, int]
    parameters: int
    nbytes: int


@dataclass(frozen=True)
class Contents:
    """What is in a model.

    Args:
        name: as it was given.
        path: the folder on this machine.
        architecture: the config's first, or else its model_type.
        tensors, parameters, nbytes: stored in the weight files.
        dtypes: parameters by dtype, in safetensors' names.
        files: the weight files.
        layers: layers by stack.
        head: the tensor that predicts: of its own, or the embedding it is tied to; None without a head.
        tied: the head is tied to the embedding.
        groups: the tensors by layer, kind or one by one.
        adapter: what is on top.
    """

    name: str
    path: str
    architecture: str
    tensors: int
    parameters: int
    nbytes: int
    dtypes: dict[str, int]
    files: tuple[File, ...]
    layers: dict[str, int]
    head: str | None
    tied: bool
    groups: tuple[Group, ...]
    adapter: AdapterContents | None


def open_inputs(models: Sequence[str | Path | Reference]) -> list[Input]:
    """Open every model; a folder that several of them share is read once.

    Raises:
        CheckpointError: all that is wrong with any of them, at once.
    """
    faults: list[Fault] = []
    opened: dict[tuple[str, str | None], Checkpoint] = {}
    inputs = []
    for model in models:
        ref: Reference = _Folder(str(model)) if isinstance(model, str | Path) else model
        try:
            inputs.append(_open(ref, opened))
        except MixmergeError as error:
            faults += [fault for fault in error.faults if fault not in faults]
    if faults:
        raise CheckpointError(faults)
    return inputs


def _open(ref: Reference, opened: dict[tuple[str, str | None], Checkpoint]) -> Input:
    name = str(ref)
    key = ref.path, ref.revision
    if key not in opened:
        folder = locate(ref.path, ref.revision, where=_WHERE)
        if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
            what = "it is an adapter, which says nothing without the model it was trained on"
            raise CheckpointError(Fault(name, what, run=f"Write MODEL+{name}"))
        opened[key] = open_checkpoint(folder, name=ref.path)
    checkpoint = opened[key]
    if ref.adapter is None:
        return Input(name, checkpoint, None, {})
    folder = locate(ref.adapter, ref.adapter_revision, where=_WHERE)
    return Input(name, checkpoint, folder, read_adapter(folder, checkpoint.tensors, where=_WHERE))


def describe(model: Input, by: By) -> Contents:
    """What is in one model."""
    checkpoint = model.checkpoint
    tensors = checkpoint.tensors
    head, tied = _head(checkpoint)
    return Contents(
        name=model.name,
        path=str(checkpoint.path),
        architecture=architecture(checkpoint.config),
        tensors=len(tensors),
        parameters=sum(tensor.elements for tensor in tensors.values()),
        nbytes=checkpoint.nbytes,
        dtypes=_dtypes(tensors.values()),
        files=tuple(File(file.name, file.stat().st_size) for file in checkpoint.files),
        layers=stacks(tensors),
        head=head,
        tied=tied,
        groups=tuple(
            _group(row, [tensors[name] for name in names], by) for row, names in groups(tensors, by).items()
        ),
        adapter=_adapter(model.adapter, model.deltas) if model.adapter else None,
    )


def architecture(config: Mapping[str, Any]) -> str:
    """The config's first architecture, or else its model_type."""
    listed = config.get("architectures")
    return str(listed[0] if isinstance(listed, list) and listed else config.get("model_type", "unknown"))


def _head(checkpoint: Checkpoint) -> tuple[str | None, bool]:
    names = checkpoint.tensors
    own = [name for name in names if name.removesuffix(".weight").rpartition(".")[2] in _OWN_HEADS]
    if own:
        return own[0], False
    if not architecture(checkpoint.config).endswith(_HAVE_HEADS):
        return None, False
    known = BaseNames(names, ())
    embeddings = [name for name in names if known.is_embedding(name)]
    return (embeddings[0], True) if len(embeddings) == 1 else (None, False)


def _dtypes(tensors: Iterable[TensorHeader]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for tensor in tensors:
        counts[tensor.dtype] += tensor.elements
    return dict(counts.most_common())


def _group(name: str, tensors: Sequence[TensorHeader], by: By) -> Group:
    return Group(
        name,
        len(tensors),
        sum(tensor.elements for tensor in tensors),
        sum(tensor.nbytes for tensor in tensors),
        _dtypes(tensors),
        tensors[0].shape if by == "tensor" else None,
    )


def _adapter(folder: Path, deltas: Mapping[str, AdapterDelta]) -> AdapterContents:
    counts: dict[str, Counter[Any]] = defaultdict(Counter)
    stored: dict[str, TensorHeader] = {}
    for name, delta in deltas.items():
        counts["kind"][delta.kind] += 1
        module = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
        counts["module"][module] += 1
        if delta.a is not None:
            counts["rank"][delta.a.shape[0] // delta.experts] += 1
            counts["scale"][delta.scale] += 1
        stored.update({header.name: header for header in delta.headers})
    return AdapterContents(
        path=str(folder),
        kinds=dict(sorted(counts["kind"].items())),
        ranks=dict(sorted(counts["rank"].items())),
        scales=dict(sorted(counts["scale"].items())),
        modules=dict(sorted(counts["module"].items())),
        parameters=sum(header.elements for header in stored.values()),
        nbytes=sum(header.nbytes for header in stored.values()),
    )


def as_data(value: Any) -> Any:
    """A dataclass as JSON data: None where there is none, lists for tuples, text for keys."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_data(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): as_data(inner) for key, inner in value.items()}
    return [as_data(inner) for inner in value] if isinstance(value, tuple | list) else value
