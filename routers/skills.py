"""The router that knows skills: which a query takes, and what each expert is worth at them.

Q queries, E experts, K skills of the vocabulary, U different skills that are asked for, D dimensions of an embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from mixmerge.decision.records import Query, as_queries
from mixmerge.errors import Fault, MixmergeError
from mixmerge.routers import profiles
from mixmerge.routers.base import BLOCK, Floats, Inputs, Options, Prediction, Router, State, Training
from mixmerge.routers.features import CharacterFeatures, Features
from mixmerge.routers.keywords import LONGEST, Generate, Salience, asked_skills, named_skills
from mixmerge.routers.profiles import Expectation, Mentions, Tally

COLUMN = "skills"  # of metadata: a query's skills, separated by commas, where they are known
_STEP = 2048  # skills matched at a time
_EXPECTATION = tuple(field.name for field in fields(Expectation))


class SkillOptions(Options):
    """What may be set; those of the released code beside what they are by default.

    Args:
        profile: what weights are made of: the share of right answers at a skill, ``shrunk`` to the expert's share of
            all and put on the scale from -1 to 1; or ``counts`` of +1 and -1, as released.
        match: a skill that is not in the vocabulary is taken for the nearest of all skills (``union``, as released),
            or for each expert for the nearest it has outcomes on (``expert``).
        scores: what the router gives as scores: ``expected`` ones, or Symbolic-MoE's ``weights``, which add up to 1
            over the experts and have no deviation; the policy ``sample`` draws by them at temperature 1.
        floor: cosine below which the nearest skill is none; 0 takes any, as released.
        temperature: of the competency over all skills; 0.5 as released.
        right_above: a score above it is a right answer in profiles.
        each, least, most, longest: of the local keywords: ``mixmerge.routers.keywords.Salience``.
        passes, seen, asking_temperature: of the model that is asked: ``mixmerge.routers.keywords.asked_skills``.
    """

    profile: Literal["shrunk", "counts"] = "shrunk"
    match: Literal["union", "expert"] = "union"
    scores: Literal["expected", "weights"] = "expected"
    floor: float = Field(0.5, ge=0, lt=1)
    temperature: float = Field(0.5, gt=0)
    right_above: float = 0.5
    each: int = Field(10, ge=1, le=100)
    least: int | None = Field(None, ge=1)
    most: int = Field(5000, ge=1)
    longest: int = Field(LONGEST, ge=3)
    passes: int = Field(5, ge=1, le=100)
    seen: int = Field(2, ge=1)
    asking_temperature: float = Field(0.7, ge=0)

    @model_validator(mode="after")
    def _seen_in_passes(self) -> Self:
        if self.seen > self.passes:
            raise ValueError(f"seen is {self.seen}, and there are {self.passes} passes")
        return self


@dataclass(frozen=True, eq=False)
class _Asked:
    """The skills of queries: their names, the vocabulary's skill for each, and how near that is; ``(U, E or 1)``."""

    skills: tuple[tuple[str, ...], ...]
    index: Mapping[str, int]
    place: NDArray[np.int64]
    similarity: Floats

    def mentions(self) -> Mentions:
        pairs = [(row, self.index[name]) for row, names in enumerate(self.skills) for name in names]
        row, at = (np.array(column, np.int64) for column in (zip(*pairs, strict=True) if pairs else ([], [])))
        return Mentions(row, self.place[at], len(self.skills))


