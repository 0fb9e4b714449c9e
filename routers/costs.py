"""What asking an expert is expected to cost. E experts, Q queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
