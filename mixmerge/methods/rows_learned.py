"""Rows of the methods whose coefficients are learned from calibration data; their defaults are the published ones."""

from __future__ import annotations

from mixmerge.methods.parameters import (
    flag,
    kept,
    merged_by,
    number,
    tables,
    threshold_scope,
    tolerance,
    whole,
)
from mixmerge.methods.records import ANY, Method, Parameter, Value

_MANY = 1e6


def _number(name: str, default: float, doc: str, low: float = 0.0, high: float = float("inf")) -> Parameter:
    return Parameter(name, "number", "merge", default, doc, low, high, constant=True, learning=True)


def _whole(name: str, default: int, doc: str, low: int = 0, high: float = float("inf")) -> Parameter:
    return whole(name, default, doc, low, high, constant=True, learning=True)


def _choice(name: str, default: Value, doc: str, *choices: str, listed: bool = False) -> Parameter:
    return Parameter(
        name, "choice", "merge", default, doc, choices=choices, listed=listed, constant=True, learning=True
    )


def _weight(default: float) -> Parameter:
    return number("weight", default, "coefficient before the first step", per="expert")


def _learn(default: str, rest: str = "its weight") -> Parameter:
    doc = f"which tensors are learned: all, matrices of linear maps, none; the rest keeps {rest}"
    return Parameter(
        "learn", "choice", "merge", default, doc, choices=("all", "linear", "none"), learning=True
    )


_IMPORTANCE = Parameter(
    "importance", "number", "expert", 1.0, "factor on the loss of each expert (beta)", 0.0, learning=True
)
_PRECISION = _choice(
    "precision", "float32", "of the model while it is learned", "float32", "bfloat16", "float16"
)
_CLAMP = _choice(
    "clamp",
    "project",
    "keeps coefficients in [0, 1]: after the step, as released (dead: it never comes back), or not at all",
    *("project", "dead", "none"),
)
_GRANULARITY = _choice(
    "granularity", "layer", "one coefficient per tensor and expert, or per expert", "layer", "task"
)
_ADA = (
    _GRANULARITY,
    _CLAMP,
    _learn("all"),
    _whole("steps", 500, "updates of the coefficients", 1, _MANY),
    _whole("rows", 16, "rows of each expert in a step; the released loop takes 32", 1, _MANY),
    _number("learning_rate", 1e-3, "of Adam, betas .9 and .999"),
    _PRECISION,
)
_LABELS = (
    number(
        "weight", 0.5, "coefficient before the first step; as shares, divided by their sum", 0.0, per="expert"
    ),
    _number("from_layer", 0.3, "layers that are averaged, not learned: a share below 1, or how many"),
    flag(
        "average_attention",
        True,
        "attention of the other layers is averaged, not learned",
        constant=True,
        learning=True,
    ),
    _choice("outside", "base", "what is in no layer: of the base (released), or averaged", "base", "mean"),
    _choice(
        "transform",
        "softmax",
        "over the experts of a tensor: coefficients are shares of one; or none",
        *("softmax", "none"),
    ),
    _choice(
        "clamp",
        "none",
        "keeps what is learned (under a softmax, its input) in [0, 1], as for `adamerging`",
        *("none", "project", "dead"),
    ),
    _learn("all"),
    _whole("steps", 1000, "updates of the coefficients", 1, _MANY),
    _whole("rows", 24, "rows of each expert in a step", 1, _MANY),
    _number("learning_rate", 1e-4, "of Adam, betas .9 and .999; a later configuration has 1e-3"),
    _PRECISION,
)


def _aligned(hidden: str) -> tuple[Parameter, ...]:
    """The loss of alignment, and whose hidden states it takes by default."""
    return (
        _IMPORTANCE,
        _choice(
            "hidden_layers",
            hidden,
            "whose hidden states are aligned; or layers by number from 1, as '4,8,12'",
            *("all", "last", "none"),
            listed=True,
        ),
        _choice("hidden_loss", "mean", "of squares (released), or their sum (paper)", "mean", "sum"),
        _number("hidden_weight", 1.0, "factor on the hidden loss"),
        _choice(
            "logit_loss", "kl", "of the paper, or of the released code: equal gradients", "kl", "soft_ce"
        ),
        _number("logit_weight", 1.0, "factor on the logit loss"),
        _number("temperature", 1.0, "of the logit loss", 1e-3, 1e3),
        _PRECISION,
    )


