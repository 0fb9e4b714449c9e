"""The checkpoints and the check that other tests lean on are themselves right, and the check can fail."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest


def test_a_family_is_real_whole_and_all_different(
    family: Any, family_name: str, assert_loads: Any, read_tensors: Any
) -> None:
    import torch

    made = family(family_name)
    assert made is family(family_name)
    base, *experts = map(read_tensors, (made.base, *made.experts))
    for name, tensor in base.items():
        assert tensor.dtype == torch.bfloat16
        assert tensor.float().std() > 0, f"{name} is a constant: a lost one would not show"
        assert not any(torch.equal(tensor, expert[name]) for expert in experts), f"{name} did not move"
    assert [expert.keys() for expert in experts] == [base.keys()] * 2
    assert_loads(made.experts[1])


def test_only_dtype_and_shards_change(family: Any, assert_loads: Any, read_tensors: Any) -> None:
    import torch

    exact = read_tensors(family("llama_bias", dtype="float32").base)
    folder = family("llama_bias", dtype="float16", shard_size="20KB", experts=1).base
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"
    sharded = read_tensors(folder)
    assert sharded.keys() == exact.keys()
    assert all(torch.equal(exact[name].half(), tensor) for name, tensor in sharded.items())
    assert_loads(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [("drop", "missing_keys"), ("add", "unexpected_keys"), ("reshape", "mismatch"), ("nan", "is not finite")],
)
def test_assert_loads_sees_damage(
    family: Any, clone: Any, assert_loads: Any, damage: str, message: str
) -> None:
    from safetensors.torch import load_file, save_file

    folder = clone(family("llama_bias").base)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.down_proj.bias"
    if damage == "drop":
        del tensors[name]
    elif damage == "add":
        tensors["model.layers.7.extra"] = tensors[name].clone()
    elif damage == "reshape":
        tensors[name] = tensors[name][:-1].clone()
    else:
        tensors[name][3] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises((AssertionError, RuntimeError), match=message):
        assert_loads(folder)


def test_tokenizer_survives_any_text(family: Any) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(family("t5").base)
    text = "naïve 模型\tdef f(x):\n    return x"
    assert loaded.decode(loaded(text).input_ids) == text


def test_programs_are_processes_of_their_own(programs: Any, tmp_path: Path) -> None:
    """As ``python`` runs them: arguments, folder, environment, streams, exit codes, signals; nothing of ours."""
    code = (
        "import os, sys; print(sys.argv, os.getcwd(), os.environ['SAID'], 'torch' in sys.modules);"
        "print([name for name in globals() if name[0] != '_'],"
        " [name for name in sys.modules if name.split('.')[0] == 'mixmerge'], file=sys.stderr);"
        "sys.exit(int(sys.argv[1]))"
    )
    done = programs("-P", "-c", code, "3", folder=tmp_path, environment={"SAID": "so"})
    assert (done.returncode, done.stdout) == (3, f"['-c', '3'] {tmp_path.resolve()} so True\n")
    assert done.stderr == "['os', 'sys'] []\n"
    assert programs("-c", "import os; os.abort()", folder=tmp_path).returncode == -signal.SIGABRT
    fault = programs("-c", "json", folder=tmp_path)
    assert (fault.returncode, fault.stderr.splitlines()[-1][:9]) == (1, "NameError")
    (tmp_path / "beside.py").write_text("X = 7")
    (tmp_path / "script.py").write_text("import beside, sys; print(__name__, beside.X, sys.argv[1:])")
    assert programs("script.py", "a", folder=tmp_path).stdout == "__main__ 7 ['a']\n"
    assert programs("-m", "script", folder=tmp_path).stdout == "__main__ 7 []\n"
    own = programs(
        "-c", "import sys; print('torch' in sys.modules)", folder=tmp_path, environment={"HF_HOME": "x"}
    )
    assert own.stdout == "False\n", "what libraries read when they are loaded is another: they are not loaded"


def test_a_program_ends_with_who_asked_for_it(programs: Any, tmp_path: Path) -> None:
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    with subprocess.Popen([programs.python, "-c", code], stdout=subprocess.PIPE, text=True) as asker:
        assert asker.stdout is not None
        assert int(asker.stdout.readline()) != asker.pid
        asker.kill()
        assert asker.stdout.read() == "", "it ends when nobody holds its output any more"
