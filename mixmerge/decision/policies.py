"""Policies: from scores to who answers. Q queries, E experts, K picks a query.

``Policy`` is the rule and its numbers, strict and frozen; ``choose`` gives arrays, ``decide`` gives ``Decision``s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, ValidationError, model_validator

from mixmerge.decision.choosing import Integers
from mixmerge.decision.explaining import decisions
from mixmerge.decision.records import Decision, Query, Scores
from mixmerge.decision.rules import choice_of
from mixmerge.errors import Fault, MixmergeError
from mixmerge.registry import choices

PolicyKind = Literal["argmax", "top_k", "sample", "threshold", "budget", "willingness_to_pay", "lower_bound"]
KINDS: tuple[str, ...] = get_args(PolicyKind)
SHARED_FIELDS = ("fallback", "abstain_below", "seed")
# kind -> its own fields: those it cannot be without have no default here
_FIELDS: dict[str, dict[str, Any]] = {
    "argmax": {},
    "top_k": {"k": ...},
    "sample": {"draws": 3, "temperature": 0.5, "trim": 0.0},
    "threshold": {"threshold": ..., "strong": ..., "weak": ...},
    "budget": {"budget": ..., "trade": None, "above": None, "share": None},
    "willingness_to_pay": {"willingness_to_pay": ...},
    "lower_bound": {"z": 1.0},
}


class Policy(BaseModel):
    """Who answers a query, given what is expected of every expert. Fields of other kinds are refused.

    Ties go to the cheaper expert, then to the first name; experts without a finite score are never picked.

    Args:
        kind: ``argmax``: the highest expected score. ``top_k``: the ``k`` highest. ``sample``: drawn by expected
            score. ``threshold``: one of two experts, by what the stronger one is expected to gain. ``budget``:
            the highest score for a mean cost. ``willingness_to_pay``: the highest ``willingness_to_pay * score -
            cost``. ``lower_bound``: the highest ``score - z * std``.
        k: experts that answer, 1 or more.
        draws: answers of a query, 1 or more; drawn with replacement, so an expert may be asked twice.
        temperature: above 0; chances are in proportion to ``score ** (1 / temperature)``.
        trim: share of a task's draws, or of all draws of queries without a ``task``, below which an expert is
            removed and its draws are drawn again. 0 to below 1; with more than 0 the picks depend on which
            queries are decided together, not on their order.
        threshold: ``strong`` answers where its expected score is at least this much above that of ``weak``.
        strong, weak: names of two experts.
        budget: mean dollars a query.
        trade: dollars worth paying for one more point of score; calibration finds it for a budget.
        above, share: this share of the queries, drawn by their id, is decided at the trade ``above`` instead, so
            that a budget between two settings is used up.
        willingness_to_pay: dollars worth paying for one more point of score, 0 or more.
        z: standard deviations, 0 or more.
        abstain_below: no expert is picked for a query where the expected score of the first pick is below this;
            of ``sample``, the best expected score; of ``lower_bound``, the lower bound.
        fallback: the expert that answers instead of nobody: below ``abstain_below``, or where no expert has a
            finite score.
        seed: of all draws, which are keyed by it and the query's id.

    Raises:
        MixmergeError: every field that is unknown, missing, of another kind or out of range.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    kind: PolicyKind = "argmax"
    k: int | None = Field(default=None, ge=1)
    draws: int | None = Field(default=None, ge=1, le=10_000)
    temperature: float | None = Field(default=None, gt=0)
    trim: float | None = Field(default=None, ge=0, lt=1)
    threshold: float | None = None
    strong: str | None = Field(default=None, min_length=1)
    weak: str | None = Field(default=None, min_length=1)
    budget: float | None = Field(default=None, gt=0)
    trade: float | None = Field(default=None, ge=0)
    above: float | None = Field(default=None, ge=0)
    share: float | None = Field(default=None, ge=0, le=1)
    willingness_to_pay: float | None = Field(default=None, ge=0)
    z: float | None = Field(default=None, ge=0)
    fallback: str | None = Field(default=None, min_length=1)
    abstain_below: float | None = None
    seed: int = Field(default=0, ge=0, lt=2**64)

    @model_validator(mode="wrap")
    @classmethod
    def _all_at_once(cls, given: Any, read: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(given, Mapping):
            return read(given)
        present = {name: value for name, value in given.items() if value is not None}
        faults = _misplaced(present)
        unknown = {fault.where for fault in faults}
        own = _FIELDS.get(str(present.get("kind", "argmax")), {})
        defaults = {name: value for name, value in own.items() if value is not ...}
        usable = {name: value for name, value in present.items() if f"policy.{name}" not in unknown}
        try:
            made = read({**defaults, **usable})
        except ValidationError as error:
            faults += [_fault_of(one) for one in error.errors()]
            raise MixmergeError(faults) from error
        faults += _together(made)
        if faults:
            raise MixmergeError(faults)
        return made

    def as_dict(self) -> dict[str, Any]:
        """JSON values; ``Policy(**these)`` is the same policy."""
        return self.model_dump(mode="json", exclude_none=True)

    def but(self, *, fallback: str | None = None, abstain_below: float | None = None) -> Policy:
        """The same policy with these in place of its own, where given."""
        given = {"fallback": fallback, "abstain_below": abstain_below}
        return Policy(**{**self.as_dict(), **{name: v for name, v in given.items() if v is not None}})

    def describe(self) -> str:
        """``top_k(k=3, fallback=tutor)``: the kind and every number that decides."""
        values = {name: getattr(self, name) for name in (*_FIELDS[self.kind], *SHARED_FIELDS)}
        said = [
            f"{name}={value}"
            for name, value in values.items()
            if value is not None and not (name in ("seed", "trim") and value == 0)
        ]
        return f"{self.kind}({', '.join(said)})" if said else self.kind

    def __str__(self) -> str:
        return self.describe()

    def experts(self) -> dict[str, str]:
        """The experts it names, by field."""
        named = {name: getattr(self, name) for name in ("strong", "weak", "fallback")}
        return {name: expert for name, expert in named.items() if expert is not None}

    @property
    def whole(self) -> bool:
        """What one query gets depends on which others are decided with it: they cannot be decided in blocks."""
        return bool(self.trim)

    def choose(self, scores: Scores, queries: Sequence[Query] | None = None) -> Integers:
        """``(Q, K)`` places in ``scores.experts``, best first, ``-1`` where nobody is picked. Makes no objects.

        Args:
            scores: of Q queries.
            queries: the same queries. Needed where something is drawn: ``sample``, and ``budget`` with a ``share``.

        Raises:
            MixmergeError: experts that the scores do not have, costs that are not known, more picks than experts,
                a budget that is not calibrated.
        """
        return choice_of(self, scores, queries).picks

    def decide(
        self,
        scores: Scores,
        queries: Sequence[Query],
        *,
        version: str = "unsaved",
        reasons: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[Decision]:
        """One decision for each query, in their order.

        ``reason`` has ``rule`` in a sentence; ``score``, ``std`` and ``cost``, of the primary but for the cost,
        which is of all picks (None if not known); ``margin``: by how much the rule puts the primary above the
        next expert, or above ``abstain_below`` where it abstains, in the rule's unit.

        Args:
            scores: of the queries.
            queries: Q.
            version: of the router.
            reasons: what the router says of each query; its entries stand behind those above.

        Raises:
            MixmergeError: as ``choose``.
        """
        return decisions(self, scores, queries, version=version, reasons=reasons)


# --- what can be wrong with the fields


def _misplaced(given: Mapping[str, Any]) -> list[Fault]:
    """Fields that do not exist, that the kind does not use, and that it cannot be without."""
    kind, names = given.get("kind", "argmax"), list(Policy.model_fields)
    faults = [
        Fault(f"policy.{name}", "there is no such field", choices(str(name), names))
        for name in given
        if name not in names
    ]
    if not isinstance(kind, str) or kind not in _FIELDS:
        return [
            *faults,
            Fault("policy.kind", f"no policy is called {kind!r}", choices(str(kind), list(KINDS))),
        ]
    used = ("kind", *_FIELDS[kind], *SHARED_FIELDS)
    faults += [
        Fault(f"policy.{name}", f"{kind} does not use it", f"{kind} takes {', '.join(used[1:])}")
        for name in given
        if name in names and name not in used
    ]
    faults += [
        Fault(f"policy.{name}", f"{kind} needs it")
        for name, default in _FIELDS[kind].items()
        if default is ... and name not in given
    ]
    return faults


def _fault_of(error: Any) -> Fault:
    where = ".".join(str(part) for part in ("policy", *error["loc"]))
    got = "" if isinstance(error["input"], Mapping) else f", got {error['input']!r:.60}"
    return Fault(where, error["msg"].replace("Input should be", "should be") + got)


def _together(policy: Policy) -> list[Fault]:
    faults = []
    if policy.strong is not None and policy.strong == policy.weak:
        faults.append(Fault("policy.weak", f"is {policy.weak}, as strong is", "Two experts"))
    if (policy.above is None) != (policy.share is None):
        missing = "above" if policy.above is None else "share"
        faults.append(Fault(f"policy.{missing}", "above and share go together"))
    if policy.above is not None and (policy.trade is None or policy.above < policy.trade):
        faults.append(Fault("policy.above", "is the higher of two trades", "At least trade"))
    return faults
