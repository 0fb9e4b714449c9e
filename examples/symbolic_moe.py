"""Symbolic-MoE on the zoo: is recruiting by skills and voting better than one expert, and than chance?

    python examples/symbolic_moe.py [--out symbolic-moe] [--validation 100] [--test 150]

Runs ``recipes/mixtures/symbolic-moe.yaml``: every expert answers the validation questions, the router is fitted on
what came of that, and the test questions are answered in grouped batches. No expert was trained on any of these, and
nobody is profiled or chosen by test questions. Where the zoo is cached it takes less than a minute.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from zoo_support import Questions, named, note, place, read_answers, write_questions

import mixmerge
from mixmerge.aggregate.bench import AggregatorBench, Answered, best_aggregator
from mixmerge.batch.opening import open_engine
from mixmerge.batch.records import Item
from mixmerge.batch.setup import Conditions
from mixmerge.cli.show import step_progress
from mixmerge.decision.policies import Policy
from mixmerge.engines.callables import generator
from mixmerge.engines.records import Message
from mixmerge.errors import MixmergeError
from mixmerge.evaluate.intervals import bootstrap_means, estimate, groups_of, mean_of, paired_bootstrap
from mixmerge.mixture import Mixture, MixtureSpec, RouterSpec, read
from mixmerge.mixture.answering import expert_set
from mixmerge.mixture.batching import Files, run
from mixmerge.mixture.profiling import profile, same
from mixmerge.mixture.schema import ComposeSpec
from mixmerge.outcomes.table import OutcomeTable
from mixmerge.zoo import Spec, Zoo, build

RECIPE = Path(mixmerge.__file__).parent / "recipes" / "mixtures" / "symbolic-moe.yaml"
PROFILED = "profiled.jsonl"
EXTRACT = "first_line"  # what of an answer counts, in votes and in scores
ALIKE = 1e6  # at this temperature all experts are drawn alike
OURS, RANDOM, MERGED = (
    "Symbolic-MoE",
    "experts drawn at random, same vote",
    "Symbolic-MoE, an expert aggregates",
)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Result:
    """Scores on the test questions.

    Args:
        scores: system -> ``(Q,)``, 0 or 1.
        texts: of the questions.
        best: the row of the best single expert, by validation.
        said: what else there is to say.
    """

    scores: Mapping[str, Floats]
    texts: tuple[str, ...]
    best: str
    said: tuple[str, ...]


def systems(spec: MixtureSpec) -> dict[str, MixtureSpec]:
    """What the recipe is compared with, beside single experts: each differs from it in one or two sections."""
    voted = spec.compose.options
    samples = ComposeSpec(kind="self_consistency", options={**voted, "samples": spec.policy.draws})
    constant = {"router": RouterSpec(kind="best_single", outcomes=PROFILED), "policy": Policy()}
    chance = {
        "router": RouterSpec(kind="random", outcomes=PROFILED),
        "policy": Policy(kind="sample", draws=spec.policy.draws, temperature=ALIKE),
    }
    merged = ComposeSpec(kind="aggregate", options={"temperature": voted["temperature"]})
    return {
        OURS: spec,
        "its router alone, likeliest expert": spec.model_copy(
            update={"policy": Policy(), "compose": ComposeSpec()}
        ),
        RANDOM: spec.model_copy(update=chance),
        "best single expert, its samples voted": spec.model_copy(update={**constant, "compose": samples}),
        MERGED: spec.model_copy(update={"compose": merged}),
    }


def split(zoo: Zoo, validation: int, test: int) -> tuple[Questions, Questions]:
    """Held-out questions of every task, for validation and for test: none is in both."""
    held_out = {task: zoo.questions(task) for task in zoo.tasks}
    return (
        {task: some[:validation] for task, some in held_out.items()},
        {task: some[validation : validation + test] for task, some in held_out.items()},
    )


def study(zoo: Zoo, *, validation: int, test: int) -> Result:
    """Profile, fit, answer and score, in the current folder."""
    for_profile, for_test = split(zoo, validation, test)
    write_questions(Path("validation.jsonl"), for_profile, answers=True)
    write_questions(Path("labelled.jsonl"), for_test, answers=True)
    write_questions(Path("test.jsonl"), for_test, answers=False)
    spec = read(RECIPE).require()
    known = _profile(spec, "validation.jsonl", PROFILED)
    alone = _profile(spec, "labelled.jsonl", "measured.jsonl")
    best = known.experts[int(np.nanargmax(np.nanmean(known.score, axis=0)))]
    asked, check = named(for_test), same(EXTRACT)
    scores: dict[str, Floats] = {}
    said: list[str] = []
    for name, system in systems(spec).items():
        note(f"answering: {name}")
        output = Path(f"answers-{len(scores)}.jsonl")
        files = Files(Path("test.jsonl"), output, explain=True, overwrite=True)
        report = run(Mixture.load(system), files, Conditions()).report
        given = read_answers(output)
        scores[name] = np.array([check(given[at]["answer"], one.answer) for at, one in asked.items()])
        if name == OURS:
            loads = sum(one.times for one in report.loads)
            said.append(
                f"{name}: {loads} loads; one question after the other would take {report.naive_loads}"
            )
        if name == MERGED:
            fell = sum("fallback" in one["reason"] for one in given.values())
            said.append(
                f"{name}: gave no answer to {fell} of {len(given)}, where the best-ranked answer stands"
            )
    rows = {expert: f"expert: {expert}" for expert in alone.experts}
    rows[best] = f"best single expert: {best}"
    for column, expert in sorted(enumerate(alone.experts), key=lambda pair: pair[1] != best):
        scores[rows[expert]] = alone.score[:, column]
    scores["best expert on each question (oracle)"] = alone.score.max(axis=1)
    said.append(aggregators(spec, for_profile))
    return Result(scores, tuple(one.prompt for one in asked.values()), rows[best], tuple(said))


def _profile(spec: MixtureSpec, tasks: str, output: str) -> OutcomeTable:
    """As ``mixmerge profile``: outcomes of all experts, in a file."""
    note(f"every expert answers {tasks}")
    with tempfile.TemporaryDirectory() as work:
        made = profile(spec, Path(tasks), Path(work), check=same(EXTRACT)).outcomes
    made.write(output)
    return made


def aggregators(spec: MixtureSpec, questions: Questions) -> str:
    """The aggregator bench: who tells one right answer from two wrong ones."""
    note("measuring who aggregates")
    asked, mixture = named(questions), Mixture.load(spec)
    items = [
        Item(f"{expert}/{at}", (Message("user", one.prompt),), expert)
        for expert in spec.experts
        for at, one in asked.items()
    ]
    texts = {one.id: one.text for one in mixture.answer(items)}
    answered = [
        Answered(at, one.prompt, one.answer, {expert: texts[f"{expert}/{at}"] for expert in spec.experts})
        for at, one in asked.items()
    ]
    experts = expert_set(spec)
    engines = {one.name: open_engine([one], device="cpu") for one in experts}
    try:
        found = best_aggregator(
            {name: generator(engine) for name, engine in engines.items()},
            answered,
            same(EXTRACT),
            max_new_tokens=spec.generate.max_new_tokens,
        )
    except MixmergeError as error:
        return f"aggregator bench: cannot be measured: {error.faults[0]}"
    return f"aggregator bench: {_told(found)}"


def _told(found: AggregatorBench) -> str:
    shares = ", ".join(
        f"{name} {100 * share:.1f} ± {196 * found.error[name]:.1f}" for name, share in found.accuracy.items()
    )
    return f"right in % of {found.trials} trials of one right and two wrong answers: {shares}"


HEADINGS = ("answered by", "right in % (95 % interval)", "Symbolic-MoE's lead in points (95 % interval)")


def rows_of(result: Result, *, resamples: int = 2000) -> list[tuple[str, str, str]]:
    """The table: the interval of every score, and of what Symbolic-MoE has over it on the same questions."""
    names, groups = list(result.scores), groups_of(result.texts)
    stacked = np.stack([result.scores[name] for name in names], axis=1)
    drawn = bootstrap_means(stacked, groups, resamples=resamples, seed=0)
    rows = []
    for column, name in enumerate(names):
        own = estimate(mean_of(stacked[:, column]), drawn[:, column])
        score = f"{100 * own.value:.1f} ({100 * own.low:.1f} to {100 * own.high:.1f})"
        lead = ""
        if name != OURS:
            paired = paired_bootstrap(
                result.scores[OURS], result.scores[name], result.texts, resamples=resamples
            ).difference
            lead = f"{100 * paired.value:+.1f} ({100 * paired.low:+.1f} to {100 * paired.high:+.1f})"
        rows.append((name, score, lead))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("symbolic-moe"), help="folder of all files")
    parser.add_argument("--validation", type=int, default=100, help="questions of each task to profile on")
    parser.add_argument("--test", type=int, default=150, help="other questions of each task to be scored on")
    parser.add_argument("--effort", type=float, default=1.0, help="share of the zoo's training; 1 is real")
    parser.add_argument("--markdown", type=Path, help="write the table there, too")
    options = parser.parse_args()
    with step_progress(quiet=False) as progress:
        zoo = build(Spec(effort=options.effort), progress=progress)
    began = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    place(zoo, options.out / "zoo")
    with contextlib.chdir(options.out):
        result = study(zoo, validation=options.validation, test=options.test)
    rows = rows_of(result)
    title = (
        f"{len(result.texts)} test questions of {len(zoo.tasks)} tasks; "
        f"{options.validation} others of each to profile on"
    )
    table = Table(*HEADINGS, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console(width=max(140, Console().width)).print(table)
    for line in result.said:
        print(line)
    print(f"{options.out}: {time.perf_counter() - began:.0f} s")
    if options.markdown is not None:
        lines = [HEADINGS, ("---", "---:", "---:"), *rows]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        said = "\n".join(f"- {line}" for line in result.said)
        options.markdown.write_text(f"{title}\n\n{text}\n\n{said}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
