"""``mixmerge inspect``: contents against transformers and torch, differences against torch in float64."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from mixmerge.checkpoint.header import read_header
from mixmerge.errors import CheckpointError, DependencyError, MixmergeError, OutputError
from mixmerge.inspect import inspect_models
from mixmerge.inspect.names import group_of, groups, kind_of, short_names, stacks
from mixmerge.recipe import ModelRef

Clone = Callable[[Path], Path]


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Mapping[str, Any]]) -> Path:
    """Save the tensors of a folder again, changed."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    save_file(dict(change(load_file(file))), file, metadata={"format": "pt"})
    return folder


def add_adapter(
    folder: Path, *, rank: int = 2, alpha: float = 6.0, dora: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A LoRA adapter on layer 0 of a tiny Llama; returns the dense deltas in float64.

    With ``dora``, the base's tensors, it is DoRA and stores the last norm whole.
    """
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    stored, dense = {}, {}
    for module, outputs in (("q_proj", 32), ("v_proj", 16)):
        a, b = (torch.randn(shape, generator=generator) * 0.1 for shape in ((rank, 32), (outputs, rank)))
        name = f"model.layers.0.self_attn.{module}"
        stored[f"base_model.model.{name}.lora_A.weight"] = a
        stored[f"base_model.model.{name}.lora_B.weight"] = b
        dense[f"{name}.weight"] = alpha / rank * b.double() @ a.double()
        if dora:
            magnitude = torch.rand(outputs, generator=generator) + 0.5
            stored[f"base_model.model.{name}.lora_magnitude_vector"] = magnitude
            weight = dora[f"{name}.weight"].double()
            moved = weight + dense[f"{name}.weight"]
            moved *= (magnitude / moved.norm(dim=1))[:, None]
            dense[f"{name}.weight"] = moved - weight
    if dora:
        stored["base_model.model.model.norm.weight"] = torch.rand(32, generator=generator)
        dense["model.norm.weight"] = stored["base_model.model.model.norm.weight"].double()
        dense["model.norm.weight"] -= dora["model.norm.weight"].double()
    save_file(stored, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": ["q_proj", "v_proj"]}
    if dora:
        config |= {"use_dora": True, "modules_to_save": ["norm"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return dense


def expected(base: Mapping[str, Any], experts: list[Mapping[str, Any]], names: list[str]) -> dict[str, Any]:
    """What one row says, by torch in float64."""
    import torch

    root = torch.cat([base[name].double().flatten() for name in names])
    deltas = torch.stack(
        [torch.cat([expert[name].double().flatten() for name in names]) - root for expert in experts]
    )
    signs = deltas.sign()
    norms = deltas.norm(dim=1)
    return {
        "base_norm": root.norm().item(),
        "norms": norms.tolist(),
        "relative": (norms / root.norm()).tolist(),
        "zeros": (deltas == 0).double().mean(dim=1).tolist(),
        "cosines": (deltas @ deltas.T / norms[:, None] / norms).tolist(),
        "opposite": ((signs[:, None] * signs[None]) < 0).double().mean(dim=2).tolist(),
        "conflicts": ((signs == 1).any(dim=0) & (signs == -1).any(dim=0)).double().mean().item(),
    }


# -- the kernel -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [1, 2, 5])
@pytest.mark.parametrize("n", [1, 7, 2016, 5000])
def test_the_kernel_is_its_reference(experts: int, n: int) -> None:
    from mixmerge.kernels.compare import compare_reference
    from mixmerge.kernels.layout import CODES, COMPARE_BLOCK, LANES
    from mixmerge.kernels.loops import compare_chunk, decode

    random = np.random.default_rng(n + experts)
    raw = np.zeros((experts + 1, 4 * n), np.uint8)
    codes = np.array([CODES[("BF16", "F16", "F32")[row % 3]] for row in range(experts + 1)])
    direct = np.array([row == 3 for row in range(experts + 1)], np.uint8)
    values = np.empty((experts + 1, n), np.float32)
    for row, code in enumerate(codes):
        exact = random.choice([-0.0, 0.0, 0.5, -0.5, 1e-3, 3.0], size=n).astype(np.float32)
        stored = (
            exact if code == 2 else exact.astype(np.float16) if code == 1 else exact.view(np.uint16)[1::2]
        )
        raw[row, : stored.nbytes] = np.ascontiguousarray(stored).view(np.uint8)
        decode(code, raw[row], 0, values[row])
    deltas = np.stack([values[row] - (0 if direct[row] else values[0]) for row in range(1, experts + 1)])
    products, counts = np.ones((experts, experts)), np.ones((experts, experts), np.int64)
    totals, seen = np.empty(2), np.zeros(experts + 1, np.uint32)
    compare_chunk(
        raw, codes, direct, n, np.empty((experts + 1, COMPARE_BLOCK), np.float32),
        np.empty((experts + 1, COMPARE_BLOCK), np.uint8), np.empty((experts**2 + 1, LANES)), products, counts,
        totals, seen,
    )  # fmt: skip
    reference = compare_reference(values[0], deltas)
    np.testing.assert_allclose(np.triu(products), reference[0], rtol=1e-12, atol=1e-12)
    assert np.array_equal(np.triu(counts), reference[1])
    assert tuple(totals) == (pytest.approx(reference[2], rel=1e-12), reference[3])


# -- names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (
            "attention",
            "model.layers.0.self_attn.q_proj.weight h.1.attn.c_attn.bias layers.2.attention.output.dense.weight"
            " gpt_neox.layers.0.attention.query_key_value.weight decoder.block.1.layer.1.EncDecAttention.k.weight"
            " model.layers.3.linear_attn.in_proj.weight",
        ),
        (
            "mlp",
            "model.layers.0.mlp.gate_proj.weight encoder.layer.0.output.dense.bias h.3.mlp.c_fc.weight"
            " model.layers.9.block_sparse_moe.experts.2.w1.weight encoder.layer.1.intermediate.dense.weight"
            " encoder.block.0.layer.1.DenseReluDense.wi.weight model.decoder.layers.0.fc1.weight",
        ),
        (
            "norm",
            "model.norm.weight transformer.ln_f.bias h.0.ln_1.weight model.layers.0.self_attn.q_norm.weight"
            " encoder.layer.0.attention.output.LayerNorm.weight embeddings.LayerNorm.bias"
            " model.layers.0.post_attention_layernorm.weight",
        ),
        (
            "embedding",
            "model.embed_tokens.weight wte.weight transformer.wpe.weight gpt_neox.embed_in.weight shared.weight"
            " bert.embeddings.word_embeddings.weight",
        ),
        ("head", "lm_head.weight embed_out.weight cls.predictions.bias score.weight"),
        ("other", "model.layers.0.mixer.A_log pooler.dense.weight x"),
    ],
)
def test_kinds(kind: str, names: str) -> None:
    assert {name: kind_of(name) for name in names.split()} == dict.fromkeys(names.split(), kind)


def test_rows_are_in_the_order_of_the_model() -> None:
    names = ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
    names += [f"model.layers.{number}.mlp.up_proj.weight" for number in (0, 10, 2)]
    layers = [f"model.layers.{number}" for number in (0, 2, 10)]
    assert list(groups(names, "layer")) == ["model.embed_tokens", *layers, "model.norm", "lm_head"]
    assert list(groups(names, "kind")) == ["embedding", "mlp", "norm", "head"]
    assert stacks([*names, "vision.blocks.3.norm.weight"]) == {"model.layers": 11, "vision.blocks": 4}
    assert group_of("model.norm.weight", "tensor") == "model.norm.weight"


def test_short_names_tell_paths_apart() -> None:
    assert short_names(["a/math", "b/code/"]) == ["math", "code"]
    assert short_names(["runs/1/best", "runs/2/best"]) == ["1/best", "2/best"]
    assert short_names(["base+loras/math", "base+loras/code"]) == ["math", "code"]
    assert short_names(["m", "x/m"]) == ["m", "x/m"]


# -- contents ---------------------------------------------------------------------------------------------


def test_contents_of_every_family(
    family: Callable[..., Any], family_name: str, read_tensors: Callable[[Path], dict[str, Any]]
) -> None:
    folder = family(family_name).base
    (model,) = inspect_models(folder, by="kind").models
    tensors = read_tensors(folder)
    assert model.tensors == len(tensors) == sum(group.tensors for group in model.groups)
    assert model.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert model.dtypes == {"BF16": model.parameters}
    assert model.nbytes == 2 * model.parameters
    assert set(model.layers.values()) == {2}
    assert len(model.layers) == (2 if family_name == "t5" else 1)
    assert model.architecture == json.loads((folder / "config.json").read_text())["architectures"][0]
    assert {"norm", "embedding", "attention", "mlp"} <= {group.name for group in model.groups}
    assert [group.name for group in model.groups if group.name == "other"] == ["other"] * (
        family_name == "bert"
    )
    assert (model.head is None) == (family_name == "bert")
    assert model.tied == (family_name in ("llama_tied", "gemma", "gpt2", "bert_mlm", "t5"))


def test_shards_and_single_tensors(family: Callable[..., Any]) -> None:
    folder = family("llama", shard_size="20KB").base
    (model,) = inspect_models([folder], by="tensor").models
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 1
    assert [(file.name, file.nbytes) for file in model.files] == [(f.name, f.stat().st_size) for f in files]
    assert {group.name: group.shape for group in model.groups}["model.embed_tokens.weight"] == (280, 32)
    assert model.groups[0].name == "model.embed_tokens.weight"


def test_what_an_adapter_is(family: Callable[..., Any], tmp_path: Path) -> None:
    base = family("llama").base
    add_adapter(tmp_path / "lora")
    (model,) = inspect_models(ModelRef(str(base), adapter=str(tmp_path / "lora"))).models
    adapter = model.adapter
    assert adapter is not None
    assert (adapter.kinds, adapter.ranks, adapter.scales) == ({"lowrank": 2}, {2: 2}, {3.0: 2})
    assert adapter.modules == {"q_proj": 1, "v_proj": 1}
    assert (adapter.parameters, adapter.nbytes) == (2 * (32 + 32) + 2 * (32 + 16), 4 * 224)
    assert model.tensors == len(read_header(base / "model.safetensors"))


# -- differences ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_differences_are_those_of_torch(
    family: Callable[..., Any], read_tensors: Callable[[Path], dict[str, Any]], clone: Clone, dtype: str
) -> None:
    made = family("llama", experts=3, dtype=dtype)
    # One expert has a layer that was not trained.
    frozen = rewrite(clone(made.experts[2]), lambda tensors: tensors | layer_one(read_tensors(made.base)))
    folders = [*made.experts[:2], frozen]
    base, experts = read_tensors(made.base), [read_tensors(folder) for folder in folders]
    for by in ("layer", "kind", "tensor"):
        found = inspect_models(folders, base=made.base, by=by).comparison
        assert found is not None
        assert found.experts == tuple(map(str, folders))
        for row in (*found.rows, found.total):
            names = [name for name in base if row.name in ("all", group_of(name, by))]
            assert row.tensors == len(names)
            assert row.parameters == sum(base[name].numel() for name in names)
            for field, wanted in expected(base, experts, names).items():
                got = np.array(getattr(row, field), np.float64)
                # The kernel's delta is float32; where one is zero, torch's cosine is NaN too.
                np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-9, err_msg=f"{row.name} {field}")
    assert found.skipped == ()


def layer_one(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tensor for name, tensor in tensors.items() if ".layers.1." in name}


def test_a_frozen_layer_has_no_cosine(
    family: Callable[..., Any], read_tensors: Callable[[Path], dict[str, Any]], clone: Clone
) -> None:
    made = family("llama")
    frozen = rewrite(clone(made.experts[0]), lambda tensors: tensors | layer_one(read_tensors(made.base)))
    found = inspect_models([frozen, made.experts[1]], base=made.base).comparison
    assert found is not None
    row = next(row for row in found.rows if row.name == "model.layers.1")
    assert (row.norms[0], row.relative[0], row.zeros[0]) == (0.0, 0.0, 1.0)
    assert row.cosines[0] == (None, None)
    assert row.cosines[1] == (None, 1.0)
    assert row.opposite[0][1] == row.conflicts == 0.0


def test_threads_change_nothing(family: Callable[..., Any]) -> None:
    made = family("qwen3", experts=3)
    seen: list[tuple[int, int]] = []
    one = inspect_models(made.experts, base=made.base, threads=1, progress=lambda *at: seen.append(at))
    assert inspect_models(made.experts, base=made.base, threads=5) == one
    assert seen[-1][0] == seen[-1][1] == sum(model.nbytes for model in one.models) * 4 // 3
    assert seen == sorted(seen)


def test_long_tensors_are_read_in_chunks(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(0)
    folders = []
    for number in range(3):
        folders.append(tmp_path / str(number))
        folders[-1].mkdir()
        (folders[-1] / "config.json").write_text('{"model_type": "none"}')
        save_file({"w": torch.randn(3, 250_001, generator=generator)}, folders[-1] / "model.safetensors")
    found = inspect_models(folders[1:], base=folders[0]).comparison
    assert found is not None
    base, *experts = [load_file(folder / "model.safetensors") for folder in folders]
    for field, wanted in expected(base, experts, ["w"]).items():
        np.testing.assert_allclose(
            np.array(getattr(found.total, field), float), wanted, rtol=1e-6, err_msg=field
        )


def test_dtypes_may_differ(
    family: Callable[..., Any], read_tensors: Callable[[Path], dict[str, Any]], clone: Clone
) -> None:
    made = family("llama")
    folders = [
        rewrite(clone(made.experts[0]), lambda tensors: {name: t.float() for name, t in tensors.items()}),
        rewrite(clone(made.experts[1]), lambda tensors: {name: t.double() for name, t in tensors.items()}),
    ]
    half = inspect_models(made.experts, base=made.base, by="kind").comparison
    wide = inspect_models(folders, base=made.base, by="kind").comparison
    assert half is not None
    assert wide is not None
    for one, other in zip(half.rows, wide.rows, strict=True):
        assert one.zeros == other.zeros
        assert one.conflicts == other.conflicts
        np.testing.assert_allclose(one.norms, other.norms, rtol=1e-9)
        np.testing.assert_allclose(one.cosines, other.cosines, rtol=1e-6)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_adapter_is_compared_exactly(
    family: Callable[..., Any],
    read_tensors: Callable[[Path], dict[str, Any]],
    tmp_path: Path,
    dtype: str,
    dora: bool,
) -> None:
    made = family("llama", dtype=dtype)
    dense = add_adapter(tmp_path / "lora", dora=read_tensors(made.base) if dora else None)
    expert = ModelRef.parse(f"{made.base}+{tmp_path / 'lora'}")
    found = inspect_models([expert, made.experts[0]], base=made.base, by="tensor").comparison
    assert found is not None
    for row in found.rows:
        wanted = dense[row.name].norm().item() if row.name in dense else 0.0
        assert row.norms[0] == pytest.approx(wanted, rel=1e-6)  # not rounded to what W + BA can hold
    changed = sum(delta.numel() for delta in dense.values())
    assert found.total.zeros[0] == pytest.approx(1 - changed / found.total.parameters)


def test_an_adapter_on_another_model(
    family: Callable[..., Any], read_tensors: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    made = family("llama", dtype="float32")
    dense = add_adapter(tmp_path / "lora")
    expert = ModelRef(str(made.experts[0]), adapter=str(tmp_path / "lora"))
    found = inspect_models([expert], base=made.base, by="tensor").comparison
    assert found is not None
    base, other = read_tensors(made.base), read_tensors(made.experts[0])
    for row in found.rows:
        wanted = other[row.name].double() - base[row.name].double() + dense.get(row.name, 0)
        assert row.norms[0] == pytest.approx(wanted.norm().item(), rel=1e-5)
    turned = inspect_models([made.base], base=expert).comparison
    assert turned is not None
    assert turned.total.norms[0] == pytest.approx(found.total.norms[0], rel=1e-6)
    double = inspect_models([ModelRef(str(made.base), adapter=expert.adapter)], base=expert).comparison
    assert double is not None
    plain = inspect_models([made.experts[0]], base=made.base).comparison
    assert plain is not None
    assert double.total.norms[0] == pytest.approx(plain.total.norms[0], rel=1e-5)


def test_a_tied_head_is_compared_with_its_embedding(family: Callable[..., Any], clone: Clone) -> None:
    import torch

    made = family("llama_tied")
    untied = rewrite(
        clone(made.experts[0]),
        lambda tensors: (
            tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + torch.tensor(0.5)}
        ),
    )
    config = json.loads((untied / "config.json").read_text())
    (untied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    found = inspect_models([untied, made.experts[1]], base=made.base).comparison
    assert found is not None
    assert found.skipped == ()
    rows = {row.name: row for row in found.rows}
    assert rows["lm_head"].base_norm == rows["model.embed_tokens"].base_norm
    assert rows["lm_head"].norms[1] == rows["model.embed_tokens"].norms[1]
    assert rows["lm_head"].norms[0] == pytest.approx(0.5 * math.sqrt(280 * 32), rel=0.1)
    (untied / "config.json").write_text(json.dumps(config))
    again = inspect_models([untied, made.experts[1]], base=made.base)
    assert again.comparison is not None
    assert again.comparison.skipped[0].reason == "tied to the embedding by every config"


def test_what_is_not_in_every_model_is_named(family: Callable[..., Any], clone: Clone) -> None:
    import torch

    made = family("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    less = rewrite(clone(made.experts[0]), lambda tensors: {n: t for n, t in tensors.items() if n != name})
    more = rewrite(clone(made.experts[1]), lambda tensors: tensors | {"steps": torch.tensor([1, 2])})
    found = inspect_models([less, more], base=made.base)
    assert found.comparison is not None
    skipped = {one.name: one.reason for one in found.comparison.skipped}
    assert skipped == {name: f"not in {less}", "steps": f"not in {made.base}, {less}"}
    assert "2 tensors are not compared" in found.warnings[0]


# -- the base ---------------------------------------------------------------------------------------------


def test_which_model_is_the_base(family: Callable[..., Any], tmp_path: Path) -> None:
    made = family("llama")
    base, one, two = str(made.base), str(made.experts[0]), str(made.experts[1])
    assert inspect_models(one).comparison is None
    implied = inspect_models([base, one, two])
    assert implied.comparison is not None
    assert (implied.comparison.base, implied.comparison.experts) == (base, (one, two))
    assert "no base is given" in implied.warnings[0]
    named = inspect_models([one, base, two], base=base)
    assert named.comparison == implied.comparison
    assert (len(named.models), named.warnings) == (3, ())
    for name in "ab":
        add_adapter(tmp_path / name)
    shared = inspect_models([ModelRef(base, adapter=str(tmp_path / name)) for name in "ab"])
    assert shared.comparison is not None
    assert (shared.comparison.base, shared.warnings) == (base, ())
    assert shared.comparison.total.cosines[0][1] == pytest.approx(1.0)
    assert inspect_models(base, base=base).comparison is None


# -- what can be wrong ------------------------------------------------------------------------------------


def test_missing_folders_are_all_named(family: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        inspect_models([tmp_path / "a", family("llama").base, tmp_path / "b"])
    assert [fault.what for fault in caught.value.faults] == [
        f"{tmp_path / 'a'}: no such folder",
        f"{tmp_path / 'b'}: no such folder",
    ]


def test_an_adapter_alone(tmp_path: Path) -> None:
    add_adapter(tmp_path / "lora")
    with pytest.raises(CheckpointError, match=r"it is an adapter.*Write MODEL\+.*lora"):
        inspect_models(tmp_path / "lora")


def test_other_shapes(family: Callable[..., Any], clone: Clone) -> None:
    made = family("llama")

    def cut(tensors: dict[str, Any], *names: str) -> dict[str, Any]:
        return tensors | {name: tensors[name][:279].contiguous() for name in names}

    one = rewrite(clone(made.experts[0]), lambda tensors: cut(tensors, "lm_head.weight"))
    both = ("model.embed_tokens.weight", "lm_head.weight")
    two = rewrite(clone(made.experts[1]), lambda tensors: cut(tensors, *both))
    with pytest.raises(CheckpointError) as caught:
        inspect_models([one, two], base=made.base)
    assert [fault.where for fault in caught.value.faults] == [str(one), str(two)]
    first, second = (fault.what for fault in caught.value.faults)
    assert (
        first
        == f"a tensor has another shape than in {made.base}: lm_head.weight is [279, 32], there [280, 32]"
    )
    assert second.startswith(f"2 tensors have other shapes than in {made.base}: ")


def test_nothing_in_common(family: Callable[..., Any]) -> None:
    with pytest.raises(CheckpointError, match="no tensor is in all of"):
        inspect_models([family("gpt2").base], base=family("t5").base)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize("damaged", ["expert", "base"])
def test_nan_is_refused_with_its_place(
    family: Callable[..., Any], clone: Clone, dtype: str, damaged: str
) -> None:
    import torch

    made = family("llama")
    name = "model.layers.1.mlp.up_proj.weight"

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        tensors = {known: tensor.to(getattr(torch, dtype)) for known, tensor in tensors.items()}
        tensors[name].view(-1)[77] = float("nan")
        return tensors

    models = {"base": clone(made.base), "expert": clone(made.experts[0])}
    rewrite(models[damaged], change)
    with pytest.raises(CheckpointError) as caught:
        inspect_models(models["expert"], base=models["base"])
    fault = caught.value.faults[0]
    assert fault.where == str(models[damaged] / "model.safetensors")
    assert fault.what == f"tensor {name!r} holds NaN or Inf (first at element 77)"


def test_a_difference_beyond_float32(family: Callable[..., Any], clone: Clone) -> None:
    made = family("llama", dtype="float32")
    folders = [
        rewrite(
            clone(made.base),
            lambda t, sign=sign: t | {"model.norm.weight": t["model.norm.weight"] * 0 + sign},
        )
        for sign in (3e38, -3e38)
    ]
    with pytest.raises(CheckpointError, match=r"model.norm.weight' has values too large"):
        inspect_models(folders[1], base=folders[0])


def test_faults_of_the_call(family: Callable[..., Any]) -> None:
    base = family("llama").base
    with pytest.raises(MixmergeError, match="none is given"):
        inspect_models([])
    with pytest.raises(MixmergeError, match="is given twice"):
        inspect_models([base, str(base)])
    with pytest.raises(MixmergeError, match="Did you mean 'layer'"):
        inspect_models(base, by="layers")  # type: ignore[arg-type]


# -- the command ------------------------------------------------------------------------------------------


def run(*arguments: object) -> Any:
    from mixmerge.cli import app

    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


def cells(output: str, start: str) -> list[str]:
    """The cells of the first table row that starts so."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if "│" in line]
    return next(row for row in rows if row and row[0] == start)


def test_one_model_as_a_table(family: Callable[..., Any]) -> None:
    done = run(family("llama_tied").base)
    assert (done.exit_code, done.stderr) == (0, "")
    assert cells(done.stdout, "architecture")[1] == "LlamaForCausalLM"
    assert cells(done.stdout, "layers")[1] == "2 in model.layers"
    assert cells(done.stdout, "head")[1] == "tied to model.embed_tokens.weight"
    assert cells(done.stdout, "model.embed_tokens")[1:] == ["1", "BF16", "8,960", "36.60 %", "17.92 kB"]
    listed = run(family("llama_tied").base, "--by", "tensor")
    assert cells(listed.stdout, "model.embed_tokens.weight")[1] == "280x32"


def test_experts_as_tables(family: Callable[..., Any]) -> None:
    made = family("llama", experts=3)
    done = run(*made.experts, "--base", made.base)
    assert (done.exit_code, done.stderr) == (0, "")
    found = inspect_models(made.experts, base=made.base).comparison
    assert found is not None
    total = found.total
    norm, share = f"{total.norms[1]:.4g}", f"{100 * (total.relative[1] or 0):.2f} %"
    assert cells(done.stdout, "expert1")[1:3] == [norm, share]
    assert cells(done.stdout, "model.layers.1")[1:3] == ["7,744", f"{found.rows[2].base_norm:.4g}"]
    assert cells(done.stdout, "all")[-1] == f"{100 * (total.conflicts or 0):.2f} %"
    for title in ("cosines between deltas", "entries of opposite sign", "by layer"):
        assert title in done.stdout


def test_the_command_as_json(family: Callable[..., Any], tmp_path: Path) -> None:
    made = family("llama")
    add_adapter(tmp_path / "lora")
    done = run(
        f"{made.base}+{tmp_path / 'lora'}", made.experts[0], "--base", made.base, "--by", "kind", "--json"
    )
    assert done.exit_code == 0, done.stderr
    data = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(name))
    assert data["models"][0]["adapter"]["ranks"] == {"2": 2}
    comparison = data["comparison"]
    assert [row["name"] for row in comparison["rows"]] == ["embedding", "attention", "mlp", "norm", "head"]
    assert comparison["rows"][0]["cosines"] == [[None, None], [None, 1.0]]
    assert set(comparison["total"]) >= {"norms", "relative", "zeros", "cosines", "opposite", "conflicts"}


