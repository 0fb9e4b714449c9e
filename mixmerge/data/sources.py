"""Where rows come from: files, folders of splits, the standard library, the hub. Gives mappings with their place."""

from __future__ import annotations

import ast
import json
import re
import sysconfig
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from mixmerge.errors import DependencyError, Fault, MixmergeError
from mixmerge.registry import choices

_LINES, _TEXT, _PARQUET = (".jsonl", ".ndjson"), (".txt", ".text"), (".parquet",)
_SUFFIXES = (*_LINES, *_TEXT, *_PARQUET)
_MAX_LINE = 100_000_000  # bytes; a longer one is no row
_HUB = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")
BUILTIN = "builtin:"
# Of the standard library, in this order: modules with much prose, of every Python this package runs on.
_MODULES = (
    *("argparse", "ast", "calendar", "configparser", "contextlib", "copy", "csv", "dataclasses", "difflib"),
    *("doctest", "enum", "fractions", "functools", "inspect", "ipaddress", "optparse", "pdb", "pickle"),
    *("random", "shelve", "shlex", "shutil", "statistics", "string", "subprocess", "tarfile", "textwrap"),
    *("threading", "traceback", "typing", "uuid", "zipfile"),
)


class Broken(NamedTuple):
    """What stands for the values of a row that cannot be read."""

    why: str


class Found(NamedTuple):
    """A row as stored: where it is, what it holds, and whether a column ``split`` could say which part it is of."""

    where: str
    values: Any
    in_file: bool = True


def found_rows(source: str | Path, *, split: str | None) -> Iterator[Found]:
    """Every row of a source, in order; arguments as in ``mixmerge.data.rows.read_rows``.

    Raises:
        MixmergeError: the source is not there or cannot be read.
        DependencyError: a package it takes is not installed.
    """
    name = str(source)
    if isinstance(source, str) and name.startswith(BUILTIN):
        return _builtin(name)
    path, is_here = looked_up(source)
    if path.is_dir():
        path = _file_of_split(path, split or "train")
    if is_here or isinstance(source, Path) or not _may_be_hub(name):
        return _file(path)
    return _hub(name, split or "train")


def is_of_hub(source: str) -> bool:
    """Whether ``found_rows`` would ask the hub for a source: nothing of this name is here, and one could be there."""
    return not source.startswith(BUILTIN) and _may_be_hub(source) and not looked_up(source)[1]


def looked_up(source: str | Path) -> tuple[Path, bool]:
    """The path that is meant, and whether anything is there.

    Raises:
        MixmergeError: that cannot be said of such a name.
    """
    try:
        path = Path(source).expanduser()
        return path, path.exists()
    except (OSError, RuntimeError) as error:  # a name that is too long; ~ of a user who does not exist
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise MixmergeError(Fault(str(source), f"cannot be looked up: {reason}")) from error


def _may_be_hub(name: str) -> bool:
    return bool(_HUB.fullmatch(name)) and not name.lower().endswith((*_SUFFIXES, ".json", ".csv", ".gz"))


def _file_of_split(folder: Path, split: str) -> Path:
    for suffix in _SUFFIXES:
        if (folder / f"{split}{suffix}").is_file():
            return folder / f"{split}{suffix}"
    held = ", ".join(sorted(file.name for file in folder.iterdir() if file.suffix in _SUFFIXES)[:8])
    what = f"is a folder without a file of the split {split!r}"
    raise MixmergeError(
        Fault(str(folder), what, f"It has {held}" if held else f"{split}.jsonl, .parquet or .txt")
    )


