"""Adapters that are refused, each by its message; and which base tensor an adapter's name means."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from mixmerge.checkpoint.adapter import AdapterDelta, read_adapter
from mixmerge.checkpoint.adapter_names import BaseNames, parse
from mixmerge.checkpoint.header import read_header
from mixmerge.errors import CheckpointError

Tensors = dict[str, Any]
Edit = Callable[[Tensors], Tensors]

PREFIX = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.0.mlp.up_proj"
BASE = {
    "model.embed_tokens.weight": (50, 8),
    f"{Q}.weight": (8, 8),
    f"{UP}.weight": (12, 8),
    "model.layers.1.self_attn.q_proj.weight": (8, 8),
    "model.norm.weight": (8,),
    "lm_head.weight": (50, 8),
}
FACTORS = {
    f"{PREFIX}{module}.lora_{part}.weight": shape
    for module, outputs in ((Q, 8), (UP, 12))
    for part, shape in (("A", (2, 8)), ("B", (outputs, 2)))
}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "modules_to_save": None}


def save(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    random = np.random.default_rng(0)
    save_file({n: random.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()}, path)


def edit_config(folder: Path, **keys: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def edit(folder: Path, change: Edit, file: str = "adapter_model") -> None:
    path = folder / f"{file}.safetensors"
    save_file(change(load_file(path)), path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base and a sound adapter of it, in one folder."""
    save(tmp_path / "model.safetensors", BASE)
    save(tmp_path / "adapter_model.safetensors", FACTORS)
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def read(folder: Path) -> dict[str, AdapterDelta]:
    return read_adapter(folder, read_header(folder / "model.safetensors"), where="models[0].model")


def refusal(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read(folder)
    return caught.value


def test_a_hand_made_adapter(tmp_path: Path) -> None:
    """W = [[1, 2], [3, 4]], A = [[1, 10]], B = [[2], [3]], alpha 4, r 1: 4 B A by hand."""
    save_file({"layers.0.up.weight": np.float32([[1, 2], [3, 4]])}, tmp_path / "model.safetensors")
    factors = {"A": np.float32([[1, 10]]), "B": np.float32([[2], [3]])}
    named = {f"{PREFIX}layers.0.up.lora_{part}.weight": factor for part, factor in factors.items()}
    save_file(named, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 4}')
    delta = read(tmp_path)["layers.0.up.weight"]
    assert {header.name for header in delta.headers} == set(named)
    facts = json.loads(json.dumps(delta.facts()))
    assert (facts["kind"], facts["scale"]) == ("lowrank", 4)
    assert facts["parts"]["b"] == [f"{PREFIX}layers.0.up.lora_B.weight", "F32", [2, 1]]
    assert str(tmp_path) not in json.dumps(facts)
    loaded = delta.load()
    assert loaded.rows(0, 2).tolist() == [[8, 80], [12, 120]]
    out = np.empty((1, 2), dtype=np.float32)
    assert loaded.expert(1, 2, np.float32([[3, 4]]), out=out) is out
    assert out.tolist() == [[15, 124]]


def test_the_sound_adapter_is_read(folder: Path) -> None:
    assert sorted(read(folder)) == [f"{UP}.weight", f"{Q}.weight"]
    with pytest.raises(ValueError, match="needs the rows of the base"):
        read(folder)[f"{Q}.weight"].load().expert(0, 8)


REFUSED_CONFIGS: dict[str, tuple[Tensors, str]] = {
    "another method": ({"peft_type": "IA3"}, "peft_type is 'IA3'. Only LORA adapters are read"),
    "no method": ({"peft_type": None}, "peft_type is None"),
    "QALoRA": ({"use_qalora": True}, "use_qalora is set: QALoRA pools its inputs"),
    "more layers": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication is set"),
    "token rows": ({"trainable_token_indices": [1]}, "trainable_token_indices is set"),
    "aLoRA": ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens is set"),
    "KaSA": ({"kasa_config": {"beta": 1}}, "kasa_config is set"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "changed the base's own weights"),
    "OLoRA": ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "changed the base's own weights"),
    "unknown start": ({"init_lora_weights": "fancy"}, "'fancy' is not known"),
    "a key to come": ({"use_everything": True}, "use_everything is not a key this version knows"),
    "rank 0": ({"r": 0}, "r is 0"),
    "rank true": ({"r": True}, "r is True"),
    "no rank": ({"r": None}, "r is None"),
    "alpha NaN": ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
    "bias": ({"bias": "some"}, "bias is 'some'. none, all or lora_only is allowed"),
    "flag": ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
    "names": ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head'"),
    "pattern": ({"rank_pattern": {"q(": 4}}, "rank_pattern['q('] is no regular expression"),
    "pattern rank": ({"rank_pattern": {"q_proj": 1.5}}, "rank_pattern['q_proj'] is 1.5"),
    "patterns": ({"alpha_pattern": [1]}, "alpha_pattern is [1]"),
    "other rank": ({"r": 4}, "r and rank_pattern in adapter_config.json say 4"),
    "no magnitudes": ({"use_dora": True}, f"no DoRA magnitude: {UP}, {Q}. use_dora is true"),
    "no bias of B": ({"lora_bias": True}, f"no bias of lora_B: {UP}, {Q}. lora_bias is true"),
}


