"""What compositions can be told: strict frozen models, one for each kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mixmerge.aggregate.extraction import extractor
from mixmerge.errors import Fault, MixmergeError
from mixmerge.registry import choices

M = TypeVar("M", bound=BaseModel)
SAMPLING = 0.7  # temperature where an expert is asked for several answers


class Options(BaseModel):
    """One field for each key, of exactly its type; lists stand for tuples."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Voting(Options):
    """How answers are counted.

    Args:
        extract: what an answer says: ``number``, ``choice``, ``exact``, ``json:PATH``, ``whole``, ``first_line``, or
            the name of a plug-in. Answers that say nothing of the kind do not vote.
    """

    extract: str = "exact"

    @field_validator("extract")
    @classmethod
    def _known(cls, name: str) -> str:
        try:
            extractor(name)
        except MixmergeError as error:
            raise ValueError(str(error)) from error
        return name


class AnswerOptions(Options):
    """Options of ``answer``: none."""


class VoteOptions(Voting):
    """Options of ``vote``.

    Args:
        extract: as of every vote.
        weights: ``picks``: an answer counts what its pick does; ``equal``: 1.
        confidence: times the geometric mean of the probabilities of the answer's tokens. Experts differ in how sure
            they sound, so this is meant for experts of one kind.
        temperature: of the answers, 0 or more; None: the mixture's.
    """

    weights: Literal["picks", "equal"] = "picks"
    confidence: bool = False
    temperature: float | None = Field(default=None, ge=0)


class BestOptions(Options):
    """Options of ``best``.

    Args:
        score: of an answer: ``mean`` or ``sum`` of the log-probabilities of its tokens. The sum prefers short answers.
        temperature: of the answers, 0 or more; None: the mixture's.
    """

    score: Literal["mean", "sum"] = "mean"
    temperature: float | None = Field(default=None, ge=0)


class SelfConsistencyOptions(Voting):
    """Options of ``self_consistency``.

    Args:
        extract: as of every vote.
        samples: 2 to 1000.
        temperature: of the samples, above 0: without chance all are the same.
        expert: whose samples; None: the primary's.
    """

    samples: int = Field(default=10, ge=2, le=1000)
    temperature: float = Field(default=SAMPLING, gt=0)
    expert: str | None = Field(default=None, min_length=1)


class AggregateOptions(Options):
    """Options of ``aggregate``.

    Args:
        aggregator: who makes one answer of the others; None: the primary.
        temperature: of the answers, 0 or more; None: the mixture's.
        aggregator_temperature: of the last answer; as that.
    """

    aggregator: str | None = Field(default=None, min_length=1)
    temperature: float | None = Field(default=None, ge=0)
    aggregator_temperature: float | None = Field(default=None, ge=0)


class MoaOptions(AggregateOptions):
    """Options of ``moa``.

    Args:
        layers: 2 or more, the last of which is the aggregator.
        proposers: who answers in every layer before; None: the picks.
        aggregator, aggregator_temperature: of the last layer, as of ``aggregate``.
        temperature: of the layers before, 0 or more; None: the mixture's.
    """

    layers: int = Field(default=2, ge=2, le=20)
    proposers: tuple[str, ...] | None = Field(default=None, min_length=1, strict=False)
    temperature: float | None = Field(default=SAMPLING, ge=0)

    @field_validator("proposers")
    @classmethod
    def _once(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if names is not None and len(set(names)) < len(names):
            raise ValueError("names an expert twice")
        return names


class SelfMoaOptions(AggregateOptions):
    """Options of ``self_moa``.

    Args:
        samples: of one expert, 2 to 1000; the default is ours.
        expert: whose; None: the primary's.
        aggregator: None: the same expert.
        temperature: of the samples, above 0.
        aggregator_temperature: of the last answer, 0 or more; None: the mixture's.
    """

    samples: int = Field(default=6, ge=2, le=1000)
    expert: str | None = Field(default=None, min_length=1)
    temperature: float = Field(default=SAMPLING, gt=0)


class SelfMoaSeqOptions(SelfMoaOptions):
    """Options of ``self_moa_seq``: those of ``self_moa``, and the window.

    Args:
        window: answers that the aggregator sees at once, 2 or more. 6 is the paper's as remembered, not verified.
        reserved: how many of them are the current synthesis, over and over; 1 to ``window - 1``. The default is ours.
    """

    samples: int = Field(default=12, ge=2, le=1000)
    window: int = Field(default=6, ge=2)
    reserved: int = Field(default=3, ge=1)

    @model_validator(mode="after")
    def _room(self) -> Self:
        if self.reserved >= self.window:
            raise ValueError(f"reserved is {self.reserved}: it leaves no room in a window of {self.window}")
        return self


class CascadeOptions(Voting):
    """Options of ``cascade``.

    Args:
        experts: in the order of escalation, each once; not to be given where a fitted escalation is.
        thresholds: one for each expert but the last: its answer stands if its confidence is this or more.
        confidence: ``logprobs``: geometric mean of the probabilities of the answer's tokens; ``agreement``: the
            share of samples that say the same; ``verification``: the share of the expert's own verdicts on its answer
            that call it correct. All are 0 to 1, and fitted thresholds hold for the kind they were fitted on.
        samples: answers for ``agreement``, verdicts for ``verification``: 2 to 1000.
        temperature: of those, above 0.
        extract: what samples agree on, as of every vote.
    """

    experts: tuple[str, ...] | None = Field(default=None, min_length=1, strict=False)
    thresholds: tuple[float, ...] | None = Field(default=None, strict=False)
    confidence: Literal["logprobs", "agreement", "verification"] = "logprobs"
    samples: int = Field(default=8, ge=2, le=1000)
    temperature: float = Field(default=SAMPLING, gt=0)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        names, levels = self.experts, self.thresholds
        if names is not None and len(set(names)) < len(names):
            raise ValueError("experts names one twice")
        if levels is not None and names is None:
            raise ValueError("thresholds need the experts that they are for")
        if names is not None and len(levels or ()) != len(names) - 1:
            raise ValueError(
                f"thresholds are {len(levels or ())}: one for each of {len(names)} experts but the last"
            )
        return self


def read_options(model: type[M], given: Mapping[str, Any], *, where: str = "compose") -> M:
    """The options that a mapping says.

    Raises:
        MixmergeError: everything that is wrong: keys that do not exist, values that are not as they should be.
    """
    try:
        return model.model_validate(dict(given))
    except ValidationError as error:
        raise MixmergeError([_fault(one, model, where) for one in error.errors()]) from error


def _fault(error: Any, model: type[BaseModel], where: str) -> Fault:
    at = ".".join([where, *map(str, error["loc"])])
    if error["type"] == "extra_forbidden":
        known = list(model.model_fields)
        return Fault(
            at, "there is no such option", choices(str(error["loc"][-1]), known) if known else "It has none"
        )
    what = error["msg"].removeprefix("Value error, ")
    return Fault(
        at, what if error["type"] == "value_error" else f"is {error['input']!r}: {what[0].lower()}{what[1:]}"
    )