def _file(path: Path) -> Iterator[Found]:
    suffix = path.suffix.lower()
    if not path.exists():
        raise MixmergeError(
            Fault(str(path), "does not exist", "A file, a data set of the hub, or builtin:NAME")
        )
    if suffix in _LINES:
        return _json_lines(path)
    if suffix in _TEXT:
        return (
            Found(f"{path}, line {number}", {"text": line}) for number, line in _lines(path) if line.strip()
        )
    if suffix in _PARQUET:
        return _parquet(path)
    raise MixmergeError(
        Fault(str(path), f"is of no kind known here ({suffix or 'no ending'})", ", ".join(_SUFFIXES))
    )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open("rb") as file:
            number = 0
            while raw := file.readline(_MAX_LINE + 1):
                number += 1
                if len(raw) > _MAX_LINE:
                    raise MixmergeError(
                        Fault(f"{path}, line {number}", f"is longer than {_MAX_LINE:,} bytes")
                    )
                if number == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                try:
                    yield number, raw.decode("utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise MixmergeError(Fault(f"{path}, line {number}", "is not UTF-8 text")) from error
    except OSError as error:
        raise MixmergeError(Fault(str(path), f"cannot be read: {error.strerror or error}")) from error


def _json_lines(path: Path) -> Iterator[Found]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            problem = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deep"
            values = Broken(f"is not JSON: {problem}")
        yield Found(f"{path}, line {number}", values)


def _parquet(path: Path) -> Iterator[Found]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DependencyError(
            Fault(str(path), "reading Parquet takes pyarrow", run="pip install mixmerge[data]")
        ) from error
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for values in batch.to_pylist():
                number += 1
                yield Found(f"{path}, row {number}", values)
    except (pyarrow.ArrowException, OSError) as error:
        raise MixmergeError(Fault(str(path), f"is no Parquet that can be read: {error}")) from error


def _hub(name: str, split: str) -> Iterator[Found]:
    try:
        import datasets
    except ImportError as error:
        raise DependencyError(
            Fault(name, "is no file here, and reading a data set of the hub takes the package datasets",
                  run="pip install mixmerge[data], or correct the path")
        ) from error  # fmt: skip
    repository, _, configuration = name.partition(":")
    try:
        with _without_bars(datasets):
            found = datasets.load_dataset(
                repository, configuration or None, split=split, trust_remote_code=False
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise MixmergeError(
            Fault(
                name,
                f"is no file here, and the data set cannot be had from the hub: {reason}",
                "A file, org/name or org/name:configuration, or builtin:NAME",
                "Correct the path; or, once online, run the same again: it stays in the cache",
            )
        ) from error
    return (Found(f"{name} ({split}), row {at}", dict(values), False) for at, values in enumerate(found, 1))


@contextmanager
def _without_bars(datasets: Any) -> Iterator[None]:
    """Whoever calls shows how far it is, and need not; the package draws bars of its own."""
    hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            datasets.enable_progress_bars()


def _builtin(name: str) -> Iterator[Found]:
    wanted = name.removeprefix(BUILTIN)
    if wanted not in BUILTINS:
        raise MixmergeError(
            Fault(name, f"nothing built in is called {wanted!r}", choices(wanted, list(BUILTINS)))
        )
    pick = BUILTINS[wanted]
    return (
        Found(f"{name}, row {at}", {"text": text, "id": place}, False)
        for at, (place, text) in enumerate(_library(pick), 1)
    )


def _library(pick: Callable[[ast.AST, list[str]], str | None]) -> Iterator[tuple[str, str]]:
    """Texts of the standard library's own source, by module and line; the same for one release of Python."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    for module in _MODULES:
        file = folder / f"{module}.py"
        if not file.is_file():
            continue
        source = file.read_text(encoding="utf-8")
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            text = pick(node, lines)
            if text is not None and 200 <= len(text) <= 20_000:
                yield f"{module}:{getattr(node, 'lineno', 0)}", text


def _docs(node: ast.AST, lines: list[str]) -> str | None:
    return ast.get_docstring(node) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) else None


def _code(node: ast.AST, lines: list[str]) -> str | None:
    if not isinstance(node, ast.FunctionDef):
        return None
    return textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))


# name -> the text a node of a module's syntax tree gives, or None
BUILTINS: Mapping[str, Callable[[ast.AST, list[str]], str | None]] = {"code": _code, "docs": _docs}
