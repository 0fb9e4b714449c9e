"""Scores: what one answer is worth, greedy answers of a model, and the table that compares models on tasks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mixmerge.engines.local import no_bars
from mixmerge.errors import DependencyError, Fault, MixmergeError
from mixmerge.recipe import ModelRef

if TYPE_CHECKING:
    from rich.table import Table

Metric = Callable[[str, str], float]  # (given, expected) -> score in [0, 1]


@dataclass(frozen=True)
class Question:
    """What a model is asked, and the answer it should give."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Answerer:
    """A loaded model with its tokenizer.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer, with an end-of-text token.
    """

    model: Any
    tokenizer: Any


def exact_match(given: str, expected: str) -> float:
    """1.0 if the first line of the answer is the expected one, spaces around it aside."""
    first, _, _ = given.strip().partition("\n")
    return float(first.strip() == expected.strip())


def load(model: str, *, device: str = "cpu") -> Answerer:
    """Load a model to be asked.

    Args:
        model: a folder or hub id, or ``BASE+ADAPTER`` with a PEFT adapter.
        device: a torch device.

    Raises:
        MixmergeError: it is no model, or lacks its tokenizer.
        DependencyError: an adapter is asked for and peft is not installed.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ref = ModelRef.parse(model)
    try:
        with no_bars():
            loaded = AutoModelForCausalLM.from_pretrained(
                ref.path, revision=ref.revision, dtype=torch.float32
            )
            tokenizer = AutoTokenizer.from_pretrained(ref.path, revision=ref.revision)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MixmergeError(
            Fault(model, f"cannot load it: {reason}", "A folder with config, weights and tokenizer")
        ) from error
    if ref.adapter is not None:
        loaded = _with_adapter(loaded, model, ref.adapter, ref.adapter_revision)
    return Answerer(loaded.to(device).eval(), tokenizer)


def _with_adapter(base: Any, model: str, adapter: str, revision: str | None) -> Any:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise DependencyError(
            Fault(model, "adapters need peft", run="Run: pip install 'mixmerge[peft]'")
        ) from error
    try:
        return PeftModel.from_pretrained(base, adapter, revision=revision)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MixmergeError(Fault(model, f"cannot load the adapter: {reason}")) from error


@dataclass(frozen=True)
class Answered:
    """One answer, and what it took.

    Args:
        text: without special tokens.
        tokens_in, tokens_out: of the prompt and of the answer, special ones included.
        seconds: its share of the time of its batch.
    """

    text: str
    tokens_in: int
    tokens_out: int
    seconds: float


def answered(
    answerer: Answerer, prompts: Sequence[str], *, max_new_tokens: int, batch_size: int = 256
) -> list[Answered]:
    """Greedy answers, in the order of the prompts.

    Args:
        answerer: who answers.
        prompts: any number of texts.
        max_new_tokens: an answer is cut after so many, if it has not ended before.
        batch_size: prompts answered together. Prompts of like length share a batch; left padding.
    """
    import torch

    model, tokenizer = answerer.model, answerer.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index))
    found: dict[int, Answered] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        began = time.perf_counter()
        batch = tokenizer(
            [prompts[index] for index in chosen], return_tensors="pt", padding=True, padding_side="left"
        ).to(model.device)
        with torch.inference_mode():
            tokens = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                do_sample=False,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
            )
        new = tokens[:, batch["input_ids"].shape[1] :]
        given = tokenizer.batch_decode(new, skip_special_tokens=True)
        asked = batch["attention_mask"].sum(dim=1).tolist()
        # What comes behind the first end of text is padding.
        ends = (new == tokenizer.eos_token_id).int()
        lengths = new.shape[1] - (ends.cumsum(dim=1) - ends).clamp(max=1).sum(dim=1)
        share = (time.perf_counter() - began) / len(chosen)
        for index, text, tokens_in, tokens_out in zip(chosen, given, asked, lengths.tolist(), strict=True):
            found[index] = Answered(text, tokens_in, tokens_out, share)
    return [found[index] for index in range(len(prompts))]


def answers(
    answerer: Answerer, prompts: Sequence[str], *, max_new_tokens: int, batch_size: int = 256
) -> list[str]:
    """The texts that ``answered`` gives."""
    given = answered(answerer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    return [one.text for one in given]


def ask(answerer: Answerer, questions: Sequence[Question], *, batch_size: int = 256) -> list[Answered]:
    """Answers in the order of the questions.

    An answer may be two tokens longer than the longest expected one before it is cut: enough to see that it
    goes on where it should end.
    """
    expected = answerer.tokenizer([question.answer for question in questions], add_special_tokens=False)
    longest = max((len(ids) for ids in expected["input_ids"]), default=0)
    prompts = [question.prompt for question in questions]
    return answered(answerer, prompts, max_new_tokens=longest + 2, batch_size=batch_size)


def grade(
    answerer: Answerer, questions: Sequence[Question], *, metric: Metric = exact_match, batch_size: int = 256
) -> list[float]:
    """The score of every answer that ``ask`` gets, in the order of the questions."""
    given = ask(answerer, questions, batch_size=batch_size)
    return [metric(one.text, question.answer) for one, question in zip(given, questions, strict=True)]


@dataclass(frozen=True)
class ScoreTable:
    """Mean scores of models on tasks.

    Args:
        tasks: the columns, in order.
        scores: model -> task -> mean score in [0, 1], in the order they are shown.
        own: task -> score of the expert trained for it on the same questions; tasks without one are left out.
        questions: task -> how many questions its scores are the mean of.
    """

    tasks: tuple[str, ...]
    scores: Mapping[str, Mapping[str, float]]
    own: Mapping[str, float]
    questions: Mapping[str, int]

    def average(self, model: str) -> float:
        """Mean over the tasks."""
        return statistics.fmean(self.scores[model][task] for task in self.tasks)

    def shares(self, model: str) -> dict[str, float]:
        """Task -> score as a share of its own expert's; tasks whose expert scores nothing are left out."""
        return {task: self.scores[model][task] / own for task, own in self.own.items() if own > 0}

    def retained(self, model: str) -> float | None:
        """Mean of the shares; None if there is no expert to compare with."""
        shares = self.shares(model)
        return statistics.fmean(shares.values()) if shares else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: what is in the table, and what follows from it."""
        return {
            "tasks": list(self.tasks),
            "questions": dict(self.questions),
            "models": {
                model: {
                    "scores": dict(row),
                    "average": self.average(model),
                    "retained": self.shares(model),
                    "retained_average": self.retained(model),
                }
                for model, row in self.scores.items()
            },
        }

    def render(self, title: str) -> Table:
        """For people: scores in per cent, and below each task the share of its own expert's score."""
        from rich.table import Table

        table = Table(title=title, title_justify="left")
        table.add_column("model", overflow="fold")
        for task in self.tasks:
            table.add_column(task, justify="right", no_wrap=True)
        table.add_column("average", justify="right", no_wrap=True)
        table.add_column("retained", justify="right", no_wrap=True)
        for cells in self._cells():
            table.add_row(*cells)
        return table

    def _cells(self) -> Iterator[list[str]]:
        for model, row in self.scores.items():
            shares, kept = self.shares(model), self.retained(model)
            yield [
                model,
                *(
                    f"{100 * row[task]:.1f}" + (f" ({100 * shares[task]:.0f}%)" if task in shares else "")
                    for task in self.tasks
                ),
                f"{100 * self.average(model):.1f}",
                "-" if kept is None else f"{100 * kept:.0f}%",
            ]
