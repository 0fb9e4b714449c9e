"""A bridge: how one expert is read at one level, and how it reads others there.

Legend as in ``records``.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import dropout, layer_norm, linear, softplus

from mixmerge.latent.options import BridgeOptions
from mixmerge.latent.sight import Sight


class Entry(nn.Module):
    """An expert's states in the shared space: a LayerNorm, and a projection from d to s."""

    def __init__(self, width: int, shared: int, draw: Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.into = _matrix(shared, width, draw)

    def forward(self, states: Tensor) -> Tensor:
        kind = states.dtype
        normed = layer_norm(states, self.weight.shape, self.weight.to(kind), self.bias.to(kind))
        return linear(normed, self.into.to(kind))


class Bridge(nn.Module):
    """Of one expert at one level. Products are in the type of the states, whatever the parameters are in.

    Source: Mixture of Thoughts (arXiv 2509.21164), figure 3, as reviews and summaries tell it; the gate is Flamingo's
    (arXiv 2204.14198), section 2.2.

    Deviations: projections of queries, keys and values are each expert's own; the primary's own states are not among
    what it reads; an empty latent is; what is written starts at exactly 0; no private layers for peers.

    Args:
        reads: width of the expert's states at its depth as a primary; None: it is never one.
        told: width of its states at its depth as a peer; None: it is never one.
        options: of the glue.
        same: both are the same depth, and share norm and projection.
        seed: of the initial values.
    """

    def __init__(
        self, reads: int | None, told: int | None, options: BridgeOptions, *, same: bool, seed: int
    ) -> None:
        super().__init__()
        draw = Generator().manual_seed(seed)
        shared, self.heads, self._dropout = options.width, options.heads, options.dropout
        self.reads = self.told = None
        if reads is not None:
            self.reads = Entry(reads, shared, draw)
            self.query = _matrix(shared, shared, draw)
            self.out = _matrix(shared, shared, draw)
            starts = options.start == "write"
            self.write = nn.Parameter(torch.zeros(reads, shared)) if starts else _matrix(reads, shared, draw)
            self.gate = nn.Parameter(torch.tensor(1.0 if starts else 0.0))
            self.slopes = nn.Parameter(_slopes(self.heads, options.reach))
            head = shared // self.heads
            self.nothing = nn.Parameter(_normal((self.heads, head), draw)) if options.null else None
        if told is not None:
            self.told = None if same and reads is not None else Entry(told, shared, draw)
            self.key = _matrix(shared, shared, draw)
            self.value = _matrix(shared, shared, draw)

    def keys(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``(B, H, N, s/H)`` of a peer's states ``(B, N, d)``."""
        entry = self.told if self.told is not None else self.reads
        shared = _known(entry)(states)
        kind = states.dtype
        key, value = linear(shared, self.key.to(kind)), linear(shared, self.value.to(kind))
        return self._split(key).contiguous(), self._split(value).contiguous()  # each token reads all of them

    def read(self, states: Tensor, keys: Tensor, values: Tensor, sight: Sight) -> Tensor:
        """What a primary's states ``(B, T, d)`` are to be added to: ``(B, T, d)``, all 0 before training.

        Args:
            states: of the tokens that go through now.
            keys, values: of the memory at this level, ``(B, H, N, s/H)``.
            sight: of these tokens.
        """
        kind = states.dtype
        query = self._split(linear(_known(self.reads)(states), self.query.to(kind)))
        slopes = softplus(self.slopes.float())
        read = sight.attend(query, keys.to(kind), values.to(kind), slopes)
        read = read.transpose(1, 2).flatten(2)  # (B, T, s)
        if self._dropout and self.training:
            read = dropout(read, self._dropout)
        written = linear(linear(read, self.out.to(kind)), self.write.to(kind))
        gate = self.gate.tanh()
        return written * (gate if sight.scale is None else gate * sight.scale).to(kind)

    def empty(self, rows: int) -> Tensor:
        """The key of the empty latent, ``(B, H, 1, s/H)``; without one ``(B, H, 0, s/H)``."""
        if self.nothing is None:
            return self.query.new_zeros(rows, self.heads, 0, self.query.shape[0] // self.heads)
        return self.nothing[None, :, None].expand(rows, -1, -1, -1)

    def _split(self, shared: Tensor) -> Tensor:
        rows, count, width = shared.shape
        return shared.view(rows, count, self.heads, width // self.heads).transpose(1, 2)


def _known(entry: Entry | None) -> Entry:
    if entry is None:
        raise RuntimeError("a bridge was used in a role that its glue did not give it")
    return entry


def _normal(shape: tuple[int, ...], draw: Generator) -> Tensor:
    return torch.randn(shape, generator=draw)


def _matrix(rows: int, columns: int, draw: Generator) -> nn.Parameter:
    return nn.Parameter(_normal((rows, columns), draw) / math.sqrt(columns))


def _slopes(heads: int, reach: float) -> Tensor:
    """What softplus makes ALiBi's slopes of, a byte: 2^(-8 (h + 1) / H) for every ``reach`` bytes.

    Source: Press et al., Train Short, Test Long (arXiv 2108.12409), section 3.
    """
    wanted = torch.exp2(-8.0 * torch.arange(1, heads + 1) / heads) / reach
    return wanted + torch.log(-torch.expm1(-wanted))  # of a large one log(e^x - 1) would overflow
