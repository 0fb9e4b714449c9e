"""The block ``gate:`` of a recipe with a bank: how the router that weighs the experts for an input is trained."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from mixmerge.document import Node, Report, show
from mixmerge.document.sections import Strict, read_section

NONE = "none"


class TaskBlock(Strict):
    """A second training of the gate, by the loss of the experts' own tasks: weights by layer, not bound to sum to 1.

    Args:
        scope: which tensors share weights: those of a ``layer``, or those of one module, ``site``.
        hidden: width of the network that is trained.
        ranks: learn a factor for every rank of the bank too, the same for all inputs.
        epochs: passes over the rows, at most; the best one on the rows held out is kept.
        batch: rows in a step.
        learning_rate: of AdamW at its highest: it rises for the first 6 % of the steps and falls to 0.
        rank_rate: the same, of the factors of ranks.
        weight_decay: of the network.
        label_smoothing: share of a label given to all classes, or tokens, alike.
        patience: epochs without a better loss on the rows held out, after which it ends.
        dtype: of shared model and factors in this training.
    """

    scope: Literal["layer", "site"] = "layer"
    hidden: int = Field(default=128, ge=1, le=65_536)
    ranks: bool = True
    epochs: int = Field(default=3, ge=1, le=100_000)
    batch: int = Field(default=32, ge=1, le=1_000_000)
    learning_rate: float = Field(default=1e-3, gt=0)
    rank_rate: float = Field(default=2e-2, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    patience: int = Field(default=1, ge=1)
    dtype: Literal["float32", "bfloat16"] = "float32"


class GateBlock(Strict):
    """A small network from features of a prompt to weights of the experts, and its training. Defaults: Twin-Merging's.

    Args:
        features: ``hidden``: mean over the prompt's tokens of the shared model's last hidden states; ``layers``: of
            all its layers; ``text``: those of
            a text encoder.
        encoder: of ``text``: a folder or hub id.
        per_token: every token has its own weights, by its hidden state of a pass without the bank.
        hidden: layers between features and weights, 0 to 8.
        width: of such a layer, as a multiple of the features' number.
        norm: of such a layer. What is learned depends on the batches of ``batch``; what comes out later never does.
        dropout: share of a layer's outputs that are dropped in training.
        epochs: passes over the rows; the best one on the rows held out is kept.
        batch: rows in a step; the paper has 1024 and 256.
        learning_rate, weight_decay: of AdamW.
        label_smoothing: share of a row's label given to all experts alike.
        holdout: share of the calibration rows not trained on: they choose the epoch and the temperature.
        temperature: ``held_out``: what makes the held-out rows likeliest; ``one``: 1, as published.
        top_k: experts that an input gets anything of, the likeliest; None: all.
        task: a second training, by the loss of the experts' tasks; None: none, as published.
    """

    features: Literal["hidden", "layers", "text"] = "hidden"
    encoder: str | None = None
    per_token: bool = False
    hidden: int = Field(default=2, ge=0, le=8)
    width: float = Field(default=2.0, gt=0, le=64)
    norm: Literal["batch", "layer", "none"] = "batch"
    dropout: float = Field(default=0.5, ge=0, lt=1)
    epochs: int = Field(default=50, ge=1, le=100_000)
    batch: int = Field(default=256, ge=2, le=1_000_000)
    learning_rate: float = Field(default=5e-4, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    holdout: float = Field(default=0.2, gt=0, lt=1)
    temperature: Literal["held_out", "one"] = "held_out"
    top_k: int | None = Field(default=None, ge=1)
    task: TaskBlock | None = None

    def canonical(self) -> dict[str, Any]:
        """Plain data, every value spelled out but those that are not set."""
        return self.model_dump(exclude_none=True)


def read_gate(node: Node | None, report: Report) -> GateBlock | None:
    """The block; with nothing written all is as published, and ``none`` is no gate at all.

    Args:
        node: of the key ``gate``, if it is there.
        report: gets every fault.
    """
    if node is None or node.value is None:
        return GateBlock()
    if node.value == NONE:
        return None
    if not isinstance(node.value, dict):
        allowed = "A mapping, or none: then weights are given with every input"
        report.fault(node, f"expected the settings of a gate, got {show(node.value)}", allowed)
        return None
    said = node.value.get("task")
    what = "how the gate is trained by the task's loss"
    task = None if said is None or said.value is None else read_section(said, TaskBlock, report, what=what)
    block = read_section(node, GateBlock, report, what="how the gate is trained", ready={"task": task})
    if block is not None:
        _agree(node, block, report)
    return block


def _agree(node: Node, block: GateBlock, report: Report) -> None:
    inner = node.value if isinstance(node.value, dict) else {}
    if block.features == "text" and block.encoder is None:
        run = "Add encoder: PATH of a model that embeds text"
        report.fault(node, "features: text needs an encoder", run=run)
    if block.features != "text" and block.encoder is not None:
        report.fault(inner["encoder"], "is for features: text", run="Remove it, or add features: text")
    if block.features != "hidden" and block.per_token:
        what = f"features: {block.features} are of whole prompts, not of single tokens"
        report.fault(inner["per_token"], what, run="Use features: hidden, or per_token: false")
    if block.task is not None and block.per_token:
        what = "trains weights of whole prompts, and per_token asks for those of tokens"
        report.fault(inner["task"], what, run="Remove one of them")
