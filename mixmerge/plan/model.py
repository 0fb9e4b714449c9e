"""What a plan is: which bytes go where, as frozen data that can be printed, hashed and carried out."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixmerge.checkpoint.adapter import AdapterDelta
from mixmerge.checkpoint.header import TensorHeader
from mixmerge.checkpoint.hub import Snapshot
from mixmerge.methods import Method, Role, Value
from mixmerge.plan.bank import BankPlan
from mixmerge.plan.masks import MaskPlan
from mixmerge.recipe import ModelRef, Recipe


@dataclass(frozen=True)
class Model:
    """One input of the merge.

    Args:
        ref: as the recipe writes it.
        where: where the recipe writes it (``models[1].model``), for errors.
        path: the model's folder; several inputs may share it.
        adapter: the adapter's folder, if there is one.
        tensors: headers by name.
        files: weight files of the model, then of the adapter.
        deltas: what the adapter changes, by the name of the tensor; a tied head may be among them that the
            model does not store.
        config: the model's ``config.json``.
        snapshot: the commit on the hub the model is of, and which of its weights are still there.
        adapter_snapshot: the commit the adapter is of.
    """

    ref: ModelRef
    where: str
    path: Path
    adapter: Path | None
    tensors: dict[str, TensorHeader]
    files: tuple[Path, ...]
    deltas: dict[str, AdapterDelta]
    config: dict[str, Any]
    snapshot: Snapshot | None = None
    adapter_snapshot: Snapshot | None = None

    def __str__(self) -> str:
        return f"{self.where}: {self.ref}"

    def commits(self) -> dict[str, str]:
        """``commit`` and ``adapter_commit``, of what is from the hub."""
        snapshots = {"commit": self.snapshot, "adapter_commit": self.adapter_snapshot}
        return {name: snapshot.commit for name, snapshot in snapshots.items() if snapshot}


@dataclass(frozen=True)
class Source:
    """One input of one task.

    Args:
        model: index into ``Plan.models``.
        tensor: where the stored bytes are.
        adapter: what to add to them, if anything.
        delta_only: the base is the very tensor the adapter was made for, so the delta is the adapter alone.
    """

    model: int
    tensor: TensorHeader
    adapter: AdapterDelta | None = None
    delta_only: bool = False


@dataclass(frozen=True)
class Target:
    """One output tensor: its name, what it looks like, and where it goes.

    Args:
        shard: index into ``Plan.shards``.
        offset: of its first byte in the shard's file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    shard: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Task:
    """One output tensor and everything it is made of.

    Args:
        target: the output.
        sources: the experts, in the recipe's order. A copied tensor has all that must be identical.
        base: for methods that require one.
        copied: not merged: an integer or boolean tensor, which must be the same in every input, or one of the head of
            the expert whose model this is.
        parameters: the method's values for this tensor: one for parameters ``per`` merge, else a tuple with
            one for each source.
        role: what the tensor is for.
        chunks: weights of several contiguous slices of the row-major tensor, one for each source; empty if the
            parameter ``weight`` is that of the whole.
        factors: of the directions of the sum of the experts' deltas; empty if all are 1.
        nuclear: the sum of the singular values these factors were learned with; 0 if it is not known.
    """

    target: Target
    sources: tuple[Source, ...]
    base: Source | None
    copied: bool
    parameters: dict[str, Value | tuple[Value, ...]]
    role: Role = "other"
    chunks: tuple[tuple[float, ...], ...] = ()
    factors: tuple[float, ...] = ()
    nuclear: float = 0.0

    @property
    def wide(self) -> bool:
        """Whether float64 takes part, which the kernels do not do."""
        inputs = (*self.sources, *((self.base,) if self.base else ()))
        return "F64" in {self.target.dtype, *(source.tensor.dtype for source in inputs)}


@dataclass(frozen=True)
class Dropped:
    """A tensor of an input that is not in the output, and why."""

    model: int
    name: str
    reason: str
    nbytes: int


@dataclass(frozen=True)
class Head:
    """What one expert has for itself: kept beside the merged trunk, never merged into it.

    Args:
        expert: its name, a folder of ``heads/`` in the output.
        model: index into ``Plan.models``.
        tensors: by their stored names, which are those of the expert's own class.
        config: the expert's ``config.json``.
    """

    expert: str
    model: int
    tensors: tuple[Source, ...]
    config: dict[str, Any]


@dataclass(frozen=True)
class Shard:
    """One output file: its name, its header's bytes (length prefix included) and its whole size."""

    file: str
    header: bytes
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """A recipe worked out against the headers of its inputs; no tensor data was read for it.

    Args:
        recipe: the recipe; ``text`` is its source.
        method: the row of its method; of a recipe with a bank, of its shared part.
        models: every distinct input; ``base`` is an index into it, ``donor`` the one whose tokenizer
            the output gets, and whose config without an ``owner``.
        tasks: one for each output tensor, in the order of the output's bytes.
        dropped: what inputs have and the output has not.
        shards: the output's weight files.
        config: the output's ``config.json``.
        warnings: what a person should know and can ignore.
        heads: of the experts that have some, in their order.
        owner: index into ``models`` of the expert whose model this is, with its config and its own head; None where
            heads are merged, or beside the model only.
        masks: of all tasks, beside the base; None where one model is made.
        bank: what stands beside the shared model; None where the method leaves nothing else.
        hash: SHA-256 of everything that decides the output, except the values in the inputs and their paths.
    """

    recipe: Recipe
    text: str
    method: Method
    models: tuple[Model, ...]
    base: int | None
    donor: int
    tasks: tuple[Task, ...]
    dropped: tuple[Dropped, ...]
    shards: tuple[Shard, ...]
    config: dict[str, Any]
    warnings: tuple[str, ...]
    heads: tuple[Head, ...] = ()
    bank: BankPlan | None = None
    masks: MaskPlan | None = None
    owner: int | None = None
    hash: str = field(default="")

    @property
    def made_by(self) -> Method:
        """The row of the method that the recipe names."""
        return self.method if self.bank is None else self.bank.method

    @property
    def needs_data(self) -> bool:
        """Whether rows are looked at: for the merge, or to train a gate."""
        return self.method.needs_data or (self.bank is not None and self.bank.gate is not None)

    @property
    def remote(self) -> tuple[Snapshot, ...]:
        """What is still on the hub: ``fetch`` it before the plan can be carried out."""
        snapshots = [model.snapshot for model in self.models if model.snapshot and model.snapshot.absent]
        return tuple({(one.name, one.commit): one for one in snapshots}.values())

    @property
    def bytes_to_download(self) -> int:
        return sum(snapshot.bytes_to_download for snapshot in self.remote)

    @property
    def bytes_written(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    @property
    def room(self) -> int:
        """Bytes the output takes on the disk, at most; small files are not counted."""
        beside = [one.nbytes for one in (self.bank, self.masks) if one is not None]
        return self.bytes_written + sum(beside)

    @property
    def bytes_read(self) -> int:
        """Bytes of all inputs, each counted once; methods with a threshold read most of them twice."""
        seen = {}
        for task in self.tasks:
            for source in (*task.sources, *((task.base,) if task.base else ())):
                seen[source.tensor.file, source.tensor.offset] = source.tensor.nbytes
                for header in source.adapter.headers if source.adapter else ():
                    seen[header.file, header.offset] = header.nbytes
        for source in (source for head in self.heads for source in head.tensors):
            seen[source.tensor.file, source.tensor.offset] = source.tensor.nbytes
        return sum(seen.values())
