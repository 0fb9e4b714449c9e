"""Options of the bridges. No torch: a mixture's YAML is checked with them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class BridgeOptions(BaseModel):
    """Of every bridge of a glue.

    Args:
        width: s, of the space that experts meet in; a multiple of ``heads``.
        heads: H.
        start: what is zero before training, so that the primary is itself: the matrix that writes back, or the tanh
            gate before it. Exactly one of them: with both at zero neither would ever get a gradient.
        dropout: of what a token has read, in training; 0 to below 1.
        reach: bytes that count as one step of ALiBi's distances before training, above 0. The nearest head's attention
            falls by e^(-2^(-8/H)) in so many bytes, the farthest one's by e^(-1/256). Below 1 a token reads little but
            what stands where it stands, which is what generalises where a peer's last state has a word's meaning at its
            last letter; an answer that goes on for long is then too far from its prompt to learn to read it.
        null: give every token an empty latent to look at, so that it may read nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: int = Field(default=256, ge=1, le=65536)
    heads: int = Field(default=8, ge=1)
    start: Literal["write", "gate"] = "write"
    dropout: float = Field(default=0.0, ge=0, lt=1)
    reach: float = Field(default=8.0, gt=0)
    null: bool = True

    @model_validator(mode="after")
    def _divides(self) -> BridgeOptions:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}")
        return self
