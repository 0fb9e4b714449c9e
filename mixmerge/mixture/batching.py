"""A batch job of a mixture: a file of requests in, a file of answers out."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixmerge.batch.costs import Report
from mixmerge.batch.job import Job, Progress
from mixmerge.batch.journal import FILE, remove
from mixmerge.batch.lines import Input, Line
from mixmerge.batch.ordering import loads
from mixmerge.batch.placing import REMOTE, Placement, load_seconds
from mixmerge.batch.records import Answer
from mixmerge.batch.setup import Conditions, Setup
from mixmerge.batch.writing import Form
from mixmerge.batch.writing_files import Unordered, write_ordered
from mixmerge.errors import Fault, MixmergeError, collecting
from mixmerge.mixture.answering import setup_of
from mixmerge.outcomes.whole import check_free

if TYPE_CHECKING:
    from mixmerge.mixture.wiring import Mixture


@dataclass(frozen=True)
class Files:
    """What a batch job reads and writes.

    Args:
        input: requests: OpenAI batch JSONL, JSONL, CSV or text.
        output: answers, in the format that goes with the input's.
        format: of the input; None to tell by its name and first lines.
        field: of JSONL or CSV that holds the text, where it has another name than the usual ones.
        name: that ``body.model`` has where the mixture is meant.
        explain: write decisions and reasons too.
        unordered: write answers as they come, and error records last; not in the order of the input at the end.
        overwrite: replace an output that exists, and start again.
    """

    input: Path
    output: Path
    format: str | None = None
    field: str | None = None
    name: str = "mixmerge"
    explain: bool = False
    unordered: bool = False
    overwrite: bool = False

    @property
    def work(self) -> Path:
        """The folder a job goes on from; it is gone when the job is done."""
        return self.output.absolute().parent / f".{self.output.name}.job"

    @property
    def begun(self) -> bool:
        """A run before has left a job to go on with."""
        return (self.work / FILE).exists()


@dataclass(frozen=True)
class JobPlan:
    """What a job would do in its first stage.

    Args:
        placements: what each device does.
        requests: of the input; ``bad`` of them are no requests.
        calls: generations of the first stage; later ones depend on what is said in it.
        answered: calls that a run before has answered already.
        naive_loads, naive_load_seconds: if requests were answered one by one, with one unit in memory.
        loads: of all devices.
    """

    placements: tuple[Placement, ...]
    requests: int
    bad: int
    calls: int
    answered: int
    naive_loads: int
    naive_load_seconds: float
    loads: int

    def as_dict(self) -> dict[str, Any]:
        groups = [
            {
                "device": one.device,
                "unit": group.unit,
                "experts": [expert.name for expert in group.experts],
                "calls": group.calls,
                "batches": len(group.batches),
                "bytes": group.bytes,
                "prompt_tokens": group.prompt,
                "new_tokens": group.new,
            }
            for one in self.placements
            for group in one.groups
        ]
        return {
            "requests": self.requests,
            "bad": self.bad,
            "calls": self.calls,
            "answered": self.answered,
            "groups": groups,
            "loads": self.loads,
            "naive_loads": self.naive_loads,
            "naive_load_seconds": self.naive_load_seconds,
        }


@dataclass(frozen=True)
class Batched:
    """What came of a job: the report, and where the answers are."""

    report: Report
    output: Path


def plan(mixture: Mixture, files: Files, conditions: Conditions) -> JobPlan:
    """What ``run`` would do: nothing is loaded or written; what a run before has answered counts."""
    setup, source = _opened(mixture, files)
    with (
        tempfile.TemporaryDirectory(prefix="mixmerge-") as folder,
        Job(
            source, setup, files.work if files.begun and not files.overwrite else Path(folder), conditions
        ) as job,
    ):
        job.decide()
        stage = job.next_stage()
        placements = [] if stage is None else job.placements(stage)
        sizes = [load_seconds(group) for one in placements for group in one.groups if not group.remote]
        mean = sum(sizes) / len(sizes) if sizes else 0.0
        return JobPlan(
            tuple(placements),
            len(job),
            len(job.bad),
            0 if stage is None else len(stage),
            0 if stage is None else int((stage.offsets >= 0).sum()),
            job.naive_loads,
            job.naive_loads * mean,
            sum(_loads(one, conditions) for one in placements if one.device != REMOTE),
        )


def _loads(placement: Placement, conditions: Conditions) -> int:
    """How often a device loads anything, as far as can be told before."""
    memory = next(device.memory for device in conditions.devices if device.name == placement.device)
    return loads([one.unit for one in placement.groups], [one.bytes for one in placement.groups], memory)


def run(
    mixture: Mixture, files: Files, conditions: Conditions, *, progress: Progress | None = None
) -> Batched:
    """Answer every request of a file; after a kill the same call goes on.

    Raises:
        StoppedError: the deadline is over; the same call goes on.
        MixmergeError: the output exists, the input has no request, the disk refuses, ...
    """
    check_free(files.output, overwrite=files.overwrite or files.begun)
    setup, source = _opened(mixture, files)
    if files.overwrite:
        remove(files.work)
    begun = files.begun
    with Job(source, setup, files.work, conditions, progress=progress) as job:
        form = Form(source, created=job.created, explain=files.explain)
        failed = None if files.unordered else _written(job, files)
        if failed is None:
            # looked at once more: another run may have written it since
            check_free(files.output, overwrite=files.overwrite or (files.unordered and begun))
            work = _unordered if files.unordered else _ordered
            failed = work(job, source, form, files)
        report = job.report(failed=failed)
        job.remove()
    return Batched(report, files.output)


def check_files(files: Files, *, read: bool = True, written: bool = True) -> None:
    """What can be told of a job's files without its mixture.

    Args:
        files: of the job.
        read: look at the input: it is a file, not standard input.
        written: look at the output: the job is to be run, not planned.

    Raises:
        MixmergeError: the input is of no format that is read, the output exists; all at once.
    """
    faults: list[Fault] = []
    if read:
        with collecting(faults):
            _input(files, ())
    if written:
        with collecting(faults):
            check_free(files.output, overwrite=files.overwrite or files.begun)
    if faults:
        raise MixmergeError(faults)


def _opened(mixture: Mixture, files: Files) -> tuple[Setup, Input]:
    """What answers, and what is asked; all that is wrong with either at once."""
    faults: list[Fault] = []
    setup: Setup | None = None
    source: Input | None = None
    with collecting(faults):
        setup = setup_of(mixture, explain=files.explain)
    with collecting(faults):
        source = _input(files, tuple(mixture.experts))
    if setup is None or source is None:
        raise MixmergeError(faults)
    return setup, source


def _input(files: Files, experts: tuple[str, ...]) -> Input:
    return Input.open(
        files.input, format=files.format, field=files.field, experts=experts, mixture_name=files.name
    )


def _ordered(job: Job, source: Input, form: Form, files: Files) -> int:
    job.run()
    failed = 0

    def pairs() -> Iterator[tuple[Line, Answer]]:
        nonlocal failed
        for line, answer in zip(source.lines(), job.answers(), strict=True):
            failed += answer.fault is not None
            yield line, answer
        # The file gets its name after this, and a kill may come between that and the end of the job.
        job.journal.note({"written": failed, "naive_loads": job.naive_loads})

    write_ordered(files.output, pairs(), form=form, overwrite=files.overwrite)
    return failed


def _written(job: Job, files: Files) -> int | None:
    """How many requests failed, if a run before was killed after it wrote the output; None if it is not written."""
    if not files.output.exists():
        return None
    for event in reversed(job.journal.events):
        if "written" in event:
            job.naive_loads = int(event["naive_loads"])
            return int(event["written"])
    return None


def _unordered(job: Job, source: Input, form: Form, files: Files) -> int:
    """What failed is written when all else is done: a run that is killed before tries it again when it goes on."""
    failed: list[int] = []
    with ExitStack() as stack:
        out = stack.enter_context(
            Unordered(files.output, form, resume=not files.overwrite, overwrite=files.overwrite)
        )

        def settled(answer: Answer) -> None:
            if answer.fault is not None:
                failed.append(answer.row)
            else:
                out.write(source.read([answer.row])[0], answer)

        job.run(settled=settled)
        for answer in job.answers_of(sorted(failed), len(job.stages)):
            if answer is not None:
                out.write(source.read([answer.row])[0], answer)
    return len(failed)
