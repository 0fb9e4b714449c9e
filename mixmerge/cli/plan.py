"""``mixmerge plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mixmerge.cli.show import emit_json, size, table, warn


def plan(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every output tensor.")] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="For the memory figure.", show_default=False)
    ] = None,
    allow_tokenizer_mismatch: Annotated[
        bool, typer.Option("--allow-tokenizer-mismatch", help="Merge rows by id whatever the tokenizers say.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No warnings.")] = False,
) -> None:
    """Say what a merge would do, from headers alone: tensors, bytes, memory, and everything that is wrong."""
    print_plan(
        recipe,
        json=json,
        quiet=quiet,
        tensors=tensors,
        threads=threads,
        allow_tokenizer_mismatch=allow_tokenizer_mismatch,
    )


def print_plan(
    recipe: Path,
    *,
    json: bool,
    quiet: bool,
    tensors: bool = False,
    threads: int | None = None,
    allow_tokenizer_mismatch: bool = False,
) -> None:
    """Make a plan and print it."""
    from mixmerge.engine.merge import default_threads
    from mixmerge.plan import as_json, make_plan

    made = make_plan(recipe, allow_tokenizer_mismatch=allow_tokenizer_mismatch)
    if not quiet:
        warn(made.warnings)
    report = as_json(made, threads=threads or default_threads())
    if json:
        emit_json(report)
        return
    _print_summary(report)
    if tensors:
        rows = [
            (
                tensor["name"],
                str(tensor["shape"]),
                tensor["dtype"],
                tensor["action"],
                _values(tensor["parameters"]),
            )
            for tensor in report["tensors"]
        ]
        table("tensors", ("name", "shape", "dtype", "action", "parameters"), rows)
    if report["dropped"]:
        lost = [(drop["name"], drop["model"], drop["reason"]) for drop in report["dropped"]]
        table("dropped", ("name", "model", "reason"), lost)


def _values(parameters: dict[str, Any]) -> str:
    return " ".join(
        f"{name}={','.join(f'{v:g}' if isinstance(v, float) else str(v) for v in value)}"
        if isinstance(value, list | tuple)
        else f"{name}={value}"
        for name, value in parameters.items()
        if value is not None
    )


def _print_summary(report: dict[str, Any]) -> None:
    actions = [tensor["action"] for tensor in report["tensors"]]
    models = [
        (model["model"], str(model["tensors"]), str(model["adapted"]) if model["adapted"] else "")
        for model in report["models"]
    ]
    table(report["method"], ("model", "tensors", "adapted"), models)
    merged, copied = actions.count("merged"), actions.count("copied")
    rows = [
        (
            "output tensors",
            f"{merged} merged, {copied} copied, {len(report['dropped'])} of the inputs dropped",
        ),
        ("config and tokenizer", report["config_and_tokenizer_from"]),
        ("to download", size(report["to_download"])),
        ("to read", size(report["bytes_read"])),
        ("to write", f"{size(report['bytes_written'])} in {len(report['shards'])} file(s)"),
        ("peak memory", size(report["peak_memory"])),
        ("plan hash", report["hash"]),
    ]
    table("plan", ("what", "how much"), rows)
