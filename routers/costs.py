"""What asking an expert is expected to cost. E experts, Q queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixmerge.errors import Fault, MixmergeError
from mixmerge.outcomes.table import OutcomeTable, Price

Floats = NDArray[np.float64]
TOKENS_A_CHARACTER = 0.25  # of English text, where no tokens were counted
ANSWER_TOKENS = 256.0  # the same of answers


@dataclass(frozen=True, eq=False)
class CostModel:
    """Dollars of a query: ``fixed + a_character * its characters``.

    From an expert's price and the tokens of its outcomes (without those, ``TOKENS_A_CHARACTER`` and
    ``ANSWER_TOKENS``); from its mean cost where it has no price.

    Args:
        fixed, a_character: ``(E,)`` dollars, NaN for experts of which nothing is known.
    """

    fixed: Floats
    a_character: Floats

    @classmethod
    def fit(cls, table: OutcomeTable) -> CostModel | None:
        """None if the table has neither costs nor prices."""
        fixed, a_character = (np.full(len(table.experts), np.nan) for _ in range(2))
        characters = np.array([len(text) for text in table.queries], np.float64)
        for e, name in enumerate(table.experts):
            price = table.prices.get(name)
            if price is not None:
                prompt = _mean(None if table.tokens_in is None else table.tokens_in[:, e] / characters)
                answer = _mean(None if table.tokens_out is None else table.tokens_out[:, e])
                a_character[e] = price.input / 1e6 * (TOKENS_A_CHARACTER if prompt is None else prompt)
                fixed[e] = price.output / 1e6 * (ANSWER_TOKENS if answer is None else answer)
            elif table.cost is not None and (mean := _mean(table.cost[:, e])) is not None:
                fixed[e], a_character[e] = mean, 0.0
        return None if np.isnan(fixed).all() else cls(fixed, a_character)

    def expect(self, texts: Sequence[str]) -> Floats:
        """``(Q, E)`` dollars."""
        characters = np.array([len(text) for text in texts], np.float64)
        return self.fixed + np.outer(characters, self.a_character)

    def extended(self, more: CostModel | None, *, experts: int = 1) -> CostModel:
        """With further experts behind; NaN for all ``experts`` of them if nothing is known."""
        unknown = np.full(experts, np.nan)
        return CostModel(
            np.append(self.fixed, unknown if more is None else more.fixed),
            np.append(self.a_character, unknown if more is None else more.a_character),
        )

    def without(self, at: int) -> CostModel:
        return CostModel(np.delete(self.fixed, at), np.delete(self.a_character, at))

    def as_dict(self) -> dict[str, Any]:
        """JSON values; None stands for what is not known."""
        return {
            "fixed": [None if np.isnan(x) else float(x) for x in self.fixed],
            "a_character": [None if np.isnan(x) else float(x) for x in self.a_character],
        }

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> CostModel:
        def numbers(values: Sequence[float | None]) -> Floats:
            return np.array([np.nan if x is None else x for x in values], np.float64)

        return cls(numbers(given["fixed"]), numbers(given["a_character"]))


@dataclass(frozen=True, eq=False)
class CostEstimate:
    """Costs that nobody recorded, from prices and lengths.

    Args:
        experts: whose costs are estimated.
        cost: ``(Q, E)`` dollars: of these experts by the tokens that were recorded, estimates for the others; of all
            other experts as the table has them, NaN where not known.
        expected: ``(Q, E)`` dollars of these experts by what is known before they answer, NaN for all others.
        rule: how, in words; "" if nothing is estimated.
    """

    experts: tuple[str, ...]
    cost: Floats
    expected: Floats
    rule: str


def estimate_costs(table: OutcomeTable, *, output_tokens: float | None = None) -> CostEstimate:
    """Costs of the experts that have a price and of which no query's cost is known.

    Tokens that were not recorded are ``TOKENS_A_CHARACTER`` of the query's text, and ``output_tokens`` for the answer.
    An expert of which some costs are known keeps its gaps: they may not be like the rest.

    Args:
        output_tokens: of an answer, 0 or more; ``ANSWER_TOKENS`` if None.

    Raises:
        MixmergeError: ``output_tokens`` are given and no answer's tokens have to be estimated.
    """
    known = table.costs()
    cost = np.full(table.score.shape, np.nan) if known is None else known
    expected = np.full(cost.shape, np.nan)
    answer = ANSWER_TOKENS if output_tokens is None else output_tokens
    prompt = TOKENS_A_CHARACTER * np.array([len(text) for text in table.queries], np.float64)
    names, used = [], False
    for e, name in enumerate(table.experts):
        price = table.prices.get(name)
        if price is None or not np.isnan(cost[:, e]).all():
            continue
        tokens_in, tokens_out = (
            np.full(len(table), np.nan) if tokens is None else tokens[:, e]
            for tokens in (table.tokens_in, table.tokens_out)
        )
        used = used or bool(np.isnan(tokens_out).any())
        tokens_in = np.where(np.isnan(tokens_in), prompt, tokens_in)
        tokens_out = np.where(np.isnan(tokens_out), answer, tokens_out)
        cost[:, e] = (price.input * tokens_in + price.output * tokens_out) / 1e6
        expected[:, e] = (price.input * prompt + price.output * answer) / 1e6
        names.append(name)
    if output_tokens is not None and not used:
        what = "is of no use: no answer's tokens have to be estimated"
        allowed = "Prices of experts for which the outcomes have neither costs nor tokens"
        raise MixmergeError(Fault("output_tokens", what, allowed, "Leave it out"))
    rule = f"from prices, {TOKENS_A_CHARACTER:g} tokens for a character of the query" if names else ""
    rule += f" and {answer:,g} for an answer" if used else ""
    return CostEstimate(tuple(names), cost, expected, rule)


def mean_costs(
    recorded: Floats, experts: Sequence[str], prices: Mapping[str, Price], texts: Sequence[str]
) -> Floats:
    """``(E,)`` mean dollars a query: as recorded, else from prices and the length of the texts; NaN without either."""
    characters = sum(len(text) for text in texts) / max(len(texts), 1)
    costs = recorded.copy()
    for e, name in enumerate(experts):
        price = prices.get(name)
        if price is not None and np.isnan(recorded[e]):
            prompt = price.input * TOKENS_A_CHARACTER * characters
            costs[e] = (prompt + price.output * ANSWER_TOKENS) / 1e6
    return costs


def _mean(values: Floats | None) -> float | None:
    if values is None or np.isnan(values).all():
        return None
    return float(np.nanmean(values))
