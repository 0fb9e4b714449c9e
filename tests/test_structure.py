"""Who may import whom (DESIGN section 1), read from the source with ``ast``; and what start-up really loads.

A unit is a file or folder directly under ``mixmerge/``: ``mixmerge.engine.run`` belongs to ``engine``.
``ALLOWED`` is the design as a table; a new unit needs a row there before anything else passes.
"""

from __future__ import annotations

import ast
import functools
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"mixmerge": "mixmerge", "routers": "mixmerge.routers", "kernels": "mixmerge.kernels"}
HEAVY = ("torch", "transformers", "mergekit", "numba", "peft")
ANY = frozenset({"*"})
SHARED = frozenset(
    {"errors", "registry", "document", "checkpoint", "experts", "outcomes", "kernels", "machine"}
    | {"data", "bank"}
)
_COMPOSITION = frozenset({"decision", "engines", "aggregate", "dynamic", "latent", "logits"})

# unit -> the units it may import, at any depth of a function. ``methods`` as seen by recipe, plan and the
# like is its table of names and parameters.
ALLOWED: dict[str, frozenset[str]] = {
    "errors": frozenset(),
    "registry": frozenset({"errors"}),
    "machine": frozenset(),
    "document": frozenset({"errors", "registry"}),
    "kernels": frozenset({"errors", "machine"}),
    "methods": frozenset({"errors", "registry", "kernels"}),
    "recipe": frozenset({"errors", "registry", "document", "methods"}),
    "checkpoint": frozenset({"errors", "registry", "kernels"}),
    "experts": frozenset({"errors", "registry", "checkpoint", "kernels", "outcomes", "data"}),
    "outcomes": frozenset({"errors", "registry"}),
    "data": frozenset({"errors", "registry"}),
    "bank": frozenset({"errors", "registry", "checkpoint", "kernels", "machine", "data", "experts"}),
    # merge side
    "plan": frozenset({"errors", "registry", "recipe", "methods", "checkpoint"}),
    "calibrate": frozenset({"errors", "registry", "experts", "methods", "kernels", "data", "bank"}),
    "engine": SHARED | {"plan", "recipe", "methods", "calibrate"},
    "inspect": frozenset({"errors", "registry", "checkpoint", "kernels", "machine"}),
    # answer side
    "decision": frozenset({"errors", "registry", "outcomes"}),
    "routers": SHARED - {"checkpoint"} | {"decision"},
    "engines": SHARED | {"decision"},
    "aggregate": SHARED | {"decision", "engines"},
    "dynamic": SHARED | {"decision", "engines"},
    "latent": SHARED | {"decision", "engines"},
    "logits": SHARED | {"decision", "engines"},
    "batch": SHARED | _COMPOSITION,
    "mixture": SHARED | _COMPOSITION | {"routers", "batch"},
    # both sides; the ban on cli and zoo still holds
    "evaluate": ANY,
    "searching": ANY,
    "zoo": ANY,
    "cli": ANY,
    "": ANY,
}
# what nobody imports, but for these
RESERVED = {"cli": frozenset({"cli"}), "zoo": frozenset({"cli", "zoo"})}
# neither torch nor transformers may be loaded by importing these
LIGHT = (
    *("", "errors", "registry", "document", "recipe", "plan", "checkpoint", "engine", "cli", "kernels"),
    "methods/__init__",  # the table; the definitions beside it are torch
)


@dataclass(frozen=True)
class Import:
    target: str
    line: int
    at_import: bool  # runs when the module is imported: not in a function, not under TYPE_CHECKING


def source_files(root: Path = ROOT) -> Iterator[tuple[str, Path]]:
    """(dotted module name, file) of every module; the links inside ``mixmerge/`` are not followed twice."""
    for folder, package in FOLDERS.items():
        for path in sorted((root / folder).rglob("*.py")):
            inner = path.relative_to(root / folder).with_suffix("").parts
            if any((root / folder).joinpath(*inner[:depth]).is_symlink() for depth in range(1, len(inner))):
                continue
            yield ".".join([package, *inner]), path


def unit_of(module: str) -> str:
    """``mixmerge.engine.run`` -> ``engine``; the root is ``""``, ``mixmerge.__main__`` the command line."""
    parts = [part for part in module.split(".")[1:] if part != "__init__"]
    unit = parts[0] if parts else ""
    return "cli" if unit == "__main__" else "zoo" if unit.startswith("zoo_") else unit


