"""The small networks: losses by hand, what is held out, what they learn and what they do where nothing can be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mixmerge.decision.records import queries_of
from mixmerge.errors import MixmergeError
from mixmerge.outcomes.table import OutcomeTable
from mixmerge.routers.base import Inputs, Router, Training
from mixmerge.routers.contract import check_router, sample
from mixmerge.routers.contrastive import ContrastiveRouter, cluster_loss, expert_loss
from mixmerge.routers.factors import FactorsRouter, pair_loss
from mixmerge.routers.gap import GapRouter, labels
from mixmerge.routers.neural import MlpOptions, MlpRouter, fit_networks, masked_loss, outputs
from mixmerge.routers.strengths import calibrated, expected, fit_slopes
from mixmerge.routers.training import (
    EnsembleOptions,
    TrainedOptions,
    arranged,
    held_out,
    seeded,
    stream,
    train,
)

torch = pytest.importorskip("torch")
KINDS: list[tuple[type[Router], dict[str, Any]]] = [
    (MlpRouter, {}),
    (FactorsRouter, {}),
    (ContrastiveRouter, {}),
]
PAIR = {"weak": "plain", "strong": "sums"}


def table_of(score: Any, *, experts: tuple[str, ...] | None = None) -> OutcomeTable:
    """A table with these scores, and the texts of the sample."""
    score = np.asarray(score, np.float64)
    texts = sample(len(score)).queries
    names = experts or tuple(f"e{i}" for i in range(score.shape[1]))
    return OutcomeTable(tuple(f"q{i}" for i in range(len(score))), texts, names, score)


# --- the loop


def test_copies_are_held_out_together_whatever_else_there_is() -> None:
    texts = [f"question {i}" for i in range(300)] + [f"  QUESTION   {i}" for i in range(300)]
    out = held_out(texts, share=0.3, seed=1, member=0)
    assert (out[:300] == out[300:]).all()
    assert 0.2 < out.mean() < 0.4
    assert (held_out(texts[100:200], share=0.3, seed=1, member=0) == out[100:200]).all()
    assert (held_out(texts, share=0.3, seed=1, member=1) != out).any()
    assert not held_out(["one text"], share=0.99, seed=0, member=0).any(), "something is left to train on"


def test_outcomes_are_arranged_by_their_content() -> None:
    rng = np.random.default_rng(0)
    data = Training(
        Inputs(("b", "a", "c"), {"task": ("x", "y", "z")}, rng.normal(size=(3, 2)).astype(np.float32)),
        rng.normal(size=(3, 2)),
        ("two", "one"),
        np.array([2.0, 1.0]),
        {},
    )
    first = arranged(data)
    assert first.data.experts == ("one", "two")
    assert first.data.costs.tolist() == [1.0, 2.0]
    at = first.data.inputs.texts.index("b")
    assert first.data.inputs.metadata["task"][at] == "x"
    np.testing.assert_array_equal(first.data.score[at][first.back], data.score[0])
    np.testing.assert_array_equal(first.data.inputs.embedded()[at], data.inputs.embedded()[0])


def test_torch_is_left_as_it_was() -> None:
    torch.manual_seed(3)
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    with seeded(7):
        first = torch.rand(2)
        assert torch.get_num_threads() == 1
    with seeded(7):
        assert torch.equal(torch.rand(2), first)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert stream(1, "a") != stream(1, "b")


def test_training_keeps_the_best_pass() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    seen: list[float] = []

    def held() -> float:  # best at 0.5, on the way to 1
        seen.append(float(weight.detach()))
        return abs(seen[-1] - 0.5)

    options = TrainedOptions(rate=0.05, decay=0, batch=1, epochs=60, patience=5)
    lowest = train([weight], lambda index: ((weight - 1) ** 2).sum(), rows=10, options=options, held=held)
    assert float(weight.detach()) == pytest.approx(0.5, abs=0.05)
    assert lowest == min(abs(one - 0.5) for one in seen)
    best = int(np.argmin([abs(one - 0.5) for one in seen]))
    assert len(seen) == best + 6, "it waited for five passes more"


def test_least_steps_lengthen_a_short_training() -> None:
    steps = []
    weight = torch.nn.Parameter(torch.zeros(1))

    def loss(index: Any) -> Any:
        steps.append(len(index))
        return (weight**2).sum()

    options = TrainedOptions(batch=4, epochs=1, least=10)
    train([weight], loss, rows=6, options=options)
    assert steps == [4, 2] * 5


def test_a_diverging_rate_is_an_error() -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(MixmergeError, match=r"diverged.*lower rate"):
        train(
            [weight],
            lambda index: torch.exp(1e4 * weight).sum(),
            rows=4,
            options=TrainedOptions(epochs=2),
        )


# --- strengths


def test_slope_by_hand() -> None:
    # One expert: strengths -1, 0, 1 and scores 0, 1, 5. Slope 5 / 2; residuals .5, -1, .5 with one degree of
    # freedom: noise 1.5; variance of the slope 1.5 / 2; shrunk to 2.5 - .75 / 2.5.
    slopes = fit_slopes(np.array([[-1.0], [0.0], [1.0]]), np.array([[0.0], [1.0], [5.0]]))
    np.testing.assert_allclose(slopes.slope, [2.2])
    np.testing.assert_allclose(slopes.spread, [0.75])
    assert slopes.center.tolist() == [0.0]


def test_slopes_are_never_negative_and_vanish_in_noise() -> None:
    rng = np.random.default_rng(0)
    strength = rng.normal(size=(200, 3))
    assert fit_slopes(strength, -strength).slope.tolist() == [0, 0, 0]
    assert (fit_slopes(strength, rng.normal(size=(200, 3))).slope < 0.15).all()
    assert fit_slopes(np.zeros((9, 2)), rng.normal(size=(9, 2))).slope.tolist() == [0, 0]
    assert fit_slopes(np.zeros((0, 2)), np.zeros((0, 2))).slope.tolist() == [0, 0]


def test_slopes_differ_where_the_data_say_so() -> None:
    rng = np.random.default_rng(1)
    strength = rng.normal(size=(400, 2))
    slopes = fit_slopes(strength, strength * [3.0, 0.5] + 0.1 * rng.normal(size=(400, 2)))
    np.testing.assert_allclose(slopes.slope, [3.0, 0.5], atol=0.05)


def test_calibrated_strengths_go_through_the_means() -> None:
    rng = np.random.default_rng(2)
    strength = rng.normal(size=(300, 2))
    score = 0.2 * strength + [0.3, 0.6] + 0.1 * rng.normal(size=(300, 2))
    score[:50, 1] = np.nan
    arrays = calibrated([strength, strength], [np.arange(300) < 150, np.arange(300) >= 150], score)
    told = expected(np.stack([arrays["center"][:, None, :][0], arrays["center"][:, None, :][1]]), arrays)
    np.testing.assert_allclose(told.mean[0], np.nanmean(score, axis=0))
    apart = expected(np.stack([strength, strength + 1]), arrays)
    assert (apart.std > expected(np.stack([strength, strength]), arrays).std).all(), "members that differ"


# --- losses


def test_masked_loss_by_hand() -> None:
    output = torch.tensor([[0.0, 3.0], [1.0, 0.0]])
    target = torch.tensor([[1.0, torch.nan], [0.5, torch.nan]])
    wanted = (np.log(2) + np.log1p(np.exp(1)) - 0.5) / 2
    assert float(masked_loss(output, target, bounded=True)) == pytest.approx(wanted)
    assert float(masked_loss(output, target, bounded=False)) == pytest.approx((1 + 0.25) / 2)
    assert float(masked_loss(output, torch.full((2, 2), torch.nan), bounded=True)) == 0


def test_pair_loss_by_hand() -> None:
    # Strengths 1, 0, 3; scores 1, 0, 1: 0 beats 1 by 1, 0 and 2 tie at -2, 2 beats 1 by 3.
    strength = torch.tensor([[1.0, 0.0, 3.0]])
    score = torch.tensor([[1.0, 0.0, 1.0]])
    pairs = [np.log1p(np.exp(-1)), np.log1p(np.exp(-2)) + 1.0, np.log1p(np.exp(-3))]
    assert float(pair_loss(strength, score)) == pytest.approx(np.mean(pairs))
    missing = torch.tensor([[1.0, torch.nan, 1.0]])
    assert float(pair_loss(strength, missing)) == pytest.approx(pairs[1])
    assert float(pair_loss(strength[:, :1], score[:, :1])) == 0, "one expert has no pairs"


def test_pair_loss_pushes_winners_up_and_ties_together() -> None:
    strength = torch.tensor([[0.0, 0.0, 1.0]], requires_grad=True)
    pair_loss(strength, torch.tensor([[1.0, 0.0, 1.0]])).backward()
    gradient = strength.grad.numpy()[0]
    assert gradient.sum() == pytest.approx(0, abs=1e-7), "only differences count"
    half, near = 0.5, 1 / (1 + np.exp(-1))
    np.testing.assert_allclose(
        gradient * 3, [-half - (near - half), half + (1 - near), (near - half) - (1 - near)], atol=1e-6
    )


def test_expert_loss_by_hand() -> None:
    # Scores 1, 0.5, 0: with one good and one bad, 0 against 2. Cosines .5, 0, -.5.
    cosine, score = torch.tensor([[0.5, 0.0, -0.5]]), torch.tensor([[1.0, 0.5, 0.0]])
    one = expert_loss(cosine, score, top=1, last=1, temperature=1.0)
    assert float(one) == pytest.approx(np.log1p(np.exp(-1)))
    warm = expert_loss(cosine, score, top=1, last=1, temperature=0.5)
    assert float(warm) == pytest.approx(np.log1p(np.exp(-2)))
    # two good, two bad: 0 against 1 and 2, and 1 against 2 alone, as it is no less than itself
    both = expert_loss(cosine, score, top=2, last=2, temperature=1.0)
    wanted = np.log1p(np.exp(-0.5) + np.exp(-1)) + np.log1p(np.exp(-0.5))
    assert float(both) == pytest.approx(wanted)


def test_expert_loss_leaves_ties_and_gaps_out() -> None:
    cosine = torch.tensor([[0.5, 0.0, -0.5]], requires_grad=True)
    alike = expert_loss(cosine, torch.ones(1, 3), top=3, last=3, temperature=1.0)
    alike.backward()
    assert float(alike.detach()) == 0
    assert torch.equal(cosine.grad, torch.zeros(1, 3))
    missing = torch.tensor([[1.0, torch.nan, 0.0]])
    one = expert_loss(cosine.detach(), missing, top=3, last=3, temperature=1.0)
    assert float(one) == pytest.approx(np.log1p(np.exp(-1)))


def test_cluster_loss_by_hand() -> None:
    # Two clusters of two, at right angles: the friend has cosine 1, both others 0.
    hidden = torch.tensor([[1.0, 0], [2.0, 0], [0, 1.0], [0, 3.0]])
    group = torch.tensor([0, 0, 1, 1])
    loss = cluster_loss(hidden, group, negatives=2)
    assert float(loss) == pytest.approx(np.log1p(2 * np.exp(-1)))
    assert float(cluster_loss(hidden, group, negatives=3)) == 0, "nobody has three others"
    assert float(cluster_loss(hidden, torch.zeros(4), negatives=1)) == 0


# --- networks


def test_numpy_computes_what_torch_does() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 5)).astype(np.float32)
    y = np.stack([x[:, 0] > 0, x[:, 1] > 0], axis=1).astype(np.float64)
    fitted = fit_networks(
        x,
        y,
        [f"t{i}" for i in range(50)],
        options=MlpOptions(hidden=8, members=2, epochs=20, dropout=0.0),
        seed=0,
        start=np.zeros(2),
        bounded=True,
    )
    arrays = {name: torch.from_numpy(array) for name, array in fitted.arrays.items()}
    hidden = torch.relu(torch.from_numpy(x) @ arrays["inner"] + arrays["inner_bias"][:, None, :])
    wanted = hidden @ arrays["outer"] + arrays["outer_bias"][:, None, :]
    np.testing.assert_allclose(outputs(fitted.arrays, x), wanted.numpy(), atol=1e-5)
    right = (outputs(fitted.arrays, x).mean(axis=0) > 0) == (y > 0)
    assert right.mean() > 0.8


@pytest.mark.parametrize(("kind", "options"), [*KINDS, (GapRouter, PAIR)])
def test_rows_may_be_in_any_order(kind: type[Router], options: dict[str, Any]) -> None:
    data = _training(sample(80))
    shuffled = np.random.default_rng(1).permutation(80)
    other = Training(
        Inputs(tuple(data.inputs.texts[i] for i in shuffled), embedding=data.inputs.embedded()[shuffled]),
        data.score[shuffled],
        data.experts,
        data.costs,
        data.prices,
    )
    router = kind({**options, **SHORT})
    router.experts = data.experts
    first, second = (router.predict(router.learn(one), data.inputs) for one in (data, other))
    np.testing.assert_array_equal(first.mean, second.mean)


SHORT = {"epochs": 3, "members": 2, "least": 0}


def _training(table: OutcomeTable) -> Training:
    from mixmerge.routers.features import TfidfFeatures

    features = TfidfFeatures(dimensions=16).fit(table.queries)
    embedding = features.embed(queries_of(table))
    return Training(
        Inputs(table.queries, embedding=embedding), table.score, table.experts, np.full(4, np.nan), {}
    )


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_nothing_to_learn(kind: type[Router], options: dict[str, Any]) -> None:
    score = np.stack([np.ones(40), np.zeros(40), np.full(40, 0.5)], axis=1)
    told = kind({**options, **SHORT}).fit(table_of(score)).score(["a poem", "a loop"])
    np.testing.assert_allclose(told.mean, np.tile([1, 0, 0.5], (2, 1)), atol=0.03)
    assert np.isfinite(told.std).all()


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_one_expert_and_few_rows(kind: type[Router], options: dict[str, Any]) -> None:
    one = kind({**options, **SHORT}).fit(table_of(sample(30).score[:, :1])).score(["a poem"])
    assert np.isfinite(one.mean).all()
    assert np.isfinite(one.std).all()
    for rows in (1, 2, 3):
        score = np.array([[1.0, np.nan], [0.0, 1.0], [np.nan, 0.0]])[:rows]
        score = score[:, :1] if rows == 1 else score
        few = kind({**options, **SHORT}).fit(table_of(score)).score(["a poem"])
        assert np.isfinite(few.mean).all()
        assert np.isfinite(few.std).all()


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_scores_on_any_scale(kind: type[Router], options: dict[str, Any]) -> None:
    table = sample(150, missing=0.0)
    other = table_of(table.score * 40 - 300, experts=table.experts)
    quick = {} if kind is MlpRouter else {"members": 1, "least": 300, "rate": 3e-3}
    told = kind({**options, **quick}).fit(other).score(queries_of(sample(60, seed=1)))
    assert -330 < told.mean.min() < told.mean.max() < -230
    held = sample(60, seed=1, missing=0.0).score
    picked = held[np.arange(60), told.mean.argmax(axis=1)].mean()
    assert picked > held.mean() + 0.15


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_removing_an_expert_leaves_the_others(kind: type[Router], options: dict[str, Any]) -> None:
    router = kind({**options, **SHORT}).fit(sample())
    before = router.score(["a poem", "a loop"])
    after = router.remove_expert("code").score(["a poem", "a loop"])
    assert after.experts == ("sums", "verse", "plain")
    np.testing.assert_allclose(after.mean, before.mean[:, [0, 2, 3]], atol=1e-6)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_the_seed_changes_what_is_learned(kind: type[Router], options: dict[str, Any]) -> None:
    table = sample()
    first, second = (kind({**options, **SHORT}, seed=seed).fit(table).score(["a poem"]) for seed in (0, 1))
    assert (first.mean != second.mean).any()


@pytest.mark.parametrize(("kind", "options"), [*KINDS, (GapRouter, PAIR)])
def test_an_expert_without_scores_is_refused(kind: type[Router], options: dict[str, Any]) -> None:
    table = sample(20)
    table.score[:, 2] = np.nan
    with pytest.raises(MixmergeError, match="no query has a score of verse"):
        kind(options).fit(table)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_wrong_options(kind: type[Router], options: dict[str, Any]) -> None:
    for wrong in ({"members": 0}, {"rate": 0}, {"holdout": 1.0}, {"layers": 3}, {"batch": 0}):
        with pytest.raises(MixmergeError, match=next(iter(wrong))):
            kind(wrong)
    assert EnsembleOptions().members == 3


# --- two experts


def test_labels_by_hand() -> None:
    lead = np.array([0.5, 0.0, -0.1, -0.5, -0.9])
    assert labels(lead, mode="deterministic", tau=0.1)[0].tolist() == [1, 1, 0, 0, 0]
    np.testing.assert_allclose(
        labels(lead, mode="probabilistic", tau=0.1)[0][:2], [1 / (1 + np.exp(-5)), 0.5]
    )
    # Slack 0: 2 of 5 are good enough, 2 p (1 - p) = .48; .1: 3 of 5, .48; the lower slack is taken.
    label, slack = labels(lead, mode="transformed", tau=0.1)
    assert (label.tolist(), slack) == ([1, 1, 0, 0, 0], 0.0)
    label, slack = labels(lead - 0.6, mode="transformed", tau=0.1)
    assert slack == pytest.approx(0.6), "where the weak expert never wins, slack balances the labels"
    assert label.tolist() == [1, 1, 0, 0, 0]


@pytest.mark.parametrize("mode", ["deterministic", "probabilistic", "transformed"])
def test_contract_of_every_mode(mode: str) -> None:
    check_router(lambda: GapRouter({"weak": "code", "strong": "sums", "mode": mode}))


def test_the_gap_is_split_and_others_keep_their_means() -> None:
    table = sample(200, missing=0.0)
    router = GapRouter(PAIR).fit(table)
    told = router.score(queries_of(sample(60, seed=1)))
    mean = table.score.mean(axis=0)
    np.testing.assert_allclose(told.mean[:, 1:3], np.tile(mean[1:3], (60, 1)))
    np.testing.assert_allclose(told.mean[:, 0] + told.mean[:, 3], mean[0] + mean[3])
    task = np.array(sample(60, seed=1).metadata["task"])
    gap = told.mean[:, 0] - told.mean[:, 3]
    assert gap[task == "sums"].mean() > gap[task != "sums"].mean() + 0.2
    reason = router.reasons(["add the digits of a number"])[0]
    assert (reason["weak"], reason["strong"]) == ("plain", "sums")
    assert 0 <= reason["weak_is_enough"] <= 1


def test_which_of_two_is_weak() -> None:
    table = sample(60, missing=0.0)
    two = table.only(("verse", "sums"))
    assert GapRouter(SHORT).fit(two).state.values["weak"] == "sums", "the cheaper by its price"
    score = np.stack([np.arange(30) % 2, np.zeros(30)], axis=1)
    assert GapRouter(SHORT).fit(table_of(score)).state.values["weak"] == "e1", "the worse, without costs"
    said = GapRouter({**SHORT, "weak": "verse"}).fit(two)
    assert (said.state.values["weak"], said.state.values["strong"]) == ("verse", "sums")
    other = GapRouter({**SHORT, "strong": "sums"}).fit(two)
    assert other.state.values["weak"] == "verse"


def test_pairs_that_are_none() -> None:
    table = sample(40)
    with pytest.raises(
        MixmergeError, match=r"there are 4: plain, sums.*|there are 4: code, plain, sums, verse"
    ):
        GapRouter().fit(table)
    with pytest.raises(MixmergeError, match="there are 1: sums"):
        GapRouter().fit(table.only(("sums",)))
    with pytest.raises(MixmergeError, match="no expert is called 'maths'"):
        GapRouter({"weak": "maths", "strong": "sums"}).fit(table)
    with pytest.raises(MixmergeError, match="both weak and strong"):
        GapRouter({"weak": "sums", "strong": "sums"}).fit(table)
    with pytest.raises(MixmergeError, match="mode"):
        GapRouter({"mode": "soft"})
    apart = table_of([[1.0, np.nan], [np.nan, 0.0]])
    with pytest.raises(MixmergeError, match="no query has scores of both"):
        GapRouter().fit(apart)
