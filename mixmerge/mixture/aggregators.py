"""Who of a mixture's experts makes the best one answer of several: ``mixmerge.aggregate.bench`` as a grouped job."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mixmerge.aggregate.bench import AggregatorBench, Answered, Check, check_enough, judged, prompts, trials
from mixmerge.batch.job import Job, Progress
from mixmerge.batch.records import Item
from mixmerge.batch.setup import Conditions, Listed
from mixmerge.mixture.answering import expert_set
from mixmerge.mixture.everyone import everyone
from mixmerge.mixture.schema import MixtureSpec

WRONG = 2  # answers of a trial that are wrong, beside one that is right


def bench(
    spec: MixtureSpec,
    answered: Sequence[Answered],
    work: Path,
    *,
    check: Check,
    conditions: Conditions | None = None,
    progress: Progress | None = None,
) -> AggregatorBench:
    """Show every expert one right and two wrong answers to each question, grouped; a killed call goes on.

    Args:
        spec: of the mixture.
        answered: the questions, and what the experts said of them.
        work: folder of the job.
        check: (answer, reference) -> above 0.5 if it is right.
        conditions: where it runs.
        progress: told how far it is.

    Raises:
        MixmergeError: no question has one right and two wrong answers; as ``Job.run``.
    """
    made = trials(answered, check, wrong=WRONG, seed=spec.generate.seed)
    check_enough(made, len(answered), WRONG)
    experts = expert_set(spec)
    items = zip(made, prompts(made), strict=True)
    source = Listed(tuple(Item(one.id, prompt) for one, prompt in items))
    said: dict[str, list[str]] = {name: [] for name in experts.names}
    with Job(source, everyone(spec, experts), work, conditions, progress=progress) as job:
        job.run()
        for view in job.replays(range(len(job))):
            heard = {one["expert"]: one["text"] for one in view.heard() if one is not None}
            for name, texts in said.items():
                texts.append(heard.get(name, ""))  # who gives no answer is not right
    return judged(made, said, check, left_out=len(answered) - len(made))
