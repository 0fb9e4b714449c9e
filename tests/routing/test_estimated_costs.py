"""Costs that nobody recorded: estimates by hand, curves drawn from them, and reports that say so."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixmerge.decision.records import Scores
from mixmerge.errors import MixmergeError
from mixmerge.evaluate.routing import EvaluationOptions, Scored, evaluate_scores
from mixmerge.outcomes.table import OutcomeTable, Price
from mixmerge.routers.costs import estimate_costs

NAN = float("nan")
Run, Fault = Callable[..., Any], Callable[..., str]


def priced() -> OutcomeTable:
    """Queries of 8 and 40 characters, so 2 and 10 tokens; ``dear`` is always right, ``cheap`` on the second."""
    return OutcomeTable(
        ids=("1", "2"),
        queries=("a" * 8, "b" * 40),
        experts=("dear", "cheap"),
        score=np.array([[1.0, 0.0], [1.0, 1.0]]),
        prices={"dear": Price(10.0, 20.0), "cheap": Price(1.0, 2.0)},
    )


def test_estimates_by_hand() -> None:
    found = estimate_costs(priced())
    expected = np.array([[20 + 5120, 2 + 512], [100 + 5120, 10 + 512]]) / 1e6
    np.testing.assert_allclose(found.cost, expected)
    np.testing.assert_allclose(found.expected, expected)
    assert found.experts == ("dear", "cheap")
    assert found.rule == "from prices, 0.25 tokens for a character of the query and 256 for an answer"
    none = estimate_costs(priced(), output_tokens=0)
    np.testing.assert_allclose(none.cost, np.array([[20, 2], [100, 10]]) / 1e6)


def test_tokens_that_were_counted_are_taken() -> None:
    half = replace(priced(), tokens_out=np.array([[30.0, 7.0], [NAN, 5.0]]))
    found = estimate_costs(half, output_tokens=100)
    np.testing.assert_allclose(found.cost, np.array([[20 + 600, 2 + 14], [100 + 2000, 10 + 10]]) / 1e6)
    np.testing.assert_allclose(
        found.expected[1], np.array([100 + 2000, 10 + 200]) / 1e6
    )  # not its own answer's


def test_what_is_known_is_left_alone() -> None:
    recorded = replace(priced(), cost=np.array([[3.0, NAN], [NAN, NAN]]))
    found = estimate_costs(recorded)
    assert found.experts == ("cheap",)
    assert found.cost[0, 0] == 3.0
    assert np.isnan(found.cost[1, 0])
    assert np.isnan(found.expected[:, 0]).all()
    unpriced = estimate_costs(replace(priced(), prices={}))
    assert unpriced.experts == ()
    assert np.isnan(unpriced.cost).all()
    assert np.isnan(recorded.cost[:, 1]).all()  # the table is as it was


def test_tokens_of_no_use_are_refused() -> None:
    whole = replace(priced(), cost=np.ones((2, 2)))
    counted = replace(priced(), tokens_out=np.ones((2, 2)))
    for table in (whole, counted, replace(priced(), prices={})):
        with pytest.raises(MixmergeError, match="output_tokens: is of no use"):
            estimate_costs(table, output_tokens=100)
    for wrong in (-1.0, NAN, float("inf")):
        with pytest.raises(MixmergeError, match=r"output_tokens: is .*0 or more"):
            evaluate_scores([], priced(), EvaluationOptions(output_tokens=wrong))


@pytest.mark.parametrize("expects", [True, False])
def test_the_curve_is_drawn(expects: bool) -> None:
    """Whether or not the router expects costs itself: prices and lengths are known before anyone answers."""
    table = priced()
    own = estimate_costs(table).cost if expects else None
    sure = Scores(table.experts, table.score.copy(), np.zeros((2, 2)), own)
    report = evaluate_scores(
        [Scored("mine", sure, best=("dear", "dear"))], table, EvaluationOptions(resamples=200)
    )
    curve = report.row("mine").curve
    assert curve is not None
    cheapest, best = (514 + 522) / 2 / 1e6, (5140 + 522) / 2 / 1e6
    np.testing.assert_allclose(curve.hull.cost, [cheapest, best])
    assert curve.hull.score.tolist() == [0.5, 1.0]
    assert curve.saved == pytest.approx(1 - best / ((5140 + 5220) / 2 / 1e6))
    assert report.estimated == ("dear", "cheap")
    assert report.as_dict()["estimated"] == ["dear", "cheap"]
    assert any(note.startswith("Costs of dear, cheap are estimated, from prices") for note in report.notes)


def test_on_the_command_line(route: Run, fault: Fault, fitted: Path, tmp_path: Path) -> None:
    table = OutcomeTable.read(fitted / "b.jsonl")
    replace(table, tokens_in=None, tokens_out=None).write("bare.jsonl")
    ask = ("eval", fitted / "router", "--data", "bare.jsonl")
    result = route(*ask, "--report", "r.html", "--output-tokens", "100")
    assert "~$ per 1,000" in result.stdout
    assert "Costs of sums, code, verse, plain are estimated" in result.stdout
    assert "and 100 for an answer" in result.stdout
    assert "Score against cost" in (tmp_path / "r.html").read_text()
    assert "are estimates; the notes say how" in (tmp_path / "r.html").read_text()
    few, many = (
        json.loads(route(*ask, "--json", "--output-tokens", tokens).stdout)["rows"][0] for tokens in (1, 1000)
    )
    assert few["curve"] is not None
    assert many["cost"]["value"] > 10 * few["cost"]["value"]
    known = ("eval", fitted / "router", "--data", fitted / "b.jsonl")
    assert fault(*known, "--output-tokens", 100).startswith("output_tokens: is of no use")
    assert "estimated" not in route(*known).stdout
