"""The skills a query takes, as short texts: asked of a language model, or its salient words. Q queries."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, Self

LONGEST = 20  # characters of a skill
_PROMPT_TEXT = 8_000  # characters of a query that are shown to the model
_COMMON = 0.5  # a word in more than this share of the queries says nothing about one
_ANSWER = 64  # tokens: five skills and some room
_LABEL = re.compile(r"^\W*(skills?|keywords?)\W*:", re.IGNORECASE)
_MARK = re.compile(r"^[\s\d)(*•-]+|[*_`'\"]")  # of lists and of emphasis
_CLAUSE = re.compile(r"[^\w\s'+#-]+|\n+")
_WORD = re.compile(r"[^\W\d_](?:[\w'+#-]*[\w+#])?")
_FUNCTION_WORDS = """
    a about above after again against all also am an and any are aren't as at be because been before being below
    between both but by can can't cannot could couldn't did didn't do does doesn't doing don't down during each either
    else ever every few for from further get gets give given gives go goes going got had hadn't has hasn't have
    haven't having he her here hers herself him himself his how however i i'm if in into is isn't it it's its itself
    just let let's like made make makes many may me might more most much must my myself neither no nor not of off on
    once one ones only or other others ought our ours ourselves out over own per please same say says shall she should
    shouldn't since so some still such take takes than that that's the their theirs them themselves then there there's
    these they they're this those three through to too two under until up upon us use used uses using very was wasn't
    we were weren't what what's when where whether which while who whom whose why will with within without would
    wouldn't yes yet you you're your yours yourself yourselves"""
_STOP = frozenset(_FUNCTION_WORDS.split())


class Generate(Protocol):
    """A language model: prompts to texts, one for each; ``mixmerge.engines.callables.generator`` makes one."""

    def __call__(
        self, prompts: Sequence[str], *, max_new_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> Sequence[str]: ...


def asked_skills(
    texts: Sequence[str],
    generate: Generate,
    *,
    passes: int = 5,
    seen: int = 2,
    temperature: float = 0.7,
    longest: int = LONGEST,
    seed: int = 0,
) -> list[tuple[str, ...]]:
    """Skills that a language model names for each text, those it names most often first.

    Source: Chen et al. (2025), Symbolic Mixture-of-Experts, arXiv 2503.05641, and its released
    ``annotate_keywords.py``, whose defaults these are; the prompt is ours, and draws are keyed by the text, not by
    its place.

    Args:
        texts: Q queries; of each the first 8,000 characters are shown.
        generate: the model.
        passes: how often it is asked, 1 or more.
        seen: in how many of the answers a skill must be, 1 to ``passes``.
        temperature: of its draws, 0 or more.
        longest: characters of a skill; longer ones are dropped.
        seed: of the draws.
    """
    unique = list(dict.fromkeys(texts))
    prompts = [_prompt(text) for text in unique for _ in range(passes)]
    seeds = [_seed(seed, number, text) for text in unique for number in range(passes)]
    answers = generate(prompts, max_new_tokens=_ANSWER, temperature=temperature, seeds=seeds)
    found: dict[str, tuple[str, ...]] = {}
    for at, text in enumerate(unique):
        named = Counter(
            skill
            for answer in answers[at * passes : (at + 1) * passes]
            for skill in named_skills(answer, longest=longest)
        )
        kept = [skill for skill, count in named.items() if count >= seen]
        found[text] = tuple(sorted(kept, key=lambda skill: (-named[skill], skill)))
    return [found[text] for text in texts]


def named_skills(answer: str, *, longest: int = LONGEST) -> tuple[str, ...]:
    """The skills in a list separated by commas, semicolons or lines: in lower case, without dots, each once."""
    pieces = re.split(r"[,;\n]", _LABEL.sub("", answer.strip()))
    cleaned = (" ".join(_MARK.sub("", one.replace(".", "").lower()).split()) for one in pieces)
    return tuple(dict.fromkeys(one for one in cleaned if one and len(one) <= longest and one[-1] != ":"))


def _prompt(text: str) -> str:
    return (
        "Which skills does it take to answer the question below? Name two to five, each in one to three words, "
        f"separated by commas, and nothing else.\n\nQuestion: {text[:_PROMPT_TEXT]}\n\nSkills:"
    )


def _seed(seed: int, number: int, text: str) -> int:
    digest = hashlib.blake2b(f"{seed}:{number}:{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True)
class Salience:
    """Words and pairs of words of a corpus, and how telling each is.

    A text's skills are those of its terms that have the highest TF-IDF in the corpus it was fitted on. Terms are
    words that are not function words, and pairs of them that follow each other. It is made for languages that put
    spaces between words, and its function words are English; elsewhere they fall out by being common.

    Args:
        weight: term -> its inverse document frequency.
        each: skills of a text at most, 1 or more.
        longest: characters of a skill.
    """

    weight: Mapping[str, float]
    each: int = 10
    longest: int = LONGEST

    @classmethod
    def fit(
        cls,
        texts: Sequence[str],
        *,
        each: int = 10,
        least: int | None = None,
        most: int = 5000,
        longest: int = LONGEST,
    ) -> Self:
        """Learn the terms of a corpus.

        Args:
            texts: of the corpus.
            each: skills of a text at most.
            least: in so many texts a term must be; by default one in 200, and 2 to 10.
            most: so many terms are kept, the most frequent ones.
            longest: characters of a term.
        """
        least = max(2, min(10, len(texts) // 200)) if least is None else least
        frequency = Counter(term for text in texts for term in set(_terms(text, longest)))
        common = max(least, _COMMON * len(texts))
        kept = [(count, term) for term, count in frequency.items() if least <= count <= common]
        kept = sorted(kept, key=lambda one: (-one[0], one[1]))[:most]
        return cls({term: math.log((1 + len(texts)) / (1 + n)) + 1 for n, term in kept}, each, longest)

    def skills(self, text: str, *, known_only: bool = False) -> tuple[str, ...]:
        """The most telling terms of a text; if the corpus knows none, its most frequent words, or nothing."""
        count = Counter(_terms(text, self.longest))
        known = {
            term: (1 + math.log(n)) * self.weight[term] for term, n in count.items() if term in self.weight
        }
        chosen: list[str] = []
        for term in sorted(known, key=lambda term: (-known[term], -len(term.split()), term)):
            if len(chosen) == self.each:
                break
            inside = any(set(term.split()) <= set(other.split()) for other in chosen)
            if not inside:  # "equation" says nothing more beside "linear equation"
                chosen.append(term)
        if chosen or known_only:
            return tuple(chosen)
        words = [word for word in count if " " not in word]
        return tuple(sorted(words, key=lambda word: (-count[word], word))[: self.each])

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"weight": dict(self.weight), "each": self.each, "longest": self.longest}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Self:
        return cls(given["weight"], given["each"], given["longest"])


def _terms(text: str, longest: int) -> Iterable[str]:
    """Words that carry meaning, and pairs of those that stand together."""
    for clause in _CLAUSE.split(text.lower()):
        words = [word if word not in _STOP and len(word) > 2 else "" for word in _WORD.findall(clause)]
        yield from (word for word in words if word and len(word) <= longest)
        for first, second in pairwise(words):
            if first and second and first != second and len(first) + len(second) < longest:
                yield f"{first} {second}"
