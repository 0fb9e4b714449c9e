"""One training loop for the routers that need torch: seeded, and stopped early on texts that were held out.

N rows, E experts. torch is imported inside functions: scoring with a router that does not need it never loads it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mixmerge.errors import Fault, MixmergeError
from mixmerge.routers.base import Inputs, Options, Training
from mixmerge.routers.trained import text_hash

if TYPE_CHECKING:
    import torch

    Loss = Callable[[torch.Tensor], torch.Tensor]
    Parameters = Sequence[torch.Tensor] | Sequence[dict[str, Any]]

_MEASURED = 10  # steps between two measurements of the held-out loss, at least


class TrainedOptions(Options):
    """What all that are trained share.

    Args:
        holdout: share of the texts that are not trained on, but decide when to stop and how to calibrate.
        rate: learning rate of Adam, above 0.
        decay: of the weights, 0 or more.
        batch: queries in a step.
        epochs: passes over the data, at most.
        least: steps that are allowed at least, where that is more than the passes.
        patience: passes without a better held-out loss after which it stops; a tenth of ``least``, if that is more.
            The loss is measured after each pass, or after ten steps where a pass has fewer.
    """

    holdout: float = Field(0.2, gt=0, lt=1)
    rate: float = Field(1e-3, gt=0)
    decay: float = Field(0.01, ge=0)
    batch: int = Field(64, ge=1)
    epochs: int = Field(100, ge=1)
    least: int = Field(0, ge=0)
    patience: int = Field(10, ge=1)


class EnsembleOptions(TrainedOptions):
    """``members``: networks in the ensemble, each with its own start and its own texts held out; 1 or more."""

    members: int = Field(3, ge=1)


@dataclass(frozen=True, eq=False)
class Arranged:
    """Outcomes in an order that no reading order can change.

    Args:
        data: rows ordered by a hash of their text, experts by name.
        back: ``(E,)``, the places in ``data`` of the experts as they were given: ``array[..., back]``.
    """

    data: Training
    back: NDArray[np.int64]


def arranged(data: Training) -> Arranged:
    """The same outcomes ordered by their content, so that what is learned depends on nothing else."""
    columns = np.array(sorted(range(len(data.experts)), key=lambda e: data.experts[e]), np.int64)
    score = data.score[:, columns]
    inputs = data.inputs
    keys = [(_digest(text), score[i].tobytes()) for i, text in enumerate(inputs.texts)]
    rows = np.array(sorted(range(len(keys)), key=lambda i: keys[i]), np.int64)
    ordered = Training(
        inputs=Inputs(
            tuple(inputs.texts[i] for i in rows),
            {name: tuple(column[i] for i in rows) for name, column in inputs.metadata.items()},
            None if inputs.embedding is None else inputs.embedding[rows],
        ),
        score=score[rows],
        experts=tuple(data.experts[e] for e in columns),
        costs=data.costs[columns],
        prices=data.prices,
    )
    return Arranged(ordered, np.argsort(columns))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8")).digest()


def stream(seed: int, *keys: object) -> int:
    """A seed below 2^31 for one use of randomness, from the router's seed and what tells the uses apart."""
    digest = hashlib.sha256(repr((seed, *keys)).encode("utf-8")).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def held_out(texts: Sequence[str], *, share: float, seed: int, member: int) -> NDArray[np.bool_]:
    """``(N,)``: the rows that a member does not train on.

    Chosen by a hash of the text without case and spacing, so that copies stay together and the rest of the table
    does not matter. None, where that would leave nothing on one side.
    """
    drawn = [stream(seed, "held out", member, text_hash(text)) for text in texts]
    chosen = np.array(drawn, np.int64) < share * 2**31
    return np.zeros(len(texts), np.bool_) if chosen.all() else chosen


@contextmanager
def seeded(seed: int, *, threads: int | None = 1) -> Iterator[None]:
    """torch with this seed and so many threads (None: as they are); its own state is put back afterwards."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(before)


def train(
    parameters: Parameters,
    loss: Loss,
    *,
    rows: int,
    options: TrainedOptions,
    held: Callable[[], float] | None = None,
    decoupled: bool = True,
    mode: Callable[[bool], object] | None = None,
) -> float:
    """Train with Adam, and keep the parameters of the pass with the lowest held-out loss: the start is one of them.

    Args:
        parameters: tensors, or groups of them as torch's optimizers take them.
        loss: of the rows of a batch, given their indices.
        rows: N.
        options: rate, decay, batch and how long.
        held: the loss on the rows held out; None trains for all the passes.
        decoupled: decay apart from the gradient (AdamW); False adds it to the gradient (Adam).
        mode: called with True before a pass of training and with False before ``held``.

    Returns:
        The lowest held-out loss, or NaN.

    Raises:
        MixmergeError: a parameter is no longer finite.
    """
    import torch

    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer: Any = kind(parameters, lr=options.rate, weight_decay=options.decay, fused=True)
    learned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    switch = mode or (lambda training: None)

    def measured() -> float:
        switch(False)
        with torch.no_grad():
            return float("nan") if held is None else held()

    steps = -(-rows // options.batch)
    passes, between = max(options.epochs, -(-options.least // steps)), max(1, _MEASURED // steps)
    patience = max(options.patience, -(-options.least // (10 * steps)))
    lowest, best, waited = measured(), _copies(learned), 0
    for number in range(1, passes + 1):
        switch(True)
        for index in torch.split(torch.randperm(rows), options.batch):
            optimizer.zero_grad(set_to_none=True)
            loss(index).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        if number % between and number < passes:
            continue
        now = measured()
        if held is None or now < lowest:
            lowest, best, waited = now, _copies(learned), 0
        elif (waited := waited + between) >= patience:
            break
    with torch.no_grad():
        for parameter, kept in zip(learned, best, strict=True):
            parameter.copy_(kept)
    switch(False)
    if not all(bool(torch.isfinite(parameter).all()) for parameter in learned):
        raise MixmergeError(
            Fault("router options: rate", f"training diverged at {options.rate:g}", run="Choose a lower rate")
        )
    return lowest


def _copies(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def unarranged(
    arrays: Mapping[str, NDArray[Any]], names: Sequence[str], back: NDArray[np.int64]
) -> dict[str, Any]:
    """The arrays with the last axis of those named back in the order the experts were given in."""
    return {
        name: np.ascontiguousarray(array[..., back] if name in names else array)
        for name, array in arrays.items()
    }


def subset(data: Training, rows: NDArray[np.bool_]) -> Training:
    """Some rows of the outcomes, without their metadata."""
    inputs = data.inputs
    chosen = Inputs(
        tuple(text for text, keep in zip(inputs.texts, rows, strict=True) if keep),
        embedding=None if inputs.embedding is None else inputs.embedding[rows],
    )
    return replace(data, inputs=chosen, score=data.score[rows])
