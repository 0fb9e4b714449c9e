"""Entries of a bank: by hand, from PEFT adapters against PEFT itself, from full experts against the experts."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mixmerge.bank.building import (
    adapter_entries,
    allocate,
    assembled,
    bank_of,
    changes_of,
    chosen,
    extended,
    fingerprint_of,
    low_rank,
    spectrum,
    to_low_rank,
)
from mixmerge.bank.records import Entry
from mixmerge.checkpoint.reader import read_weights
from mixmerge.errors import MixmergeError

TOKENS = torch.tensor([[3, 17, 41, 5, 99, 200], [7, 7, 250, 1, 30, 12]])


def product(entry: Entry) -> Tensor:
    scale = torch.as_tensor(entry.scale).expand(entry.rank)
    if entry.kind == "embedding":
        return (entry.a * scale) @ entry.b
    return (entry.b.T * scale) @ entry.a


# -- by hand


def test_a_matrix_by_hand() -> None:
    delta = torch.tensor([[0.0, -3.0], [2.0, 0.0], [0.0, 0.0]])
    entry = low_rank(delta, rank=1)
    assert entry.scale.tolist() == pytest.approx([3.0])  # type: ignore[union-attr]
    torch.testing.assert_close(entry.a, torch.tensor([[0.0, 1.0]]))  # its largest entry is positive
    torch.testing.assert_close(entry.b, torch.tensor([[-1.0, 0.0, 0.0]]))
    both = low_rank(delta)
    assert both.rank == 2
    torch.testing.assert_close(product(both), delta)
    # squares 9 and 4 of 13
    assert [low_rank(delta, energy=share).rank for share in (0.1, 9 / 13, 0.7, 1.0)] == [1, 1, 2, 2]
    assert low_rank(delta, energy=0.99, rank=1).rank == 1
    table = low_rank(delta, rank=1, kind="embedding")
    assert (table.a.shape, table.b.shape) == ((3, 1), (1, 2))
    torch.testing.assert_close(product(table), product(entry))
    assert low_rank(torch.zeros(2, 3)).rank == 0


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    rank=st.integers(1, 12),
    table=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_a_product_of_factors_is_as_its_matrix(
    rows: int, columns: int, rank: int, table: bool, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    a = torch.randn(*((rows, rank) if table else (rank, columns)), generator=draw)
    b = torch.randn(rank, columns if table else rows, generator=draw)
    kind: Any = "embedding" if table else "linear"
    entry = Entry(a, b, torch.rand(rank, generator=draw) + 0.1, kind)
    dense = product(entry)
    whole = low_rank(entry)
    assert whole.rank == min(rank, rows, columns)
    torch.testing.assert_close(product(whole), dense, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(product(low_rank(dense, kind=kind)), dense, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(spectrum(entry)[:1], spectrum(dense)[:1], atol=1e-4, rtol=1e-4)
    orthonormal = whole.b @ whole.b.T
    torch.testing.assert_close(orthonormal, torch.eye(whole.rank), atol=1e-3, rtol=1e-3)
    for kept in range(1, whole.rank + 1):  # Eckart and Young: what is lost are the singular values left out
        lost = (product(low_rank(entry, rank=kept)) - dense).norm()
        torch.testing.assert_close(lost, whole.scale[kept:].norm(), atol=1e-4, rtol=1e-3)  # type: ignore[index]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": True}, "rank is True"),
        ({"rank": 1.5}, "rank is 1.5"),
        ({"energy": 0.0}, "energy is 0.0"),
        ({"energy": float("nan")}, "energy is nan"),
        ({"energy": 1.01}, "energy is 1.01"),
    ],
)
def test_sizes_that_cannot_be(options: dict[str, Any], said: str) -> None:
    with pytest.raises(MixmergeError, match=said):
        low_rank(torch.ones(2, 2), **options)


def test_values_that_are_not_finite() -> None:
    bad = torch.tensor([[1.0, float("nan")]])
    with pytest.raises(MixmergeError, match="q_proj: holds NaN"):
        low_rank(bad, where="q_proj")
    with pytest.raises(MixmergeError, match="NaN"):
        low_rank(Entry(bad, torch.ones(1, 2)))


def test_ranks_are_bought_where_they_bring_most() -> None:
    spectra = {
        "wide": [torch.tensor([4.0, 3.0]), torch.tensor([1.0])],
        "thin": [torch.tensor([2.0, 2.0, 1.0]), torch.zeros(0)],
    }
    shapes = {"wide": (6, 4), "thin": (1, 1)}
    # for their price: thin 2, 2, 0.5; wide 1.6, 0.9, and 0.1 of the other expert
    assert allocate(spectra, shapes, budget=1) == {"wide": [0, 0], "thin": [0, 0]}
    assert allocate(spectra, shapes, budget=4) == {"wide": [0, 0], "thin": [2, 0]}
    assert allocate(spectra, shapes, budget=14) == {"wide": [1, 0], "thin": [2, 0]}
    assert allocate(spectra, shapes, budget=16) == {"wide": [1, 0], "thin": [3, 0]}
    assert allocate(spectra, shapes, budget=26) == {"wide": [2, 0], "thin": [3, 0]}
    assert allocate(spectra, shapes, budget=99) == {"wide": [2, 1], "thin": [3, 0]}
    assert allocate(spectra, shapes, budget=14, by_expert=True)["wide"] == [0, 1]
    with pytest.raises(MixmergeError, match="budget"):
        allocate(spectra, shapes, budget=0)


@given(
    values=st.lists(st.lists(st.floats(0.1, 9), max_size=3), min_size=1, max_size=3),
    price=st.integers(2, 5),
    budget=st.integers(1, 40),
)
def test_no_other_ranks_of_one_price_keep_more(values: list[list[float]], price: int, budget: int) -> None:
    spectra = {"w": [torch.tensor(sorted(one, reverse=True)) for one in values]}
    got = allocate(spectra, {"w": (price - 1, 1)}, budget=budget)["w"]
    assert sum(got) * price <= budget

    def energy(ranks: tuple[int, ...] | list[int]) -> float:
        kept = (one[:rank].square().sum() for one, rank in zip(spectra["w"], ranks, strict=True))
        return float(sum(kept))

    best = max(
        energy(ranks)
        for ranks in itertools.product(*(range(len(one) + 1) for one in values))
        if sum(ranks) * price <= budget
    )
    assert energy(got) == pytest.approx(best)


# -- side by side


def entries(seed: int, *names: str, tied: bool = False, rank: int = 2) -> dict[str, Entry]:
    draw = torch.Generator().manual_seed(seed)
    made = {}
    for name in names:
        table = "embed" in name
        a = torch.randn(*((6, rank) if table else (rank, 4)), generator=draw)
        b = torch.randn(rank, 4 if table else 6, generator=draw)
        made[name] = Entry(a, b, 0.5, "embedding" if table else "linear", table and tied)
    return made


def test_experts_side_by_side_added_and_in_another_order() -> None:
    one = entries(0, "q", "embed"), {"norm": torch.tensor([1.0, 2.0])}
    two = entries(1, "q", "k", rank=3), {"bias": torch.tensor([3.0])}
    bank = assembled({"one": one, "two": two})
    assert {name: site.ranks for name, site in bank.sites.items()} == {
        "q": (2, 3),
        "embed": (2, 0),
        "k": (0, 3),
    }
    assert bank.vectors["norm"].tolist() == [[1, 2], [0, 0]]
    more = extended(assembled({"one": one}), "two", two)
    turned = chosen(bank, ["two", "one"])
    for weights in (torch.tensor([1.0, 0.0]), torch.tensor([0.2, -1.0])):
        for name, site in bank.sites.items():
            assert torch.equal(site.delta(weights), more.sites[name].delta(weights))
            torch.testing.assert_close(site.delta(weights), turned.sites[name].delta(weights.flip(0)))
    assert turned.experts == ("two", "one")
    assert turned.vectors["bias"].tolist() == [[3], [0]]
    assert set(changes_of(bank)["two"][0]) == {"q", "k"}
    assert chosen(bank, ["two"]).sites.keys() == {"q", "k"}
    with pytest.raises(MixmergeError, match="called 'one' already"):
        extended(bank, "one", two)
    with pytest.raises(MixmergeError, match="Did you mean 'two'"):
        chosen(bank, ["tow"])


def test_a_tie_that_only_some_keep_is_undone() -> None:
    tied, own = entries(0, "embed", tied=True), entries(1, "embed")
    bank = assembled({"tied": (tied, {}), "own": (own, {})})
    assert not bank.sites["embed"].tied
    assert bank.sites["lm_head.weight"].ranks == (2, 0)
    first = torch.tensor([1.0, 0.0])
    torch.testing.assert_close(bank.sites["lm_head.weight"].delta(first), bank.sites["embed"].delta(first))
    assert assembled({"tied": (tied, {})}).sites["embed"].tied


def test_experts_that_do_not_fit() -> None:
    good = entries(0, "q")
    wide = {"q": Entry(torch.ones(1, 5), torch.ones(1, 6))}
    broken = {"q": Entry(torch.full((1, 4), float("inf")), torch.ones(1, 6))}
    with pytest.raises(MixmergeError) as error:
        assembled({"good": (good, {}), "wide": (wide, {}), "broken": (broken, {}), "base": ({}, {})})
    text = str(error.value)
    assert "expert wide: changes q as linear 5 x 6, and good as linear 4 x 6" in text
    assert "expert broken: the factors of q hold NaN or Inf" in text
    assert "expert base: changes nothing: it equals the base" in text
    with pytest.raises(MixmergeError, match="has no experts"):
        assembled({})


# -- adapters

ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "alpha": ("llama", {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 3, "r": 6}),
    "rslora": ("llama", {"target_modules": "all-linear", "r": 5, "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "k_proj", "v_proj"],
            "rank_pattern": {"q_proj": 2, "1.self_attn.(k|v)_proj": 6},
            "alpha_pattern": {"layers.1.*q_proj": 5, "proj": 1},
        },
    ),
    "embedding and head": ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "norms saved": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "biases": (
        "llama_bias",
        {"target_modules": ["q_proj"], "lora_bias": True, "bias": "all", "lora_alpha": 3},
    ),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "positions": ("gpt2", {"target_modules": ["wpe", "wte", "c_attn"], "fan_in_fan_out": True}),
    "tied table": ("llama_tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied head": ("llama_tied", {"target_modules": ["lm_head", "q_proj"]}),
    "tied both": ("llama_tied", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "gemma": ("gemma", {"target_modules": ["embed_tokens", "q_proj"]}),
    "gpt_neox": ("gpt_neox", {"target_modules": ["query_key_value", "dense"], "use_rslora": True}),
}


@pytest.mark.parametrize("case", list(ADAPTERS))
def test_an_adapter_in_a_bank_is_the_adapter(logits_of: Any, trained: Any, case: str) -> None:
    base, folder, expected = trained(*ADAPTERS[case])
    bank = bank_of(base, {"it": folder})
    found = logits_of(base, bank, torch.ones(2, 1))
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


def test_adapters_of_any_ranks_and_targets_share_a_bank(logits_of: Any, trained: Any) -> None:
    cases = ("alpha", "rslora", "embedding and head", "norms saved")
    folders = {case: trained(*ADAPTERS[case])[1] for case in cases}
    base = trained(*ADAPTERS["alpha"])[0]
    bank = bank_of(base, folders)
    assert bank.sites["model.layers.0.self_attn.q_proj.weight"].ranks == (6, 5, 8, 8)
    for number, case in enumerate(cases):
        rows = torch.eye(len(cases))[number].expand(2, -1)
        expected = trained(*ADAPTERS[case])[2]
        torch.testing.assert_close(logits_of(base, bank, rows), expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        ("llama", {"target_modules": ["q_proj"], "use_dora": True}, "DoRA scales the base's rows"),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "replaced whole"),
        (
            "mixtral",
            {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]},
            "experts of a layer",
        ),
    ],
)
def test_what_has_no_low_rank_is_refused_by_name(
    trained: Any, name: str, config: dict[str, Any], said: str
) -> None:
    base, folder, _ = trained(name, config)
    with pytest.raises(MixmergeError, match=said) as error:
        bank_of(base, {"odd": folder})
    assert "expert odd" in str(error.value)
    assert "mixmerge merge" in str(error.value)


def test_all_faults_of_all_adapters_at_once(trained: Any, family: Any, clone: Any) -> None:
    base, good, _ = trained(*ADAPTERS["alpha"])
    zero, nan, renamed = clone(good), clone(good), clone(good)
    _edit(zero / "adapter_config.json", r=0)
    _spoil(nan)
    other = family("llama", dtype="float32", seed=5).base
    _edit(renamed / "adapter_config.json", base_model_name_or_path=str(other))
    cut = clone(good)
    (cut / "adapter_config.json").write_text("{")
    gpt2 = trained(*ADAPTERS["conv1d"])[1]
    with pytest.raises(MixmergeError) as error:
        bank_of(base, {"zero": zero, "nan": nan, "renamed": renamed, "cut": cut, "gpt2": gpt2, "good": good})
    text = str(error.value)
    assert "r is 0" in text
    assert "is not JSON" in text
    assert "holds NaN or Inf" in text
    assert f"expert renamed: was trained on {other}, whose weights are not those of" in text
    assert "expert gpt2" in text
    assert "not in the base" in text
    assert "expert good" not in text


def test_adapters_that_name_different_hub_bases(trained: Any, clone: Any) -> None:
    base, good, _ = trained(*ADAPTERS["alpha"])
    one, two, copy = clone(good), clone(good), clone(good)
    _edit(one / "adapter_config.json", base_model_name_or_path="org/model")
    _edit(two / "adapter_config.json", base_model_name_or_path="org/model-Instruct")
    _edit(
        copy / "adapter_config.json", base_model_name_or_path=str(clone(base))
    )  # the same weights elsewhere
    with pytest.raises(
        MixmergeError, match="adapters of different bases: one of org/model, two of org/model-I"
    ):
        bank_of(base, {"one": one, "two": two})
    assert bank_of(base, {"one": one, "copy": copy}).experts == ("one", "copy")
    assert fingerprint_of(one) != fingerprint_of(two)
    assert fingerprint_of(base) == fingerprint_of(clone(base))


def test_an_adapter_that_was_never_trained(family: Any, tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    base = family("llama", dtype="float32").base
    model = AutoModelForCausalLM.from_pretrained(base)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert adapter_entries(tmp_path, read_weights(base)[0], where="it") == ({}, {})
    with pytest.raises(MixmergeError, match="expert new: changes nothing"):
        bank_of(base, {"new": tmp_path})


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _spoil(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        tensors[sorted(tensors)[0]].view(-1)[0] = float("nan")
        save_file(tensors, path, metadata={"format": "pt"})


# -- full experts


@pytest.mark.parametrize("name", ["llama_tied", "llama_bias", "gpt2", "gemma", "gpt_neox", "qwen3"])
def test_a_full_expert_at_full_rank_is_the_expert(logits_of: Any, family: Any, name: str) -> None:
    from transformers import AutoModelForCausalLM

    made = family(name, dtype="float32")
    bank = bank_of(made.base, {"one": made.experts[0], "two": made.experts[1]}, energy=1.0)
    found = logits_of(made.base, bank, torch.eye(2))
    for row, folder in enumerate(made.experts):
        expert = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            expected = expert(TOKENS).logits[row]
        torch.testing.assert_close(found[row], expected, atol=2e-4, rtol=2e-4)


def test_sizes_of_a_full_expert(family: Any) -> None:
    made = family("llama_tied", dtype="float32")
    expert, base = made.experts[0], made.base
    for rank in (1, 3):
        found, vectors = to_low_rank(expert, base, rank=rank)
        assert {one.rank for one in found.values()} == {rank}
        assert found["model.embed_tokens.weight"].tied
        assert len(vectors) == 5
    half = to_low_rank(expert, base, energy=0.5)[0]
    assert len({one.rank for one in half.values()}) > 1
    bought = to_low_rank(expert, base, budget=5000)[0]
    numbers = sum(one.a.numel() + one.b.numel() for one in bought.values())
    assert 4800 < numbers <= 5000
    some = to_low_rank(expert, base, rank={"model.layers.0.mlp.up_proj.weight": 2})[0]
    assert {name: one.rank for name, one in some.items()} == {"model.layers.0.mlp.up_proj.weight": 2}
    shared = bank_of(base, dict(zip("ab", made.experts, strict=True)), budget=9000, rank=4)
    assert sum(site.a.numel() + site.b.numel() for site in shared.sites.values()) <= 9000
    assert max(max(site.ranks) for site in shared.sites.values()) <= 4


def test_an_expert_whose_head_is_its_own(logits_of: Any, family: Any, tmp_path: Path) -> None:
    """The base ties its head to its table, the expert does not: head and table have changed apart."""
    from transformers import AutoModelForCausalLM

    made = family("llama_tied", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(made.experts[0], dtype=torch.float32).eval()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 0.05)
    model.save_pretrained(tmp_path / "own")
    bank = bank_of(made.base, {"own": tmp_path / "own", "tied": made.experts[1]}, energy=1.0)
    assert bank.sites["lm_head.weight"].ranks[1] > 0  # the tied expert's table, the other way round
    found = logits_of(made.base, bank, torch.eye(2))
    other = AutoModelForCausalLM.from_pretrained(made.experts[1], dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(found[0], model(TOKENS).logits[0], atol=2e-4, rtol=2e-4)
        torch.testing.assert_close(found[1], other(TOKENS).logits[1], atol=2e-4, rtol=2e-4)


def test_experts_that_are_not_of_the_base(family: Any, clone: Any, tmp_path: Path) -> None:
    made, other = family("llama", dtype="float32"), family("gpt2", dtype="float32")
    with pytest.raises(MixmergeError, match="it lacks"):
        to_low_rank(other.base, made.base, rank=1)
    with pytest.raises(MixmergeError, match="has no size"):
        to_low_rank(made.experts[0], made.base)
    with pytest.raises(MixmergeError, match="full experts, and no size"):
        bank_of(made.base, {"one": made.experts[0]})
    with pytest.raises(MixmergeError, match="changes nothing"):
        bank_of(made.base, {"same": clone(made.base)}, rank=1)
    bad = clone(made.experts[0])
    _spoil(bad)
    with pytest.raises(MixmergeError, match="holds NaN or Inf"):
        to_low_rank(bad, made.base, rank=1)
    tables = family("t5", dtype="float32")
    with pytest.raises(MixmergeError, match=r"shared\.weight: changed, and encoder"):
        to_low_rank(tables.experts[0], tables.base, rank=1)
    moe = family("mixtral", dtype="float32")
    with pytest.raises(MixmergeError, match="is of no linear layer"):
        to_low_rank(moe.experts[0], moe.base, rank=1)