@pytest.mark.parametrize("fault", REFUSED_CONFIGS)
def test_configs_that_are_refused(folder: Path, fault: str) -> None:
    keys, message = REFUSED_CONFIGS[fault]
    edit_config(folder, **keys)
    error = refusal(folder)
    assert message in str(error)
    assert all(one.where.startswith("models[0].model: ") for one in error.faults)


@pytest.mark.parametrize(
    "keys",
    [
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"qalora_group_size": 16, "setting_to_come": 3, "flag_to_come": False, "config_to_come": None},
        {"rank_pattern": None, "alpha_pattern": {"nothing": 3}, "loftq_config": {}, "use_bdlora": None},
    ],
)
def test_configs_that_are_read(folder: Path, keys: Tensors) -> None:
    edit_config(folder, **keys)
    assert len(read(folder)) == 2


def _zeros(shapes: dict[str, tuple[int, ...]]) -> Edit:
    more = {PREFIX + name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}
    return lambda tensors: {**tensors, **more}


def _renamed(old: str, new: str) -> Edit:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def _without(part: str) -> Edit:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


BROKEN: dict[str, tuple[Edit, str]] = {
    "no B": (_without(f"{Q}.lora_B"), f"no lora_B: {Q}."),
    "no A": (_without(f"{Q}.lora_A"), f"no lora_A: {Q}."),
    "nothing": (lambda tensors: {}, "missing: every tensor"),
    "unknown kind": (_zeros({f"{Q}.lora_E": (6, 1)}), f"of no known kind: {PREFIX}{Q}.lora_E"),
    "not asked for": (
        _zeros({"model.norm.weight": (8,)}),
        "of no known kind: base_model.model.model.norm.weight",
    ),
    "a layer more": (
        _renamed("layers.0.mlp", "layers.7.mlp"),
        "not in the base: model.layers.7.mlp.up_proj.weight",
    ),
    "another model": (_renamed("proj", "linear"), "base_model_name_or_path in its adapter_config.json"),
    "rank": (_zeros({f"{Q}.lora_A.weight": (5, 8)}), f"of another rank: {Q} (lora_A 5 x 8, lora_B 8 x 2)"),
    "shape": (
        _zeros({f"{Q}.lora_A.weight": (2, 9)}),
        f"of another shape than the base: {Q} (8 x 9, the base 8 x 8)",
    ),
    "convolution": (_zeros({f"{Q}.lora_A.weight": (2, 8, 1, 1)}), "LoRA on convolutions is not read"),
    "integers": (
        lambda tensors: {name: tensor.astype(np.int32) for name, tensor in tensors.items()},
        f"not floating point: {PREFIX}{UP}.lora_A.weight (I32)",
    ),
    "magnitude": (_zeros({f"{Q}.lora_magnitude_vector": (8,)}), f"a DoRA magnitude: {Q}. use_dora is false"),
    "bias of B": (_zeros({f"{Q}.lora_B.bias": (8,)}), f"a bias of lora_B: {Q}. lora_bias is false"),
    "two adapters": (
        _renamed(f"{Q}.lora_A.", f"{Q}.lora_A.one."),
        "it holds more than one adapter: one, two",
    ),
    "twice": (_zeros({f"{Q}.lora_A.default.weight": (2, 8)}), "there twice, under names"),
    "vocabulary": (_zeros({"lm_head.weight": (53, 8)}), "resize the base the same way first"),
    "other width": (_zeros({"lm_head.weight": (50, 9)}), "lm_head.weight (50 x 9, the base 50 x 8)"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_tensors_are_named(folder: Path, fault: str) -> None:
    change, message = BROKEN[fault]
    if fault == "two adapters":
        edit(folder, _renamed("lora_B.", "lora_B.two."))
    edit(folder, change)
    assert message in str(refusal(folder))


def test_two_modules_of_one_tensor(folder: Path) -> None:
    edit(folder, lambda tensors: {**tensors, **_renamed("model.layers", "_orig_mod.model.layers")(tensors)})
    assert "there twice, under names" in str(refusal(folder))
    edit(folder, _without("_orig_mod"))
    edit(folder, lambda tensors: {**tensors, **_renamed("model.layers", "decoder.layers")(tensors)})
    assert f"changed by two modules of the adapter: {UP}.weight, {Q}.weight" in str(refusal(folder))


def test_all_faults_come_at_once(folder: Path) -> None:
    edit(folder, _without(f"{Q}.lora_B"))
    edit(folder, _zeros({f"{Q}.lora_E": (6, 1)}))
    edit(folder, _renamed("layers.0.mlp", "layers.9.mlp"))
    assert len(refusal(folder).faults) == 3
    edit_config(folder, r=-1, lora_alpha="much", use_qalora=True, init_lora_weights="pissa")
    assert len(refusal(folder).faults) == 4


def test_missing_and_damaged_files(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    assert "the file at byte" in str(refusal(folder))
    file.unlink()
    assert "it holds no adapter weights" in str(refusal(folder))
    (folder / "adapter_model.bin").write_bytes(b"not a zip archive")
    assert "adapter_model.bin: it is not a zip archive" in str(refusal(folder))
    (folder / "adapter_config.json").write_text("[]")
    assert "not an object" in str(refusal(folder))
    (folder / "adapter_config.json").unlink()
    assert "no such file" in str(refusal(folder))


def test_an_absurd_rank(folder: Path) -> None:
    edit(folder, _zeros({f"{Q}.lora_A.weight": (17, 8), f"{Q}.lora_B.weight": (8, 17)}))
    edit_config(folder, rank_pattern={"q_proj": 17})
    assert f"an absurd rank: {Q} (lora_A 17 x 8, lora_B 8 x 17)" in str(refusal(folder))


def test_a_quantised_base(folder: Path) -> None:
    as_bytes: Edit = lambda tensors: {**tensors, f"{Q}.weight": tensors[f"{Q}.weight"].astype(np.uint8)}  # noqa: E731
    edit(folder, as_bytes, "model")
    assert f"quantised in the base: {Q}.weight (U8)" in str(refusal(folder))
    edit(folder, _renamed("q_proj.weight", "q_proj.qweight"), "model")
    assert "The base is quantised: name the model it was quantised from" in str(refusal(folder))


def test_a_bias_the_base_does_not_have(folder: Path) -> None:
    edit(folder, _zeros({f"{Q}.lora_B.bias": (8,), f"{UP}.lora_B.bias": (12,)}))
    edit_config(folder, lora_bias=True)
    assert "a bias on lora_B, but none on the base's module" in str(refusal(folder))


@pytest.mark.parametrize("name", ["shared", "bert.embeddings.word_embeddings"])
def test_embeddings_tied_to_more_than_a_head(folder: Path, name: str) -> None:
    edit(folder, _renamed("model.embed_tokens", name), "model")
    edit(folder, _without("lm_head"), "model")
    edit(folder, _zeros({f"{name}.weight": (50, 8)}))
    assert "changed, but the base uses it under other names too" in str(refusal(folder))
    edit_config(folder, task_type="FEATURE_EXTRACTION")
    assert read(folder)[f"{name}.weight"].kind == "replace"


def test_a_headless_base_gets_no_head(folder: Path) -> None:
    edit(folder, _without("lm_head"), "model")
    edit(folder, _zeros({"model.embed_tokens.weight": (50, 8)}))
    head = read(folder)["lm_head.weight"]
    assert (head.kind, head.weight.name) == ("same", "model.embed_tokens.weight")
    assert not head.load().rows(0, 50).any()
    edit_config(folder, auto_mapping={"base_model_class": "LlamaModel"})
    assert "lm_head.weight" not in read(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_inf_are_refused_at_load(folder: Path, value: float) -> None:
    def spoil(tensors: Tensors) -> Tensors:
        tensors[f"{PREFIX}{Q}.lora_B.weight"][3, 1] = value
        return tensors

    edit(folder, spoil)
    deltas = read(folder)
    with pytest.raises(CheckpointError, match=r"q_proj.lora_B.weight' holds NaN or Inf"):
        deltas[f"{Q}.weight"].load()
    deltas[f"{UP}.weight"].load()


def test_a_scale_beyond_float32_is_refused_at_load(folder: Path) -> None:
    edit_config(folder, lora_alpha=1e41)
    with pytest.raises(CheckpointError, match="exceed float32"):
        read(folder)[f"{Q}.weight"].load()


def test_files_that_change_after_planning(folder: Path) -> None:
    deltas = list(read(folder).values())
    last = max(deltas, key=lambda delta: max(header.offset for header in delta.headers))
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="it ends inside tensor"):
        last.load()
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match="cannot be read"):
        last.load()


@pytest.mark.parametrize("turned", [False, True])
def test_dora_of_a_direction_that_is_zero(folder: Path, turned: bool) -> None:
    def no_base(tensors: Tensors) -> Tensors:
        tensors[f"{UP}.weight"][3] = 0
        if turned:
            tensors[f"{UP}.weight"] = np.ascontiguousarray(tensors[f"{UP}.weight"].T)
        return tensors

    def no_change(tensors: Tensors) -> Tensors:
        tensors[f"{PREFIX}{UP}.lora_B.weight"][3] = 0
        return tensors

    edit(folder, no_base, "model")
    edit(folder, no_change)
    edit(folder, _zeros({f"{Q}.lora_magnitude_vector": (8,), f"{UP}.lora_magnitude_vector": (12,)}))
    edit_config(folder, use_dora=True)
    delta = read(folder)[f"{UP}.weight"]
    weight = load_file(folder / "model.safetensors")[f"{UP}.weight"]
    axis = "column" if turned else "row"
    with pytest.raises(CheckpointError, match=rf"{axis} 3 of {UP}.weight and its LoRA sum to zero"):
        delta.load().rows(0, delta.shape[0], weight)


@pytest.mark.parametrize(("rank", "message"), [(2, "do not tell which parameter"), (1, "fit no parameter")])
def test_expert_shapes_that_prove_nothing(tmp_path: Path, rank: int, message: str) -> None:
    save(tmp_path / "model.safetensors", {"layers.0.experts.down_proj": (2, 8, 8)})
    factors = {"layers.0.experts.lora_A.weight": (4, 8), "layers.0.experts.lora_B.weight": (8, 4)}
    save(tmp_path / "adapter_model.safetensors", {PREFIX + name: shape for name, shape in factors.items()})
    config = {**CONFIG, "r": rank, "target_parameters": ["experts.down_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert message in str(refusal(tmp_path))


VISION = ["vision.layers.0.q.weight", "vision.layers.0.fc.weight"]
NAMES: list[tuple[list[str], list[str], str | None]] = [
    (["model.layers.0.q.weight"], ["model.layers.0.q.weight"], "model.layers.0.q.weight"),
    (["h.0.c.weight", "wte.weight"], ["transformer.h.0.c.weight"], "h.0.c.weight"),
    (["h.0.c.weight", "wte.weight"], ["transformer.wte.weight"], "wte.weight"),
    (
        ["model.layers.0.q.weight", "model.norm.weight"],
        ["norm.weight", "layers.0.q.weight"],
        "model.norm.weight",
    ),
    (
        ["encoder.block.0.q.weight", "decoder.block.0.q.weight"],
        ["m.decoder.block.0.q.weight"],
        "decoder.block.0.q.weight",
    ),
    (
        ["model.layers.0.block_sparse_moe.gate.weight"],
        ["model.layers.0.mlp.gate.weight"],
        "model.layers.0.block_sparse_moe.gate.weight",
    ),
    (
        ["text.model.layers.0.q.weight", "text.model.layers.0.up.weight", *VISION],
        ["model.text.layers.0.q.weight", "model.text.layers.0.up.weight"],
        "text.model.layers.0.q.weight",
    ),
    (["text.model.layers.0.q.weight", *VISION], ["model.text.layers.0.q.weight"], None),
    (["a.layers.0.q.weight", "b.layers.0.q.weight"], ["layers.0.q.weight"], None),
    (["model.layers.0.norm.weight"], ["norm.weight"], None),
]


@pytest.mark.parametrize(("base", "wanted", "found"), NAMES)
def test_names_are_found_by_their_cores(base: list[str], wanted: list[str], found: str | None) -> None:
    assert BaseNames(base, wanted).find(wanted[0]) == found


dotted = st.lists(st.sampled_from(["model", "layers", "0", "1", "q", "weight", "h"]), min_size=1, max_size=5)


@given(base=st.lists(dotted.map(".".join), max_size=8), name=dotted.map(".".join))
def test_what_is_found_exists_and_exact_names_win(base: list[str], name: str) -> None:
    found = BaseNames(base, [name]).find(name)
    assert found is None or found in base
    assert found == name or name not in base


@given(st.text(max_size=40))
def test_any_name_is_parsed(name: str) -> None:
    assert parse(name).part in ("a", "b", "b_bias", "magnitude", "full")