def test_the_command_draws(family: Callable[..., Any], tmp_path: Path) -> None:
    from matplotlib.image import imread

    made = family("llama", experts=3)
    for experts in (3, 1):
        picture = tmp_path / f"{experts}.png"
        done = run(*made.experts[:experts], "--base", made.base, "--png", picture, "-q")
        assert done.exit_code == 0, done.stderr
        pixels = imread(picture)
        assert pixels.shape[0] > 300
        assert pixels.shape[1] > 500
        assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 100


def test_faults_of_the_command(family: Callable[..., Any], tmp_path: Path) -> None:
    base = family("llama").base
    for arguments, message in [
        ((tmp_path / "none",), "no such folder"),
        ((base, "--by", "layers"), "--by: is 'layers'. Did you mean 'layer'?"),
        (
            (base, "--png", tmp_path / "x.png"),
            "--png: there is nothing to draw: one model is compared with no other. Name a base",
        ),
        ((base, "--base", base, "--png", tmp_path / "x.svg"), "is not called .png"),
        ((base, "--base", base, "--png", tmp_path / "no" / "x.png"), "no such folder"),
        (("a+b+c",), "MODEL: 'a+b+c' has more than one +"),
    ]:
        done = run(*arguments)
        assert done.exit_code == 2, arguments
        assert done.stdout == ""
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("*.png"))


def test_a_folder_with_a_plus_in_its_name(family: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "c++@1"
    shutil.copytree(family("llama").base, folder)
    assert run(folder).exit_code == 0


def test_no_matplotlib(family: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixmerge.inspect.plot import check_png

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DependencyError, match=r"pip install 'mixmerge\[plot\]'"):
        check_png(tmp_path / "x.png")


def test_a_picture_that_cannot_be_written(family: Callable[..., Any], tmp_path: Path) -> None:
    from mixmerge.inspect.plot import save_png

    made = family("llama")
    found = inspect_models(made.experts, base=made.base).comparison
    assert found is not None
    (tmp_path / "x.png").mkdir()
    with pytest.raises(OutputError, match="cannot be written"):
        save_png(found, tmp_path / "x.png")


def test_inspecting_loads_no_torch(family: Callable[..., Any]) -> None:
    made = family("llama")
    code = (
        "import sys\nfrom mixmerge.inspect import inspect_models\n"
        f"inspect_models({str(made.experts[0])!r})\n"
        "print('numba' in sys.modules)\n"
        f"assert inspect_models({str(made.experts[0])!r}, base={str(made.base)!r}).comparison\n"
        "print('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "False"]