@functools.cache
def imports_of(module: str, source: str) -> tuple[Import, ...]:
    """Every import of a module, relative names resolved, ``import_module("x")`` included."""
    found: list[Import] = []

    def add(target: str, node: ast.AST, at_import: bool) -> None:
        found.append(Import(target, getattr(node, "lineno", 0), at_import))

    def visit(node: ast.AST, at_import: bool) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            at_import = False
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                visit(child, False)
            for child in node.orelse:
                visit(child, at_import)
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                add(alias.name, node, at_import)
        elif isinstance(node, ast.ImportFrom):
            start = node.module or ""
            if node.level:
                parents = module.split(".")[: -node.level]
                start = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                add(f"{start}.{alias.name}", node, at_import)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            named = [argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)]
            found.extend(Import(str(name), node.lineno, at_import) for name in named)
        for inner in ast.iter_child_nodes(node):
            visit(inner, at_import)

    visit(ast.parse(source), True)
    return tuple(found)


def dependency_faults(modules: Mapping[str, str]) -> list[str]:
    """Breaches of the table in ``{module name: source}``, one line each."""
    faults: list[str] = []
    for module, source in modules.items():
        unit = unit_of(module)
        if unit not in ALLOWED:
            faults.append(f"{module}: unit {unit!r} has no row in ALLOWED (DESIGN section 1)")
            continue
        for item in imports_of(module, source):
            top = item.target.split(".")[0]
            where = f"{module}:{item.line} imports {item.target}"
            if top in ("routers", "kernels"):
                faults.append(f"{where}; say mixmerge.{item.target}")
            elif top in ("torch", "transformers") and unit in ("errors", "registry", "document", "recipe"):
                faults.append(f"{where}; {unit} may not, at any depth")
            elif top == "mixmerge":
                faults.extend(f"{where}; {why}" for why in _why_not(unit, item.target))
    return faults


def _why_not(unit: str, target: str) -> Iterator[str]:
    other = unit_of(target)
    if target in ("mixmerge", "mixmerge.__version__"):
        return
    if other not in ALLOWED:  # a public name of the root package, or a unit without a row
        if unit not in ("", "cli", "zoo", "evaluate"):
            yield f"{other!r} is not a unit; the library imports from the module that defines a name"
    elif unit not in RESERVED.get(other, frozenset({unit})):
        yield f"only {sorted(RESERVED[other])} and tests may import {other}"
    elif other != unit and ALLOWED[unit] is not ANY and other not in ALLOWED[unit]:
        yield f"{unit} may import {sorted(ALLOWED[unit])}"


def is_light(module: str) -> bool:
    name = module.removeprefix("mixmerge").lstrip(".")
    return unit_of(module) in LIGHT or name.replace(".", "/") in LIGHT


