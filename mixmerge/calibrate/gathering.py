"""Running an expert over its rows and adding up what the methods need to know of it.

Padding is never counted, and how rows are put into batches changes nothing but the rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mixmerge.calibrate.accumulators import Facts, Statistics, added
from mixmerge.calibrate.anatomy import Anatomy, Need, Shown
from mixmerge.calibrate.fisher import add_fisher, fisher_need
from mixmerge.calibrate.kinds import KINDS, StatisticKind
from mixmerge.calibrate.sums import Sums, waiting_inputs
from mixmerge.data.batches import Batch, Task, context_of, make_batches, tokenised
from mixmerge.data.rows import Row
from mixmerge.errors import Fault, MixmergeError
from mixmerge.experts.loading import Kind as Outputs
from mixmerge.experts.loading import LoadedExpert, check_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

# Rows done, rows in all.
Told = Callable[[int, int], None]


@dataclass(frozen=True)
class Measure:
    """How rows are shown to a model; the fields of the recipe's ``calibration`` of the same names."""

    max_tokens: int = 512
    batch_size: int = 8
    layout: Literal["padded", "packed"] = "padded"
    seed: int = 0

    def settings(self, kind: str) -> dict[str, Any]:
        """What decides the share of a row."""
        return {name: getattr(self, name) for name in KINDS[kind].settings}

    def lines(self, kind: str) -> int:
        """Lines of a batch."""
        return 1 if KINDS[kind].rows == "alone" else self.batch_size


def gather(
    expert: LoadedExpert,
    rows: Sequence[Row],
    kind: str,
    *,
    fingerprint: str,
    measure: Measure = Measure(),
    wanted: Collection[str] | None = None,
    progress: Told | None = None,
) -> Statistics:
    """The statistics of an expert on its rows.

    Args:
        expert: loaded, with its tokenizer.
        rows: what it is shown. A row that is too short to say anything adds nothing.
        kind: a name of ``KINDS``.
        fingerprint: of the model, to be kept with the sums.
        measure: how rows are shown.
        wanted: names of the tensors to gather for; None is all there are.
        progress: called with (rows done, rows in all) after every batch.

    Raises:
        MixmergeError: no tokenizer, no usable row; of gradients, a model without logits that say something; sums that
            are not finite.
    """
    batches = Reader.of(expert).batches(rows, kind, measure)
    sums = Sums(wanted)
    shown = told(batches, progress)
    row = KINDS[kind]
    if row.gradients:
        add_fisher(expert, shown, rows, measure.seed, sums, together=row.rows == "together")
    else:
        _activations(expert, shown, row, sums)
    used = {rows[at].digest for batch in batches for at in batch.rows}
    return finished(sums, kind, expert.name, fingerprint, measure.settings(kind), used)


def told(batches: Sequence[Batch], progress: Told | None) -> Iterator[Batch]:
    """The batches; whoever listens is told of each when it has been used."""
    total, done = sum(len(batch.rows) for batch in batches), 0
    for batch in batches:
        yield batch
        done += len(batch.rows)
        if progress is not None:
            progress(done, total)


def finished(
    sums: Sums, kind: str, name: str, fingerprint: str, settings: dict[str, Any], used: Collection[str]
) -> Statistics:
    """Sums as statistics of an expert called ``name`` on the rows with the digests ``used``.

    Raises:
        MixmergeError: they are not finite.
    """
    wrong = sorted(tensor for tensor, value in sums.values.items() if not value.isfinite().all())
    if wrong:
        what = f"gives statistics that are not finite, of {wrong[0]} for one"
        raise MixmergeError(Fault(name, what, run="Check the expert: it has NaN or overflows on this data"))
    facts = Facts(kind, fingerprint, settings, tuple(sorted(used)), sums.counts, sums.same)
    return Statistics(facts, sums.values)


@dataclass(frozen=True)
class Reader:
    """How an expert reads rows: known before any of its weights is.

    Args:
        name: for messages.
        architecture: its class in transformers.
        kind: what its logits are.
        config: of transformers.
        tokenizer: of transformers, or None.
    """

    name: str
    architecture: str
    kind: Outputs
    config: Any
    tokenizer: Any

    @classmethod
    def of(cls, expert: LoadedExpert) -> Reader:
        model = expert.model
        return cls(expert.name, type(model).__name__, expert.kind, model.config, expert.tokenizer)

    @property
    def context(self) -> int:
        """Tokens it takes at most, as its config and tokenizer say; positions beyond have no embedding."""
        return context_of(self.config, self.tokenizer)

    def takes(self, row: Row, measure: Measure) -> bool:
        """Whether a row is long enough to say anything.

        Raises:
            MixmergeError: as ``batches``.
        """
        check_tokenizer(self.tokenizer, self.name)
        most = min(measure.max_tokens, self.context)
        return any(True for _ in tokenised([row], self.tokenizer, task=self.task, max_tokens=most))

    @property
    def task(self) -> Task:
        return "causal" if self.kind == "causal" else "classifier"

    def batches(self, rows: Sequence[Row], kind: str, measure: Measure) -> tuple[Batch, ...]:
        """The rows as this expert reads them for a statistic, none longer than it can.

        Raises:
            MixmergeError: it has no tokenizer, or not the logits it takes; as ``make_batches``.
        """
        if KINDS[kind].gradients and self.kind == "other":
            what = f"is a {self.architecture}: it predicts neither a token nor a class"
            if "For" in self.architecture:
                what = f"is a {self.architecture}: gradients of such predictions are not taken yet"
            raise MixmergeError(Fault(self.name, what, "A causal language model or a sequence classifier"))
        check_tokenizer(self.tokenizer, self.name)
        if getattr(self.config, "is_encoder_decoder", False) and self.kind == "other":
            what = f"is a {self.architecture}: an encoder with a decoder is not run over data yet"
            raise MixmergeError(Fault(self.name, what, "An encoder, or a causal language model"))
        return make_batches(
            rows,
            self.tokenizer,
            task=self.task,
            max_tokens=min(measure.max_tokens, self.context),
            batch_size=measure.lines(kind),
            layout=measure.layout,
            order="given" if KINDS[kind].rows == "together" else "length",
        )


