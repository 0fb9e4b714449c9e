"""Fixed mixtures: at work in a bank, as a checkpoint, as an adapter in PEFT, and for vLLM all the same model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mixmerge.bank.building import adapter_entries, bank_of
from mixmerge.bank.fixed import mixture_of
from mixmerge.bank.fold import export_adapter, export_checkpoint
from mixmerge.bank.mix import Mix, change
from mixmerge.bank.records import Bank, Entry, side_by_side
from mixmerge.checkpoint.reader import read_weights
from mixmerge.checkpoint.used_rows import read_used
from mixmerge.errors import MixmergeError, OutputError

TOKENS = torch.tensor([[3, 17, 41, 5, 99, 200], [7, 7, 250, 1, 30, 12]])
WEIGHTS = [0.7, -0.4]
LINEAR = {"target_modules": ["q_proj", "down_proj"]}

# name -> family, the configs of adapters; none: the family's full experts
BANKS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "adapters": (
        "llama",
        [
            {**LINEAR, "r": 3, "use_rslora": True},
            {"target_modules": "all-linear", "r": 2, "rank_pattern": {"layers.0.mlp.*": 5}},
        ],
    ),
    "tables": ("llama", [{"target_modules": ["embed_tokens", "lm_head", "q_proj"]}, LINEAR]),
    "tied tables": ("llama_tied", [{"target_modules": ["embed_tokens", "q_proj"]}, LINEAR]),
    "tied heads": (
        "llama_tied",
        [
            {"target_modules": ["lm_head", "q_proj"]},
            {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        ],
    ),
    "biases": ("llama_bias", [{"target_modules": ["q_proj"], "lora_bias": True, "bias": "all"}, LINEAR]),
    "conv1d": (
        "gpt2",
        [
            {"target_modules": ["wpe", "c_attn", "c_proj"], "fan_in_fan_out": True},
            {"target_modules": ["c_fc"]},
        ],
    ),
    "full llama": ("llama_tied", []),
    "full bias": ("llama_bias", []),
    "full gpt2": ("gpt2", []),
    "full gemma": ("gemma", []),
    "full gpt_neox": ("gpt_neox", []),
    "full qwen3": ("qwen3", []),
}


@pytest.fixture(scope="session")
def made(trained: Any, family: Any) -> Any:
    """``made(name)``: the base's folder, and a bank of two experts over it."""

    def make(name: str) -> tuple[Path, Bank]:
        which, configs = BANKS[name]
        if not configs:
            experts = family(which, dtype="float32")
            return experts.base, bank_of(experts.base, dict(zip("ab", experts.experts, strict=True)), rank=3)
        folders = [trained(which, config, seed) for seed, config in enumerate(configs)]
        return folders[0][0], bank_of(folders[0][0], {"a": folders[0][1], "b": folders[1][1]})

    return make


