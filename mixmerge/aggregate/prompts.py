"""What an expert is asked to make one answer of several. The wording is ours."""

from __future__ import annotations

from collections.abc import Sequence

from mixmerge.aggregate.extraction import final_text
from mixmerge.aggregate.records import Prompt
from mixmerge.engines.records import Message


def aggregation_prompt(question: str, answers: Sequence[str]) -> str:
    """The answers, numbered and without the thoughts before them, then the question."""
    shown = "\n\n".join(f"### Answer {at}\n{final_text(text)}" for at, text in enumerate(answers, start=1))
    return (
        "Several experts answered the question below; some of them may be wrong. Weigh their answers against each "
        f"other and give one answer of your own.\n\n{shown}\n\n### Question\n{question}\n\n### Your answer\n"
    )


def with_answers(prompt: Prompt, answers: Sequence[str]) -> Prompt:
    """A prompt that shows answers to it and asks for one of them all.

    Of a chat, the last turn becomes ``aggregation_prompt`` if it is the user's, and the turns before stay as they are;
    else a turn of the user is added. Not every chat template takes a second system turn, so none is made.
    """
    if isinstance(prompt, str):
        return aggregation_prompt(prompt, answers)
    if prompt[-1].role == "user":
        return (*prompt[:-1], Message("user", aggregation_prompt(prompt[-1].content, answers)))
    return (
        *prompt,
        Message("user", aggregation_prompt("What comes next in the conversation above?", answers)),
    )


def as_text(prompt: Prompt) -> str:
    """A prompt as a text to show: of a chat of one turn its words, of a longer one its turns with their roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0].content
    return "\n".join(f"{turn.role}: {turn.content}" for turn in prompt)
