"""How large a network's factors are and in which type, as its YAML says; and keys there that nothing reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from mixmerge.bank.building import bank_of, to_low_rank
from mixmerge.bank.files import load_bank
from mixmerge.errors import MixmergeError
from mixmerge.mixture.reading import parse


def fit(folder: Path, experts: str, compose: str) -> Any:
    from mixmerge.cli import app

    (folder / "mix.yaml").write_text(f"{experts}compose: {{kind: adapters, {compose}}}\n")
    done = CliRunner().invoke(app, ["fit", str(folder / "mix.yaml"), str(folder / "net"), "-q"])
    assert done.exit_code == 0, done.output
    return load_bank(folder / "net")


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_adapters_in_sixteen_bits_stay_so(loras: Any, clone: Any, tmp_path: Path, stored: Any) -> None:
    lines, exact = "experts:\n", {}
    for name, folder in loras.adapters.items():
        copy = clone(folder)
        tensors = {
            key: one.to(stored) for key, one in load_file(folder / "adapter_model.safetensors").items()
        }
        save_file(tensors, copy / "adapter_model.safetensors", metadata={"format": "pt"})
        lines += f"  {name}: {{adapter: {copy}, base: {loras.base}}}\n"
        exact[name] = copy
    found = fit(tmp_path, lines, "gate: {kind: arrow}")
    wanted = bank_of(loras.base, exact)
    assert found.sites.keys() == wanted.sites.keys()
    for name, site in found.sites.items():
        assert site.a.dtype is site.b.dtype is stored
        assert torch.equal(site.a.float(), wanted.sites[name].a)
        assert torch.equal(site.b.float(), wanted.sites[name].b)
        assert torch.equal(site.scale, wanted.sites[name].scale)


def test_adapters_that_need_them_keep_all_digits(loras: Any, tmp_path: Path) -> None:
    found = fit(tmp_path, loras.entries(), "gate: {kind: mean}")
    assert {site.b.dtype for site in found.sites.values()} == {torch.float32}


def test_a_rank_for_each_expert(loras: Any, tmp_path: Path) -> None:
    lines = "experts:\n" + "".join(f"  {name}: {{model: {loras.experts[name]}}}\n" for name in ("one", "two"))
    compose = f"base: {loras.base}, gate: {{kind: mean}}"
    found = fit(tmp_path, lines, f"{compose}, rank: {{one: 2, two: 5}}")
    assert {site.ranks for site in found.sites.values()} == {(2, 5)}
    folders = {name: loras.experts[name] for name in ("one", "two")}
    shared = bank_of(loras.base, folders, rank={"one": 2}, budget=9000)
    assert (
        max(site.ranks[0] for site in shared.sites.values())
        == 2
        < max(site.ranks[1] for site in shared.sites.values())
    )
    for rank, words in (
        ("{one: 2}", "there is no rank of two"),
        ("{one: 2, two: 3, tow: 4}", "Did you mean 'two'"),
        ("{one: 0, two: 3}", "greater than or equal to 1"),
        ("0", "greater than or equal to 1, got 0"),
        ("many", "a valid integer"),
    ):
        faults = parse(f"{lines}compose: {{kind: adapters, {compose}, rank: {rank}}}\n").faults
        assert [words in str(fault) for fault in faults] == [True], faults
    with pytest.raises(MixmergeError, match="is no full expert"):
        bank_of(loras.base, folders, rank={"one": 2, "two": 2, "tree": 1})
    with pytest.raises(MixmergeError, match="two: full experts, and no size"):
        bank_of(loras.base, folders, rank={"one": 2})


def test_a_rank_is_the_third_argument(loras: Any) -> None:
    entries, _ = to_low_rank(loras.experts["one"], loras.base, 2)
    assert {entry.rank for entry in entries.values()} == {2}


@pytest.mark.parametrize(
    ("compose", "words"),
    [
        ("gate: {kind: arrow}, given: r.safetensors", "arrow takes no router that was trained elsewhere"),
        ("gate: {kind: arrow}, encoder: enc", "arrow reads no texts by an encoder"),
        ("gate: {kind: mean}, split: test", "has no effect without data"),
        ("gate: {kind: mean}, samples: 3", "has no effect without data"),
    ],
)
def test_keys_that_nothing_reads(loras: Any, compose: str, words: str) -> None:
    (fault,) = parse(f"{loras.entries()}compose: {{kind: adapters, {compose}}}\n").faults
    assert words in str(fault)
    assert "Remove it" in str(fault)


def test_a_gate_of_ranks_may_be_given_its_biases(loras: Any) -> None:
    found = parse(
        f"{loras.entries()}compose: {{kind: adapters, gate: {{kind: flylora}}, given: d.safetensors}}\n"
    )
    assert not found.faults