_EXPERT = (
    _learn("linear"),
    _whole("steps", 50, "updates of the coefficients; the released run has about 7", 1, _MANY),
    _whole("rows", 8, "rows of each expert in a step", 1, _MANY),
    _number("learning_rate", 0.5, "of AdamW on the coefficients' logits"),
    _number("weight_decay", 1e-5, "of AdamW"),
    _whole("period", 50, "steps between cosine warm restarts", 1, _MANY),
    _number("clip", 1.0, "greatest norm of the gradient; 0 for no limit"),
    _number("regulariser", 5.0, "times the mean distance of coefficients from their start (gamma)"),
    *_aligned("all"),
)
_CHUNKS = whole(
    "chunks",
    1,
    "coefficients of a tensor and expert, each for a slice; by filters for some",
    1,
    learning=True,
)
_PLUS = (
    _number("budget", 1.0, "chunks in all, as a multiple of the tensors; paper: .9 to 1.2", 0.0, 1e4),
    _number("kappa", 1.0, "exponent on a tensor's importance; its value is not published", 0.0, 10.0),
    _whole("least_chunks", 1, "of any tensor; 0 freezes those whose share is none", 0, 1),
)
_SPECTRUM = (
    number("weight", 1.0, "factor on each delta before they are added up", per="expert"),
    merged_by(1.0),
    tables("mean"),
    tolerance(),
    _learn("all", "factors 1"),
    _whole("steps", 150, "updates of the factors", 1, _MANY),
    _whole("rows", 8, "rows of each expert in a step", 1, _MANY),
    _number("learning_rate", 0.03, "of Adam, betas .9 and .999"),
    _number("regulariser", 0.0, "times the mean distance of factors from 1"),
    *_aligned("none"),
)
_DENSITY = kept(0.2)
_SCOPE = threshold_scope(
    "model", "where the magnitude threshold is taken: the whole delta (paper) or each tensor"
)
_ADA_PAPER = "AdaMerging, arXiv:2310.02575"
_EXPERT_PAPER = "Expert Merging, arXiv:2509.25712"


def _row(
    name: str,
    *,
    learner: str,
    parameters: tuple[Parameter, ...],
    summary: str,
    paper: str,
    footprint: str = "",
    least: int = 1,
) -> Method:
    return Method(
        name=name,
        function=f"mixmerge.methods.learned:{name}",
        takes="deltas",
        parameters=parameters,
        base="required",
        inputs=(least, ANY),
        summary=summary,
        paper=paper,
        kernel="" if name == "adamerging_plus" else "task_vectors",
        learner=learner,
        footprint=footprint and f"mixmerge.methods.footprint:{footprint}",
    )


ROWS = (
    _row(
        "adamerging",
        learner="entropy",
        parameters=(_weight(0.3), *_ADA),
        summary="coefficients learned by the entropy of predictions on unlabeled rows",
        paper=_ADA_PAPER,
    ),
    _row(
        "adamerging_plus",
        learner="entropy",
        parameters=(_weight(0.3), _DENSITY, _SCOPE, *_ADA),
        summary="AdaMerging of deltas trimmed and sign-elected as in TIES",
        paper=_ADA_PAPER,
        footprint="unknown",
    ),
    _row(
        "adamerging_labels",
        learner="labels",
        parameters=_LABELS,
        summary="shares of the experts in each tensor learned from the answers, or labels, of rows",
        paper=f"{_ADA_PAPER}, as in FusionBench's variant for Llama",
        least=2,
    ),
    _row(
        "expert_merging",
        learner="alignment",
        parameters=(_weight(0.1), *_EXPERT, _CHUNKS),
        summary="coefficients learned so that hidden states and logits follow each expert on its rows",
        paper=_EXPERT_PAPER,
    ),
    _row(
        "expert_merging_plus",
        learner="alignment",
        parameters=(_weight(0.1), *_EXPERT, *_PLUS),
        summary="Expert Merging with more coefficients, by chunks, where they matter",
        paper=_EXPERT_PAPER,
        footprint="chunked",
    ),
    Method(
        name="learned_spectrum",
        function="mixmerge.methods.spectrum:learned_spectrum",
        takes="deltas",
        parameters=_SPECTRUM,
        base="required",
        inputs=(1, ANY),
        summary="as `iso_c`, each direction of the sum with a factor learned so that logits follow each expert",
        paper="ours: Iso-C (No Task Left Behind, arXiv:2502.04959) with a factor for each direction, learned as in "
        "Expert Merging, arXiv:2509.25712",
        differentiable=False,
        roles=True,
        streams=True,
        factors=True,
        learner="spectrum",
        footprint="mixmerge.methods.footprint:iso_c",
    ),
)
