"""Banks and gates on disk: written, read again, damaged, meant for another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mixmerge.bank import gates
from mixmerge.bank.files import (
    FOLDER,
    BankWriter,
    extend_bank,
    load_bank,
    load_gate,
    read_card,
    save_bank,
    save_gate,
)
from mixmerge.bank.gate import Gate
from mixmerge.bank.mix import Mix
from mixmerge.bank.publishing import making
from mixmerge.bank.records import Bank, Entry, Kind, Site
from mixmerge.checkpoint.identity import canonical_hash
from mixmerge.errors import CheckpointError, MixmergeError, OutputError

HASHES = {"one": "1" * 64, "two": "2" * 64}


def site(
    name: str, ranks: tuple[int, ...], *, kind: Kind = "linear", tied: bool = False, seed: int = 0
) -> Site:
    draw = torch.Generator().manual_seed(seed)
    rank = sum(ranks)
    a = torch.randn(*((9, rank) if kind == "embedding" else (rank, 5)), generator=draw)
    return Site(
        name,
        a,
        torch.randn(rank, 4, generator=draw),
        torch.rand(rank, generator=draw) + 0.5,
        ranks,
        kind,
        tied,
    )


def bank_of_two() -> Bank:
    sites = [
        site("layer.0.weight", (2, 1)),
        site("layer.1.weight", (0, 3), seed=1),
        site("embed.weight", (1, 2), kind="embedding", tied=True, seed=2),
    ]
    return Bank(
        ("one", "two"), {one.name: one for one in sites}, {"norm.weight": torch.tensor([[1.0, 2], [0, 3]])}
    )


def saved(folder: Path, **options: Any) -> Path:
    save_bank(folder, bank_of_two(), base="b" * 64, hashes=HASHES, **options)
    return folder


def assert_same(one: Bank, other: Bank) -> None:
    assert one.experts == other.experts
    assert one.sites.keys() == other.sites.keys()
    for name, left in one.sites.items():
        right = other.sites[name]
        assert (left.ranks, left.kind, left.tied) == (right.ranks, right.kind, right.tied)
        assert all(
            torch.equal(getattr(left, part), getattr(right, part))
            and getattr(left, part).dtype == getattr(right, part).dtype
            for part in ("a", "b", "scale")
        )
    assert one.vectors.keys() == other.vectors.keys()
    assert all(torch.equal(one.vectors[name], other.vectors[name]) for name in one.vectors)


@given(
    ranks=st.integers(1, 3).flatmap(
        lambda experts: st.lists(
            st.tuples(*[st.integers(0, 3)] * experts).filter(any), min_size=1, max_size=4
        )
    ),
    kinds=st.lists(st.sampled_from(["linear", "embedding"]), min_size=4, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    shard_size=st.sampled_from([1, 200, 1_000_000]),
    names=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8),
        min_size=4,
        max_size=4,
        unique=True,
    ),
)
def test_what_is_written_is_read_again(
    tmp_path_factory: pytest.TempPathFactory,
    ranks: list[tuple[int, ...]],
    kinds: list[Kind],
    dtype: torch.dtype,
    shard_size: int,
    names: list[str],
) -> None:
    folder = tmp_path_factory.mktemp("any")
    sites = {
        name: site(name, each, kind=kind, tied=kind == "embedding", seed=number).to("cpu", dtype)
        for number, (name, each, kind) in enumerate(zip(names, ranks, kinds, strict=False))
    }
    experts = tuple(f"e{number}" for number in range(len(ranks[0])))
    bank = Bank(experts, sites, {})
    card = save_bank(folder, bank, base="b", hashes=dict.fromkeys(experts, "h"), shard_size=shard_size)
    assert read_card(folder) == card
    assert_same(load_bank(folder), bank)
    files = sorted(path.name for path in (folder / FOLDER).glob("*.safetensors"))
    assert files == sorted(card.files)
    assert (len(files) > 1) == (shard_size == 1 and len(sites) > 1) or shard_size == 200


def test_a_card_says_what_is_there(tmp_path: Path) -> None:
    card = read_card(saved(tmp_path))
    assert card.experts == ("one", "two")
    assert card.base == "b" * 64
    assert card.sites["embed.weight"].ranks == (1, 2)
    assert card.sites["embed.weight"].tied
    assert card.parameters == (3 + 3) * (5 + 4) + 3 * (9 + 4) + 2 * 2
    assert card.nbytes == sum(path.stat().st_size for path in (tmp_path / FOLDER).glob("*.safetensors"))
    other = read_card(saved(tmp_path / "again"))
    assert other.hash == card.hash
    assert read_card(saved(tmp_path / "half", bits=16)).hash != card.hash


def test_eight_bits_are_as_near_as_half_a_step(tmp_path: Path) -> None:
    bank = bank_of_two()
    loaded = load_bank(saved(tmp_path, bits=8))
    for name, one in bank.sites.items():
        got = loaded.sites[name]
        assert torch.equal(
            got.a.float() * 128, (got.a.float() * 128).round()
        )  # whole numbers, exact in bfloat16
        table = one.kind == "embedding"
        step_a = one.a.abs().amax(0 if table else 1) / 127
        step_b = one.b.abs().amax(1) / 127
        a = got.a.float() * 128 * (step_a if table else step_a[:, None])
        b = got.b.float() * 128 * step_b[:, None]
        assert ((a - one.a).abs() <= (step_a if table else step_a[:, None]) / 2 * 1.001).all()
        assert ((b - one.b).abs() <= step_b[:, None] / 2 * 1.001).all()
        torch.testing.assert_close(got.scale, one.scale * step_a * step_b * 128**2)
        for weights in (torch.tensor([1.0, 0.0]), torch.tensor([0.3, -2.0])):
            exact = one.delta(weights)
            assert float((got.delta(weights) - exact).norm() / exact.norm().clamp_min(1e-9)) < 0.02


def test_eight_bits_take_a_quarter_of_the_room(tmp_path: Path) -> None:
    wide = Bank(("e",), {"w": Site("w", torch.randn(8, 512), torch.randn(8, 512), torch.ones(8), (8,))}, {})
    sizes = {
        bits: save_bank(tmp_path / str(bits), wide, base="b", hashes={"e": "h"}, bits=bits)  # type: ignore[arg-type]
        for bits in (8, 16, 32)
    }
    factors = 8 * 1024
    for bits, card in sizes.items():
        assert factors * bits // 8 <= card.nbytes <= factors * bits // 8 + 600
        assert card.parameters == factors
    assert load_bank(tmp_path / "16").sites["w"].a.dtype == torch.bfloat16
    assert load_bank(tmp_path / "8").sites["w"].a.dtype == torch.bfloat16


def test_a_rank_of_nothing_stays_nothing_in_eight_bits(tmp_path: Path) -> None:
    still = Site("w", torch.zeros(1, 3), torch.randn(1, 2), torch.ones(1), (1,))
    save_bank(tmp_path, Bank(("e",), {"w": still}, {}), base="b", hashes={"e": "h"}, bits=8)
    assert not load_bank(tmp_path).sites["w"].delta(torch.ones(1)).any()


def _stopped(folder: Path) -> None:
    with BankWriter(folder, ["one", "two"], base="b", hashes=HASHES, shard_size=1) as writer:
        writer.add(site("a", (1, 1)))
        writer.add(site("b", (1, 1)))
        raise KeyError


def test_a_bank_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        _stopped(tmp_path)
    assert not list(tmp_path.iterdir())
    saved(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER]
    with pytest.raises(OutputError, match="it exists"):
        saved(tmp_path)
    before = read_card(tmp_path).hash
    saved(tmp_path, bits=8, overwrite=True)
    assert read_card(tmp_path).hash != before
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER]


def test_what_is_no_bank_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds no bank\.json"):
        saved(tmp_path, overwrite=True)
    assert (tmp_path / FOLDER / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (site("a", (1,)), "of 1 experts"),
        (Site("a", torch.ones(1, 5), torch.ones(2, 4), torch.ones(2), (1, 1)), "of 1 and 2 ranks"),
        (Site("a", torch.full((2, 5), float("nan")), torch.ones(2, 4), torch.ones(2), (1, 1)), "NaN"),
    ],
)
def test_a_site_that_cannot_be_is_refused(tmp_path: Path, wrong: Site, said: str) -> None:
    writer = BankWriter(tmp_path, ["one", "two"], base="b", hashes=HASHES)
    with pytest.raises(MixmergeError, match=said):
        writer.add(wrong)
    writer.add(site("b", (1, 1)))
    with pytest.raises(MixmergeError, match="is there already"):
        writer.add(site("b", (1, 1)))
    writer.add(site("empty", (0, 0)))
    with pytest.raises(MixmergeError, match="for 2 experts"):
        writer.add_vectors("n", torch.ones(3, 2))
    assert list(writer.close().sites) == ["b"]


def test_an_empty_bank_and_strange_hashes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MixmergeError, match="is empty"):
        BankWriter(tmp_path, ["one", "two"], base="b", hashes=HASHES).close()
    with pytest.raises(MixmergeError) as error:
        BankWriter(tmp_path, ["one", "one"], base="b", hashes=HASHES, bits=4)  # type: ignore[arg-type]
    assert len(error.value.faults) == 3
    assert not list(tmp_path.iterdir())


def _edit(path: Path, **changes: Any) -> None:
    card = json.loads(path.read_text())
    path.write_text(json.dumps({**card, **changes}))


def test_damage_is_named(tmp_path: Path) -> None:
    def damaged(name: str) -> Path:
        folder = saved(tmp_path / name, shard_size=1)
        return folder / FOLDER

    def said(folder: Path) -> str:
        with pytest.raises(MixmergeError) as error:
            load_bank(folder.parent)
        return str(error.value)

    place = damaged("missing")
    (place / "factors-00001.safetensors").unlink()
    (place / "factors-00002.safetensors").write_bytes(b"")
    assert "is missing" in said(place)
    assert "has 0 bytes" in said(place)
    place = damaged("flipped")
    shard = place / "factors-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert "its hash differs" in said(place)
    place = damaged("cut")
    (place / "bank.json").write_text('{"format": "mixmerge-bank", ')
    assert "not JSON" in said(place)
    place = damaged("edited")
    _edit(place / "bank.json", base="c")
    assert "was changed after it was written" in said(place)
    place = damaged("old")
    _edit(place / "bank.json", version=0)
    assert "of version 0" in said(place)
    place = damaged("other")
    _edit(place / "bank.json", format="router")
    assert "not a bank's card" in said(place)
    place = damaged("less")
    _edit(place / "bank.json", sites={"x": {"inputs": 1}})
    assert "is damaged" in said(place)
    assert "holds no bank" in said(tmp_path / "nothing" / FOLDER)


@pytest.mark.parametrize(
    "change",
    [
        {"experts": ["one", "one"]},
        {"base": [1]},
        {"hashes": {}},
        {"bits": 8},
        {"file": {"nbytes": "many"}},
        {"site": {"tied": "yes"}},
        {"site": {"inputs": "5"}},
        {"outside": True},
    ],
    ids=str,
)
def test_a_card_that_nobody_has_written_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    """One whose hash is right all the same."""
    saved(tmp_path)
    path = tmp_path / FOLDER / "bank.json"
    card = json.loads(path.read_text())
    first = next(iter(card["files"]))
    card["files"][first] |= change.pop("file", {})
    for one in card["sites"].values():
        one |= change.get("site", {})
    change.pop("site", None)
    if change.pop("outside", False):
        card["files"][".."] = card["files"].pop(first)
        for one in (*card["sites"].values(), *card["vectors"].values()):
            one["file"] = ".."
    card |= change
    body = {key: value for key, value in card.items() if key not in ("format", "version", "hash")}
    path.write_text(json.dumps({**card, "hash": canonical_hash(body)}))
    with pytest.raises(CheckpointError):
        load_bank(tmp_path)


class Learned(Gate):
    """A gate with a tensor and a setting."""

    kind = "learned"
    open_to_new: ClassVar[bool] = False

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.v = width, nn.Parameter(torch.arange(2.0 * width).view(2, width))

    def settings(self) -> dict[str, Any]:
        return {"width": self.width}

    def mix(self, site: str, u: Tensor, run: Any) -> Mix | None:
        return Mix((u @ self.v.T).softmax(-1))


class Open(Learned):
    kind = "open"
    open_to_new = True


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, made in (("learned", Learned), ("open", Open)):
        monkeypatch.setitem(gates.GATES, name, made)  # type: ignore[arg-type]


@pytest.mark.usefixtures("kinds")
def test_a_gate_comes_back_for_its_own_bank(tmp_path: Path) -> None:
    gate = Learned(3)
    save_gate(tmp_path, gate, bank="x" * 64, experts=["one", "two"])
    loaded = load_gate(tmp_path, bank="x" * 64, experts=["one", "two"])
    assert isinstance(loaded, Learned)
    assert not loaded.training
    assert torch.equal(loaded.v, gate.v)
    with pytest.raises(MixmergeError, match="for another bank"):
        load_gate(tmp_path, bank="y" * 64)
    with pytest.raises(MixmergeError, match="knows the experts one, two"):
        load_gate(tmp_path, bank="x" * 64, experts=["two", "one"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gate.json", "gate.safetensors"]


@pytest.mark.usefixtures("kinds")
def test_only_open_gates_take_experts_that_came_later(tmp_path: Path) -> None:
    for name, gate in (("closed", Learned(2)), ("open", Open(2))):
        save_gate(tmp_path / name, gate, bank="x", experts=["one", "two"])
    more: dict[str, Any] = {"bank": "y", "earlier": ["x"], "experts": ["one", "two", "three"]}
    assert isinstance(load_gate(tmp_path / "open", **more), Open)
    with pytest.raises(MixmergeError, match="Experts were added"):
        load_gate(tmp_path / "closed", **more)
    with pytest.raises(MixmergeError, match="for another bank"):
        load_gate(tmp_path / "open", bank="y", earlier=["z"])


@pytest.mark.usefixtures("kinds")
def test_damaged_gates_are_named(tmp_path: Path) -> None:
    save_gate(tmp_path, Learned(2), bank="x")
    good = (tmp_path / "gate.json").read_text()
    for change, said in (
        ({"kind": "lerned"}, "Did you mean 'learned'"),
        ({"version": 9}, "of version 9"),
        ({"format": "?"}, "not a gate's card"),
        ({"settings": {"width": 5}}, "is damaged"),
        ({"settings": {"depth": 5}}, "is damaged"),
        ({"bank": None}, "bank is missing"),
        ({"sha256": "0"}, "hash differs"),
    ):
        (tmp_path / "gate.json").write_text(json.dumps({**json.loads(good), **change}))
        with pytest.raises(MixmergeError, match=said):
            load_gate(tmp_path, bank="x")
    with pytest.raises(MixmergeError, match="holds no gate"):
        load_gate(tmp_path / "none", bank="x")
    broken = Learned(2)
    with torch.no_grad():
        broken.v[0, 0] = float("inf")
    with pytest.raises(MixmergeError, match="NaN or Inf"):
        save_gate(tmp_path / "inf", broken, bank="x")


def test_a_gate_without_tensors(tmp_path: Path) -> None:
    from mixmerge.bank.gate import RowGate

    save_gate(tmp_path, RowGate(), bank="x")
    assert isinstance(load_gate(tmp_path, bank="x"), RowGate)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.usefixtures("kinds")
def test_an_expert_that_comes_later(tmp_path: Path, bits: Any) -> None:
    old = saved(tmp_path / "old", bits=bits)
    before = load_bank(old)
    save_gate(old, Open(2), bank=read_card(old).hash, experts=before.experts)
    entry = Entry(torch.randn(2, 5), torch.randn(2, 4), 0.5)
    card = extend_bank(old, tmp_path / "new", "three", ({"layer.1.weight": entry}, {}), fingerprint="3" * 64)
    after = load_bank(tmp_path / "new")
    assert after.experts == card.experts == ("one", "two", "three")
    assert after.sites["layer.1.weight"].ranks == (0, 3, 2)
    for name, site in before.sites.items():  # the others are what they were, in 8 bits too
        first = torch.tensor([0.5, 2.0])
        assert torch.equal(site.delta(first), after.sites[name].delta(torch.tensor([0.5, 2.0, 0.0])))
    assert load_gate(old, bank=card.hash, earlier=card.earlier, experts=card.experts)
    assert load_bank(old).experts == ("one", "two")


def test_writing_holds_no_more_than_a_shard(tmp_path: Path, peak_of: Any) -> None:
    setup = """
