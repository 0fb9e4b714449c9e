"""What a plan says of a merge by data: its rows, all that is wrong with them, and what gathering and learning take."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from mixmerge.calibrate.anatomy import Anatomy, Shown
from mixmerge.calibrate.gathering import gathering_need
from mixmerge.calibrate.kinds import KINDS
from mixmerge.calibrate.teachers import Teachers
from mixmerge.cli import app
from mixmerge.engine.merge import merge
from mixmerge.engine.outlook import plan_with_data
from mixmerge.errors import RecipeError

LINES = ["the quick brown fox", "jumps over", "a lazy dog and 12 more of them"]


def rows(path: Path, lines: list[Any]) -> str:
    texts = [line if isinstance(line, dict) else {"text": line} for line in lines]
    path.write_text("".join(json.dumps(text) + "\n" for text in texts))
    return str(path)


def recipe(made: Any, method: str, data: Any, **more: Any) -> dict[str, Any]:
    calibration = {"per_expert": data} if isinstance(data, dict) else {"data": data}
    learned = method not in ("regmean", "regmean_plus", "fisher")
    return {
        "merge_method": method,
        "models": [{"model": str(path)} for path in made.experts[:2]],
        **({"base_model": str(made.base)} if learned else {}),
        "parameters": more.pop("parameters", {}),
        "calibration": {**calibration, **more},
    }


def faults(written: dict[str, Any]) -> list[str]:
    with pytest.raises(RecipeError) as raised:
        plan_with_data(written)
    return [str(fault) for fault in raised.value.faults]


@pytest.mark.parametrize(
    "method", ["fisher", "regmean", "regmean_plus", "expert_merging", "learned_spectrum"]
)
def test_rows_and_tokens(method: str, family: Callable[..., Any], tmp_path: Path) -> None:
    from mixmerge.data.batches import make_batches
    from mixmerge.data.rows import read_rows
    from mixmerge.experts.loading import read_tokenizer

    made = family("llama", dtype="float32")
    file = rows(tmp_path / "rows.jsonl", [*LINES, LINES[0]])
    plan, outlook = plan_with_data(recipe(made, method, file, max_examples=10))
    assert outlook is not None
    batches = make_batches(read_rows(file)[:3], read_tokenizer(made.base, "base"))
    tokens = sum(batch.tokens for batch in batches)
    assert [(seen.expert, seen.rows, seen.there, seen.tokens) for seen in outlook.experts] == [
        (str(path), 3, 4, tokens) for path in made.experts[:2]
    ]
    assert outlook.need.total > 4 * 2 * sum(task.target.nbytes for task in plan.tasks) // 4
    assert any("has 3 different rows, and max_examples asks for 10" in note for note in outlook.notes)
    assert outlook.work == ("learning" if method in ("expert_merging", "learned_spectrum") else "gathering")


def test_a_method_without_data_has_no_outlook(family: Callable[..., Any]) -> None:
    made = family("llama", dtype="float32")
    models = [{"model": str(path), "parameters": {"weight": 1}} for path in made.experts]
    assert plan_with_data({"merge_method": "linear", "models": models})[1] is None


def test_faults_of_data_and_inputs_at_once(family: Callable[..., Any], tmp_path: Path) -> None:
    made = family("llama", dtype="float32")
    bad = rows(tmp_path / "bad.jsonl", [{"txt": 1}])
    gone = str(tmp_path / "gone.jsonl")
    named = {made.experts[0].name: bad, made.experts[1].name: gone}
    written = recipe(made, "regmean", named)
    said = faults(written)
    assert len(said) == 2
    assert "has neither text, prompt nor messages" in said[0]
    assert said[1].startswith(f"{gone}: does not exist")
    long = {**named, made.experts[1].name: "x" * 300}  # as a data set of the hub could be called
    assert "cannot be looked up" in faults(recipe(made, "regmean", long))[1]
    # beside an input that is not there, and beside a typo of the recipe
    written["models"].append({"model": str(tmp_path / "nobody")})
    written["calibration"]["data"] = gone
    said = faults(written)
    assert len(said) == 3
    assert said[0].startswith("models[2].model")
    assert faults({**written, "sed": 1})[-2:] == said[1:]
    assert any("'sed'" in one for one in faults({**written, "sed": 1}))
    # and so does the merge itself, before it writes anything
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(written))
    before = set(tmp_path.iterdir())
    with pytest.raises(RecipeError) as raised:
        merge(written, tmp_path / "out")
    assert [str(fault) for fault in raised.value.faults] == said
    shown = CliRunner().invoke(app, ["merge", str(tmp_path / "r.yaml"), str(tmp_path / "out")])
    assert shown.exit_code == 2
    assert shown.stderr.splitlines() == [f"error: {one}" for one in said]
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("method", "lines", "more", "message"),
    [
        ("regmean", [], {}, "holds no rows"),
        ("regmean", ["a"], {}, "none of 1 rows gives two tokens"),
        ("fisher", ["a"], {}, "none of 1 rows gives two tokens"),
        ("regmean", LINES, {"parameters": {"alpha": 1.0, "ridge": 0.0}}, "its Gram matrix is singular"),
        ("adamerging", LINES, {}, "none of 3 rows has two choices"),
        ("regmean", LINES, {"split": "dev"}, None),
        ("regmean", [{"text": "one", "split": "a"}], {"split": "dev"}, "holds no row of the split 'dev'"),
        ("expert_merging", [{"messages": [{"role": "user", "content": "hi"}]}], {}, "no chat template"),
    ],
)
def test_data_that_will_not_do(
    method: str,
    lines: list[Any],
    more: dict[str, Any],
    message: str | None,
    family: Callable[..., Any],
    tmp_path: Path,
) -> None:
    made = family("llama", dtype="float32")
    written = recipe(made, method, rows(tmp_path / "rows.jsonl", lines), **more)
    if message is None:
        assert plan_with_data(written)[1] is not None
        return
    said = faults(written)
    assert any(message in one for one in said), said
    assert all(str(tmp_path) in one or one.startswith("calibration") for one in said)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("fisher", "it predicts neither a token nor a class"),
        ("adamerging", "has no head, and the entropy is that of its predictions"),
        ("expert_merging", "has no head, and alignment compares logits"),
        ("learned_spectrum", "has no head, and alignment compares logits"),
    ],
)
def test_models_without_the_outputs(
    method: str, message: str, family: Callable[..., Any], tmp_path: Path
) -> None:
    said = faults(recipe(family("bert", dtype="float32"), method, rows(tmp_path / "rows.jsonl", LINES)))
    assert any(message in one for one in said)


def test_one_expert_without_data(family: Callable[..., Any], tmp_path: Path) -> None:
    made = family("llama", dtype="float32")
    file = rows(tmp_path / "rows.jsonl", LINES)
    said = faults(recipe(made, "regmean", {made.experts[0].name: file}))
    assert len(said) == 1
    assert f"{made.experts[1]} has no data, and regmean needs some of every expert" in said[0]


def test_a_data_set_of_the_hub_is_left_for_the_merge(
    family: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("mixmerge.data.sources._hub", asked)
    _, outlook = plan_with_data(recipe(family("llama", dtype="float32"), "regmean", "org/name"))
    assert outlook is not None
    assert [(seen.rows, seen.tokens) for seen in outlook.experts] == [(None, None)] * 2
    assert outlook.notes == ("org/name: is no file here, so it is read from the hub at merge time",)


@pytest.mark.parametrize("command", [False, True], ids=["merge", "mixmerge merge"])
def test_data_are_read_once(
    command: bool, family: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mixmerge.engine import calibration_data

    asked, really = [], calibration_data.read_rows

    def counted(source: str, **options: Any) -> Any:
        asked.append(source)
        return really(source, **options)

    monkeypatch.setattr(calibration_data, "read_rows", counted)
    made = family("llama", dtype="float32")
    files = [rows(tmp_path / name, LINES) for name in ("a.jsonl", "b.jsonl")]
    named = {expert.name: file for expert, file in zip(made.experts, files, strict=False)}
    written = recipe(made, "regmean", named, max_tokens=16)
    if command:
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(written))
        done = CliRunner().invoke(app, ["merge", str(tmp_path / "r.yaml"), str(tmp_path / "out")])
        assert done.exit_code == 0, done.output
    else:
        merge(written, tmp_path / "out")
    assert sorted(asked) == files
    kept = json.loads((tmp_path / "out" / "mixmerge_manifest.json").read_text())
    assert len(kept["calibration"]["rows"]) == len(LINES)


def hollow(folder: Path, tokenizer: Any) -> Path:
    """A model of 5 GB whose header is right and whose tensors are one hole in the file."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=300, hidden_size=8192, num_hidden_layers=3, num_attention_heads=64, num_key_value_heads=8,
        intermediate_size=28672, max_position_embeddings=64, pad_token_id=0, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: list(value.shape) for name, value in LlamaForCausalLM(config).named_parameters()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