def _closure(module: str, modules: Mapping[str, str]) -> Iterator[tuple[str, Import]]:
    """(module, import) for all that runs when ``module`` is imported, parents' ``__init__`` included."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        candidates = (name, f"{name}.__init__", name.rpartition(".")[0])  # module, package, or a name in one
        current = next((candidate for candidate in candidates if candidate in modules), None)
        if current is None or current in seen:
            continue
        seen.add(current)
        parts = current.split(".")
        waiting += [".".join([*parts[:depth], "__init__"]) for depth in range(1, len(parts))]
        for item in imports_of(current, modules[current]):
            if item.at_import:
                yield current, item
                waiting.append(item.target)


def heavy_faults(modules: Mapping[str, str]) -> list[str]:
    """Light modules whose import, followed through the package, loads torch or transformers."""
    return [
        f"importing {module} loads {item.target} ({current}:{item.line}); import it inside the function"
        for module in modules
        if is_light(module)
        for current, item in _closure(module, modules)
        if item.target.split(".")[0] in ("torch", "transformers")
    ]


@pytest.fixture(scope="module")
def modules() -> dict[str, str]:
    return {module: path.read_text(encoding="utf-8") for module, path in source_files()}


def test_every_folder_is_seen(modules: dict[str, str]) -> None:
    assert {"mixmerge.__init__", "mixmerge.errors", "mixmerge.kernels.philox"} <= modules.keys()
    assert not [name for name in modules if name.count("kernels") > 1]


def test_dependency_rules(modules: dict[str, str]) -> None:
    assert dependency_faults(modules) == []


def test_light_modules_load_no_torch(modules: dict[str, str]) -> None:
    assert heavy_faults(modules) == []


@pytest.mark.parametrize(
    ("module", "line", "word"),
    [
        ("mixmerge.recipe", "def f():\n    import torch", "at any depth"),
        ("mixmerge.registry", "from transformers import AutoModel", "at any depth"),
        ("mixmerge.plan", "from mixmerge.engine import merge", "plan may import"),
        ("mixmerge.plan", "from .engine.run import go", "plan may import"),
        ("mixmerge.engine.run", "import mixmerge.cli.merge", "only ['cli'] and tests"),
        ("mixmerge.engine.run", "from ..inspect import inspect_models", "engine may import"),
        ("mixmerge.evaluate", "from mixmerge import zoo_tasks", "only ['cli', 'zoo'] and tests"),
        ("mixmerge.methods.average", "from mixmerge.recipe import Recipe", "methods may import"),
        ("mixmerge.methods.average", "from ..checkpoint.header import read_header", "methods may import"),
        ("mixmerge.kernels.philox", "from mixmerge import plan", "kernels may import"),
        ("mixmerge.kernels.philox", "from ..methods import METHODS", "kernels may import"),
        ("mixmerge.routers.nearest", "from mixmerge.batch import run", "routers may import"),
        ("mixmerge.batch", "from mixmerge.routers import nearest", "batch may import"),
        ("mixmerge.batch", "import importlib\nimportlib.import_module('mixmerge.plan')", "batch may import"),
        ("mixmerge.checkpoint.header", "if True:\n    import kernels.philox", "say mixmerge.kernels.philox"),
        ("mixmerge.engine.run", "from mixmerge import merge", "the module that defines a name"),
        ("mixmerge.utils", "import os", "no row in ALLOWED"),
    ],
)
def test_a_planted_dependency_is_found(module: str, line: str, word: str) -> None:
    faults = dependency_faults({module: line})
    assert len(faults) == 1
    assert word in faults[0]


def test_allowed_dependencies_are_not_faults() -> None:
    planted = {
        "mixmerge.engine.run": "from mixmerge import __version__\nfrom ..plan import Plan\nfrom . import one",
        "mixmerge.cli.zoo": "from mixmerge import zoo\nfrom mixmerge.cli.show import table\nimport mixmerge",
        "mixmerge.zoo": "from mixmerge.zoo_tasks import TASKS\nimport mixmerge.engine\nimport torch",
        "mixmerge.recipe": "from typing import TYPE_CHECKING\nfrom mixmerge.methods import Method",
        "mixmerge.kernels.lowrank": "import numpy\nfrom mixmerge.kernels.philox import draws",
    }
    assert dependency_faults(planted) == []


def test_a_planted_heavy_import_is_found_through_the_package() -> None:
    planted = {
        "mixmerge.__init__": "",
        "mixmerge.plan": "from mixmerge.recipe import Recipe",
        "mixmerge.recipe": "from mixmerge.methods.average import linear",
        "mixmerge.methods.__init__": "",
        "mixmerge.methods.average": "import numpy\ntry:\n    from torch import nn\nexcept ImportError: ...",
    }
    faults = heavy_faults(planted)
    assert len(faults) == 2
    assert all("mixmerge.methods.average:3" in fault for fault in faults)
    planted["mixmerge.methods.average"] = (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\ndef f():\n    import torch"
    )
    assert heavy_faults(planted) == []
    planted["mixmerge.methods.__init__"] = "class A:\n    import transformers.utils"
    assert {fault.split()[1] for fault in heavy_faults(planted)} == {
        "mixmerge.plan",
        "mixmerge.recipe",
        "mixmerge.methods.__init__",
    }


def test_links_and_names() -> None:
    for name in ("routers", "kernels", "recipes"):
        link = ROOT / "mixmerge" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..", name)
        assert any(link.iterdir()), f"{name}/ is empty, and git keeps no empty folder"
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()


def run_python(code: str, *, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONSAFEPATH": ""},  # the working directory on the path is the hazard
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def test_transformers_is_unharmed_from_the_repository_root() -> None:
    done = run_python(
        "import sys; assert sys.path[0] == ''\n"
        "import transformers\nfrom transformers import LlamaForCausalLM\n"
        "print(LlamaForCausalLM.__name__)\n"
        "print(*[module.__file__ for name, module in sys.modules.items()\n"
        "        if name.split('.')[0] in ('kernels', 'routers') and getattr(module, '__file__', None)])"
    )
    assert done.returncode == 0, done.stderr
    name, *ran = done.stdout.split()
    assert name == "LlamaForCausalLM"
    assert not [path for path in ran if Path(path).is_relative_to(ROOT)], "transformers ran code of ours"


HELP = """
import sys
{first}
from typer.testing import CliRunner
from mixmerge.cli import app
done = CliRunner().invoke(app, ["--help"])
assert done.exit_code == 0, done.output
assert "merge" in done.output
print(*[name for name in {heavy} if name in sys.modules])
"""


def test_help_loads_nothing_heavy() -> None:
    done = run_python(HELP.format(first="", heavy=HEAVY))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_the_help_check_can_fail() -> None:
    done = run_python(HELP.format(first="import numba", heavy=HEAVY))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["numba"]
