"""A large model knows the answers, a small expert knows how to say them: fused, they do both.

    python examples/logit_fusion.py                 # three minutes on one core
    python examples/logit_fusion.py --effort 0.01   # does it run?

The large model has learned the codes of some names by heart, mostly in small letters; the small one was trained on
the same texts and has no room for them. Small experts are tuned, on names that nobody is asked about, to say codes in
capitals or with a dot behind. Asked for is a code in capitals (one expert), and in capitals with a dot (two experts).
Everything is trained here; fixed alphas are picked by ``mixmerge fit`` on names of their own. Printed in the end: the
tables, and whether a matched alpha is not below the best fixed one by more than the interval of their difference.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import numpy as np
    from fusion_support.models import Names
    from numpy.typing import NDArray

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)


@dataclass(frozen=True)
class Asked:
    """A task.

    Args:
        name: of it.
        experts: that shift the base.
        style: of the answers: loud, dotted.
    """

    name: str
    experts: tuple[str, ...]
    style: tuple[bool, bool]


TASKS = (
    Asked("capitals", ("loud",), (True, False)),
    Asked("capitals and a dot", ("loud", "dotted"), (True, True)),
)


def main(
    effort: Annotated[float, typer.Option(min=0.001, help="Of training, 1 for all of it.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    keep: Annotated[Path | None, typer.Option(help="A folder for the models; else they go.")] = None,
) -> None:
    """Train, fuse, and say what each way answers."""
    from fusion_support.models import build, names

    with tempfile.TemporaryDirectory(prefix="mixmerge-") as work:
        folder, start = keep or Path(work), time.perf_counter()
        known = names((80, 40, 120), seed) if effort >= 0.1 else names((8, 4, 8), seed)
        places = build(folder, known, effort=effort, seed=seed)
        print(f"trained in {time.perf_counter() - start:.0f} s", file=sys.stderr)
        good = [asked(task, places, known, folder) for task in TASKS]
    print(f"\nin all {time.perf_counter() - start:.0f} s")
    if effort >= 1 and not all(good):
        raise typer.Exit(1)


def asked(task: Asked, places: dict[str, Path], known: Names, folder: Path) -> bool:
    """One task's table; whether its bar holds."""
    from mixmerge.evaluate.intervals import paired_bootstrap

    plain = mixture(task, places, mode="static", alpha=1.0)
    best, alpha = fitted(task, places, known, folder)
    matched = "matched, all experts jointly" if len(task.experts) > 1 else "matched, one expert a token"
    fixed = f"fixed, the best alpha of {len(ALPHAS)}: {alpha:g}"
    right = {
        "large base alone": scores(plain, task, known, alone="large"),
        **{f"small expert *{one}* alone": scores(plain, task, known, alone=one) for one in task.experts},
        "fixed, alpha 1": scores(plain, task, known),
        fixed: scores(best, task, known),
        "matched, one expert a token": scores(mixture(task, places, mode="one"), task, known),
        "the same by the published grid": scores(mixture(task, places, mode="grid"), task, known),
    }
    if len(task.experts) > 1:
        right[matched] = scores(mixture(task, places, mode="joint"), task, known)
    print(f"\n| {task.name} | right, of {len(known.test)} names | 95 % interval |\n| --- | --- | --- |")
    for name, values in right.items():
        print(f"| {name} | {interval(values, tuple(known.test))} |")
    found = paired_bootstrap(right[matched], right[fixed], tuple(known.test)).difference
    said = f"{100 * found.value:+.1f} points ({100 * found.low:+.1f} to {100 * found.high:+.1f})"
    holds = found.high >= 0
    print(f"\n{matched}, less the best fixed alpha: {said}. Not below it: {'yes' if holds else 'no'}.")
    return holds


def mixture(task: Asked, places: dict[str, Path], **compose: Any) -> dict[str, Any]:
    """What a mixture's YAML says."""
    models = {name: {"model": str(places[name])} for name in ("large", "small", *task.experts)}
    return {
        "experts": models,
        "compose": {"kind": "logits", "base": "large", "reference": "small", **compose},
        "generate": {"max_new_tokens": 6},
    }


def fitted(task: Asked, places: dict[str, Path], known: Names, folder: Path) -> tuple[Path, float]:
    """The folder of the best fixed alpha, and the alpha."""
    from fusion_support.models import question

    from mixmerge.mixture import read
    from mixmerge.mixture.gluing import fit

    loud, dotted = task.style
    rows = [question(name, code, loud=loud, dotted=dotted) for name, code in known.validation.items()]
    data = folder / f"{task.experts[-1]}.jsonl"
    data.write_text("".join(json.dumps({"prompt": row.prompt, "answer": row.answer}) + "\n" for row in rows))
    told = mixture(task, places, mode="static", data=str(data), alphas=list(ALPHAS), score="exact")
    done = fit(read(told).require(), folder / f"fitted-{task.experts[-1]}", overwrite=True)
    return done.path, float(done.facts["alpha"])


def scores(told: Any, task: Asked, known: Names, *, alone: str | None = None) -> NDArray[np.float64]:
    """1 for each name whose code is said as it is asked for, else 0."""
    import numpy as np
    from fusion_support.models import question

    from mixmerge import Mixture
    from mixmerge.batch.records import Item

    loud, dotted = task.style
    rows = [question(name, code, loud=loud, dotted=dotted) for name, code in known.test.items()]
    given = Mixture.load(told).answer([Item(row.prompt, row.prompt, alone) for row in rows])
    return np.array([float(one.text == row.answer) for one, row in zip(given, rows, strict=True)])


def interval(values: NDArray[np.float64], names: tuple[str, ...]) -> str:
    from mixmerge.evaluate.intervals import bootstrap_means, estimate, groups_of

    drawn = bootstrap_means(values[:, None], groups_of(names), resamples=2000, seed=0)[:, 0]
    found = estimate(float(values.mean()), drawn)
    return f"{100 * found.value:.1f} % | {100 * found.low:.1f} to {100 * found.high:.1f}"


if __name__ == "__main__":
    typer.run(main)
