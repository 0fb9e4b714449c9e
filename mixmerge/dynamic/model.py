"""``DynamicModel``: a base, a bank of experts' changes and a gate as one model.

Legend: B rows, T tokens, E experts, V entries of a vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from mixmerge.bank.gate import Gate, RowGate
from mixmerge.bank.mix import How
from mixmerge.bank.records import Bank
from mixmerge.dynamic.explaining import Explanation, Tally
from mixmerge.dynamic.exporting import Form
from mixmerge.dynamic.folders import Parts, parts_of
from mixmerge.dynamic.loading import running
from mixmerge.dynamic.running import Embed, Running
from mixmerge.dynamic.texts import check_texts, tokens_of
from mixmerge.dynamic.weights import Weights, weights_of_rows
from mixmerge.engines.decoding import Told, accepted, left_padded, positions
from mixmerge.engines.records import Request, Scoring
from mixmerge.errors import Fault, MixmergeError
from mixmerge.experts.loading import check_tokenizer, kind_of, load_expert, load_with_head

_ROWS = 32  # texts of a batch that are explained


class DynamicModel:
    """A network whose weights depend on the input: ``base + sum_e w_e(input) * expert_e``.

    What a row gives depends on nothing but that row: not on its batch-mates, its padding or its place.

    Args:
        model: the base, a model of transformers in evaluation mode; hooks are put on it, its weights stay.
        tokenizer: its tokenizer; None where only tokens are given.
        bank: the experts' changes.
        gate: weighs them; None: ``weights`` are said each time, and without them it is the base.
        embed: texts to features ``(B, f)``, for a gate of texts.
        parts: the folders it came from; needed by ``export``.

    Raises:
        MixmergeError: the bank is of another model.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        bank: Bank,
        gate: Gate | None = None,
        *,
        embed: Embed | None = None,
        parts: Parts | None = None,
    ) -> None:
        name = type(model).__name__ if parts is None else str(parts.folder)
        made = RowGate() if gate is None else gate
        self._set(Running(model, tokenizer, bank, made, embed=embed, name=name), parts)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        device: str = "cpu",
        dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32",
        head: str | None = None,
        base: str | Path | None = None,
        encoder: str | Path | None = None,
        embed: Embed | None = None,
    ) -> Self:
        """Load a network.

        Args:
            folder: a model folder with ``bank/`` (a twin merge), or what ``mixmerge fit`` made of a mixture.
            device: a torch device.
            dtype: of the weights in memory, those of the bank too; ``auto``: as the base is stored.
            head: of the folder's ``heads/``: the expert whose classifier is used.
            base: where the base is, if it is not where the folder says; its fingerprint is checked.
            encoder: text encoder of a gate of texts, a folder or hub id.
            embed: the same as a function of texts.

        Raises:
            MixmergeError: no such dtype; there is no bank; it is damaged or of another base; its gate is gone, or of
                another bank.
        """
        parts = parts_of(folder, base=base)
        if head is None:
            expert = load_expert(parts.base, device=device, dtype=dtype)
        else:
            expert = load_with_head(parts.base, head, device=device, dtype=dtype)
        return cls.around(parts, expert.model, expert.tokenizer, embed=embed, encoder=encoder)

    @classmethod
    def around(
        cls,
        parts: Parts,
        model: Any,
        tokenizer: Any,
        *,
        embed: Embed | None = None,
        encoder: str | Path | None = None,
    ) -> Self:
        """The network of a folder around its base that is loaded already, with whatever head.

        Raises:
            MixmergeError: as ``load``.
        """
        made = cls.__new__(cls)
        told = None if encoder is None else str(encoder)
        made._set(running(parts, model, tokenizer, embed=embed, encoder=told), parts)
        return made

    def _set(self, running: Running, parts: Parts | None) -> None:
        self._running, self._parts = running, parts

    @property
    def experts(self) -> tuple[str, ...]:
        """Names, in the order of all weights."""
        return self._running.experts

    @property
    def model(self) -> Any:
        """The base, a model of transformers."""
        return self._running.model

    @property
    def tokenizer(self) -> Any:
        return self._running.tokenizer

    @property
    def bank(self) -> Bank:
        return self._running.attached.bank

    @property
    def gate(self) -> Gate:
        return self._running.gate

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        weights: Weights | None = None,
        token_type_ids: Tensor | None = None,
        prompt: Sequence[int] | None = None,
        texts: Sequence[str] | None = None,
    ) -> Tensor:
        """Logits: ``(B, T, V)`` of a language model, ``(B, C)`` of a classifier.

        Args:
            input_ids: ``(B, T)``.
            attention_mask: ``(B, T)``, 1 for tokens that are no padding, on whichever side that is.
            weights: of the experts, in place of the gate: one mixture, or one for each row (``weights_of_rows``). They
                mix as the gate does where it is a constant (``gate.fixed``), else as ``outputs``.
            token_type_ids: ``(B, T)``, of encoders that tell two texts apart.
            prompt: how many tokens of each row are its prompt, which a gate of prompts reads; None: all.
            texts: the prompts, for a gate of texts; None: what the tokens say.

        Raises:
            MixmergeError: weights of other experts or another shape.
        """
        rows = self._told(input_ids, attention_mask, prompt, texts)
        beside = self._running.rows(rows, self._weights(weights, len(rows)))
        given = self._given(input_ids, attention_mask, token_type_ids)
        with beside.running(given):
            logits: Tensor = self.model(**given).logits
        return logits

    __call__ = forward

    def generate(
        self,
        prompts: Sequence[str],
        *,
        weights: Weights | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: tuple[str, ...] = (),
        seed: int = 0,
        batch_tokens: int = 8192,
    ) -> list[str]:
        """How the texts go on, in their order. What a prompt gets depends on no other of them.

        Args:
            prompts: texts that are continued as they are.
            weights: of the experts, in place of the gate: one mixture, or one for each prompt.
            max_new_tokens, temperature, top_p, stop, seed: as in ``engines.records.Request``.
            batch_tokens: of a batch, prompts and what may be generated.

        Raises:
            MixmergeError: a setting out of range, a prompt that does not fit, weights of other experts; it is no
                language model.
        """
        check_texts({"prompts": prompts})
        names, mixtures = self._mixtures(weights, len(prompts))
        requests = [
            Request(str(at), prompt, max_new_tokens, temperature, top_p, stop, seed=seed, adapter=name)
            for at, (prompt, name) in enumerate(zip(prompts, names, strict=True))
        ]
        given = self._engine(mixtures, batch_tokens).generate(requests)
        return [one.text for one in given]

    def score(
        self,
        prompts: Sequence[str],
        continuations: Sequence[str],
        *,
        weights: Weights | None = None,
        batch_tokens: int = 8192,
    ) -> list[float]:
        """Natural logarithms of the probabilities of continuations after their prompts, in their order.

        Args:
            prompts, continuations: of the same number.
            weights: as in ``generate``.
            batch_tokens: of a batch.

        Raises:
            MixmergeError: as ``generate``.
        """
        check_texts({"prompts": prompts, "continuations": continuations})
        names, mixtures = self._mixtures(weights, len(prompts))
        scorings = [
            Scoring(str(at), prompt, continuation, name)
            for at, (prompt, continuation, name) in enumerate(zip(prompts, continuations, names, strict=True))
        ]
        return [one.total for one in self._engine(mixtures, batch_tokens).loglikelihood(scorings)]

    def explain(self, texts: Sequence[str], *, weights: Weights | None = None) -> list[Explanation]:
        """How much of each expert texts get as they are read: the means over their tokens, site by site.

        Args:
            texts: prompts.
            weights: as in ``generate``.

        Raises:
            MixmergeError: there is no tokenizer; weights of other experts; texts without tokens, or too long.
        """
        check_tokenizer(self.tokenizer, self._running.name)
        check_texts({"texts": texts})
        whole = self._weights(weights, len(texts))
        read = tokens_of(texts, self.tokenizer, self.model.config)
        found: list[Explanation] = []
        for start in range(0, len(texts), _ROWS):
            some, tokens = list(texts[start : start + _ROWS]), read[start : start + _ROWS]
            ids, mask = left_padded(tokens, pad=self._pad, device=self.model.device)
            if kind_of(type(self.model).__name__) == "classifier":  # encoders count positions from the left
                ids, mask = _right_padded(ids, mask)
            told = [Told(None, one, text) for one, text in zip(tokens, some, strict=True)]
            part = None if whole is None else whole[start : start + _ROWS]
            found += self._explained(ids, mask, told, part)
        return found

    def export(
        self,
        weights: Weights | None,
        out: str | Path,
        *,
        form: Form = "checkpoint",
        how: How | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write a fixed mixture as an ordinary model folder or a PEFT adapter.

        Args:
            weights: of the experts, by name or ``(E,)``; None: those of the gate, where they do not depend on the
                input.
            out: the folder to make.
            form: ``checkpoint``: the base with the changes in it; ``adapter``: the factors side by side, exact too;
                ``vllm``: an adapter that vLLM can serve, or a refusal by name.
            how: as in ``bank.mix.Mix``; by default as in ``generate``: as the gate mixes where it is a constant, else
                ``outputs``.
            overwrite: replace the folder.

        Raises:
            MixmergeError: no such form or way to mix; weights of other experts; none, and a gate that weighs by the
                input; the folder exists; the mixture has no such form.
        """
        from mixmerge.dynamic.exporting import check_form, export, own_mixture

        check_form(form, how)
        if self._parts is None:
            raise MixmergeError(Fault("export", "the network came from no folder", run="Load it from one"))
        own = self._running.how
        if weights is None:
            weights, own = own_mixture(self._parts)
        told = weights_of_rows(weights, self.experts, 1)[0]
        export(self._parts, told, Path(out), form=form, how=how or own, overwrite=overwrite)

    def detach(self) -> None:
        """Take the hooks off: the model is its base again."""
        self._running.attached.detach()

    # --- parts

    def _explained(
        self, ids: Tensor, mask: Tensor, told: Sequence[Told], weights: Tensor | None
    ) -> list[Explanation]:
        beside, tally = self._running.rows(told, weights), Tally(self.bank, len(told))
        given, attached = self._given(ids, mask, None), self._running.attached
        with torch.inference_mode(), attached.logged() as log, beside.running(given):
            self.model(**given)
        tally.add(log, range(len(told)), mask.bool(), tokens=ids.shape[1])
        return [tally.explanation(row) for row in range(len(told))]

    @property
    def _pad(self) -> int:
        found = self.tokenizer.pad_token_id
        return 0 if found is None else int(found)

    def _told(
        self,
        ids: Tensor,
        mask: Tensor | None,
        prompt: Sequence[int] | None,
        texts: Sequence[str] | None,
    ) -> list[Told]:
        there = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        rows = [row[kept].tolist() for row, kept in zip(ids, there, strict=True)]
        if prompt is not None:
            rows = [row[:count] for row, count in zip(rows, prompt, strict=True)]
        if texts is None and self.gate.features == "text":
            check_tokenizer(self.tokenizer, self._running.name)
            texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        return [Told(None, row, "" if texts is None else texts[at]) for at, row in enumerate(rows)]

    def _given(self, ids: Tensor, mask: Tensor | None, types: Tensor | None) -> dict[str, Any]:
        """Arguments of the model; places are counted from each row's first token where the model is told of them."""
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        takes = accepted(self.model)
        if "past_key_values" in takes:
            given["use_cache"] = False
            if mask is not None:
                given["position_ids"] = positions(mask)
        return {name: value for name, value in given.items() if name in takes and value is not None}

    def _weights(self, weights: Weights | None, rows: int) -> Tensor | None:
        return None if weights is None else weights_of_rows(weights, self.experts, rows)

    def _mixtures(self, weights: Weights | None, rows: int) -> tuple[list[str | None], dict[str, Tensor]]:
        """A name for the weights of each row, and what they are."""
        if weights is None:
            return [None] * rows, {}
        whole = weights_of_rows(weights, self.experts, rows)
        names: list[str | None] = [f"row {at}" for at in range(rows)]
        return names, {f"row {at}": whole[at] for at in range(rows)}

    def _engine(self, mixtures: dict[str, Tensor], batch_tokens: int) -> Any:
        from mixmerge.dynamic.engine import DynamicEngine

        check_tokenizer(self.tokenizer, self._running.name)
        if kind_of(type(self.model).__name__) != "causal":
            what = f"is a {type(self.model).__name__}, which does not continue texts"
            raise MixmergeError(Fault(self._running.name, what, "A causal language model"))
        return DynamicEngine.over(self._running, mixtures, batch_tokens=batch_tokens)


def _right_padded(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that start where the batch starts."""
    order = mask.argsort(dim=-1, descending=True, stable=True)
    return ids.gather(1, order), mask.gather(1, order)
