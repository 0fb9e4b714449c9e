"""How a merged model of transformers is asked while its coefficients are learned: by tokens, choices or a classifier.

Shapes: B rows of a batch, L tokens, N attended positions, H hidden size, V vocabulary, C classes or choices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mixmerge.calibrate.attention import quick_attention
from mixmerge.calibrate.deltas import Deltas, pieces
from mixmerge.data.batches import Batch, make_batches
from mixmerge.data.rows import Row
from mixmerge.errors import Fault, MethodError

if TYPE_CHECKING:
    from torch import Tensor

_EXACT = 1e-3


@dataclass(frozen=True)
class LanguageStudent:
    """A causal language model on rows of tokens.

    Args:
        model: with a head over its vocabulary.
        batches: of each expert.
    """

    model: Any
    batches: Sequence[Sequence[Batch]]

    def see(self, expert: int, number: int, layers: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """Final states (N, H), and those of the layers."""
        batch = self.batches[expert][number].to(str(self.model.device))
        with quick_attention(self.model, batch.input_ids.shape[1]):
            out = self.model.base_model(**batch.inputs(), output_hidden_states=bool(layers), use_cache=False)
        keep = batch.attention_mask.bool()
        hidden = {layer: out.hidden_states[layer][keep] for layer in layers}
        return out.last_hidden_state[keep], hidden

    def logits(self, final: Tensor, expert: int) -> Tensor:
        """Logits (N, V) of the merged model's head."""
        return capped(self.model.config, self.model.get_output_embeddings()(final))


def capped(config: Any, logits: Tensor) -> Tensor:
    """Logits as the model gives them: some bound them after the head."""
    cap = getattr(config.get_text_config(), "final_logit_softcapping", None)
    return logits if not cap else cap * (logits / cap).tanh()


def check_language_model(model: Any) -> None:
    """Raise unless the model's logits are its head's product with its last hidden states.

    Raises:
        MethodError: it has no head over a vocabulary, an encoder of its own, or does something else with them.
    """
    import torch

    head = getattr(model, "get_output_embeddings", lambda: None)()
    name = type(model).__name__
    if head is None or model.base_model is model:
        raise MethodError(Fault("base_model", f"{name} has no head over its vocabulary"))
    if model.config.is_encoder_decoder:
        raise MethodError(Fault("base_model", f"{name} has an encoder and a decoder; learning takes one"))
    ids = torch.arange(1, 5, device=model.device)[None] % model.config.get_text_config().vocab_size
    with torch.no_grad():
        whole = model(input_ids=ids).logits.float()
        final = model.base_model(input_ids=ids).last_hidden_state
        parts = capped(model.config, head(final)).float()
    if (whole - parts).abs().max() > _EXACT * whole.abs().max():
        what = f"the logits of {name} are not its head's product with its last hidden states"
        raise MethodError(Fault("base_model", what, run="Use adamerging, which does not need this"))


