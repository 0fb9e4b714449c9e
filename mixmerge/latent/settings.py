"""How the glue is routed and trained, as a mixture's YAML says it. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mixmerge.document.sections import Strict

HASHED = "hashed"
ELSEWHERE = "elsewhere"  # where a fitted glue's text encoder is: the mixture's YAML says it


class RouteOptions(Strict):
    """Who is active for a prompt, and who of them answers.

    Args:
        kind: ``learned``: a small network scores the experts; ``fixed``: all of them are active, always.
        k: active experts, the primary among them; 1 or more. Of a fixed routing all are.
        primary: who answers, always; None: the best of the active ones. A fixed routing needs one.
        encoder: of the prompt's text: ``hashed`` (pieces of words by their hash, nothing to download), or the folder or
            hub id of a text encoder, which stays as it is.
        features: of ``hashed``, 16 or more.
        hidden: widths of the scoring network's inner layers.
        noise: of the Gumbel noise on the scores while it learns, 0 or more; none when it answers.
        temperature: of the soft choice that the gradient sees, above 0.
    """

    kind: Literal["learned", "fixed"] = "learned"
    k: int = Field(default=3, ge=1)
    primary: str | None = Field(default=None, min_length=1)
    encoder: str = Field(default=HASHED, min_length=1)
    features: int = Field(default=4096, ge=16)
    hidden: list[int] = Field(default=[256, 256], max_length=8)
    noise: float = Field(default=1.0, ge=0)
    temperature: float = Field(default=1.0, gt=0)


class LossWeights(Strict):
    """``loss = lm * LM + keep * KL - entropy * H(softmax s) + balance * M sum_m f_m p_m + consistency * symKL``.

    Args:
        lm: of the primary's cross-entropy on the answers, 0 or more.
        keep: of the divergence of what it says of the rows to keep from what it says of them alone, 0 or more.
        entropy: above 0 it rewards a routing that is undecided, below 0 one that is decided.
        balance: above 0 it rewards that all experts are used alike.
        consistency: above 0 it rewards that the primary says the same under another choice of peers; it takes a second
            pass of the primary. 0 or more.
    """

    lm: float = Field(default=1.0, ge=0)
    keep: float = Field(default=1.0, ge=0)
    entropy: float = 0.01
    balance: float = 0.01
    consistency: float = Field(default=0.05, ge=0)


class TrainOptions(Strict):
    """How the glue learns.

    Args:
        steps: of the optimiser.
        batch_size: rows of a step.
        keep_batch_size: rows to keep that a step takes beside them; None: half as many, at least one.
        rows_at_once: rows of one primary, whoever they read, that go through it together; gradients add up.
        learning_rate: of AdamW, at its highest; it rises over the warm-up and falls along half a cosine to 0.
        weight_decay: of AdamW.
        warm_up: share of the steps, 0 to 1.
        clip: the gradient's norm is at most this.
        weights: of the terms of the loss.
        holdout: share of the rows that are not learned from but judge; chosen by their digests. 0: none.
        evaluate_every: steps between two looks at these rows; None: a twentieth of all steps.
        patience: looks without a better one before it ends early; None: never.
        checkpointing: the frozen primary's layers are computed again on the way back, not kept: less memory, more time.
        precision: of the experts' weights while the glue learns; its own are float32.
        save_steps, save_seconds: what a killed fit goes on from is written as often as either says.
        latents_gb: disk for the peers' latents; what does not fit is computed again.
    """

    steps: int = Field(default=1000, ge=1)
    batch_size: int = Field(default=16, ge=1)
    keep_batch_size: int | None = Field(default=None, ge=1)
    rows_at_once: int = Field(default=8, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warm_up: float = Field(default=0.05, ge=0, le=1)
    clip: float = Field(default=1.0, gt=0)
    weights: LossWeights = LossWeights()
    holdout: float = Field(default=0.1, ge=0, lt=1)
    evaluate_every: int | None = Field(default=None, ge=1)
    patience: int | None = Field(default=None, ge=1)
    checkpointing: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"
    save_steps: int = Field(default=100, ge=1)
    save_seconds: float = Field(default=60.0, gt=0)
    latents_gb: float = Field(default=20.0, gt=0)

    @property
    def looks_every(self) -> int:
        """Steps between two looks at the rows that are held out."""
        return self.evaluate_every or max(1, self.steps // 20)

    @property
    def kept_rows(self) -> int:
        """Rows to keep that a step takes, where there are any."""
        return self.keep_batch_size or max(1, self.batch_size // 2)
