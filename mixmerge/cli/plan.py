"""``mixmerge plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mixmerge.cli.show import emit_json, size, table, warn

_DONORS = ("config_and_tokenizer_from", "config_and_head_from", "tokenizer_from")


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
    from mixmerge.engine.outlook import plan_with_data
    from mixmerge.plan import as_json

    made, outlook = plan_with_data(recipe, allow_tokenizer_mismatch=allow_tokenizer_mismatch)
    if not quiet:
        warn(made.warnings)
        warn(outlook.notes if outlook else ())
    report = as_json(made, threads=threads or default_threads())
    if outlook is not None:
        report["calibration"] = outlook.as_json()
        report["peak_memory"] = max(report["peak_memory"], outlook.peak_memory)
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


def _of_data(calibration: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Rows of the summary: what gathering or learning takes."""
    if calibration is None:
        return []
    parts = ", ".join(f"{what} {size(count)}" for what, count in calibration["memory"].items() if count)
    work = calibration["work"]
    disk = [(f"on disk while {work}", size(calibration["disk"]))] if calibration["disk"] else []
    return [(f"memory for {work}", f"{size(sum(calibration['memory'].values()))}: {parts}"), *disk]


def _of_bank(bank: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Rows of the summary: what stands beside a shared model."""
    if bank is None:
        return []
    share = 100 * bank["bytes_at_most"] / max(1, bank["bytes_of_experts"])
    left = f", {len(bank['left_out'])} tensors as in the shared model" if bank["left_out"] else ""
    gate = (
        "none: weights are given"
        if bank["gate"] is None
        else f"a router on {bank['gate']['features']} features"
    )
    return [
        ("shared part", bank["shared"]),
        (
            "bank",
            f"{bank['sites']} matrices, {bank['vectors']} vectors of {len(bank['experts'])} experts{left}",
        ),
        ("bank to write", f"at most {size(bank['bytes_at_most'])}, {share:.0f} % of the experts"),
        ("memory for the bank", size(bank["memory"])),
        ("gate", gate),
    ]


def _of_masks(masks: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Rows of the summary: what stands beside a base that is the model of every task."""
    if masks is None:
        return []
    models = size(masks["bytes_of_models"])
    beside = f"at most {size(masks['bytes_at_most'])} beside the base; a model each would take {models}"
    return [("tasks", ", ".join(masks["tasks"])), ("masks to write", beside)]


def _print_data(experts: list[dict[str, Any]]) -> None:
    rows = []
    for seen in experts:
        known = seen["rows"] is not None
        used = f"{seen['rows']} of {seen['there']}" if known else "read at merge time"
        tokens = str(seen["tokens"]) if seen["tokens"] is not None else "not counted"
        rows.append((seen["expert"], seen["source"], used, tokens if known else ""))
    table("calibration data", ("expert", "data", "rows", "tokens"), rows, text=(0, 1))


def _print_summary(report: dict[str, Any]) -> None:
    actions = [tensor["action"] for tensor in report["tensors"]]
    models = [
        (model["model"], str(model["tensors"]), str(model["adapted"]) if model["adapted"] else "")
        for model in report["models"]
    ]
    table(report["method"], ("model", "tensors", "adapted"), models)
    if "calibration" in report:
        _print_data(report["calibration"]["experts"])
    merged, copied = actions.count("merged"), actions.count("copied")
    rows = [
        (
            "output tensors",
            f"{merged} merged, {copied} copied, {len(report['dropped'])} of the inputs dropped",
        ),
        *((key.removesuffix("_from").replace("_", " "), report[key]) for key in _DONORS if key in report),
        ("to download", size(report["to_download"])),
        ("to read", size(report["bytes_read"])),
        ("to write", f"{size(report['bytes_written'])} in {len(report['shards'])} file(s)"),
        ("peak memory", size(report["peak_memory"])),
        *_of_bank(report.get("bank")),
        *_of_masks(report.get("masks")),
        *_of_data(report.get("calibration")),
        ("plan hash", report["hash"]),
    ]
    table("plan", ("what", "how much"), rows)