def expert_head(model: Any, deltas: Deltas, name: str | None) -> Callable[[Tensor, int], Tensor]:
    """Logits (N, V) of final states (N, H) by an expert's own head, its rows streamed.

    Args:
        model: for the head's bias and what is done with logits.
        deltas: of the experts.
        name: of the head's matrix among the deltas; None if it is not merged, and so the model's own.
    """

    def logits(final: Tensor, expert: int) -> Tensor:
        import torch

        head = model.get_output_embeddings()
        with torch.no_grad():
            if name is None:
                return capped(model.config, head(final))
            found = final.new_empty(len(final), head.weight.shape[0])
            width = head.weight.shape[1]
            for start, stop in pieces(deltas, name, unit=width):
                base, delta = deltas.read(name, start, stop)
                rows = (base + delta[expert]).reshape(-1, width).to(final)
                found[:, start // width : stop // width] = final @ rows.T
            if head.bias is not None:
                found += head.bias
            return capped(model.config, found)

    return logits


@dataclass(frozen=True)
class Choices:
    """Rows with choices as one batch: a line for each choice.

    Args:
        batch: lines whose ``loss_mask`` marks the choice.
        counts: choices of each row.
    """

    batch: Batch
    counts: tuple[int, ...]


def choice_batches(
    rows: Sequence[Row], tokenizer: Any, *, max_tokens: int, batch_size: int
) -> tuple[Choices, ...]:
    """Rows with choices as batches of at most ``batch_size`` rows; a row with a choice that does not fit is left out.

    Raises:
        MethodError: no row has two choices that fit.
    """
    usable = [row for row in rows if len(row.choices) > 1]
    found, kept = [], []
    for row in usable:
        lines = [replace(row, answer=choice) for choice in row.choices]
        # A token more than there is room for tells a line that fits from one that is cut.
        (batch,) = make_batches(lines, tokenizer, max_tokens=max_tokens + 1, batch_size=len(lines))
        fits = int(batch.attention_mask.sum(1).max()) <= max_tokens
        if fits and len(batch.rows) == len(lines) and bool(batch.loss_mask.any(1).all()):
            kept.append(row)
    for at in range(0, len(kept), batch_size):
        group = kept[at : at + batch_size]
        lines = [replace(row, answer=choice) for row in group for choice in row.choices]
        (batch,) = make_batches(lines, tokenizer, max_tokens=max_tokens, batch_size=len(lines))
        found.append(Choices(batch, tuple(len(row.choices) for row in group)))
    if not found:
        what = f"none of {len(rows)} rows has two choices that fit in {max_tokens} tokens"
        allowed = "The entropy of a language model is that of its choices: of its next token it would reward repetition"
        raise MethodError(Fault("calibration", what, allowed, "Give rows choices, or use expert_merging"))
    return tuple(found)


def left_out(label: str, rows: Sequence[Row], found: Sequence[Choices]) -> tuple[str, ...]:
    """A note on the rows with choices that ``choice_batches`` has left out, if there are any."""
    usable = sum(len(row.choices) > 1 for row in rows)
    count = usable - sum(len(one.counts) for one in found)
    what = f"{label}: {count:,} of {usable:,} rows are left out: a choice does not fit in max_tokens, or is empty"
    return (what,) if count else ()


def choice_logits(model: Any, choices: Choices) -> Tensor:
    """(B, C): the mean log-likelihood of each choice per token; -inf where a row has fewer than C."""
    import torch

    batch = choices.batch.to(str(model.device))
    # A token is predicted by the state before it.
    wanted = batch.loss_mask[:, 1:]
    with quick_attention(model, batch.input_ids.shape[1]):
        states = model.base_model(**batch.inputs(), use_cache=False).last_hidden_state
    final = states[:, :-1][wanted]
    logits = capped(model.config, model.get_output_embeddings()(final)).float()
    tokens = batch.input_ids[:, 1:][wanted]
    chosen = torch.log_softmax(logits, -1).gather(-1, tokens[:, None])[:, 0]
    line = torch.arange(len(wanted), device=wanted.device)[:, None].expand_as(wanted)[wanted]
    sums = chosen.new_zeros(len(wanted)).index_add(0, line, chosen)
    means = sums / wanted.sum(1)
    found = means.new_full((len(choices.counts), max(choices.counts)), -torch.inf)
    row = torch.repeat_interleave(torch.tensor(choices.counts))
    column = torch.cat([torch.arange(count) for count in choices.counts])
    return found.index_put((row.to(found.device), column.to(found.device)), means)


@dataclass(frozen=True)
class ClassifierStudent:
    """A classifier whose trunk is merged; each expert brings its own head.

    Args:
        model: with any expert's head, or the base's.
        heads: of each expert, the tensors of its head by their names in the model; empty where the head is merged.
        batches: of each expert.
    """

    model: Any
    heads: Sequence[Mapping[str, Tensor]]
    batches: Sequence[Sequence[Batch]]

    def predict(self, expert: int, number: int) -> Tensor:
        """Logits (B, C)."""
        return self._run(expert, number, ()).logits  # type: ignore[no-any-return]

    def _run(self, expert: int, number: int, layers: Sequence[int]) -> Any:
        from torch.func import functional_call

        batch = self.batches[expert][number].to(str(self.model.device))
        options = {**batch.inputs(), "output_hidden_states": bool(layers)}
        with quick_attention(self.model, batch.input_ids.shape[1]):
            return functional_call(self.model, dict(self.heads[expert]), kwargs=options)

    def see(self, expert: int, number: int, layers: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """Logits (B, C), and the states of the layers at attended positions."""
        out = self._run(expert, number, layers)
        keep = self.batches[expert][number].attention_mask.bool()
        return out.logits, {layer: out.hidden_states[layer][keep] for layer in layers}

    def logits(self, final: Tensor, expert: int) -> Tensor:
        """What ``see`` gave: the expert's head is in it."""
        return final
