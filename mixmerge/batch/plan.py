"""From calls to batches: what is asked in a stage, which calls share a batch, and what that will take.

A call is one generation: of a request (its row), in a stage, by an expert, in a draw. N calls of a stage.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mixmerge.engines.batching import packed
from mixmerge.engines.records import Message
from mixmerge.experts import Expert, ExpertSet

Integers = NDArray[np.int64]
CHARACTERS = 3  # a token has more, of most texts: so estimates are rather too high
ROWS = 256  # requests of a batch at most
ALONE, OFFERS, READS = 0, 1, 2  # parts of a stage: calls on their own, of peers, and of those who read them


@dataclass(frozen=True, eq=False)
class Stage:
    """What is asked in a stage, in the order of the rows.

    Args:
        number: 0, 1, ...
        rows: ``(N,)`` requests by their place in the job; ascending.
        places: ``(N,)`` which of the request's asks it is.
        experts: ``(N,)`` by their place in the set.
        tokens: ``(N,)`` estimate of the prompt's.
        new: ``(N,)`` tokens it may generate.
        keys: ``(N,)`` uint64 names of the answers, of request, stage, expert, draw and all that was asked.
        offsets: ``(N,)`` places of the answers in the journal; -1 until there is one. Changed while it runs.
        faults: call -> why there will be no answer. Changed while it runs.
        parts: ``(N,)`` ``ALONE``, ``OFFERS`` or ``READS``: a call that reads waits for those of its request that
            offer. None: all are alone.
    """

    number: int
    rows: Integers
    places: Integers
    experts: Integers
    tokens: Integers
    new: Integers
    keys: NDArray[np.uint64]
    offsets: Integers
    faults: dict[int, str] = field(default_factory=dict)
    parts: Integers | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def calls_of(self, row: int) -> range:
        """Calls of a request, in the order they were asked."""
        first, last = np.searchsorted(self.rows, [row, row + 1])
        return range(int(first), int(last))

    def open(self, call: int) -> bool:
        """Whether it is neither answered nor given up."""
        return bool(self.offsets[call] < 0) and call not in self.faults

    def part(self, call: int) -> int:
        return ALONE if self.parts is None else int(self.parts[call])

    def before(self, call: int) -> list[int]:
        """Calls that it waits for."""
        if self.part(call) != READS:
            return []
        return [one for one in self.calls_of(int(self.rows[call])) if self.part(one) == OFFERS]


@dataclass(frozen=True, eq=False)
class Batch:
    """Calls that are generated together.

    Args:
        unit: what has to be loaded.
        calls: of the stage.
        id: the same for the same calls of the same job.
    """

    unit: str
    calls: Integers
    id: str

    @classmethod
    def of(cls, unit: str, calls: Integers, keys: NDArray[np.uint64]) -> Batch:
        digest = hashlib.blake2b(keys[calls].astype("<u8").tobytes(), digest_size=12)
        digest.update(unit.encode("utf-8", "surrogatepass"))
        return cls(unit, calls, digest.hexdigest())

    def halves(self, keys: NDArray[np.uint64]) -> tuple[Batch, Batch]:
        """The same calls in two batches."""
        middle = len(self.calls) // 2
        return Batch.of(self.unit, self.calls[:middle], keys), Batch.of(self.unit, self.calls[middle:], keys)


@dataclass(frozen=True, eq=False)
class Group:
    """What one loading of a unit is good for.

    Args:
        unit: what is loaded.
        experts: that share it and are asked.
        batches: in the order they run.
        bytes: of the unit's weights; 0 if that is not known.
        prompt, new: estimated tokens of the prompts, and tokens that may be generated.
        remote: an endpoint answers: nothing is loaded here.
        reads: its calls read what others offer.
        after: units that offer it.
    """

    unit: str
    experts: tuple[Expert, ...]
    batches: tuple[Batch, ...]
    bytes: int
    prompt: int
    new: int
    remote: bool
    reads: bool = False
    after: frozenset[str] = frozenset()

    @property
    def calls(self) -> int:
        return sum(len(batch.calls) for batch in self.batches)


def groups(
    stage: Stage,
    experts: ExpertSet,
    sizes: Mapping[str, int],
    *,
    budgets: Mapping[str, int],
    splits: frozenset[str] | set[str] = frozenset(),
) -> list[Group]:
    """The calls of a stage by what has to be loaded for them, those of like length in a batch.

    Calls that read what others offer are a group of their own, and calls that offer share no batch with others. The
    batches depend on the calls alone, not on the order of the requests, nor on which are answered already.

    Args:
        stage: what is asked.
        experts: that may be asked.
        sizes: unit -> bytes.
        budgets: unit -> tokens of a batch, prompts and what may be generated.
        splits: batches that turned out too large: their halves take their place.
    """
    found = []
    for unit, members in experts.units().items():
        places = [experts.names.index(one.name) for one in members]
        mine = np.isin(stage.experts, places)
        for kinds in ((OFFERS, ALONE), (READS,)):
            parts = [np.flatnonzero(mine & _of_part(stage, kind)) for kind in kinds]
            calls = np.concatenate(parts)
            if not len(calls):
                continue
            asked = {int(place) for place in np.unique(stage.experts[calls])}
            remote = members[0].remote
            rows = 1 if remote else ROWS
            whole = [
                batch
                for some in parts
                for batch in _batches(stage, unit, some, budget=budgets[unit], rows=rows)
            ]
            found.append(
                Group(
                    unit,
                    tuple(one for one, place in zip(members, places, strict=True) if place in asked),
                    tuple(half for batch in whole for half in _halved(batch, stage.keys, splits)),
                    sizes.get(unit, 0),
                    int(stage.tokens[calls].sum()),
                    int(stage.new[calls].sum()),
                    remote,
                    kinds == (READS,),
                    _offering(stage, calls, experts) if kinds == (READS,) else frozenset(),
                )
            )
    return found


def _of_part(stage: Stage, kind: int) -> NDArray[np.bool_]:
    """``(N,)``: which of the calls are of a part."""
    if stage.parts is None:
        return np.full(len(stage), kind == ALONE)
    return np.asarray(stage.parts == kind)


def _offering(stage: Stage, calls: Integers, experts: ExpertSet) -> frozenset[str]:
    """Units that offer what these calls read."""
    offers = np.isin(stage.rows, stage.rows[calls]) & _of_part(stage, OFFERS)
    names = experts.names
    return frozenset(experts[names[int(place)]].unit for place in np.unique(stage.experts[offers]))


def _batches(stage: Stage, unit: str, calls: Integers, *, budget: int, rows: int) -> list[Batch]:
    tokens, new = stage.tokens[calls], stage.new[calls]
    order = np.lexsort((stage.keys[calls], new, tokens)).tolist()
    packs = packed(tokens.tolist(), new.tolist(), order, budget=budget, rows=rows)
    return [Batch.of(unit, calls[np.array(pack)], stage.keys) for pack in packs]


def _halved(batch: Batch, keys: NDArray[np.uint64], splits: frozenset[str] | set[str]) -> Iterator[Batch]:
    if batch.id in splits and len(batch.calls) > 1:
        for half in batch.halves(keys):
            yield from _halved(half, keys, splits)
    else:
        yield batch


def loads_in_order(stage: Stage, experts: ExpertSet) -> int:
    """How often a unit would be loaded if requests were answered one by one, with one unit in memory."""
    units = list(experts.units())
    unit_of = np.array([units.index(one.unit) for one in experts], np.int64)
    local = np.array([not one.remote for one in experts], np.bool_)
    asked = stage.experts[local[stage.experts]]
    if not len(asked):
        return 0
    loaded = unit_of[asked]
    return int(1 + np.count_nonzero(loaded[1:] != loaded[:-1]))


def estimated(prompt: str | tuple[Message, ...]) -> int:
    """Tokens of a prompt, by its characters."""
    texts = [prompt] if isinstance(prompt, str) else [turn.role + turn.content for turn in prompt]
    return max(1, -(-sum(map(len, texts)) // CHARACTERS))