from pathlib import Path
from mixmerge.bank.files import BankWriter
from mixmerge.bank.records import Site
def site(number):
    return Site(f"w{number}", torch.ones(8, 65536), torch.ones(8, 4), torch.ones(8), (8,))
BankWriter(Path(sys.argv[1]) / "warm", ["e"], base="b", hashes={"e": "h"}).add(site(0))
"""
    work = """
with BankWriter(Path(sys.argv[1]) / "bank", ["e"], base="b", hashes={"e": "h"}, shard_size=8_000_000) as writer:
    for number in range(40):
        writer.add(site(number))
told = {"bytes": writer.card.nbytes}
"""
    told = peak_of(setup, work, str(tmp_path))
    assert told["bytes"] > 80_000_000
    assert told["peak"] - told["before"] < 30_000_000


def test_what_a_kill_left_between_two_renames_is_put_right(tmp_path: Path) -> None:
    """An overwrite puts the old bank aside first: whoever writes there next puts it back, and reads it as it was."""
    old = saved(tmp_path / "net")
    first = read_card(old).hash
    (old / "bank").rename(old / ".bank.mixmerge-old")
    with pytest.raises(MixmergeError, match="holds no bank"):
        read_card(old)
    with pytest.raises(OutputError, match="it exists"):
        saved(tmp_path / "net")
    assert read_card(old).hash == first
    assert not (old / ".bank.mixmerge-old").exists()
    shutil.copytree(old / "bank", old / ".bank.mixmerge-old")  # the kill came after the second rename
    with pytest.raises(OutputError, match="it exists"):
        saved(tmp_path / "net")
    assert [path.name for path in old.iterdir()] == ["bank"]


def test_a_kill_while_a_folder_takes_the_place_of_another(tmp_path: Path, programs: Any) -> None:
    """The process ends between the two renames."""
    script = tmp_path / "killed.py"
    script.write_text(
        """
import os, sys
from pathlib import Path
from mixmerge.bank.publishing import making
place, real, done = Path("net"), Path.rename, []
def rename(self, target):
    if done:
        os._exit(9)
    done.append(target)
    return real(self, target)
Path.rename = rename
with making(place, overwrite=True, of=["card"]) as new:
    (new / "card").write_text("new")
"""
    )
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "card").write_text("old")
    assert programs(script, folder=tmp_path).returncode == 9
    assert not (tmp_path / "net").exists()
    with making(tmp_path / "net", overwrite=True, of=["card"]) as new:
        assert (tmp_path / "net" / "card").read_text() == "old"
        (new / "card").write_text("new")
    assert (tmp_path / "net" / "card").read_text() == "new"
    assert not (tmp_path / ".net.mixmerge-old").exists()
