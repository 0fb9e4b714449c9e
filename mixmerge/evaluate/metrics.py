"""What an answer is worth: the metrics of ``mixmerge eval``, in one table."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mixmerge.errors import DependencyError, Fault
from mixmerge.evaluate.answering import Metric, exact_match

Asked = Literal["text", "choices", "program", "class"]
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Its first line may name a language; a fence that ends code within a line begins no block.
_FENCED = re.compile(r"(?<![^\s:])```[ \t]*([^\s`]*)[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)


@dataclass(frozen=True)
class MetricRow:
    """A metric.

    Args:
        name: as tasks say it.
        asked: what a model gives: a text, the likelihoods of choices, a program, or a class.
        needs: what each row must hold beside the question: ``answer`` or ``label``.
        summary: one line.
        tokens: that an answer may have, unless the task says another number.
    """

    name: str
    asked: Asked
    needs: Literal["answer", "label"]
    summary: str
    tokens: int = 64


METRICS: dict[str, MetricRow] = {
    row.name: row
    for row in (
        MetricRow("exact", "text", "answer", "the answer's first line is the expected one"),
        MetricRow("f1", "text", "answer", "words in common with the expected answer, as SQuAD counts them"),
        MetricRow("rouge1", "text", "answer", "F-measure of common words", 256),
        MetricRow("rouge2", "text", "answer", "F-measure of common pairs of words", 256),
        MetricRow("rougeL", "text", "answer", "F-measure of the longest common subsequence of words", 256),
        MetricRow("choice", "choices", "label", "the likeliest choice is the right one"),
        MetricRow("pass@1", "program", "answer", "the program passes the row's tests", 512),
        MetricRow("accuracy", "class", "label", "the head's likeliest class is the right one"),
    )
}


def token_f1(given: str, expected: str) -> float:
    """Harmonic mean of precision and recall of words: lower case, without punctuation and articles.

    Two texts without words are equal; one without words scores 0.

    Source: Rajpurkar et al., SQuAD: 100,000+ Questions for Machine Comprehension of Text (2016), section 6.1.
    """
    found, wanted = _words(given), _words(expected)
    if not found or not wanted:
        return float(found == wanted)
    common = sum((Counter(found) & Counter(wanted)).values())
    if not common:
        return 0.0
    precision, recall = common / len(found), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def rouge(kind: str) -> Metric:
    """ROUGE's F-measure by the package rouge-score, words stemmed.

    Source: Lin, ROUGE: A Package for Automatic Evaluation of Summaries (2004), sections 2 and 3.

    Args:
        kind: rouge1, rouge2 or rougeL.

    Raises:
        DependencyError: rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise DependencyError(
            Fault(kind, "takes the package rouge-score", run="Run: pip install 'mixmerge[eval]'")
        ) from error
    scorer: Any = RougeScorer([kind], use_stemmer=True)

    def score(given: str, expected: str) -> float:
        return float(scorer.score(expected, given)[kind].fmeasure)

    return score


def text_metric(name: str) -> Metric:
    """The function of a metric whose ``asked`` is a text.

    Raises:
        DependencyError: a package it takes is not installed.
    """
    plain: dict[str, Callable[[str, str], float]] = {"exact": exact_match, "f1": token_f1}
    return plain[name] if name in plain else rouge(name)


def program_of(given: str) -> str:
    """The program in an answer: its first block of Python, else the first of no language, else all of it."""
    blocks = [(found[1].strip("{}.").lower(), found[2]) for found in _FENCED.finditer(given)]
    python = [program for language, program in blocks if language.startswith("py")]
    plain = [program for language, program in blocks if not language]
    return next(iter([*python, *plain]), given)


def likeliest(logprobs: Sequence[Sequence[float]], choices: Sequence[str], normalise: str) -> int:
    """The index of the likeliest choice, the first of equal ones; -1 where a likelihood is no number.

    Args:
        logprobs: of each choice, the natural logarithms of the probabilities of its tokens.
        choices: their texts.
        normalise: ``none``: the sum; ``tokens``: the mean of a token; ``characters``: the sum over the characters.
    """
    scores = []
    for tokens, text in zip(logprobs, choices, strict=True):
        length = {"none": 1, "tokens": len(tokens), "characters": len(text)}[normalise]
        scores.append(sum(tokens) / max(1, length))
    return -1 if any(math.isnan(score) for score in scores) else scores.index(max(scores))
