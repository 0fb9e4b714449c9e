"""``mixmerge merge``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixmerge.cli.plan import print_plan
from mixmerge.cli.show import byte_progress, emit_json, loss_progress, part_progress, size, warn

if TYPE_CHECKING:
    from mixmerge.engine.merge import Merged


def merge(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The folder to make.", show_default=False)],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it is a model folder.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    engine: Annotated[
        str, typer.Option(help="mixmerge, or mergekit to run the installed mergekit.")
    ] = "mixmerge",
    device: Annotated[str, typer.Option(help="cpu, or a torch device such as cuda.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Default: all cores.", show_default=False)
    ] = None,
    kernels: Annotated[bool, typer.Option(help="Use the fused CPU kernels.")] = True,
    verify: Annotated[bool, typer.Option("--verify", help="Hash every byte of the inputs.")] = False,
    allow_tokenizer_mismatch: Annotated[
        bool, typer.Option("--allow-tokenizer-mismatch", help="Merge rows by id whatever the tokenizers say.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no warnings.")] = False,
) -> None:
    """Merge models by a recipe into one model folder. A killed merge goes on when run again."""
    if dry_run:
        print_plan(recipe, json=json, quiet=quiet, allow_tokenizer_mismatch=allow_tokenizer_mismatch)
        return
    from mixmerge.engine.oracle import merge_by_mergekit
    from mixmerge.errors import Fault, MethodError

    if engine not in ("mixmerge", "mergekit"):
        raise MethodError(Fault("--engine", f"is {engine!r}", "mixmerge and mergekit are known"))
    if engine == "mergekit":
        ignored = {"--device": device != "cpu", "--threads": threads is not None, "--no-kernels": not kernels}
        ignored |= {"--verify": verify, "--allow-tokenizer-mismatch": allow_tokenizer_mismatch}
        if given := ", ".join(name for name, is_given in ignored.items() if is_given):
            raise MethodError(
                Fault("--engine mergekit", f"does not take {given}", run="Leave one of them out")
            )
        merge_by_mergekit(recipe, out, overwrite=overwrite)
        emit_json({"path": str(out), "engine": engine}) if json else print(out)
        return
    from mixmerge.engine.merge import fetch_for, run
    from mixmerge.engine.outlook import plan_with_data

    plan, outlook = plan_with_data(recipe, allow_tokenizer_mismatch=allow_tokenizer_mismatch)
    if not quiet:
        warn(plan.warnings)
    if plan.remote:
        with byte_progress("downloading", quiet=quiet) as progress:
            plan = fetch_for(plan, out, overwrite=overwrite, device=device, progress=progress)
    with (
        part_progress("gathering", quiet=quiet) as gathering,
        loss_progress("learning", quiet=quiet) as learning,
        byte_progress("merging", quiet=quiet) as progress,
    ):
        merged = run(
            plan,
            out,
            overwrite=overwrite,
            device=device,
            kernels=kernels,
            threads=threads,
            verify_inputs=verify,
            progress=progress,
            learning=learning,
            gathering=gathering,
            parts=None if outlook is None else outlook.parts,
        )
    if not quiet:
        warn(merged.notes)
    if json:
        emit_json(_facts(merged))
        return
    resumed = f", {merged.resumed} of them by an earlier run" if merged.resumed else ""
    beside = "" if merged.bank is None else f", a bank of {size(merged.bank.nbytes)}{_gate(merged.bank.gate)}"
    if plan.masks is not None:
        beside = f", masks of {len(plan.masks.tasks)} tasks of {size(merged.masks)}"
    print(
        f"{out}: {len(plan.tasks)} tensors{resumed}, {size(plan.bytes_written)}{beside} in {merged.seconds:.1f} s"
    )


def _gate(gate: Mapping[str, Any] | None) -> str:
    if gate is None or gate["accuracy"] is None:
        return ""
    return f" and a gate right on {100 * gate['accuracy']:.1f} % of {gate['held_out']} rows held out"


def _facts(merged: Merged) -> dict[str, Any]:
    plan = merged.plan
    return {
        "path": str(merged.path),
        "plan": plan.hash,
        "seconds": merged.seconds,
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "tensors": len(plan.tasks),
        "resumed": merged.resumed,
        "warnings": [*plan.warnings, *merged.notes],
        **({} if merged.bank is None else {"bank": merged.bank.as_json()}),
        **({} if plan.masks is None else {"masks": {"tasks": list(plan.masks.tasks), "bytes": merged.masks}}),
    }
