"""Policies: every kind against choices worked out by hand, ties, draws, trimming, and all that is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixmerge.decision import Policy, Query, Scores
from mixmerge.decision.draws import draw, likelihoods, trim, uniforms
from mixmerge.errors import MixmergeError

NAMES = ("cheap", "middle", "dear")
MEAN = [[0.5, 0.6, 0.9], [0.7, 0.2, 0.1], [0.3, 0.35, 0.31]]
STD = [[0.1, 0.0, 0.5], [0.0, 0.0, 0.0], [0.2, 0.1, 0.0]]
COST = [[0.001, 0.01, 0.1]] * 3


def scores(
    mean: Sequence[Sequence[float]] = MEAN,
    std: Sequence[Sequence[float]] | None = None,
    cost: Sequence[Sequence[float]] | None = COST,
    experts: tuple[str, ...] = NAMES,
) -> Scores:
    means = np.array(mean, np.float64)
    stds = np.array(STD if std is None and means.shape == (3, 3) else std or np.zeros_like(means), np.float64)
    return Scores(experts, means, stds, None if cost is None else np.array(cost, np.float64))


def asked(count: int, tasks: Sequence[str] | None = None) -> list[Query]:
    return [
        Query(f"question {i}", id=f"q{i}", metadata={} if tasks is None else {"task": tasks[i]})
        for i in range(count)
    ]


def chosen(policy: Policy, of: Scores | None = None) -> list[list[str | None]]:
    """Names of the picks of each query; None for nobody."""
    of = of or scores()
    picks = policy.choose(of, asked(len(of)))
    return [[None if e < 0 else of.experts[e] for e in row] for row in picks.tolist()]


def faults(call: object, *arguments: object, **named: object) -> list[str]:
    with pytest.raises(MixmergeError) as error:
        call(*arguments, **named)  # type: ignore[operator]
    return [str(fault) for fault in error.value.faults]


@pytest.mark.parametrize(
    ("policy", "wanted"),
    [
        (Policy(), [["dear"], ["cheap"], ["middle"]]),
        (
            Policy(kind="top_k", k=2),
            [["dear", "middle"], ["cheap", "middle"], ["middle", "dear"]],
        ),
        # gains of dear over cheap: 0.4, -0.6, 0.01
        (
            Policy(kind="threshold", threshold=0.01 - 1e-9, strong="dear", weak="cheap"),
            [["dear"], ["cheap"], ["dear"]],
        ),
        (
            Policy(kind="threshold", threshold=0.02, strong="dear", weak="cheap"),
            [["dear"], ["cheap"], ["cheap"]],
        ),
        # 0.3 * score - cost: 0.149 0.17 0.17 (tie: the cheaper); 0.209 ...; 0.089 0.095 -0.007
        (
            Policy(kind="willingness_to_pay", willingness_to_pay=0.3),
            [["middle"], ["cheap"], ["middle"]],
        ),
        (Policy(kind="willingness_to_pay", willingness_to_pay=0.0), [["cheap"]] * 3),
        (Policy(kind="budget", budget=0.01, trade=0.31), [["dear"], ["cheap"], ["middle"]]),
        # score - std: 0.4 0.6 0.4; 0.7 0.2 0.1; 0.1 0.25 0.31
        (Policy(kind="lower_bound"), [["middle"], ["cheap"], ["dear"]]),
        (Policy(kind="lower_bound", z=0.0), [["dear"], ["cheap"], ["middle"]]),
        (Policy(abstain_below=0.5), [["dear"], ["cheap"], [None]]),
        (Policy(abstain_below=0.35), [["dear"], ["cheap"], ["middle"]]),
        (Policy(abstain_below=0.5, fallback="cheap"), [["dear"], ["cheap"], ["cheap"]]),
        (
            Policy(kind="top_k", k=2, abstain_below=0.8, fallback="dear"),
            [["dear", "middle"], ["dear", None], ["dear", None]],
        ),
        (Policy(kind="lower_bound", abstain_below=0.5), [["middle"], ["cheap"], [None]]),
    ],
)
def test_choices_by_hand(policy: Policy, wanted: list[list[str | None]]) -> None:
    assert chosen(policy) == wanted


def test_ties_go_to_the_cheaper_then_to_the_first_name() -> None:
    tied = [[0.5, 0.5, 0.5]]
    assert chosen(Policy(), scores(tied, cost=[[3, 1, 2]])) == [["middle"]]
    assert chosen(Policy(), scores(tied, cost=[[3, 1, 1]])) == [["dear"]]  # of dear and middle
    assert chosen(Policy(), scores(tied, cost=[[np.nan, np.nan, 9]])) == [["dear"]]
    assert chosen(Policy(), scores(tied, cost=[[np.nan] * 3])) == [["cheap"]]
    assert chosen(Policy(), scores(tied, cost=None)) == [["cheap"]]
    assert chosen(Policy(kind="top_k", k=3), scores(tied, cost=[[3, 1, 2]])) == [["middle", "dear", "cheap"]]
    # what differs by rounding is a tie, what differs by more is not
    rounding = [[0.5, 0.5 + 1e-16, 0.3 + 0.2]]
    assert chosen(Policy(), scores(rounding, cost=[[1, 2, 3]])) == [["cheap"]]
    assert chosen(Policy(), scores([[0.5, 0.5 + 1e-9, 0.5]], cost=[[1, 2, 3]])) == [["middle"]]


def test_scores_that_are_not_finite_pick_nobody() -> None:
    mean = [[np.nan, 0.1, np.inf], [np.nan] * 3, [-np.inf, np.nan, -0.5]]
    given = scores(mean, std=np.zeros((3, 3)).tolist())
    assert chosen(Policy(), given) == [["middle"], [None], ["dear"]]
    assert chosen(Policy(fallback="cheap"), given) == [["middle"], ["cheap"], ["dear"]]
    assert chosen(Policy(kind="top_k", k=2), given) == [["middle", None], [None, None], ["dear", None]]
    assert chosen(Policy(kind="willingness_to_pay", willingness_to_pay=0.0), given) == [
        ["middle"],
        [None],
        ["dear"],
    ]
    two = Policy(kind="threshold", threshold=-9.0, strong="dear", weak="middle")
    assert chosen(two, given) == [["middle"], [None], ["dear"]]
    drawn = Policy(kind="sample", draws=2).choose(given, asked(3))
    assert drawn.tolist() == [[1, 1], [-1, -1], [2, 2]]


def test_no_queries_no_decisions() -> None:
    empty = Scores(NAMES, np.zeros((0, 3)), np.zeros((0, 3)), np.zeros((0, 3)))
    for policy in (Policy(), Policy(kind="top_k", k=2), Policy(kind="sample", trim=0.05)):
        assert policy.choose(empty, []).shape == (0, policy.k or policy.draws or 1)
        assert policy.decide(empty, []) == []


def test_large_arrays_are_chosen_in_blocks() -> None:
    rng = np.random.default_rng(0)
    mean = rng.random((50_000, 100))
    many = Scores(tuple(f"e{i}" for i in range(100)), mean, np.zeros_like(mean), rng.random(mean.shape))
    assert (Policy().choose(many)[:, 0] == mean.argmax(axis=1)).all()
    assert (Policy(kind="top_k", k=2).choose(many)[:, 1] == np.argsort(-mean, axis=1)[:, 1]).all()


# --- draws


def test_uniforms_are_keyed_by_seed_purpose_and_id() -> None:
    ids = ["a", "b", "ä"]
    first = uniforms(ids, 6, seed=1, purpose="sample")
    assert first.shape == (3, 6)
    assert ((first >= 0) & (first < 1)).all()
    assert (uniforms(ids[::-1], 6, seed=1, purpose="sample") == first[::-1]).all()
    assert (uniforms(ids, 2, seed=1, purpose="sample") == first[:, :2]).all()
    assert (uniforms(ids, 6, seed=2, purpose="sample") != first).all()
    assert (uniforms(ids, 6, seed=1, purpose="trim") != first).all()
    assert uniforms([], 3, seed=0, purpose="x").shape == (0, 3)
    many = uniforms([f"q{i}" for i in range(20_000)], 1, seed=0, purpose="sample")[:, 0]
    count = np.histogram(many, bins=10, range=(0, 1))[0]
    assert ((count - 2000) ** 2 / 2000).sum() < 27.9  # chi-squared with 9 degrees of freedom, 0.1 %


def test_likelihoods_by_hand() -> None:
    # 0.2 and 0.4 to the power of 2: 1 to 4
    assert likelihoods(np.array([[0.2, 0.4, 0.0, -1.0]]), 0.5).tolist() == [
        [pytest.approx(0.2), pytest.approx(0.8), 0, 0]
    ]
    assert likelihoods(np.array([[0.2, 0.4]]), 1.0)[0] == pytest.approx([1 / 3, 2 / 3])
    # none above 0: moved up until the worst has 1
    assert likelihoods(np.array([[-3.0, -1.0, -np.inf]]), 1.0)[0] == pytest.approx([0.25, 0.75, 0.0])
    assert likelihoods(np.array([[0.5, 0.5001]]), 1e-6)[0] == pytest.approx([0, 1])


def test_draw_by_hand() -> None:
    chance = np.array([[0.0, 0.25, 0.75, 0.0]])
    assert draw(chance, np.array([[0.0, 0.24, 0.25, 0.99, 1 - 2**-53]])).tolist() == [[1, 1, 2, 2, 2]]
    assert draw(np.array([[0.1] * 10]), np.array([[1 - 2**-53]])).tolist() == [[9]]


def test_samples_follow_their_chances() -> None:
    mean = np.tile([0.2, 0.4, 0.0], (20_000, 1))
    picks = Policy(kind="sample", draws=1).choose(Scores(NAMES, mean, mean * 0), asked(20_000))
    share = np.bincount(picks[:, 0], minlength=3) / 20_000
    assert share == pytest.approx([0.2, 0.8, 0.0], abs=0.012)  # 4 standard errors
    assert share[2] == 0


def test_trimming_by_hand() -> None:
    # 40 draws: 0 has 30, 1 has 9, 2 has 1, which is less than 5 %
    picks = np.array([[0, 0, 0, 0]] * 7 + [[0, 1, 1, 1]] * 2 + [[1, 1, 1, 2]])
    ids = [f"q{i}" for i in range(10)]
    able = np.ones((10, 3), bool)
    kept = trim(picks, able=able, share=0.05, ids=ids, tasks=[""] * 10, seed=0)
    assert (kept[picks != 2] == picks[picks != 2]).all()
    assert kept[9, 3] in (0, 1)
    assert (picks[9, 3], trim(picks, able=able, share=0.025, ids=ids, tasks=[""] * 10, seed=0)[9, 3]) == (
        2,
        2,
    )
    # with the last query alone in its task, a quarter of its draws is enough
    tasks = ["x"] * 9 + ["y"]
    assert (trim(picks, able=able, share=0.25, ids=ids, tasks=tasks, seed=0)[9] == picks[9]).all()
    assert (trim(picks, able=able, share=0.26, ids=ids, tasks=tasks, seed=0)[9] == [1, 1, 1, 1]).all()
    # nobody has half: nobody is removed
    even = np.array([[0, 1, 2]])
    assert (trim(even, able=able[:1], share=0.5, ids=["a"], tasks=[""], seed=0) == even).all()
    # a query whose experts all but one are unable
    able[9] = [False, True, True]
    assert kept.shape == trim(picks, able=able, share=0.05, ids=ids, tasks=[""] * 10, seed=3).shape
    for seed in range(20):
        assert trim(picks, able=able, share=0.05, ids=ids, tasks=[""] * 10, seed=seed)[9, 3] == 1


def test_trimmed_draws_go_where_the_others_went() -> None:
    # 4,000 queries: rare experts with 4 % together 8 %, the others 23:69
    mean = np.tile(np.sqrt([0.04, 0.04, 0.23, 0.69]), (4000, 1))
    four = Scores(("a", "b", "c", "d"), mean, mean * 0)
    picks = Policy(kind="sample", draws=1, trim=0.05).choose(four, asked(4000))[:, 0]
    share = np.bincount(picks, minlength=4) / 4000
    assert share[:2].tolist() == [0, 0]
    assert share[2:] == pytest.approx([0.25, 0.75], abs=0.03)
    plain = Policy(kind="sample", draws=1).choose(four, asked(4000))[:, 0]
    assert (picks[plain >= 2] == plain[plain >= 2]).all()


def test_who_abstains_is_not_counted_in_trimming() -> None:
    mean = np.array([[1.0, 1e-9]] * 30 + [[1e-9, 0.4]] * 1)
    two = Scores(("a", "b"), mean, mean * 0)
    policy = Policy(kind="sample", draws=1, trim=0.05, abstain_below=0.5)
    assert policy.choose(two, asked(31))[:, 0].tolist() == [0] * 30 + [-1]
    without = Policy(kind="sample", draws=1, trim=0.05)
    assert without.choose(two, asked(31))[:, 0].tolist() == [0] * 31


_POLICIES = [
    Policy(),
    Policy(kind="top_k", k=2),
    Policy(kind="sample", draws=4, trim=0.2, seed=5),
    Policy(kind="threshold", threshold=0.1, strong="e1", weak="e0", abstain_below=0.3),
    Policy(kind="willingness_to_pay", willingness_to_pay=2.0),
    Policy(kind="budget", budget=1.0, trade=0.5, above=4.0, share=0.5),
    Policy(kind="lower_bound", z=0.7, abstain_below=0.2, fallback="e1"),
]


@settings(max_examples=60, deadline=None)
@given(
    policy=st.sampled_from(_POLICIES),
    values=st.lists(
        st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9]), min_size=3, max_size=3), min_size=1, max_size=12
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_order_matters(policy: Policy, values: list[list[float]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    mean = np.array(values)
    std, cost = rng.choice([0.0, 0.1], mean.shape), rng.choice([1.0, 2.0], mean.shape)
    names, queries = np.array(["e0", "e1", "e2"]), asked(len(mean), [str(i % 2) for i in range(len(mean))])
    rows, experts = rng.permutation(len(mean)), rng.permutation(3)
    other = Scores(tuple(names[experts]), *(x[rows][:, experts] for x in (mean, std, cost)))
    first = policy.decide(Scores(tuple(names), mean, std, cost), queries)
    second = policy.decide(other, [queries[q] for q in rows])
    for at, q in enumerate(rows):
        assert second[at].as_dict() == first[q].as_dict()


def test_an_id_gets_the_same_draws_in_any_batch() -> None:
    mean = np.full((8, 3), 0.5)
    policy, queries = Policy(kind="sample", draws=3), asked(8)
    together = policy.choose(Scores(NAMES, mean, mean * 0), queries)
    alone = [policy.choose(Scores(NAMES, mean[:1], mean[:1] * 0), [query])[0] for query in queries]
    assert (together == np.array(alone)).all()
    other = Policy(kind="sample", draws=3, seed=1).choose(Scores(NAMES, mean, mean * 0), queries)
    assert (together != other).any()


def test_a_share_of_the_queries_is_decided_at_the_higher_trade() -> None:
    mean = np.tile([0.0, 1.0], (10_000, 1))
    two = Scores(("a", "b"), mean, mean * 0, np.tile([0.0, 1.0], (10_000, 1)))
    policy = Policy(kind="budget", budget=0.3, trade=0.5, above=2.0, share=0.3)
    picks = policy.choose(two, asked(10_000))[:, 0]
    assert picks.mean() == pytest.approx(0.3, abs=0.019)
    more = Policy(kind="budget", budget=0.4, trade=0.5, above=2.0, share=0.4).choose(two, asked(10_000))[:, 0]
    assert (more >= picks).all()


# --- decisions


def test_a_decision_says_why() -> None:
    policy = Policy(abstain_below=0.32, fallback="cheap")
    first, second, third = policy.decide(
        scores(), asked(3), version="v1", reasons=[{"neighbours": [1]}, {"std": 9}, {}]
    )
    assert first.query_id == "q0"
    assert [pick.expert for pick in first.picks] == ["dear"]
    assert first.primary == "dear"
    assert first.scores == {"cheap": 0.5, "middle": 0.6, "dear": 0.9}
    assert first.policy == "argmax(fallback=cheap, abstain_below=0.32)"
    assert first.version == "v1"
    assert first.reason == {
        "rule": "highest expected score",
        "score": 0.9,
        "std": 0.5,
        "cost": 0.1,
        "margin": pytest.approx(0.3),
        "neighbours": [1],
    }
    assert second.reason["std"] == 0.0  # the router's entries do not replace the policy's
    assert third.primary == "middle"
    strict = Policy(abstain_below=0.4).decide(scores(), asked(3))[2]
    assert strict.abstains
    assert strict.primary is None
    assert strict.reason["rule"] == "the best expected score 0.35 is below 0.4: nobody answers"
    assert strict.reason["cost"] == 0.0
    assert strict.reason["margin"] == pytest.approx(-0.05)
    kept = Policy(abstain_below=0.4, fallback="dear").decide(scores(), asked(3))[2]
    assert (kept.primary, kept.reason["score"], kept.reason["cost"]) == ("dear", 0.31, 0.1)
    assert kept.reason["rule"].endswith("below 0.4: the fallback dear answers")


@pytest.mark.parametrize(
    "policy", [*(p for p in _POLICIES if not p.experts()), Policy(kind="sample", draws=9)]
)
def test_decisions_are_json_whatever_the_scores(policy: Policy) -> None:
    mean = [[0.1, 0.2, 0.3], [np.nan, np.inf, -np.inf], [np.nan, 0.5, 0.5]]
    made = policy.decide(scores(mean, std=[[0.1] * 3] * 3), asked(3))
    for decision in made:
        json.dumps(decision.as_dict(), allow_nan=False)
    assert made[1].abstains
    assert made[1].reason["rule"] == "no expert has a score: nobody answers"
    picks = policy.choose(scores(mean, std=[[0.1] * 3] * 3), asked(3))
    for decision, row in zip(made, picks.tolist(), strict=True):
        assert [pick.expert for pick in decision.picks] == [NAMES[e] for e in row if e >= 0]


def test_repeated_draws_are_numbered_and_paid_for() -> None:
    given = scores([[0.0, 1.0, 0.0]], cost=[[1.0, 2.0, 4.0]])
    (decision,) = Policy(kind="sample", draws=3).decide(given, asked(1))
    assert [(pick.expert, pick.draw, pick.weight) for pick in decision.picks] == [
        ("middle", 0, 1.0),
        ("middle", 1, 1.0),
        ("middle", 2, 1.0),
    ]
    assert decision.reason["cost"] == 6.0


def test_rules_and_margins_of_the_kinds() -> None:
    def first(policy: Policy) -> tuple[str, float]:
        reason = policy.decide(scores(), asked(3))[0].reason
        return reason["rule"], reason["margin"]

    two = Policy(kind="threshold", threshold=0.1, strong="dear", weak="cheap")
    assert first(two) == ("dear is expected to gain 0.4 over cheap: at least 0.1", pytest.approx(0.4))
    paying = Policy(kind="willingness_to_pay", willingness_to_pay=1.0)
    assert first(paying) == ("highest 1 * score - cost", pytest.approx(0.8 - 0.59))
    bound = Policy(kind="lower_bound")
    assert first(bound) == ("highest expected score - 1.0 * std", pytest.approx(0.2))
    assert first(Policy(kind="top_k", k=2))[0] == "the 2 highest expected scores"
    budget = Policy(kind="budget", budget=0.01, trade=0.31)
    assert first(budget)[0] == "highest 0.31 * score - cost, for a mean of at most $0.01 a query"


# --- what a policy is


def test_descriptions() -> None:
    assert Policy().describe() == "argmax"
    assert Policy(kind="top_k", k=3, fallback="tutor").describe() == "top_k(k=3, fallback=tutor)"
    assert str(Policy(kind="sample", seed=4)) == "sample(draws=3, temperature=0.5, seed=4)"
    assert Policy(kind="sample", trim=0.05).describe() == "sample(draws=3, temperature=0.5, trim=0.05)"
    assert Policy(kind="lower_bound", z=2).describe() == "lower_bound(z=2.0)"


@pytest.mark.parametrize("policy", _POLICIES)
def test_a_policy_is_its_json(policy: Policy) -> None:
    assert Policy(**json.loads(json.dumps(policy.as_dict()))) == policy


def test_but_replaces_what_is_given() -> None:
    policy = Policy(kind="top_k", k=2, fallback="a")
    assert policy.but() == policy
    assert policy.but(fallback="b", abstain_below=0.1) == Policy(
        kind="top_k", k=2, fallback="b", abstain_below=0.1
    )


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (
            {"kind": "argmax", "k": 3},
            ["policy.k: argmax does not use it. argmax takes fallback, abstain_below, seed."],
        ),
        ({"kind": "topk"}, ["policy.kind: no policy is called 'topk'. Did you mean 'top_k'? Known: "]),
        ({"kind": ["x"]}, ["policy.kind: no policy is called ['x']"]),
        ({"kind": "top_k"}, ["policy.k: top_k needs it."]),
        ({"kind": "top_k", "k": 0}, ["policy.k: should be greater than or equal to 1, got 0."]),
        ({"kind": "top_k", "k": "3"}, ["policy.k: should be a valid integer, got '3'."]),
        ({"kind": "top_k", "k": True}, ["policy.k: should be a valid integer, got True."]),
        ({"abstain_below": float("nan")}, ["policy.abstain_below: should be a finite number, got nan."]),
        (
            {"abstain_blow": 0.1},
            ["policy.abstain_blow: there is no such field. Did you mean 'abstain_below'?"],
        ),
        ({"seed": -1}, ["policy.seed: should be greater than or equal to 0, got -1."]),
        ({"kind": "sample", "temperature": 0.0}, ["policy.temperature: should be greater than 0, got 0.0."]),
        ({"kind": "sample", "trim": 1.0}, ["policy.trim: should be less than 1, got 1.0."]),
        (
            {"kind": "threshold", "strong": "a"},
            ["policy.threshold: threshold needs it.", "policy.weak: threshold needs it."],
        ),
        (
            {"kind": "threshold", "threshold": 0.1, "strong": "a", "weak": "a"},
            ["policy.weak: is a, as strong is."],
        ),
        ({"kind": "budget", "budget": 0.0}, ["policy.budget: should be greater than 0, got 0.0."]),
        (
            {"kind": "budget", "budget": 1.0, "trade": 1.0, "share": 0.5},
            ["policy.above: above and share go together."],
        ),
        (
            {"kind": "budget", "budget": 1.0, "trade": 1.0, "above": 0.5, "share": 0.5},
            ["policy.above: is the higher"],
        ),
        ({"kind": "willingness_to_pay"}, ["policy.willingness_to_pay: willingness_to_pay needs it."]),
        (
            {"kind": "top_k", "k": -1, "z": 1.0, "zz": 1, "fallback": ""},
            ["policy.zz: there is", "policy.z: top_k does", "policy.k: should be", "policy.fallback: "],
        ),
    ],
)
def test_what_no_policy_can_be(given: dict[str, object], wanted: list[str]) -> None:
    found = faults(Policy, **given)
    assert len(found) == len(wanted)
    for said, start in zip(found, wanted, strict=True):
        assert said.startswith(start)


@pytest.mark.parametrize(
    ("policy", "given", "wanted"),
    [
        (
            Policy(fallback="deer"),
            scores(),
            "policy.fallback: no expert is called 'deer'. Did you mean 'dear'?",
        ),
        (Policy(kind="top_k", k=4), scores(), "policy.k: there are only 3 experts. At most 3."),
        (
            Policy(kind="willingness_to_pay", willingness_to_pay=1.0),
            scores(cost=None),
            "policy: willingness_to_pay needs costs, and the router knows none.",
        ),
        (
            Policy(kind="budget", budget=1.0, trade=1.0),
            scores(cost=[[1, np.nan, 1], [1, 1, 1], [1, 1, 1]]),
            "policy: budget needs costs, and the router knows none of middle.",
        ),
        (
            Policy(kind="budget", budget=1.0),
            scores(),
            "policy.trade: a budget needs the trade that keeps it.",
        ),
    ],
)
def test_what_cannot_be_decided(policy: Policy, given: Scores, wanted: str) -> None:
    (said,) = faults(policy.choose, given, asked(3))
    assert said.startswith(wanted)
    (said,) = faults(policy.decide, given, asked(3))
    assert said.startswith(wanted)


def test_queries_that_do_not_fit() -> None:
    assert faults(Policy().choose, scores(), asked(2)) == ["queries: there are 2, and scores of 3."]
    assert faults(Policy(kind="sample").choose, scores())[0].startswith(
        "queries: sample draws by the queries' ids"
    )
    assert faults(Policy().decide, scores(), asked(3), reasons=[{}]) == ["reasons: there are 1 of 3 queries."]
    both = Policy(kind="threshold", threshold=0.0, strong="x", weak="y", fallback="z")
    assert len(faults(both.choose, scores(), asked(3))) == 3
