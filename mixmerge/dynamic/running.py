"""A bank and a gate at work in a loaded model, for batches whose rows come and go.

Legend: B rows of a batch, T tokens that go through the model, E experts, h width of the model, S of what a gate keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mixmerge.bank.attach import Attached
from mixmerge.bank.features import states_of
from mixmerge.bank.folded import Folded
from mixmerge.bank.gate import Gate, Run
from mixmerge.bank.mix import How, Mix
from mixmerge.bank.records import Bank
from mixmerge.dynamic.explaining import Tally
from mixmerge.engines.decoding import Told, accepted
from mixmerge.errors import Fault, MixmergeError
from mixmerge.experts.encoding import mean_of
from mixmerge.experts.loading import kind_of

Embed = Callable[[Sequence[str]], Tensor]  # texts -> (B, f)


@dataclass(frozen=True, eq=False)
class Forced(Run):
    """A batch whose ``rows`` are weights of experts, ``(B, E)``, whatever the gate would say; mixed as ``how`` says."""

    how: How = "outputs"

    @cached_property
    def of_rows(self) -> Mix | None:
        return None if self.rows is None else Mix(self.rows, how=self.how)


class _Either(Gate):
    """The gate, but for batches whose weights are said. Of a language model, sites may see the last tokens alone."""

    kind = "either"

    def __init__(self, gate: Gate, *, causal: bool) -> None:
        super().__init__()
        self.gate, self._causal = gate, causal

    def bind(self, bank: Bank) -> None:
        self.gate.bind(bank)

    def mix(self, site: str, u: Tensor, run: Run) -> Mix | None:
        if isinstance(run, Forced) and run.rows is not None:
            return run.of_rows
        return self.gate.mix(site, u, _of_last_tokens(run, u) if self._causal else run)


def _of_last_tokens(run: Run, u: Tensor) -> Run:
    """What is known of the tokens that a site sees: a head is shown the last ones alone where no others are scored."""
    hidden = run.hidden
    if hidden is None or u.dim() != 3 or u.shape[1] >= hidden.shape[1]:
        return run
    count = u.shape[1]
    return Run(run.rows, hidden[:, -count:], None if run.mask is None else run.mask[:, -count:])


class Running:
    """A model that is the mixture for those who ask, and its base for all others.

    Args:
        model: of transformers, in evaluation mode; hooks are put on it.
        tokenizer: its tokenizer.
        bank: of its tensors.
        gate: of the bank; moved to the model's device.
        embed: texts to features, for a gate of texts.
        name: for messages.

    Raises:
        MixmergeError: the bank is of another model; a gate of texts without ``embed``.
    """

    def __init__(
        self, model: Any, tokenizer: Any, bank: Bank, gate: Gate, *, embed: Embed | None = None, name: str
    ) -> None:
        if gate.features == "text" and embed is None:
            what = f"its gate {gate.kind} reads features of texts, and nothing makes them"
            raise MixmergeError(Fault(name, what, run="Name a text encoder (encoder), or pass embed"))
        self.model, self.tokenizer, self.name = model, tokenizer, name
        device = next(model.parameters()).device
        self.gate = gate.to(device).eval().requires_grad_(False)
        causal = kind_of(type(model).__name__) == "causal"
        self.attached = Attached(model, bank, _Either(self.gate, causal=causal))
        self._embed = embed

    @property
    def experts(self) -> tuple[str, ...]:
        return self.attached.bank.experts

    @property
    def how(self) -> How:
        """How weights that are said mix: as those of the gate where they are constants, which others stand for."""
        own = self.gate.fixed()
        return "outputs" if own is None else own[1]

    def folding(self, weights: Tensor | None = None) -> Folded | None:
        """A mixture of all rows for layers to hold, if there is one and they can hold all of it.

        Args:
            weights: ``(E,)``, in place of the gate; None: the gate's own, where they are constants.
        """
        own = self.gate.fixed()
        told = weights if weights is not None or own is None else own[0]
        if told is None:
            return None
        made = self.attached.folding(told, self.how)
        return made if made.exact else None

    def rows(
        self, told: Sequence[Told], weights: Tensor | None = None, *, folded: Folded | None = None
    ) -> GatedRows:
        """What answers the rows of a batch.

        Args:
            told: of the rows.
            weights: ``(B, E)``: of the experts for each row; None: the gate decides.
            folded: of ``folding``: layers hold this mixture while the rows are answered.
        """
        return GatedRows(self, told, weights, folded)

    def hidden(self, given: Mapping[str, Any], cache: Any = None) -> Tensor:
        """``(B, T, h)``: the base's last hidden states of tokens; those of all layers if its gate reads them.

        Args:
            given: arguments of the model; its own cache is not used.
            cache: keys and values of the base; new ones are added.
        """
        trunk = self.model.base_model
        layers = self.gate.features == "layers"
        changed = {**given, "past_key_values": cache, "use_cache": cache is not None}
        takes = accepted(trunk)
        with self.attached.running(None):
            kept = {name: value for name, value in changed.items() if name in takes}
            out = trunk(**kept, output_hidden_states=layers)
        return states_of(out, layers)

    def features(self, texts: Sequence[str]) -> Tensor:
        """``(B, f)`` of texts, for a gate of texts."""
        if self._embed is None:
            raise MixmergeError(Fault(self.name, "has nothing that makes features of texts"))
        return self._embed(texts).to(next(self.model.parameters()).device)


class GatedRows:
    """Rows of a batch under a gate, or under weights that are said; a ``decoding.Beside``.

    A gate of prompts reads them once, before their first token; one that wants the base's hidden states of every token
    has a second cache of keys and values, that of the base.
    """

    def __init__(
        self, running: Running, told: Sequence[Told], weights: Tensor | None, folded: Folded | None
    ) -> None:
        self._running, self._told, self._forced = running, told, weights is not None
        self._folded = folded
        device = next(running.model.parameters()).device
        self._rows = None if weights is None else weights.to(device)
        self._cache: Any = None
        self._begun = False
        self._left = list(range(len(told)))
        self._tally = Tally(running.attached.bank, len(told)) if any(row.explain for row in told) else None

    @contextmanager
    def running(self, given: Mapping[str, Any]) -> Iterator[None]:
        attached = self._running.attached
        if self._folded is not None:
            with attached.within(self._folded):
                yield
            if self._tally is not None:
                tokens = given["input_ids"].shape[1]
                self._tally.add(self._constant(), self._left, _padding(given), tokens=tokens)
            return
        run = self._run(given)
        with attached.running(run):
            if self._tally is None:
                yield
                return
            with attached.logged() as log:
                yield
        tokens = given["input_ids"].shape[1]
        self._tally.add(log, self._left, run.mask, tokens=tokens)

    def logits(self, given: Mapping[str, Any], logits: Tensor) -> Tensor:
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        self._left = [self._left[at] for at in rows]
        if self._rows is None and self._cache is None:
            return
        kept = torch.tensor(rows, device=next(self._running.model.parameters()).device)
        if self._rows is not None:
            self._rows = self._rows[kept]
        if self._cache is not None:
            self._cache.reorder_cache(kept)

    def weights(self, row: int) -> Mapping[str, Any] | None:
        if self._tally is None or not self._told[row].explain:
            return None
        return self._tally.explanation(row).as_dict()

    def _constant(self) -> list[tuple[str, Mix]]:
        """What every site would be told, were it asked."""
        if self._folded is None:
            return []
        bank, mix = self._running.attached.bank, Mix(self._folded.weights.expand(len(self._left), -1))
        return [(name, mix) for name in (*bank.sites, *bank.vectors)]

    def _run(self, given: Mapping[str, Any]) -> Run:
        mask = _padding(given)
        if self._forced:
            return Forced(self._rows, None, mask, self._running.how)
        gate, hidden = self._running.gate, None
        reads = gate.features in ("hidden", "layers") and not self._begun
        if gate.second_pass or reads:
            hidden = self._running.hidden(given, self._base_cache(given))
        if not self._begun and gate.features:
            found = self._features(hidden, mask)
            with torch.no_grad():
                self._rows = gate.query(found)
        self._begun = True
        return Run(self._rows, hidden if gate.second_pass else None, mask)

    def _base_cache(self, given: Mapping[str, Any]) -> Any:
        """Of the base, if the model keeps one of its own and more tokens are to come."""
        if not (self._running.gate.second_pass and given.get("use_cache")):
            return None
        if self._cache is None:
            from transformers import DynamicCache

            self._cache = DynamicCache(config=self._running.model.config)
        return self._cache

    def _features(self, hidden: Tensor | None, mask: Tensor | None) -> Tensor:
        """``(B, f)`` of the rows' prompts."""
        if hidden is None:
            return self._running.features([row.text for row in self._told])
        lengths = torch.tensor([len(row.prompt) for row in self._told], device=hidden.device)
        there = hidden.new_ones(hidden.shape[:2], dtype=torch.bool) if mask is None else mask
        of_prompt = there & (there.cumsum(-1) <= lengths[:, None])  # (B, T)
        return mean_of(hidden, of_prompt)


def _padding(given: Mapping[str, Any]) -> Tensor | None:
    """``(B, T)``: which of the tokens are none; None if all are."""
    mask = given.get("attention_mask")
    if mask is None:
        return None
    now: Tensor = mask[:, -given["input_ids"].shape[1] :].bool()
    return None if bool(now.all()) else now
