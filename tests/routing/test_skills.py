"""The skill router: extraction, profiles, matching, expected scores, Symbolic-MoE's weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixmerge.decision.records import Query
from mixmerge.engines.callables import generator
from mixmerge.engines.local import TransformersEngine
from mixmerge.errors import MixmergeError
from mixmerge.outcomes.table import OutcomeTable
from mixmerge.routers import profiles
from mixmerge.routers.base import Router
from mixmerge.routers.contract import check_router, queries_of, sample
from mixmerge.routers.features import TfidfFeatures
from mixmerge.routers.keywords import Salience, asked_skills, named_skills
from mixmerge.routers.skills import SkillRouter

NONE = np.nan


def table_of(skills: Sequence[str], score: Sequence[Sequence[float]], *experts: str) -> OutcomeTable:
    """Outcomes on queries whose skills are known."""
    return OutcomeTable(
        ids=tuple(f"q{n}" for n in range(len(skills))),
        queries=tuple(f"question {n}" for n in range(len(skills))),
        experts=experts or tuple("abcdef"[: len(score[0])]),
        score=np.array(score, np.float64),
        metadata={"skills": tuple(skills)},
    )


def query(skills: str, text: str = "of whatever") -> Query:
    return Query(text, metadata={"skills": skills})


def mentions(*skills: Sequence[int]) -> profiles.Mentions:
    pairs = [(row, place) for row, places in enumerate(skills) for place in places]
    row, place = (np.array(column, np.int64) for column in zip(*pairs, strict=True))
    return profiles.Mentions(row, place[:, None], len(skills))


# --- the contract


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"match": "expert", "floor": 0.3},
        {"profile": "counts", "floor": 0, "temperature": 1.0},
        {"scores": "weights"},
        {"each": 1, "least": 1, "floor": 0.9},
    ],
)
def test_contract(options: dict[str, Any]) -> None:
    check_router(lambda: SkillRouter(options))


def test_skills_that_are_given() -> None:
    table = sample()
    held = [Query(q.text, q.id, {"skills": q.metadata["task"]}) for q in queries_of(sample(30, seed=1))]
    outcomes = OutcomeTable(
        table.ids, table.queries, table.experts, table.score, metadata={"skills": table.metadata["task"]}
    )
    picks = SkillRouter().fit(outcomes).score(held).mean.argmax(axis=1)
    assert [table.experts[e] for e in picks] == [q.metadata["skills"] for q in held]


# --- profiles, by hand: skills x, y; experts a, b, c


SKILLS = ("x", "x", "x, y", "y", "")
SCORE = ((1, 0, 1), (1, 0, NONE), (0, 1, 1), (0, 1, 1), (1, 0, 1))


def test_profiles_of_counts() -> None:
    router = SkillRouter({"profile": "counts"}).fit(table_of(SKILLS, SCORE))
    # x: a right, right, wrong; b wrong, wrong, right; c right, right. y: two queries.
    assert router.profiles() == {"a": {"x": 1, "y": -2}, "b": {"x": -1, "y": 2}, "c": {"x": 2, "y": 2}}
    # G: -1, 1, 4, raised by 2: 1, 3, 6, squared: 1, 9, 36, of 46
    shares = np.array([1, 9, 36]) / 46
    statistic = router._fitted().arrays["statistic"]
    np.testing.assert_allclose(profiles.competency(statistic), shares)
    # x: a and c are suited, 1 x 1 and 2 x 36. y: b and c, 2 x 9 and 2 x 36. Both: b 1 x 9 and c 4 x 36.
    weights = router.weights([query("x"), query("y"), query("x, y"), query("", "?")])
    expected = [[1 / 73, 0, 72 / 73], [0, 18 / 90, 72 / 90], [0, 9 / 153, 144 / 153], [1 / 3] * 3]
    np.testing.assert_allclose(weights, expected)
    # At temperature 1, as in Avengers: 1, 3, 6 of 10
    np.testing.assert_allclose(profiles.competency(statistic, 1.0), np.array([1, 3, 6]) / 10)


def test_nobody_is_suited() -> None:
    # S = -3, -1, -1, raised by 4 to 1, 3, 3; nobody is left out
    given = profiles.chances(np.array([[-3.0, -1, -1]]), np.array([0.5, 0.25, 0.25]), np.array([True]))
    np.testing.assert_allclose(given, [[0.5 / 2, 0.75 / 2, 0.75 / 2]])
    # The only one that is suited is worth nothing over all
    given = profiles.chances(np.array([[2.0, 0, 0]]), np.array([0.0, 0.5, 0.5]), np.array([True]))
    np.testing.assert_allclose(given, [[1, 0, 0]])


@given(
    st.lists(st.lists(st.integers(-5, 5), min_size=3, max_size=3), min_size=1, max_size=4),
    st.floats(0.05, 20),
)
def test_weights_are_shares(rows: list[list[int]], temperature: float) -> None:
    statistic = np.array(rows, np.float64)
    competent = profiles.competency(statistic, temperature)
    assert competent.sum() == pytest.approx(1)
    assert (competent >= 0).all()
    given = profiles.chances(statistic, competent, np.ones(len(rows), np.bool_))
    np.testing.assert_allclose(given.sum(axis=1), 1)
    assert (given >= 0).all()
    suited = (statistic > 0) & (statistic > 0).any(axis=1, keepdims=True)
    assert not given[(statistic > 0).any(axis=1)][~suited[(statistic > 0).any(axis=1)]].any()


def test_shrunk_profiles_do_not_count_frequency() -> None:
    skills = ["often"] * 100 + ["once", "rare", "rare"] + ["other"] * 100
    score = [[1, 0]] * 70 + [[0, 1]] * 30 + [[1, 1], [1, 0], [1, 0]] + [[0, 0]] * 80 + [[1, 1]] * 20
    counts = SkillRouter({"profile": "counts"}).fit(table_of(skills, score)).profiles()["a"]
    shrunk = SkillRouter().fit(table_of(skills, score)).profiles()["a"]
    assert counts == {"often": 40, "once": 1, "rare": 2, "other": -60}
    # 70 of 100 is 0.4 on the scale from -1 to 1; what was seen once or twice is drawn to the mean, 93 of 203
    assert shrunk["often"] == pytest.approx(0.4, abs=0.02)
    assert shrunk["other"] == pytest.approx(-0.6, abs=0.02)
    assert -0.084 < shrunk["once"] < shrunk["rare"] < 0.9
    assert counts["rare"] < counts["often"]


def test_expected_scores_by_hand() -> None:
    # Two skills of 50 queries each: a scores 0.8 and 0.2, so the mean is 0.5
    skills = ["x"] * 50 + ["y"] * 50
    score = [[1.0]] * 40 + [[0.0]] * 10 + [[1.0]] * 10 + [[0.0]] * 40
    values = np.array(score)
    done = profiles.tally(mentions(*[[0]] * 50, *[[1]] * 50), values, values, skills=2)
    assert done.total.tolist() == [[40], [10]]
    assert done.count.tolist() == [[50], [50]]
    assert profiles.signed_counts(done).tolist() == [[30], [-30]]
    variance = 100 * 0.25 / 99
    # between: 100 x 0.09; sizes: 100 - 5000/100 = 50; excess (9 - variance) / 50
    worth = variance / ((9 - variance) / 50)
    gain = (40 + worth * 0.5) / (50 + worth) - 0.5
    made = profiles.Expectation.fit(mentions(*[[0]] * 50, *[[1]] * 50), done, values)
    np.testing.assert_allclose(made.gain[:, 0], [gain, -gain])
    np.testing.assert_allclose(made.spread, np.sqrt(variance / (50 + worth)))
    np.testing.assert_allclose(made.doubt, np.sqrt(variance / worth))
    assert 0.9 < made.slope[0] < 1.1
    router = SkillRouter().fit(table_of(skills, score))
    scores = router.score([query("x"), query("y"), query("x, y"), query("", "?")])
    slope = made.slope[0]
    np.testing.assert_allclose(scores.mean[:, 0], [0.5 + slope * gain, 0.5 - slope * gain, 0.5, 0.5])
    assert scores.mean[0, 0] == pytest.approx(0.8, abs=0.02)
    np.testing.assert_allclose(scores.std[:, 0], [*[np.sqrt(variance / (50 + worth))] * 3, made.doubt[0]])


def test_the_slope_is_of_queries_held_out() -> None:
    """Every skill is seen twice and says nothing: what looks like knowledge on its own queries is not believed."""
    rng = np.random.default_rng(0)
    skills = [f"skill {n // 2}" for n in range(400)]
    noise = SkillRouter().fit(table_of(skills, (rng.random((400, 1)) < 0.5).astype(float).tolist()))
    assert np.ptp(noise.score([query(one) for one in skills]).mean) < 0.25
    told = SkillRouter().fit(table_of(skills, [[float(n // 2 % 2)] for n in range(400)]))
    given = told.score([query(one) for one in skills]).mean[:, 0]
    np.testing.assert_allclose(given, [n // 2 % 2 for n in range(400)], atol=0.2)


def test_expected_scores_are_calibrated() -> None:
    train, held = sample(600), sample(600, seed=1, missing=0.0)
    mean = SkillRouter().fit(train).score(queries_of(held)).mean[:, :3]
    assert held.score[:, :3].mean() == pytest.approx(mean.mean(), abs=0.03)
    slope, _ = np.polyfit(mean.ravel(), held.score[:, :3].ravel(), 1)
    assert slope == pytest.approx(1, abs=0.15)
    assert ((held.score[:, :3] - mean) ** 2).mean() < 0.75 * held.score[:, :3].var()


def test_missing_outcomes() -> None:
    # b has none at x: it gets its mean there, and adds nothing to its weight
    router = SkillRouter({"profile": "counts"}).fit(
        table_of(["x", "x", "y", "y"], [[1, NONE], [1, NONE], [0, 1], [1, 1]])
    )
    assert router.profiles() == {"a": {"x": 2, "y": 0}, "b": {"y": 2}}
    scores = router.score([query("x"), query("y")])
    assert scores.mean[0, 1] == 1.0
    assert router.weights([query("x")]).tolist() == [[1.0, 0.0]]


# --- matching


def test_the_nearest_skill_and_the_floor() -> None:
    outcomes = table_of(["algebra"] * 20 + ["poetry"] * 20, [[1, 0]] * 20 + [[0, 1]] * 20)
    router = SkillRouter().fit(outcomes)
    asked = [query("algebraic"), query("zoology"), query("algebra, zoology")]
    near, far, _ = router.reasons(asked)
    reason = near["skills"][0]["experts"]["a"]
    assert (reason["as"], reason["right"], reason["count"]) == ("algebra", 20, 20)
    assert 0.5 < reason["similarity"] < 1
    assert far["skills"] == [{"skill": "zoology", "experts": {}}]
    mean = router.score(asked).mean
    assert mean[0, 0] > 0.9
    np.testing.assert_allclose(mean[1], [0.5, 0.5])
    np.testing.assert_allclose(mean[2], mean[0])
    assert router.weights(asked).tolist() == [[1, 0], [0.5, 0.5], [1, 0]]
    anything = SkillRouter({"floor": 0}).fit(outcomes)
    assert anything.reasons(asked)[1]["skills"][0]["experts"]["a"]["as"] in ("algebra", "poetry")
    assert anything.score(asked).mean[1, 0] != 0.5
    strict = SkillRouter({"floor": 0.99}).fit(outcomes)
    np.testing.assert_allclose(strict.score(asked).mean[0], [0.5, 0.5])


def test_matching_for_each_expert() -> None:
    # b has no outcome on algebra: of its own skills algebraic is the nearest
    outcomes = table_of(["algebra", "algebra", "algebraic", "poetry"], [[1, NONE], [1, NONE], [0, 1], [0, 0]])
    union = SkillRouter({"profile": "counts"}).fit(outcomes)
    own = SkillRouter({"profile": "counts", "match": "expert"}).fit(outcomes)
    assert union.reasons([query("algebra")])[0]["skills"][0]["experts"]["b"]["count"] == 0
    reason = own.reasons([query("algebra")])[0]["skills"][0]["experts"]
    assert (reason["a"]["as"], reason["b"]["as"]) == ("algebra", "algebraic")
    # S: a 2, b 0 or 1; G: a 0, b 0
    assert union.weights([query("algebra")]).tolist() == [[1, 0]]
    np.testing.assert_allclose(own.weights([query("algebra")]), [[2 / 3, 1 / 3]])


def test_an_expert_that_is_added_is_profiled_by_the_same_skills() -> None:
    outcomes = table_of(["algebra"] * 6 + ["poetry"] * 6, [[1]] * 6 + [[0]] * 6, "a")
    router = SkillRouter({"profile": "counts"}).fit(outcomes)
    before = router.score([query("poetry")]).mean
    more = table_of(["algebraic", "poetry", "zoology"], [[1], [1], [0]], "new")
    router.add_expert(more)
    assert router.profiles()["new"] == {"algebra": 1, "poetry": 1}
    np.testing.assert_array_equal(router.score([query("poetry")]).mean[:, :1], before)
    router.remove_expert("a")
    assert list(router.profiles()) == ["new"]


def test_outcomes_without_any_skill(tmp_path: Path) -> None:
    router = SkillRouter().fit(table_of(["", "", ""], [[1, 0], [0, 0], [0, 1]]))
    assert router.profiles() == {"a": {}, "b": {}}
    router.save(tmp_path / "router")
    for one in (router, Router.load(tmp_path / "router")):
        scores = one.score(["a moon", query("algebra")])
        np.testing.assert_allclose(scores.mean, [[1 / 3, 1 / 3]] * 2)
        assert np.isfinite(scores.std).all()
    np.testing.assert_allclose(router.weights(["x", query("y")]), 0.5)


def test_reasons_are_json_and_have_the_weights() -> None:
    import json

    router = SkillRouter({"profile": "counts"}).fit(table_of(SKILLS, SCORE))
    (reason,) = json.loads(json.dumps(router.reasons([query("x, y")], top=1)))
    assert [one["skill"] for one in reason["skills"]] == ["x"]
    assert reason["skills"][0]["experts"]["b"] == {
        "as": "x",
        "similarity": 1.0,
        "right": 1,
        "count": 3,
        "expected": pytest.approx(router._fitted().arrays["gain"][0, 1] + 0.4),
    }
    assert reason["weights"] == pytest.approx({"a": 0, "b": 9 / 153, "c": 144 / 153})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"floor": 1}, "floor"),
        ({"temperature": 0}, "temperature"),
        ({"passes": 2, "seen": 3}, "seen is 3, and there are 2 passes"),
        ({"profile": "raw"}, "'shrunk' or 'counts'"),
        ({"k": 3}, "no such option"),
    ],
)
def test_wrong_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(MixmergeError, match=words):
        SkillRouter(options)


# --- skills of a text: a model names them


@pytest.mark.parametrize(
    ("answer", "skills"),
    [
        ("Algebra, Number Theory.", ("algebra", "number theory")),
        ("Skills: algebra; U.S. history\ncalculus", ("algebra", "us history", "calculus")),
        ("**Keywords:** algebra", ("algebra",)),
        ("Here are the skills:\n1. Algebra\n2) *Geometry*\n- algebra", ("algebra", "geometry")),
        ("x" * 20 + "," + "y" * 21, ("x" * 20,)),
        (" ., ,;\n", ()),
    ],
)
def test_skills_in_an_answer(answer: str, skills: tuple[str, ...]) -> None:
    assert named_skills(answer) == skills


@given(st.text(max_size=60))
def test_skills_in_any_answer(answer: str) -> None:
    for skill in named_skills(answer):
        assert 0 < len(skill) <= 20
        assert skill == " ".join(skill.split())
        assert "." not in skill


class Script:
    """Says what is written for a text, pass by pass, and keeps what it was asked."""

    def __init__(self, answers: dict[str, list[str]]) -> None:
        self.answers, self.asked = answers, list[tuple[str, int]]()

    def __call__(
        self, prompts: Sequence[str], *, max_new_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[str]:
        assert temperature == 0.7
        said = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            text = prompt.partition("Question: ")[2].partition("\n\nSkills:")[0]
            said.append(self.answers[text][sum(text == other for other, _ in self.asked) % 5])
            self.asked.append((text, seed))
        return said


def test_what_is_named_twice_is_kept() -> None:
    script = Script(
        {
            "sum": ["algebra, sums", "Algebra.", "sums", "algebra, algebra, once", "counting things all day"],
            "ode": ["poetry", "verse", "rhyme", "", "odes"],
        }
    )
    assert asked_skills(["sum", "ode", "sum"], script) == [("algebra", "sums"), (), ("algebra", "sums")]
    assert len(script.asked) == 10
    seeds = {seed for _, seed in script.asked}
    assert len(seeds) == 10
    again = Script(script.answers)
    asked_skills(["ode"], again)
    assert [seed for _, seed in again.asked] == [seed for text, seed in script.asked if text == "ode"]
    assert asked_skills(["sum"], Script(script.answers), seen=1)[0] == ("algebra", "sums", "once")
    assert asked_skills(["sum"], Script(script.answers), seen=3) == [("algebra",)]


def test_a_router_that_asks(tmp_path: Path) -> None:
    answers = {f"question {n}": [["algebra", "poetry"][n % 2]] * 5 for n in range(20)}
    script = Script({**answers, "new": ["poetry"] * 5})
    outcomes = table_of([""] * 20, [[1.0, 0.0] if n % 2 == 0 else [0.0, 1.0] for n in range(20)])
    router = SkillRouter(generate=script).fit(outcomes)
    assert list(router.profiles()["a"]) == ["algebra", "poetry"]
    mean = router.score(["new"]).mean
    assert mean[0, 1] > 0.8 > 0.2 > mean[0, 0]
    router.reasons(["new"])
    assert len(script.asked) == 5 * 21, "scores and reasons of a query ask once"
    router.save(tmp_path / "router")
    loaded = Router.load(tmp_path / "router")
    assert isinstance(loaded, SkillRouter)
    np.testing.assert_array_equal(loaded.score([query("poetry")]).mean, mean)
    with pytest.raises(MixmergeError, match=r"has none now.*router\.generate"):
        loaded.score(["new"])
    loaded.generate = script
    np.testing.assert_array_equal(loaded.score(["new"]).mean, mean)


def test_a_real_model_names_skills(family: Callable[..., Any], tmp_path: Path) -> None:
    """It talks nonsense, and the pipeline holds."""
    engine = TransformersEngine(str(family("llama", dtype="float32").base), name="tiny")
    short = {"asking_temperature": 0.2, "seen": 1, "passes": 2}

    def generate(prompts: Sequence[str], **options: Any) -> list[str]:
        return generator(engine)([prompt[-40:] for prompt in prompts], **options)  # its context is 64 tokens

    outcomes = sample(12)
    router = SkillRouter(short, generate=generate).fit(outcomes)
    scores = router.score(queries_of(sample(5, seed=1)))
    assert np.isfinite(scores.mean).all()
    again = SkillRouter(short, generate=generate).fit(outcomes)
    np.testing.assert_array_equal(again.score(["x"]).mean, router.score(["x"]).mean)
    assert all(len(skill) <= 20 for skill in router._fitted().values["vocabulary"])


# --- or its salient words


def test_salient_words_by_hand() -> None:
    texts = ["The linear equation of a moon", "a linear equation", "Moon moon, river", "river and the sun"]
    salience = Salience.fit(texts, least=2)
    assert set(salience.weight) == {"linear", "equation", "linear equation", "moon", "river"}
    assert salience.weight["moon"] == pytest.approx(np.log(5 / 3) + 1)
    assert salience.skills("What is the linear equation of this moon?") == ("linear equation", "moon")
    assert salience.skills("the moon and a moon; a river") == ("moon", "river")
    # words that stand apart are no pair, and what the corpus does not know is the last resort
    assert salience.skills("equation, linear") == ("equation", "linear")
    assert salience.skills("An unknown zebra, zebra") == ("zebra", "unknown")
    assert salience.skills("of the 12 + 3?") == salience.skills("a zebra", known_only=True) == ()
    assert Salience.from_dict(salience.as_dict()) == salience
    assert Salience.fit(texts, least=2, most=2, each=1).skills(texts[0]) == ("equation",)
    assert Salience.fit(["the answer"] * 9 + ["the answer now"]).weight == {}


@given(st.lists(st.text(max_size=40), max_size=8), st.randoms())
def test_salient_words_of_any_texts(texts: list[str], random: Any) -> None:
    salience = Salience.fit(texts, least=1, each=3)
    assert Salience.fit(random.sample(texts, len(texts)), least=1, each=3) == salience
    for text in texts:
        skills = salience.skills(text)
        assert len(skills) <= 3
        assert len(set(skills)) == len(skills)
        assert all(skill.strip() and len(skill) <= 20 for skill in skills)


def test_other_embeddings_of_skills() -> None:
    router = SkillRouter(features=TfidfFeatures(dimensions=8)).fit(sample())
    assert router.score(["python loops"]).mean.shape == (1, 4)