class SkillRouter(Router):
    """Expected score from an expert's outcomes on queries that take the same skills; weights as in Symbolic-MoE.

    A query's skills are those of its metadata ``skills``; else what ``generate`` names, if the router was fitted
    with it; else its salient words. The expected score is the expert's mean plus what it gains or loses at these
    skills, each shrunk by how often it was seen. A query without skills, or with none near the vocabulary, gets the
    experts' means, and weights that are all alike.

    Source: Chen et al. (2025), Symbolic Mixture-of-Experts: Adaptive Skill-based Routing for Heterogeneous Reasoning,
    arXiv 2503.05641, and the released code. Deviations: scores that are expected ones;
    statistics that are shrunk, a floor of similarity, and embeddings of characters (all of them options; with
    ``profile="counts", floor=0`` and ``features=SentenceFeatures()`` the weights are the released ones). Drawing
    experts by the weights and trimming rare ones are policies.

    Args:
        options, seed: as of every router.
        features: what embeds the names of skills; whole queries are not embedded.
        generate: a language model that names skills. It is not saved: set it again on a router that was loaded.
    """

    kind = "skills"
    options_type = SkillOptions
    per_expert = ("count", "right", "statistic", *_EXPECTATION)
    options: SkillOptions

    def __init__(
        self,
        options: Options | Mapping[str, Any] | None = None,
        *,
        features: Features | None = None,
        seed: int = 0,
        generate: Generate | None = None,
    ) -> None:
        super().__init__(options, features=features or CharacterFeatures(), seed=seed)
        self.generate = generate
        self._named: dict[str, tuple[str, ...]] = {}  # what the model said last: scores and reasons ask alike

    @property
    def independent(self) -> bool:
        return self.options.scores == "expected"

    def learn(self, data: Training) -> State:
        asked = self.generate is not None
        salience = Salience.fit(
            data.inputs.texts,
            each=self.options.each,
            least=self.options.least,
            most=self.options.most,
            longest=self.options.longest,
        )
        skills = self._skills(data.inputs, salience, asked=asked, known_only=True)
        vocabulary = sorted({name for names in skills for name in names})
        values = {
            "vocabulary": vocabulary,
            "asked": asked,
            "salience": None if asked else salience.as_dict(),
        }
        empty = State({"skills": self._embed(vocabulary)}, values)
        return replace(empty, arrays={**empty.arrays, **self._profiled(empty, data)})

    def extend(self, state: State, data: Training) -> State:
        more = self._profiled(state, data)
        joined = {name: np.concatenate([state.arrays[name], more[name]], axis=-1) for name in more}
        return replace(state, arrays={**state.arrays, **joined})

    def predict(self, state: State, inputs: Inputs) -> Prediction:
        mentions = self._asked(state, inputs).mentions()
        if self.options.scores == "weights":
            weights = self._weights(state, mentions)
            return Prediction(weights, np.zeros_like(weights))
        return Prediction(*_expectation(state).predict(mentions))

    def explain(self, state: State, inputs: Inputs, *, top: int) -> list[dict[str, Any]]:
        """The ``top`` first skills of each query, each expert's outcomes at them, and Symbolic-MoE's weights."""
        asked = self._asked(state, inputs)
        weights = self._weights(state, asked.mentions())
        return [
            {
                "skills": [self._skill_reason(state, asked, name) for name in names[:top]],
                "weights": dict(zip(self.experts, map(float, row), strict=True)),
            }
            for names, row in zip(asked.skills, weights, strict=True)
        ]

    def weights(self, queries: Iterable[str | Query]) -> Floats:
        """``(Q, E)``: suitability times competency, rows adding up to 1: what Symbolic-MoE draws experts by."""
        state, asked = self._fitted(), as_queries(queries)
        parts = [
            self._weights(state, self._asked(state, self._inputs(asked[s : s + BLOCK])).mentions())
            for s in range(0, len(asked), BLOCK)
        ]
        return np.concatenate([np.empty((0, len(self.experts))), *parts])

    def profiles(self) -> dict[str, dict[str, float]]:
        """Expert -> skill -> statistic, of the skills it has outcomes on."""
        state = self._fitted()
        names, statistic, count = (
            state.values["vocabulary"],
            state.arrays["statistic"],
            state.arrays["count"],
        )
        return {
            expert: {names[k]: float(statistic[k, e]) for k in np.flatnonzero(count[:, e])}
            for e, expert in enumerate(self.experts)
        }

    # --- fitting

    def _profiled(self, state: State, data: Training) -> dict[str, Floats]:
        """The arrays of the experts of ``data``."""
        mentions = self._asked(state, data.inputs, match="union").mentions()
        known = ~np.isnan(data.score)
        right = (np.where(known, data.score, -np.inf) > self.options.right_above).astype(np.float64)
        done = profiles.tally(mentions, data.score, right, skills=len(state.values["vocabulary"]))
        expected = Expectation.fit(mentions, done, data.score)
        return {
            "count": done.count,
            "right": done.right,
            "statistic": self._statistic(done, right, known),
            **{name: getattr(expected, name) for name in _EXPECTATION},
        }

    def _statistic(self, done: Tally, right: Floats, known: NDArray[np.bool_]) -> Floats:
        if self.options.profile == "counts" or not len(done.count):
            return profiles.signed_counts(done)
        return np.where(done.count > 0, 2 * profiles.shrunk_shares(done, right, known) - 1, 0.0)

    # --- skills of queries

    def _asked(
        self, state: State, inputs: Inputs, *, match: Literal["union", "expert"] | None = None
    ) -> _Asked:
        stored = state.values["salience"]
        salience = None if stored is None else Salience.from_dict(stored)
        skills = self._skills(inputs, salience, asked=state.values["asked"])
        unique = sorted({name for names in skills for name in names})
        own = None if (match or self.options.match) == "union" else state.arrays["count"] > 0
        place, similarity = self._match(state, unique, own)
        return _Asked(tuple(skills), {name: at for at, name in enumerate(unique)}, place, similarity)

    def _skills(
        self, inputs: Inputs, salience: Salience | None, *, asked: bool, known_only: bool = False
    ) -> Sequence[tuple[str, ...]]:
        given = inputs.metadata.get(COLUMN, ("",) * len(inputs))
        found = [named_skills(text, longest=self.options.longest) for text in given]
        open_ = [at for at, names in enumerate(found) if not names]
        texts = [inputs.texts[at] for at in open_]
        if asked:
            named = self._ask(texts)
        elif salience is not None:
            named = [salience.skills(text, known_only=known_only) for text in texts]
        else:
            named = [()] * len(texts)
        for at, names in zip(open_, named, strict=True):
            found[at] = names
        return found

    def _ask(self, texts: Sequence[str]) -> list[tuple[str, ...]]:
        answers = {text: self._named[text] for text in texts if text in self._named}
        missing = [text for text in dict.fromkeys(texts) if text not in answers]
        if missing:
            if self.generate is None:
                raise MixmergeError(
                    Fault(
                        f"router {self.kind}",
                        "was fitted on skills that a language model named, and has none now",
                        "A query's metadata 'skills', or a model: router.generate = ...",
                    )
                )
            named = asked_skills(
                missing,
                self.generate,
                passes=self.options.passes,
                seen=self.options.seen,
                temperature=self.options.asking_temperature,
                longest=self.options.longest,
                seed=self.seed,
            )
            answers.update(zip(missing, named, strict=True))
            if len(self._named) + len(missing) > BLOCK:
                self._named.clear()
            self._named.update(answers)
        return [answers[text] for text in texts]

    def _inputs(self, queries: Sequence[Query]) -> Inputs:
        given = tuple(query.metadata.get(COLUMN, "") for query in queries)
        return Inputs(tuple(query.text for query in queries), {COLUMN: given})

    def _embed(self, skills: Sequence[str]) -> NDArray[np.float32]:
        if self.features is None:
            raise ValueError("this router has features")
        return self.features.embed([Query(name) for name in skills])

    def _match(
        self, state: State, names: Sequence[str], own: NDArray[np.bool_] | None
    ) -> tuple[NDArray[np.int64], Floats]:
        """Place in the vocabulary, -1 for none, and cosine: ``(U, 1)``, or ``(U, E)`` with ``own``.

        Args:
            own: ``(K, E)``, the skills that each expert may be matched with; None for all.
        """
        index = {name: at for at, name in enumerate(state.values["vocabulary"])}
        allowed = np.ones((len(index), 1), np.bool_) if own is None else own
        place = np.full((len(names), allowed.shape[1]), -1, np.int64)
        similarity = np.zeros(place.shape)
        for at, name in enumerate(names):
            if name in index:
                exact = allowed[index[name]]
                place[at, exact], similarity[at, exact] = index[name], 1.0
        rest = np.flatnonzero((place < 0).any(axis=1)) if len(index) else np.empty(0, np.int64)
        for start in range(0, len(rest), _STEP):
            some = rest[start : start + _STEP]
            cosine = self._embed([names[at] for at in some]) @ state.arrays["skills"].T  # (step, K)
            for column in range(allowed.shape[1]):
                near = np.where(allowed[:, column], cosine, -np.inf)
                best = near.argmax(axis=1)
                reached = near[np.arange(len(some)), best].astype(np.float64)
                taken = (place[some, column] < 0) & (reached >= (self.options.floor or -1.1))
                place[some[taken], column] = best[taken]
                similarity[some[taken], column] = reached[taken]
        return place, similarity

    # --- numbers

    def _weights(self, state: State, mentions: Mentions) -> Floats:
        statistic = state.arrays["statistic"]
        mentioned = np.asarray(mentions.sum(mentions.known(statistic.shape[1])).any(axis=1), np.bool_)
        competent = profiles.competency(statistic, self.options.temperature)
        return profiles.chances(profiles.suitability(mentions, statistic), competent, mentioned)

    def _skill_reason(self, state: State, asked: _Asked, name: str) -> dict[str, Any]:
        """A skill, what it was taken for, and each expert's outcomes there."""
        at, names = asked.index[name], state.values["vocabulary"]
        places = np.broadcast_to(asked.place[at], len(self.experts))
        near = np.broadcast_to(asked.similarity[at], len(self.experts))
        count, right, gain, mean = (state.arrays[key] for key in ("count", "right", "gain", "mean"))
        return {
            "skill": name,
            "experts": {
                expert: {
                    "as": names[k],
                    "similarity": round(float(near[e]), 4),
                    "right": int(right[k, e]),
                    "count": int(count[k, e]),
                    "expected": float(mean[e] + gain[k, e]),
                }
                for e, (expert, k) in enumerate(zip(self.experts, places, strict=True))
                if k >= 0
            },
        }


def _expectation(state: State) -> Expectation:
    return Expectation(**{name: state.arrays[name] for name in _EXPECTATION})
