"""``mixmerge inspect``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixmerge.cli.show import byte_progress, emit_json, size, table, warn

if TYPE_CHECKING:
    from mixmerge.inspect import Inspection
    from mixmerge.inspect.comparison import Comparison, Difference
    from mixmerge.inspect.contents import AdapterContents, Contents
    from mixmerge.recipe import ModelRef


def inspect(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...", help="Model folders, hub ids, or MODEL+ADAPTER.", show_default=False
        ),
    ],
    base: Annotated[
        str | None, typer.Option(help="Compare the models with this one.", show_default=False)
    ] = None,
    by: Annotated[str, typer.Option(help="One row for each layer, kind (of module) or tensor.")] = "layer",
    png: Annotated[
        Path | None, typer.Option(help="Draw the comparison as heat maps.", show_default=False)
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Default: all cores.", show_default=False)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no warnings.")] = False,
) -> None:
    """Say what is in models and, with a base or several models, how their weights differ."""
    from mixmerge.errors import Fault, MixmergeError
    from mixmerge.inspect import BY, inspect_models
    from mixmerge.registry import choices

    unit = next((known for known in BY if known == by), None)
    if unit is None:
        raise MixmergeError(Fault("--by", f"is {by!r}", choices(by, list(BY))))
    refs = [_reference(model, "MODEL") for model in models]
    root = _reference(base, "--base") if base is not None else None
    if png is not None:
        from mixmerge.inspect.plot import check_png

        check_png(png)
    with byte_progress("reading", quiet=quiet or not sys.stderr.isatty()) as progress:
        found = inspect_models(refs, base=root, by=unit, threads=threads, progress=progress)
    if png is not None:
        if found.comparison is None:
            what = "there is nothing to draw: one model is compared with no other"
            raise MixmergeError(Fault("--png", what, run="Name a base by --base, or more models"))
        from mixmerge.inspect.plot import save_png

        save_png(found.comparison, png)
    if not quiet:
        warn(found.warnings)
    if json:
        emit_json(found.as_json())
    else:
        _print(found)


def _reference(text: str, where: str) -> ModelRef:
    """A folder that exists is that folder, whatever signs its name has."""
    from mixmerge.recipe import ModelRef

    return ModelRef(text) if Path(text).expanduser().is_dir() else ModelRef.parse(text, where=where)


def _print(found: Inspection) -> None:
    columns = [_column(model) for model in found.models]
    rows = [(what, *(column.get(what, "") for column in columns)) for what in columns[0]]
    more = [
        what
        for what in dict.fromkeys(what for column in columns for what in column)
        if what not in columns[0]
    ]
    rows += [(what, *(column.get(what, "") for column in columns)) for what in more]
    table("models", ("what", *(model.name for model in found.models)), rows)
    if found.comparison is None:
        for model in found.models:
            _print_groups(model)
        return
    _print_experts(found.comparison)
    _print_rows(found.comparison)


def _count(number: int) -> str:
    """``134.5 M``."""
    if number < 10_000:
        return f"{number:,}"
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if number >= scale:
            return f"{number / scale:.2f} {unit}"
    return f"{number / 1e3:.1f} k"


def _percent(share: float | None) -> str:
    if share is None:
        return "-"
    return "< 0.01 %" if 0 < share < 0.0001 else f"{100 * share:.2f} %"


def _cosine(value: float | None) -> str:
    return "-" if value is None else f"{round(value, 3) + 0.0:.3f}"  # + 0.0: no -0.000


def _some(counts: dict[str, int], *, limit: int = 4) -> str:
    """``q_proj, v_proj and 3 more``."""
    names = list(counts)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _column(model: Contents) -> dict[str, str]:
    dtypes = {dtype: _percent(count / max(1, model.parameters)) for dtype, count in model.dtypes.items()}
    mixed = ", ".join(f"{dtype} {share}" for dtype, share in dtypes.items())
    head = f"tied to {model.head}" if model.tied else model.head or "none"
    column = {
        "architecture": model.architecture,
        "parameters": _count(model.parameters),
        "tensors": f"{model.tensors:,}",
        "dtype": mixed if len(dtypes) > 1 else next(iter(dtypes), "-"),
        "size": f"{size(sum(file.nbytes for file in model.files))} in {len(model.files)} file(s)",
        "layers": ", ".join(f"{layers} in {stack}" for stack, layers in model.layers.items()) or "none",
        "head": head,
    }
    if model.adapter is not None:
        column |= _adapter(model.adapter)
    return column


def _adapter(adapter: AdapterContents) -> dict[str, str]:
    ranks, scales = list(adapter.ranks), list(adapter.scales)
    rank = str(ranks[0]) if len(ranks) == 1 else f"{min(ranks)} to {max(ranks)}" if ranks else "-"
    scale = f"{scales[0]:g}" if len(scales) == 1 else f"{min(scales):g} to {max(scales):g}" if scales else "-"
    return {
        "adapter": ", ".join(f"{count} {kind}" for kind, count in adapter.kinds.items()),
        "adapter's rank": rank,
        "adapter's scale": scale,
        "adapter's modules": _some(adapter.modules, limit=7),
        "adapter's size": f"{_count(adapter.parameters)} parameters, {size(adapter.nbytes)}",
    }


def _print_groups(model: Contents) -> None:
    tensorwise = any(group.shape is not None for group in model.groups)
    rows = [
        (
            group.name,
            "x".join(map(str, group.shape or ())) if tensorwise else str(group.tensors),
            "+".join(group.dtypes),
            _count(group.parameters),
            _percent(group.parameters / max(1, model.parameters)),
            size(group.nbytes),
        )
        for group in model.groups
    ]
    second = "shape" if tensorwise else "tensors"
    table(model.name, ("name", second, "dtype", "parameters", "share", "size"), rows)


def _print_experts(comparison: Comparison) -> None:
    from mixmerge.inspect.names import short_names

    total, names = comparison.total, short_names(comparison.experts)
    rows = [
        (name, f"{total.norms[i]:.4g}", _percent(total.relative[i]), _percent(total.zeros[i]))
        for i, name in enumerate(names)
    ]
    title = f"deltas to {comparison.base} (norm {total.base_norm:.4g})"
    table(title, ("expert", "norm", "of the base's", "zero entries"), rows)
    if len(names) > 1:
        cosines = [(name, *map(_cosine, total.cosines[i])) for i, name in enumerate(names)]
        table("cosines between deltas", ("expert", *names), cosines)
        opposite = [(name, *map(_percent, total.opposite[i])) for i, name in enumerate(names)]
        table("entries of opposite sign", ("expert", *names), opposite)


def _print_rows(comparison: Comparison) -> None:
    from mixmerge.inspect.names import short_names

    names = short_names(comparison.experts)
    pairs = ("cosines", "opposite signs") if len(names) > 1 else ()
    columns = (comparison.by, "parameters", "base", *names, "zero entries", *pairs)
    rows = [_row(row, len(names)) for row in (*comparison.rows, comparison.total)]
    table(f"norms of base and deltas by {comparison.by}", columns, rows)


def _row(row: Difference, experts: int) -> tuple[str, ...]:
    norms = [
        f"{norm:.3g} ({_percent(relative)})" for norm, relative in zip(row.norms, row.relative, strict=True)
    ]
    cells = (row.name, _count(row.parameters), f"{row.base_norm:.4g}", *norms, _range(row.zeros, _percent))
    if experts == 1:
        return cells
    cosines = [row.cosines[i][j] for i in range(experts) for j in range(i)]
    return (*cells, _range(cosines, _cosine), _percent(row.conflicts))


def _range(values: Sequence[float | None], show: Callable[[float | None], str]) -> str:
    """``0.1 to 0.4``: the lowest and the highest of the experts or pairs."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    low, high = show(min(known)), show(max(known))
    return low if low == high else f"{low} to {high}"