def gathering_need(anatomy: Anatomy, kind: StatisticKind, widths: Sequence[int], shown: Shown) -> Need:
    """What ``gather`` takes.

    A sum of Gram matrices is 8 n² bytes of every map of n inputs, fewer where maps share an input; one map at a time
    makes its share, in float32. Inputs of a few hundred tokens of each map wait for the next product. Second moments
    are vectors of 8 n bytes.

    Args:
        anatomy: of the expert.
        kind: of statistics.
        widths: inputs of the linear maps that are gathered in one pass.
        shown: its largest batch.
    """
    if kind.gradients:
        return fisher_need(anatomy, shown)
    expert, widest, sizes = {"expert": anatomy.loading}, max(widths, default=0), sum(map(kind.size, widths))
    if kind.power == 2:
        sums = {"Gram matrices": sizes, "one at work": 4 * widest**2}
        sums["inputs that wait"] = waiting_inputs(widths, shown)
    else:
        sums = {"second moments": sizes, "one at work": 12 * widest * shown.places}
    return Need({**expert, **sums, "activations": anatomy.forward(shown)})


def extend(
    statistics: Statistics, expert: LoadedExpert, rows: Sequence[Row], *, measure: Measure = Measure()
) -> Statistics:
    """The statistics with the rows that are not in them yet; those that are, are not run again.

    Raises:
        MixmergeError: as ``gather`` and ``added``.
    """
    known = set(statistics.facts.rows)
    facts = statistics.facts
    reader = Reader.of(expert)
    new = [row for row in rows if row.digest not in known and reader.takes(row, measure)]
    if not new:
        return statistics
    wanted = {*facts.counts, *facts.same}
    more = gather(expert, new, facts.kind, fingerprint=facts.model, measure=measure, wanted=wanted)
    return added(statistics, more)


def linear_maps(model: Any) -> dict[str, Any]:
    """The modules that multiply by a matrix, by the name of its tensor; without a head over a vocabulary."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    }


def real_inputs(value: Tensor, mask: Tensor) -> Tensor | None:
    """The inputs of a linear map that belong to real tokens, (tokens, n); None if that cannot be told.

    Args:
        value: (B, L, n), (B x L, n), or (B, n) of one vector for a line, such as a pooler's.
        mask: (B, L).
    """
    lines, length = mask.shape
    width = value.shape[-1]
    if value.dim() == 3 and value.shape[:2] == mask.shape:
        return value[mask.bool()]
    flat = value.reshape(-1, width)
    if flat.shape[0] == lines * length and value.dim() == 2:
        return flat[mask.bool().reshape(-1)]
    if flat.shape[0] == lines:
        return flat
    return flat if bool(mask.all()) else None


def _activations(expert: LoadedExpert, batches: Iterable[Batch], kind: StatisticKind, sums: Sums) -> None:
    import torch

    model = expert.model
    maps = {name: module for name, module in linear_maps(model).items() if sums.wants(name)}
    device = str(next(model.parameters()).device)
    with watching(maps, kind, sums) as watch, torch.no_grad():
        for batch in batches:
            moved = batch.to(device)
            watch.begin(moved.attention_mask)
            model(**moved.inputs())


@dataclass
class Watch:
    """What is added up each time a linear map is about to work."""

    kind: StatisticKind
    sums: Sums
    mask: Any = None
    last: tuple[Any, str] | None = None
    first: bool = True
    unclear: set[str] = field(default_factory=set)

    def begin(self, mask: Tensor) -> None:
        """A batch comes, with this mask."""
        self.first = self.mask is None
        self.mask, self.last = mask, None

    def see(self, name: str, value: Tensor) -> None:
        if self.last is not None and self.last[0] is value:
            if self.first and name not in self.sums.counts:
                self.sums.same[name] = self.last[1]
            if name in self.sums.same:
                return
        elif name in self.sums.same:
            self.unclear.add(name)
            return
        self.last = (value, name)
        inputs = real_inputs(value.detach(), self.mask)
        if inputs is None:
            self.unclear.add(name)
            return
        if inputs.untyped_storage().data_ptr() == value.untyped_storage().data_ptr():
            inputs = inputs.clone()  # what follows in the model may write to it before its product is made
        self.sums.add_inputs(name, inputs, self.kind.power)


@contextmanager
def watching(maps: dict[str, Any], kind: StatisticKind, sums: Sums) -> Iterator[Watch]:
    """Add up the inputs of linear maps while models run; each batch is announced to the watch."""
    watch = Watch(kind, sums)

    def hook_of(name: str) -> Callable[[Any, tuple[Any, ...]], None]:
        return lambda module, arguments: watch.see(name, arguments[0])

    handles = [module.register_forward_pre_hook(hook_of(name)) for name, module in maps.items()]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()
    for name in watch.unclear:
        # Tokens were mixed up before they came here, and some of them were padding.
        sums.drop(name)
    for name in list(sums.waiting):
        sums.multiply(name)
