"""House rules that ruff and mypy cannot see: sizes, words that must not be committed, shapes of code."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ("mixmerge", "routers", "kernels")
WRITTEN = (*PACKAGE, "tests", "examples", "recipes", "docs", ".ci")
AT_TOP = ("Makefile", "pyproject.toml", "*.md")
TEXT = {".py", ".md", ".yaml", ".yml", ".toml", ".json", ".sh", ".txt", ""}
FILE_LINES = 400
FUNCTION_LINES = 80
VAGUE = ("utils.py", "helpers.py", "common.py", "misc.py")
MAY_PRINT = ("mixmerge/cli/", "examples/", "tests/")

# One-letter classes, so that this file does not hold what it forbids.
FORBIDDEN = {
    "unfinished work": re.compile(r"\b([T]ODO|[F]IXME|[X]XX|[H]ACK)\b"),
    "a path of one machine": re.compile(
        r"(?<![\w.~-])/(?:[w]ork|[h]ome|[r]oot|[o]pt|[t]mp|[U]sers|[u]sr/local)/\w"
    ),
    "the host of a package registry": re.compile(
        r"[p]ypi\.org|[p]ythonhosted|[d]ownload\.pytorch\.org|[n]pmjs\.|[d]eb\.debian\.org"
    ),
    "a conflict marker": re.compile(r"^(<{7}|>{7}|={7})( |$)", re.MULTILINE),
}
_REASONED = re.compile(r"noqa: BLE001\s+\w+ \w+")


def written_files() -> Iterator[Path]:
    """Every text file that people wrote; links and generated folders left out."""
    for folder in WRITTEN:
        for path in sorted((ROOT / folder).rglob("*")):
            inner = path.relative_to(ROOT)
            hidden = any(part.startswith((".", "__pycache__")) for part in inner.parts if part != ".ci")
            linked = any((ROOT / parent).is_symlink() for parent in inner.parents)
            if path.is_file() and path.suffix in TEXT and not hidden and not linked:
                yield path
    for pattern in AT_TOP:
        yield from sorted(ROOT.glob(pattern))


def text_faults(text: str) -> list[str]:
    """What a written file holds and must not, with its line."""
    return [
        f"{text.count(chr(10), 0, match.start()) + 1}: {why}: {match.group()!r}"
        for why, pattern in FORBIDDEN.items()
        for match in pattern.finditer(text)
    ]


def size_faults(source: str) -> list[str]:
    """A file or function that is too long, docstrings included."""
    lines = len(source.splitlines())
    faults = [f"{lines} lines, at most {FILE_LINES}: split it by concept"] if lines > FILE_LINES else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES:
                faults.append(f"{node.lineno}: {node.name} has {lines} lines, at most {FUNCTION_LINES}")
    return faults


def _catches_everything(handler: ast.ExceptHandler, line: str) -> bool:
    """Every fault, without raising it again at the end or saying beside ``noqa`` where it goes."""
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    broad = any(kind is None or ast.unparse(kind) in ("Exception", "BaseException") for kind in kinds)
    last = handler.body[-1]
    cleans_up = handler.type is not None and isinstance(last, ast.Raise)
    return broad and not cleans_up and not _REASONED.search(line)


def code_faults(source: str, *, may_print: bool = False) -> list[str]:
    """Shapes of code the house does without, with their lines."""
    faults: list[str] = []
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler) and _catches_everything(node, lines[node.lineno - 1]):
            faults.append(f"{node.lineno}: catches everything and does not raise; name the fault")
        elif isinstance(node, ast.Global):
            faults.append(f"{node.lineno}: global state; pass it")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.args.kwarg:
            faults.append(f"{node.lineno}: {node.name} takes **{node.args.kwarg.arg}; name its options")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "print" and not may_print:
            faults.append(f"{node.lineno}: prints; only the command line does")
    return faults


def _python_files() -> list[Path]:
    return [path for path in written_files() if path.suffix == ".py"]


def test_files_are_found() -> None:
    names = {str(path.relative_to(ROOT)) for path in written_files()}
    assert {"mixmerge/errors.py", "kernels/philox.py", "tests/conftest.py", "Makefile", ".ci/run"} <= names
    assert "mixmerge/kernels/philox.py" not in names


def test_text_of_every_file() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{fault}"
        for path in written_files()
        for fault in text_faults(path.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_sizes_and_shapes_of_the_package() -> None:
    found = []
    for path in _python_files():
        inner = path.relative_to(ROOT)
        if inner.parts[0] in PACKAGE:
            source = path.read_text(encoding="utf-8")
            faults = size_faults(source) + code_faults(source, may_print=str(inner).startswith(MAY_PRINT))
            found += [f"{inner}:{fault}" for fault in faults]
            assert path.name not in VAGUE, f"{inner}: name it for what it does"
    assert found == []


def test_a_planted_text_is_found() -> None:
    lines = ["fine", "# TO" + "DO later", "open('/ho" + "me/ann/x')", "-i https://py" + "pi.org", "<<<<<<< a"]
    assert [fault.split(":")[0] for fault in text_faults("\n".join(lines))] == ["2", "3", "4", "5"]
    fine = "./out/tmp/x and ~/work/x, https://example.org/home/a, /dev/shm, a method todo list\n===\n"
    assert text_faults(fine) == []


def test_a_planted_size_is_found() -> None:
    body = "    x = 1\n" * FUNCTION_LINES
    assert size_faults(f"def f():\n{body}") == ["1: f has 81 lines, at most 80"]
    assert size_faults("def f():\n" + "    x = 1\n" * (FUNCTION_LINES - 1)) == []
    assert size_faults("x = 1\n" * FILE_LINES) == []
    assert len(size_faults("x = 1\n" * (FILE_LINES + 1))) == 1


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("try:\n    f()\nexcept:\n    pass", "3: catches everything"),
        ("try:\n    f()\nexcept:\n    raise", "3: catches everything"),
        ("try:\n    f()\nexcept (OSError, Exception) as e:\n    pass", "3: catches everything"),
        ("try:\n    f()\nexcept Exception:  # noqa: BLE001\n    pass", "3: catches everything"),
        ("def f():\n    global x", "2: global"),
        ("def f(a, **rest): ...", "1: f takes **rest"),
        ("def f():\n    print('x')", "2: prints"),
    ],
)
def test_a_planted_shape_is_found(source: str, word: str) -> None:
    faults = code_faults(source)
    assert len(faults) == 1
    assert faults[0].startswith(word)


def test_allowed_shapes_are_not_faults() -> None:
    assert code_faults("try:\n    f()\nexcept BaseException:\n    undo()\n    raise") == []
    assert (
        code_faults("try:\n    f()\nexcept Exception as e:  # noqa: BLE001  the caller has it\n    q(e)")
        == []
    )
    assert code_faults("try:\n    f()\nexcept OSError:\n    pass\nconsole.print('x')\nf(**options)") == []
    assert code_faults("print('x')", may_print=True) == []


def test_warnings_of_our_package_are_errors() -> None:
    with pytest.raises(UserWarning, match="ours"):
        warnings.warn_explicit("ours", UserWarning, "plan.py", 1, module="mixmerge.plan")
    with warnings.catch_warnings(record=True) as seen:
        warnings.warn_explicit("theirs", UserWarning, "other.py", 1, module="other")
    assert len(seen) == 1