def logits_in(folder: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: Tensor = model(TOKENS).logits
    return logits


def logits_in_peft(base: Path, folder: Path) -> Tensor:
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(model, folder).eval()
    with torch.no_grad():
        logits: Tensor = adapted(TOKENS).logits
    return logits


@pytest.mark.parametrize("name", list(BANKS))
def test_bank_checkpoint_and_adapter_are_one_model(
    made: Any, logits_of: Any, assert_loads: Any, tmp_path: Path, name: str
) -> None:
    base, bank = made(name)
    expected = logits_of(base, bank, torch.tensor(WEIGHTS).expand(2, -1))
    assert (expected - logits_in(base)).abs().max() > 1e-2
    export_checkpoint(base, bank, WEIGHTS, tmp_path / "whole")
    assert_loads(tmp_path / "whole")
    torch.testing.assert_close(logits_in(tmp_path / "whole"), expected, atol=3e-4, rtol=3e-4)
    export_adapter(bank, {"a": WEIGHTS[0], "b": WEIGHTS[1]}, tmp_path / "adapter", base=base)
    found = logits_in_peft(base, tmp_path / "adapter")
    torch.testing.assert_close(found, expected, atol=3e-4, rtol=3e-4)
    again = bank_of(base, {"it": tmp_path / "adapter"})  # and it comes back as an expert
    found = logits_of(base, again, torch.ones(2, 1))
    torch.testing.assert_close(found, expected, atol=3e-4, rtol=3e-4)


def test_one_expert_alone_is_the_adapter_it_was(made: Any, trained: Any, tmp_path: Path) -> None:
    base, bank = made("adapters")
    original = trained(*[BANKS["adapters"][0], BANKS["adapters"][1][0]], 0)
    assert export_adapter(bank, [1.0, 0.0], tmp_path / "one", base=base) == 3
    torch.testing.assert_close(logits_in_peft(base, tmp_path / "one"), original[2], atol=1e-4, rtol=1e-4)
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (3, 3, {})
    assert config["base_model_name_or_path"] == str(base)


def test_ranks_that_differ_are_patterns(made: Any, tmp_path: Path) -> None:
    base, bank = made("adapters")
    assert export_adapter(bank, WEIGHTS, tmp_path / "both", base=base, base_name="org/base") == 8
    config = json.loads((tmp_path / "both" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"
    assert config["rank_pattern"] == config["alpha_pattern"]
    entries = adapter_entries(tmp_path / "both", read_weights(base)[0], where="it")[0]
    ranks = {name.split("layers.")[1]: one.rank for name, one in entries.items()}
    assert ranks["0.mlp.down_proj.weight"] == 3 + 5
    assert ranks["1.mlp.down_proj.weight"] == 3 + 2
    assert ranks["0.mlp.up_proj.weight"] == 5
    assert {one.scale for one in entries.values()} == {1.0}


def test_more_ranks_than_the_matrix_has_are_joined() -> None:
    draw = torch.Generator().manual_seed(0)
    entries: list[Entry | None] = [
        Entry(torch.randn(4, 5, generator=draw), torch.randn(4, 7, generator=draw), 2.0) for _ in range(3)
    ]
    site = side_by_side("w", entries)
    found, _ = mixture_of(Bank(("a", "b", "c"), {"w": site}, {}), [0.5, -1.0, 2.0])
    one = found["w"]
    assert one.rank == 5
    product = (one.b.T * one.scale) @ one.a
    torch.testing.assert_close(product, site.delta(torch.tensor([0.5, -1.0, 2.0])), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("table", [False, True])
def test_factors_that_are_mixed(table: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    kind: Any = "embedding" if table else "linear"
    size = (9, 2) if table else (2, 9)
    entries: list[Entry | None] = [
        Entry(torch.randn(*size, generator=draw), torch.randn(2, 7, generator=draw), 0.5 + each, kind)
        for each in range(2)
    ]
    site = side_by_side("w", [*entries, None])
    bank = Bank(("a", "b", "c"), {"w": site}, {})
    weights = torch.tensor([0.7, 0.2, 5.0])
    one = mixture_of(bank, weights, how="factors")[0]["w"]
    assert one.rank == 2
    u = torch.tensor([[0, 4, 8]]) if table else torch.randn(1, 3, 9, generator=draw)
    expected = change(site, u, Mix(weights[None], how="factors"))
    found = change(side_by_side("w", [one]), u, Mix(torch.ones(1, 1)))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    uneven = side_by_side(
        "v",
        [entries[0], Entry(torch.ones(*((9, 1) if table else (1, 9))), torch.ones(1, 7), 1.0, kind)],
    )
    with pytest.raises(MixmergeError, match="v: has ranks 2, 1, so factors cannot be mixed"):
        mixture_of(Bank(("a", "b"), {"v": uneven}, {}), [1.0, 1.0], how="factors")


def test_a_checkpoint_keeps_types_shards_and_tokenizer(
    family: Any, read_tensors: Any, tmp_path: Path
) -> None:
    made = family("llama_tied", dtype="bfloat16", shard_size="20KB")
    bank = bank_of(made.base, {"a": made.experts[0]}, rank=2)
    export_checkpoint(made.base, bank, [1.0], tmp_path / "out")
    before, after = read_tensors(made.base), read_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name].dtype == torch.bfloat16
        if name in bank.sites:
            exact = value.float() + bank.sites[name].delta(torch.ones(1))
        else:
            exact = value.float() + bank.vectors[name][0]
            assert torch.equal(after[name], exact.to(torch.bfloat16))
        torch.testing.assert_close(after[name].float(), exact, atol=1e-6, rtol=2**-8)  # rounded once
    assert (
        len(list((tmp_path / "out").glob("*.safetensors"))) == len(list(made.base.glob("*.safetensors"))) > 1
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((made.base / name).read_text())
    facts = json.loads((tmp_path / "out" / "mixmerge_manifest.json").read_text())
    assert facts["mixture"]["experts"] == {"a": 1.0}
    export_checkpoint(made.base, bank, [1.0], tmp_path / "wide", dtype="float32")
    assert {value.dtype for value in read_tensors(tmp_path / "wide").values()} == {torch.float32}
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"


def test_rows_that_base_and_network_have_seen_are_named(made: Any, tmp_path: Path) -> None:
    base, bank = made("adapters")
    rows = {}
    for number, folder in enumerate((tmp_path / "base", tmp_path / "network")):
        if folder.name == "base":
            shutil.copytree(base, folder)
        folder.mkdir(exist_ok=True)
        rows[folder] = str(number) * 64
        said = {"calibration": {"rows": {"gate": [rows[folder]]}}}
        (folder / "mixmerge_manifest.json").write_text(json.dumps(said))
    given, network = tmp_path / "base", tmp_path / "network"
    export_checkpoint(given, bank, WEIGHTS, tmp_path / "whole", network=network)
    export_adapter(bank, WEIGHTS, tmp_path / "adapter", base=given, network=network)
    for out in ("whole", "adapter"):
        found = json.loads((tmp_path / out / "mixmerge_manifest.json").read_text())
        assert read_used(found) == (frozenset(rows.values()), False)


def test_weights_of_nothing_leave_the_base(made: Any, read_tensors: Any, tmp_path: Path) -> None:
    base, bank = made("full llama")
    export_checkpoint(base, bank, {}, tmp_path / "out")
    before, after = read_tensors(base), read_tensors(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before | after)
    with pytest.raises(MixmergeError, match="changes no matrix"):
        export_adapter(bank, {}, tmp_path / "adapter", base=base)


def test_a_head_that_parts_from_its_table(made: Any, read_tensors: Any, tmp_path: Path) -> None:
    base, bank = made("tied tables")
    assert "lm_head.weight" not in read_tensors(base)
    export_checkpoint(base, bank, WEIGHTS, tmp_path / "out")
    tensors = read_tensors(tmp_path / "out")
    assert torch.equal(tensors["lm_head.weight"], read_tensors(base)["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    base, bank = made("full llama")
    export_checkpoint(base, bank, WEIGHTS, tmp_path / "tied")
    assert "lm_head.weight" not in read_tensors(tmp_path / "tied")
    assert json.loads((tmp_path / "tied" / "config.json").read_text())["tie_word_embeddings"] is True


def test_vllm_gets_one_rank_or_a_refusal_by_name(made: Any, logits_of: Any, tmp_path: Path) -> None:
    base, bank = made("adapters")
    rank = export_adapter(bank, WEIGHTS, tmp_path / "vllm", base=base, runner="vllm")
    config = json.loads((tmp_path / "vllm" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (rank, rank)
    assert not config["rank_pattern"]
    assert config["bias"] == "none"
    assert config["modules_to_save"] is None
    tensors = load_file(tmp_path / "vllm" / "adapter_model.safetensors")
    assert {one.shape[0] for name, one in tensors.items() if "lora_A" in name} == {rank}
    expected = logits_of(base, bank, torch.tensor(WEIGHTS).expand(2, -1))
    torch.testing.assert_close(logits_in_peft(base, tmp_path / "vllm"), expected, atol=3e-4, rtol=3e-4)
    for name, said in (
        ("tables", ("model.embed_tokens", "lm_head", "no tables or heads")),
        ("full gpt2", ("no Conv1D", "no biases or norms", "transformer.wte")),
    ):
        base, bank = made(name)
        with pytest.raises(MixmergeError) as error:
            export_adapter(bank, WEIGHTS, tmp_path / "no", base=base, runner="vllm")
        assert all(word in str(error.value) for word in (*said, "export_checkpoint"))
    assert not (tmp_path / "no").exists()


def test_what_cannot_be_exported(made: Any, family: Any, tmp_path: Path) -> None:
    base, bank = made("adapters")
    out = tmp_path / "out"
    for weights, said in (
        ([1.0], r"\(1,\) for 2 experts"),
        ([1.0, float("nan")], "nan"),
        ({"a": 1.0, "c": 1.0}, "no expert is called 'c'"),
    ):
        with pytest.raises(MixmergeError, match=said):
            export_checkpoint(base, bank, weights, out)
    with pytest.raises(MixmergeError, match="has no such tensor"):
        export_checkpoint(family("gpt2", dtype="float32").base, bank, WEIGHTS, out)
    _, of_tied = made("full llama")
    with pytest.raises(MixmergeError, match="has a head tied to it, and the base's head is not"):
        export_checkpoint(family("llama", dtype="float32").base, of_tied, WEIGHTS, out)
    with pytest.raises(MixmergeError, match="beyond F16"):
        export_checkpoint(base, bank, [1e6, 0.0], out, dtype="float16")
    assert not list(tmp_path.iterdir())
    export_checkpoint(base, bank, WEIGHTS, out)
    with pytest.raises(OutputError, match="it exists"):
        export_checkpoint(base, bank, WEIGHTS, out)
    export_checkpoint(base, bank, WEIGHTS, out, overwrite=True)
    with pytest.raises(OutputError, match="is read, and in it"):
        export_checkpoint(out, bank, WEIGHTS, out, overwrite=True)
    with pytest.raises(OutputError, match="holds no adapter_config"):
        export_adapter(bank, WEIGHTS, out, base=base, overwrite=True)


@pytest.mark.parametrize("name", ["bert", "bert_mlm"])
def test_encoders(family: Any, assert_loads: Any, tmp_path: Path, name: str) -> None:
    from transformers import AutoModel, AutoModelForMaskedLM

    from mixmerge.bank.attach import Attached
    from mixmerge.bank.gate import RowGate, Run

    auto = AutoModelForMaskedLM if name == "bert_mlm" else AutoModel
    made = family(name, dtype="float32")
    bank = bank_of(made.base, {"a": made.experts[0], "b": made.experts[1]}, energy=1.0)

    def answer(model: Any) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(TOKENS)[0]
        return found

    export_checkpoint(made.base, bank, WEIGHTS, tmp_path / "whole")
    export_checkpoint(made.base, bank, {"b": 1.0}, tmp_path / "b")
    expected = answer(assert_loads(tmp_path / "whole"))
    model = auto.from_pretrained(made.base, dtype=torch.float32).eval()
    attached = Attached(model, bank, RowGate())
    with attached.running(Run(torch.tensor(WEIGHTS).expand(2, -1))):
        torch.testing.assert_close(answer(model), expected, atol=3e-4, rtol=3e-4)
    expert = auto.from_pretrained(made.experts[1], dtype=torch.float32).eval()
    alone = auto.from_pretrained(tmp_path / "b", dtype=torch.float32).eval()
    torch.testing.assert_close(answer(alone), answer(expert), atol=3e-4, rtol=3e-4)
