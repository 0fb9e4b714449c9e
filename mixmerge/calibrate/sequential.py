"""Gram matrices block by block: every expert's block sees what the blocks merged before it put out.

Source: RegMean++, arXiv:2508.03121, section 3.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mixmerge.calibrate.accumulators import Statistics
from mixmerge.calibrate.anatomy import Anatomy, Need, Shown
from mixmerge.calibrate.gathering import (
    Measure,
    Reader,
    Told,
    finished,
    linear_maps,
    watching,
)
from mixmerge.calibrate.kinds import KINDS
from mixmerge.calibrate.sums import Sums, waiting_inputs
from mixmerge.data.batches import Batch
from mixmerge.data.rows import Row
from mixmerge.errors import Fault, MixmergeError
from mixmerge.experts.loading import LoadedExpert

if TYPE_CHECKING:
    from torch import Tensor

# A parameter's name, its tensor in each expert, its Gram matrix of each or None -> the merged tensor.
Combine = Callable[[str, Sequence["Tensor"], Sequence["Tensor | None"]], "Tensor"]


@dataclass
class _Flow:
    """One batch on its way through the merged model.

    Args:
        batch: what it is made of.
        hidden: the input of the next block.
        given: for every block, the rest of its positional arguments and its named ones.
    """

    batch: Batch
    hidden: Any
    given: list[tuple[tuple[Any, ...], dict[str, Any]]]


def gather_sequential(
    experts: Sequence[LoadedExpert],
    rows: Sequence[Sequence[Row]],
    combine: Combine,
    *,
    fingerprint: str,
    measure: Measure = Measure(),
    progress: Told | None = None,
) -> Iterator[list[Statistics]]:
    """For each block of layers, then for what is outside of them, the Gram statistics of every expert.

    What is outside the blocks is averaged first (``combine`` without Gram matrices). Then, block by block, every
    expert's block is run on the merged model's activations of its own rows, the block is merged, and the activations
    go on through the merged block. The experts are changed: load them for this alone.

    Args:
        experts: of one architecture, all in memory, beside one merged model.
        rows: of each expert.
        combine: merges one tensor; the name is the parameter's in the first expert.
        fingerprint: of all the experts, to be kept with the sums.
        measure: how rows are shown.
        progress: called with (blocks done, blocks in all) after every block and what is outside of them.

    Raises:
        MixmergeError: a model without one stack of layers; as ``gather``.
    """
    import torch

    merged = copy.deepcopy(experts[0].model)
    merged.config.use_cache = False  # keys and values of a first run would be seen by the second
    path = _stack(merged, experts[0].name)
    stacks = [expert.model.get_submodule(path) for expert in experts]
    result = merged.get_submodule(path)
    inside = f"{path}."
    outside = [name for name in _shared(experts) if not name.startswith(inside)]
    _put(merged, experts, outside, combine, [{} for _ in experts])
    flows = []
    used = []
    for expert, own in zip(experts, rows, strict=True):
        batches = Reader.of(expert).batches(own, "gram", measure)
        flows.append([_begin(merged, result, batch) for batch in batches])
        used.append({own[at].digest for batch in batches for at in batch.rows})
    settings = {**measure.settings("gram"), "sequential": True}

    def statistics(sums: Sequence[Sums]) -> list[Statistics]:
        return [
            finished(one, "gram", expert.name, fingerprint, settings, digests)
            for one, expert, digests in zip(sums, experts, used, strict=True)
        ]

    for number, block in enumerate(result):
        start = f"{inside}{number}."
        found = [
            _of_block(stack[number], start, expert, flow, number)
            for stack, expert, flow in zip(stacks, experts, flows, strict=True)
        ]
        made = statistics(found)
        names = [name for name in _shared(experts) if name.startswith(start)]
        _put(merged, experts, names, combine, [_means(one) for one in made])
        with torch.no_grad():
            for each in (each for flow in flows for each in flow):
                arguments, options = each.given[number]
                each.hidden = _first(block(each.hidden, *arguments, **options))
        if progress is not None:
            progress(number + 1, len(result) + 1)
        yield made
    rest = [_of_rest(expert, merged, flow, inside) for expert, flow in zip(experts, flows, strict=True)]
    if progress is not None:
        progress(len(result) + 1, len(result) + 1)
    yield statistics(rest)


def sequential_need(
    anatomy: Anatomy, blocks: Sequence[Sequence[int]], shown: Shown, *, experts: int, places: int
) -> Need:
    """What ``gather_sequential`` takes.

    Args:
        anatomy: of one expert; all are in memory, and the merged model too.
        blocks: of every block, and of what is outside of them, the inputs of the linear maps.
        shown: the largest batch of any expert.
        experts: their number.
        places: of all batches of all experts, tokens with padding: their states stay from block to block, with what
            else a block is given (places by rotations, masks), while one batch is seen by every block.
    """
    block = max((sum(width**2 for width in widths) for widths in blocks), default=0)
    widest = max((width for widths in blocks for width in widths), default=0)
    rotations = 2 * anatomy.hidden // max(anatomy.heads, 1)
    flows = (
        places * (anatomy.hidden + rotations + shown.length) + shown.places * anatomy.layers * anatomy.hidden
    )
    return Need(
        {
            "experts": 4 * anatomy.elements * experts,
            "merged model": anatomy.loading,
            # sums of a block and their means, and those of the block before, which are being kept
            "Gram matrices of a block": 8 * 3 * experts * block,
            "inputs that wait": max((waiting_inputs(widths, shown) for widths in blocks), default=0),
            "one at work": 4 * widest**2 + 8 * (experts + 2) * widest**2,
            "states of all rows": 4 * flows,
            "activations": anatomy.forward(shown),
        }
    )


def _stack(model: Any, name: str) -> str:
    """Where the list of layers is: the one outermost list of modules that holds linear maps."""
    import torch

    maps = linear_maps(model)
    found: list[str] = []
    for path, module in model.named_modules():
        nested = any(path.startswith(f"{outer}.") for outer in found)
        listed = isinstance(module, torch.nn.ModuleList) and not nested
        if listed and any(each.startswith(f"{path}.") for each in maps):
            found.append(path)
    if len(found) != 1:
        what = f"has {len(found)} stacks of layers ({', '.join(found)})"
        raise MixmergeError(
            Fault(
                name,
                what,
                "One stack: an encoder or a decoder",
                "Use regmean, which needs no order of layers",
            )
        )
    return found[0]


def _shared(experts: Sequence[LoadedExpert]) -> list[str]:
    """The parameters that every expert has in one shape: all but heads."""
    states = [dict(expert.model.named_parameters()) for expert in experts]
    return [
        name
        for name, value in states[0].items()
        if all(name in state and state[name].shape == value.shape for state in states)
    ]


def _put(
    merged: Any,
    experts: Sequence[LoadedExpert],
    names: Sequence[str],
    combine: Combine,
    grams: Sequence[dict[str, Tensor]],
) -> None:
    """Merge tensors into the merged model."""
    states = [dict(expert.model.named_parameters()) for expert in experts]
    targets = dict(merged.named_parameters())
    for name in names:
        value = combine(name, [state[name].data for state in states], [each.get(name) for each in grams])
        targets[name].data.copy_(value)


def _means(statistics: Statistics) -> dict[str, Tensor]:
    names = {*statistics.facts.counts, *statistics.facts.same}
    return {name: mean for name in names if (mean := statistics.mean(name)) is not None}


def _begin(merged: Any, stack: Any, batch: Batch) -> _Flow:
    """What the blocks are given for a batch; the model is run once to see it."""
    import torch

    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hidden: list[Any] = []

    def note(module: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        rest = dict(options)
        hidden.append(arguments[0] if arguments else rest.pop("hidden_states"))
        given.append((tuple(arguments[1:]), rest))

    moved = batch.to(str(next(merged.parameters()).device))
    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in stack]
    try:
        with torch.no_grad():
            merged(**moved.inputs())
    finally:
        for handle in handles:
            handle.remove()
    return _Flow(moved, hidden[0], given)


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _of_block(block: Any, start: str, expert: LoadedExpert, flow: Sequence[_Flow], number: int) -> Sums:
    """The Gram sums of an expert's block on the merged model's activations."""
    import torch

    sums = Sums(None)
    maps = {name: module for name, module in linear_maps(expert.model).items() if name.startswith(start)}
    with watching(maps, KINDS["gram"], sums) as watch, torch.no_grad():
        for each in flow:
            watch.begin(each.batch.attention_mask)
            arguments, options = each.given[number]
            block(each.hidden, *arguments, **options)
    return sums


def _of_rest(expert: LoadedExpert, merged: Any, flow: Sequence[_Flow], inside: str) -> Sums:
    """The Gram sums of an expert's linear maps outside the blocks, such as a pooler's, in the merged model."""
    import torch

    sums = Sums(None)
    maps = {name: module for name, module in linear_maps(expert.model).items() if not name.startswith(inside)}
    own = dict(expert.model.named_parameters())
    for name, value in merged.named_parameters():
        if name in own and name not in maps and own[name].shape == value.shape:
            own[name].data.copy_(value.data)
    with watching(maps, KINDS["gram"], sums) as watch, torch.no_grad():
        for each in flow:
            watch.begin(each.batch.attention_mask)
            expert.model(**each.batch.inputs())
    return sums
