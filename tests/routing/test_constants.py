"""Routers that hardly look at a query, and the oracles, against numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from mixmerge.decision.records import Query, queries_of
from mixmerge.errors import MixmergeError
from mixmerge.outcomes.table import OutcomeTable, Price
from mixmerge.routers import ROUTERS
from mixmerge.routers.base import Router
from mixmerge.routers.constants import (
    BestSingleRouter,
    CheapestRouter,
    LengthRouter,
    RandomRouter,
    TaskMeanRouter,
)
from mixmerge.routers.contract import sample
from mixmerge.routers.references import OracleRouter, OracleTaskRouter

NAN = float("nan")


def outcomes(
    score: Sequence[Sequence[float]],
    *,
    texts: Sequence[str] | None = None,
    experts: Sequence[str] = ("a", "b"),
    tasks: Sequence[str] | None = None,
    label: str = "task",
    prices: dict[str, Price] | None = None,
) -> OutcomeTable:
    rows = len(score)
    return OutcomeTable(
        ids=tuple(f"q{i}" for i in range(rows)),
        queries=tuple(texts or [f"query {i}" for i in range(rows)]),
        experts=tuple(experts),
        score=np.array(score, np.float64),
        metadata={} if tasks is None else {label: tuple(tasks)},
        prices=prices or {},
    )


def of_task(*tasks: str, label: str = "task") -> list[Query]:
    return [Query("asked", metadata={label: task}) for task in tasks]


# --- constants


def test_random_is_a_draw_by_text_expert_and_seed() -> None:
    table = sample()
    texts = [f"text {i}" for i in range(500)]
    mean = RandomRouter().fit(table).score(texts).mean
    assert np.array_equal(RandomRouter().fit(table).score(texts[::-1]).mean[::-1], mean)
    assert not np.array_equal(RandomRouter(seed=1).fit(table).score(texts).mean, mean)
    shares = np.bincount(mean.argmax(axis=1), minlength=4) / 500
    assert abs(shares - 0.25).max() < 4 * (0.25 * 0.75 / 500) ** 0.5
    renamed = RandomRouter().fit(table.only(table.experts[::-1])).score(texts).mean
    assert np.array_equal(renamed[:, ::-1], mean)


def test_best_single_by_hand() -> None:
    scores = BestSingleRouter().fit(outcomes([[1.0, 0.0], [0.0, 0.5], [NAN, 1.0]])).score(["x", "y"])
    assert scores.mean.tolist() == [[0.5, 0.5]] * 2
    assert scores.std[0].tolist() == pytest.approx([0.5, (0.25 / 3) ** 0.5])


def test_cheapest_takes_costs_then_prices() -> None:
    prices = {"a": Price(1.0, 0.0), "b": Price(0.0, 2.0)}
    table = outcomes([[1.0, 0.0]] * 2, texts=["four" * 2, "four" * 4], prices=prices)
    # 12 characters on average are 3 tokens at 1 $/M; 256 tokens of answer at 2 $/M
    assert CheapestRouter().fit(table).score(["x"]).mean[0].tolist() == pytest.approx([-3e-6, -512e-6])
    paid = sample()
    scores = CheapestRouter().fit(paid).score(["x"])
    assert scores.mean.argmax() == 0
    assert (np.diff(scores.mean[0]) < 0).all()


def test_cheapest_needs_to_know() -> None:
    with pytest.raises(MixmergeError, match="nothing is known of what b cost"):
        CheapestRouter().fit(outcomes([[1.0, 0.0]], prices={"a": Price(1.0, 1.0)}))


# --- length


def test_length_is_a_shrunk_line_of_its_logarithm() -> None:
    texts = ["x" * n for n in (1, 3, 7, 15)]  # 1 + length is 2, 4, 8, 16
    step = np.log(2)
    table = outcomes([[0.0, 1.0], [1.0, 0.6], [1.0, 0.4], [2.0, 0.0]], texts=texts)
    router = LengthRouter().fit(table)
    scores = router.score(["x" * 3, "x" * 7, "x" * 1000]).mean
    # as in test_a_line_by_hand, with steps of log 2: slope 0.6 a step, F = 18
    slope = 0.6 * 18 / 19
    assert scores[:, 0].tolist() == pytest.approx([1 - slope / 2, 1 + slope / 2, 1 + 1.5 * slope])
    assert router.state is not None
    assert router.state.arrays["slope"][0] == pytest.approx(slope / step)
    assert scores[0, 1] > scores[1, 1] > scores[2, 1]
    assert router.reasons(["abc"])[0]["characters"] == 3


def test_length_unlearned_sends_the_longer_to_the_strong() -> None:
    table = outcomes([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]], texts=["aaaa", "bb", "c"])
    router = LengthRouter({"learned": False}).fit(table)
    assert not router.independent
    mean = router.score(["x", "xx", "xxx"]).mean
    gain = mean[:, 1] - mean[:, 0]  # b is the best on average
    assert (np.diff(gain) > 0).all()
    assert np.ptp(mean[:, 0]) == 0
    swapped = LengthRouter({"learned": False}).fit(table.only(("b", "a"))).score(["x", "xx", "xxx"]).mean
    assert np.array_equal(swapped[:, ::-1], mean)


# --- tasks

TASKED = ([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, NAN], [1.0, 1.0]], ("sum", "sum", "sum", "code", ""))


def test_task_mean_by_hand() -> None:
    router = TaskMeanRouter({"worth": 2}).fit(outcomes(TASKED[0], tasks=TASKED[1]))
    scores = router.score(of_task("sum", "code", "new", ""))
    assert scores.mean[:, 0].tolist() == pytest.approx([(2 + 2 * 0.6) / 5, (0 + 2 * 0.6) / 3, 0.6, 0.6])
    assert scores.mean[:, 1].tolist() == pytest.approx([(1 + 2 * 0.5) / 5, 0.5, 0.5, 0.5])
    assert scores.std[0, 0] < scores.std[1, 0] < scores.std[2, 0]
    assert router.score(["no label at all"]).mean[0].tolist() == pytest.approx([0.6, 0.5])
    said = router.reasons(of_task("sum", "new"))
    assert said == [{"task": "sum", "counts": {"a": 3.0, "b": 3.0}}, {"task": "new", "counts": {}}]


def test_the_worth_of_the_mean_is_estimated() -> None:
    rng = np.random.default_rng(0)
    tasks = [f"t{i % 40}" for i in range(2000)]
    alike = (rng.random((2000, 2)) < 0.5).astype(float)
    apart = (rng.random((2000, 2)) < (np.arange(2000) % 2 * 0.8 + 0.1)[:, None]).astype(float)
    spread = [
        np.ptp(TaskMeanRouter().fit(outcomes(score, tasks=tasks)).score(of_task("t0", "t1")).mean[:, 0])
        for score in (alike.tolist(), apart.tolist())
    ]
    assert spread[0] < 0.1
    assert spread[1] > 0.6


def test_the_column_of_labels() -> None:
    table = outcomes(TASKED[0], tasks=TASKED[1], label="category")
    assert TaskMeanRouter().fit(table).score(of_task("sum", label="category")).mean[0, 0] != 0.6
    named = outcomes(TASKED[0], tasks=TASKED[1], label="subject")
    router = TaskMeanRouter({"label": "subject", "worth": 0}).fit(named)
    assert router.score(of_task("sum", label="subject")).mean[0].tolist() == pytest.approx([2 / 3, 1 / 3])
    with pytest.raises(MixmergeError, match=r"no labels in a column task or category.*Columns: subject"):
        TaskMeanRouter().fit(named)
    with pytest.raises(MixmergeError, match=r"no labels in a column other.*Columns: none"):
        TaskMeanRouter({"label": "other"}).fit(outcomes(TASKED[0]))


def test_an_added_expert_may_bring_tasks() -> None:
    router = TaskMeanRouter().fit(outcomes(TASKED[0], tasks=TASKED[1]))
    asked = of_task("sum", "code", "poem", "")
    before = router.score(asked).mean
    more = outcomes([[0.2], [0.4], [0.9]], experts=("c",), tasks=("poem", "poem", "sum"))
    after = router.add_expert(more).score(asked).mean
    assert np.array_equal(after[:, :2], before)
    alone = TaskMeanRouter().fit(more).score(asked).mean
    assert np.array_equal(after[:, 2:], alone)


# --- references


def test_oracle_task_is_not_shrunk_and_says_what_it_is() -> None:
    router = OracleTaskRouter().fit(outcomes(TASKED[0], tasks=TASKED[1]))
    assert router.score(of_task("sum")).mean[0].tolist() == pytest.approx([2 / 3, 1 / 3], abs=1e-8)
    assert "evaluated on" in router.reasons(of_task("sum"))[0]["reference"]
    assert ROUTERS["oracle_task"].reference


def test_oracle_gives_the_scores_of_the_very_query() -> None:
    texts = ["one", "two", "two", "three"]
    router = OracleRouter().fit(outcomes([[0.2, 0.9], [1.0, NAN], [0.0, NAN], [0.3, 0.1]], texts=texts))
    scores = router.score(["three", "One ", "two", "four"])
    assert scores.mean[:3].tolist() == [[0.3, 0.1], [0.2, 0.9], [0.5, 0.5]]
    assert scores.mean[3].tolist() == pytest.approx([0.375, 0.5])
    assert (scores.std[:3] == 0).all()
    assert (scores.std[3] > 0).all()
    said = router.reasons(["one", "four"])
    assert "this very query" in said[0]["reference"]
    assert "not known" in said[1]["reference"]
    assert ROUTERS["oracle"].reference


def test_oracle_is_the_best_there_is() -> None:
    table = sample(missing=0.0)
    mean = OracleRouter().fit(table).score(queries_of(table)).mean
    assert np.array_equal(mean, table.score)


# --- experts come and go


@pytest.mark.parametrize(
    "kind", [RandomRouter, BestSingleRouter, CheapestRouter, LengthRouter, TaskMeanRouter]
)
def test_experts_are_added_and_removed(kind: type[Router], tmp_path: Path) -> None:
    table, asked = sample(), queries_of(sample(20, seed=1))
    all_four = kind().fit(table).score(asked)
    router = kind().fit(table.only(table.experts[:2])).add_expert(table.only(table.experts[2:]))
    assert np.allclose(router.score(asked).mean, all_four.mean, atol=1e-12)
    router.save(tmp_path / "router")
    left = Router.load(tmp_path / "router").remove_expert("code").remove_expert("plain").score(asked)
    assert left.experts == ("sums", "verse")
    assert np.allclose(left.mean, all_four.mean[:, [0, 2]], atol=1e-12)