READS = """
import json, resource, sys
import torch, transformers.models.llama.modeling_llama
from mixmerge.calibrate import learners, sequential
from mixmerge.engine.outlook import plan_with_data

def number(file, field):
    with open(file) as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field))

mapped = number("/proc/self/status", "VmSize") * 1024
resource.setrlimit(resource.RLIMIT_AS, (mapped + 2_000_000_000,) * 2)
before, said = number("/proc/self/io", "rchar"), []
for recipe in json.loads(sys.argv[1]):
    said.append(plan_with_data(recipe)[1].need.total)
print(json.dumps([number("/proc/self/io", "rchar") - before, said]))
"""


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="what was read is told by Linux")
def test_no_weight_is_read(tmp_path: Path, tokenizer: Any) -> None:
    """Three models of 5 GB: to map or load one exceeds what the process may have, to read one what it has read."""
    base, *experts = (hollow(tmp_path / name, tokenizer) for name in ("base", "one", "two"))
    made = SimpleNamespace(base=base, experts=experts)
    file = rows(tmp_path / "rows.jsonl", LINES)
    methods = ["fisher", "regmean", "regmean_plus", "expert_merging", "learned_spectrum"]
    done = subprocess.run(
        [sys.executable, "-P", "-c", READS, json.dumps([recipe(made, method, file) for method in methods])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    read, said = json.loads(done.stdout.splitlines()[-1])
    assert read < 50_000_000
    assert min(said) > 5_000_000_000


def test_the_command_prints_it(family: Callable[..., Any], tmp_path: Path) -> None:
    made = family("llama", dtype="float32")
    file = rows(tmp_path / "rows.jsonl", LINES)
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe(made, "regmean", file)))
    shown = CliRunner().invoke(app, ["plan", str(path)])
    assert shown.exit_code == 0, shown.output
    assert "3 of 3" in shown.output
    assert "Gram matrices" in shown.output
    dry = CliRunner().invoke(app, ["merge", str(path), str(tmp_path / "out"), "--dry-run", "--json"])
    said = json.loads(dry.stdout)
    assert said["calibration"]["work"] == "gathering"
    assert said["peak_memory"] >= said["calibration"]["peak_memory"]
    assert said["calibration"]["memory"]["Gram matrices"] > 0
    path.write_text(yaml.safe_dump(recipe(made, "regmean", str(tmp_path / "gone.jsonl"))))
    gone = subprocess.run(
        [sys.executable, "-P", "-m", "mixmerge", "plan", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert gone.returncode == 2
    assert gone.stderr.splitlines() == [
        f"error: {tmp_path / 'gone.jsonl'}: does not exist. A file, a data set of the hub, or builtin:NAME."
    ]


def test_formulas_by_hand() -> None:
    small = Anatomy({"a": (4, 2), "b": (2, 4)}, {"a": (2, 4), "b": (4, 2)}, layers=1, hidden=2)
    need = gathering_need(small, KINDS["gram"], [2, 4], Shown(1, 3))
    assert need.memory["Gram matrices"] == 8 * (4 + 16)
    assert gathering_need(small, KINDS["fisher"], [], Shown(1, 3)).memory["squared gradients"] == 4 * 16
    assert Teachers.bytes_of(10, 2, 3) == 4 * 10 * 2 * 4


SETUP = """
from pathlib import Path
from mixmerge.engine.merge import run
from mixmerge.engine.outlook import plan_with_data
from mixmerge.plan import peak_memory
plan, outlook = plan_with_data(json.loads(sys.argv[1]))
"""
WORK = """
run(plan, Path(sys.argv[2]), threads=1)
told = {"said": max(outlook.peak_memory, peak_memory(plan, threads=1)), "need": outlook.need.total}
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["regmean", "fisher", "expert_merging", "learned_spectrum"])
def test_the_memory_is_what_is_said(method: str, tmp_path: Path, tokenizer: Any, peak_of: Any) -> None:
    """An upper bound, within a factor of two; the part that is not the interpreter's within two as well."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=4000, hidden_size=320, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4,
        intermediate_size=960, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    for name in ("base", "expert0", "expert1"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
    shown = [{"prompt": f"{n} + {n + 1} is " * 4, "choices": [f" {n + 1}", f" {n}"]} for n in range(24)]
    learned = method in ("expert_merging", "learned_spectrum")
    written = {
        "merge_method": method,
        **({"base_model": str(tmp_path / "base")} if learned else {}),
        "models": [{"model": str(tmp_path / name)} for name in ("expert0", "expert1")],
        "calibration": {"data": rows(tmp_path / "rows.jsonl", shown)},
        "parameters": {"steps": 2} if learned else {},
    }
    found = peak_of(SETUP, WORK, json.dumps(written), str(tmp_path / "out"))
    assert found["peak"] <= found["said"] <= 2 * found["peak"], found
    assert found["need"] <= 2 * (found["peak"] - found["before"]), found
