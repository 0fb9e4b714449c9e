"""What the tokens of a primary see of its peers' latents, and how far away.

Legend as in ``records``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from mixmerge.latent.records import NOBODY, Memory, View

_AT_ONCE = 2**24  # attention weights of one level that are in memory at a time: (B, H, T, N) is cut along T
_AGAIN = 2**20  # from so many weights on they are computed again on the way back rather than kept
_LEAST = 1e-30


@dataclass(frozen=True, eq=False)
class Ground:
    """What does not change from token to token.

    Args:
        memory: of the rows.
        term: ``(B, N)`` float32, log(K * gate) of the peer that a latent is of, -inf where the gate is 0; None: 0
            everywhere.
        scale: ``(B, 1, 1)`` float32, K * the primary's gate; None: 1.
    """

    memory: Memory
    term: Tensor | None
    scale: Tensor | None

    @classmethod
    def of(cls, memory: Memory, gates: Tensor | None) -> Ground:
        """With gates K equal ones change nothing: what counts is how much they are above or below 1/K.

        A peer whose gate is 0 is out of sight, not only far down: where nothing else is to be seen, no empty latent
        either, a softmax would make up for that.
        """
        if gates is None:
            return cls(memory, None, None)
        active = (gates > 0).sum(dim=-1, keepdim=True)
        shares = gates.float() * active  # (B, K)
        logs = shares.clamp(min=_LEAST).log().masked_fill(shares <= 0, -math.inf)
        logs = logs.gather(1, memory.peer.clamp(min=0))  # (B, N)
        return cls(memory, logs.masked_fill(memory.peer == NOBODY, 0.0), shares[:, :1, None])


class Sight:
    """Attention of the tokens that go through now.

    Args:
        ground: of the rows.
        view: of the tokens.
        null: whether every token sees an empty latent; else some may see nothing, and read 0.
    """

    def __init__(self, ground: Ground, view: View, *, null: bool) -> None:
        self.scale = ground.scale
        self._ground, self._null = ground, null
        self._seen, self._upto, self._watch = view.seen, view.upto, view.watch
        self._parts: tuple[Tensor, Tensor, Tensor | None] | None = None

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, slopes: Tensor) -> Tensor:
        """What each token reads at one level.

        Source: Mixture of Thoughts (arXiv 2509.21164), the primary's cross-attention. Ours are the mask and distance in
        bytes of a text that all tokenizers share, and the gates among the logits, without which the task teaches the
        router nothing.

        softmax over j of ``q . k_j / sqrt(s/H) - slope_h * (seen_i - ends_j) + log(K * gate_j)``, where ``ends_j`` is
        at most ``upto_i``.

        Args:
            query: ``(B, H, T, s/H)``.
            keys, values: ``(B, H, N, s/H)``.
            slopes: ``(H,)``, 0 or more, a byte.

        Returns:
            ``(B, H, T, s/H)``.
        """
        rows, heads, tokens, _ = query.shape
        count = keys.shape[2]
        if count == 0:
            return torch.zeros_like(query)
        step = max(1, min(tokens, _AT_ONCE // max(1, rows * heads * count)))
        graph = torch.is_grad_enabled() and rows * heads * tokens * count > _AGAIN
        if (
            step == tokens
        ):  # kept for all levels: a block that is computed again must find it as it was the first time
            self._part(0, tokens)
        out = []
        for low in range(0, tokens, step):
            some = query[:, :, low : low + step]
            if graph:
                read = checkpoint(
                    self._block,
                    *(some, keys, values, slopes, low),
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                read = self._block(some, keys, values, slopes, low)
            out.append(read)
        return out[0] if len(out) == 1 else torch.cat(out, dim=2)

    def _block(self, query: Tensor, keys: Tensor, values: Tensor, slopes: Tensor, low: int) -> Tensor:
        count = query.shape[2]
        allowed, distance, blind = self._part(low, count)
        bias = torch.addcmul(allowed, distance, -slopes[:, None, None])  # (B, H, t, N)
        if self._watch is not None:
            self._note(self._watch, query, keys, bias, blind, self._seen[:, low : low + count] >= 0)
        bias = bias.to(query.dtype)
        if query.shape[2] == 1 and query.device.type == "cpu" and not torch.is_grad_enabled():
            # For one token the fused kernel is several times slower here, in bfloat16 ten times.
            logits = (query @ keys.transpose(2, 3)).mul_(query.shape[-1] ** -0.5).add_(bias)
            read = logits.softmax(dim=-1) @ values
        else:
            read = scaled_dot_product_attention(query, keys, values, attn_mask=bias)
        return read if blind is None else read.masked_fill(blind, 0.0)

    def _part(self, low: int, count: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """What all levels share: log-gates with -inf for what is out of sight, bytes of distance, who sees nothing."""
        if self._parts is not None:
            return self._parts
        memory, term = self._ground.memory, self._ground.term
        seen, upto = self._seen[:, low : low + count, None], self._upto[:, low : low + count, None]
        ends = memory.ends[:, None]  # (B, 1, N)
        visible = ends <= upto  # (B, t, N)
        near = torch.zeros((), device=ends.device) if term is None else term[:, None]
        allowed = torch.where(visible, near, -math.inf)
        blind = None
        if not self._null:
            blind = allowed.isneginf().all(dim=-1, keepdim=True)
            allowed = allowed.masked_fill(
                blind, 0.0
            )  # a softmax over nothing would be NaN, also on the way back
            blind = blind[:, None]
        distance = (seen - ends).float() * memory.counts[:, None]
        parts = allowed[:, None], distance[:, None], blind  # (B, 1, t, N)
        if count == self._seen.shape[1]:
            self._parts = parts
        return parts

    def _note(
        self, watch: Tensor, query: Tensor, keys: Tensor, bias: Tensor, blind: Tensor | None, there: Tensor
    ) -> None:
        """Add where attention goes; ``there`` (B, t): not of padding, which rows have more of beside longer ones."""
        with torch.no_grad():
            logits = query.float() @ keys.float().transpose(2, 3) / math.sqrt(query.shape[-1]) + bias
            share = logits.softmax(dim=-1).mean(dim=1)  # (B, t, N)
            if blind is not None:
                share = share.masked_fill(blind[:, 0], 0.0)
                watch[:, 0] += (blind[:, 0, :, 0] & there).sum(dim=1)
            share = (share * there[:, :, None]).sum(dim=1)  # (B, N)
            column = self._ground.memory.peer.clamp(min=0)
            watch.scatter_add_(1, column, share.to(watch.dtype))
