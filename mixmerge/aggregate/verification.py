"""An expert asked whether its own answer is right. The prompt and its examples are ours.

Source: self-verification as in AutoMix (arXiv 2310.12963): few-shot, several verdicts, their share is the confidence.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from mixmerge.aggregate.extraction import final_text
from mixmerge.aggregate.prompts import as_text
from mixmerge.aggregate.records import Prompt, Said
from mixmerge.engines.records import Message

_ASKS = "Judge whether each answer to a question is correct. Say Correct or Incorrect, nothing else."
_EXAMPLES = (
    ("What is 17 + 26?", "17 + 26 = 43, so it is 43.", True),
    ("A train covers 120 km in 2 hours. How fast is it on average?", "120 x 2 = 240, so 240 km/h.", False),
    ("Which gas do plants take in for photosynthesis?", "Oxygen.", False),
    ("Which planet is closest to the sun?", "Mercury is the closest planet to the sun.", True),
)
_WRONG = re.compile(
    r"\b(?:incorrect|wrong|false)\b|(?:\bnot|n['’]t)\s+(?:\w+\s+)?(?:correct|right|true)\b", re.I
)
_RIGHT = re.compile(r"\b(?:correct|right|true)\b", re.I)


def verification_prompt(prompt: Prompt, answer: str) -> Prompt:
    """A prompt of the same kind, a text or a chat, that asks for a verdict on an answer."""
    shown = [
        _shown(question, said, "Correct" if right else "Incorrect") for question, said, right in _EXAMPLES
    ]
    text = "\n\n".join([_ASKS, *shown, _shown(as_text(prompt), final_text(answer), "").rstrip()])
    return text if isinstance(prompt, str) else (Message("user", text),)


def verdict(text: str) -> bool | None:
    """Whether a verdict says correct; by its first line that is not empty. None if it says neither, or both."""
    line = next((line for line in final_text(text).splitlines() if line.strip()), "")
    wrong = bool(_WRONG.search(line))
    right = bool(_RIGHT.search(_WRONG.sub(" ", line)))
    return None if wrong == right else right


def verified(said: Iterable[Said]) -> float:
    """Share of the verdicts that say correct, of those that say anything; NaN if none does."""
    verdicts = [found for one in said if one.fault is None and (found := verdict(one.text)) is not None]
    return sum(verdicts) / len(verdicts) if verdicts else math.nan


def _shown(question: str, answer: str, verdict: str) -> str:
    return f"Question: {question}\nAnswer: {answer}\nVerdict: {verdict}"
