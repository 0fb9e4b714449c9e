"""A fitted glue on disk: what comes back, what is refused, and what is never in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixmerge.checkpoint.identity import digest
from mixmerge.errors import CheckpointError, MixmergeError
from mixmerge.experts import Expert
from mixmerge.latent.decoders import shape_of
from mixmerge.latent.files import (
    CARD,
    VALUES,
    LatentCard,
    check_experts,
    encoder_hash,
    expert_hash,
    load_glue,
    load_latent,
    load_routing,
    save_latent,
    values_of,
)
from mixmerge.latent.options import BridgeOptions
from mixmerge.latent.router import Routing
from mixmerge.latent.settings import RouteOptions

NAMES = ("llama", "opt")


@pytest.fixture
def card(experts: Mapping[str, Any], homes: Mapping[str, Path]) -> LatentCard:
    shapes = tuple(
        shape_of(experts[name].model, name=name, hash=expert_hash(Expert(name, str(homes[name]))))
        for name in NAMES
    )
    return LatentCard(
        experts=shapes,
        mode="chunked",
        chunk=8,
        depths=((0, "last"), (0.5, 0.5)),
        bridge=BridgeOptions(width=24, heads=3),
        route=RouteOptions(k=2, hidden=[8], features=32),
        too_long="left",
        features=32,
    )


@pytest.fixture
def folder(card: LatentCard, tmp_path: Path) -> Path:
    """With stirred values."""
    glue, router = card.blank(seed=3)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in (glue, router):
            assert part is not None
            for one in part.parameters():
                one.add_(torch.randn(one.shape, generator=draw))
    place = tmp_path / "glue"
    place.mkdir()
    save_latent(place, card, glue, router)
    return place


def test_what_is_saved_comes_back(folder: Path, card: LatentCard) -> None:
    found = load_latent(folder)
    assert (found.experts, found.mode, found.chunk, found.depths) == (card.experts, "chunked", 8, card.depths)
    assert (found.bridge, found.route, found.too_long) == (card.bridge, card.route, "left")
    assert found.names == NAMES
    stored = load_file(folder / VALUES)
    assert found.parameters == sum(one.numel() for one in stored.values())
    glue = load_glue(folder, found)
    assert not glue.training
    assert not any(one.requires_grad for one in glue.parameters())
    routing = load_routing(folder, found)
    assert isinstance(routing, Routing)
    back = values_of(glue, routing.router)
    assert back.keys() == stored.keys()
    assert all(torch.equal(one, stored[name]) for name, one in back.items())
    (told,) = routing(["alpha and fox"])
    assert set(told.gates) == set(NAMES)


def test_experts_are_in_it_by_hash_alone(
    folder: Path, homes: Mapping[str, Path], experts: Mapping[str, Any]
) -> None:
    weights = {
        tuple(one.shape)
        for name in NAMES
        for key, one in experts[name].model.state_dict().items()
        if "embed" in key or "head" in key
    }
    assert not {tuple(one.shape) for one in load_file(folder / VALUES).values()} & weights
    text = (folder / CARD).read_text()
    assert not any(str(place) in text for place in homes.values())
    assert load_glue(folder, load_latent(folder)).levels == 2, "no expert is looked at"


def test_other_experts_are_refused(folder: Path, homes: Mapping[str, Path], tmp_path: Path) -> None:
    card = load_latent(folder)
    check_experts(card, [Expert(name, str(homes[name])) for name in NAMES])
    moved = tmp_path / "elsewhere"
    shutil.copytree(homes["opt"], moved)
    check_experts(card, [Expert("llama", str(homes["llama"])), Expert("opt", str(moved))])
    weights = load_file(moved / "model.safetensors")
    name = sorted(weights)[0]
    weights[name] = weights[name] + 1
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    changed = [Expert("llama", str(tmp_path / "gone")), Expert("opt", str(moved))]
    with pytest.raises(MixmergeError) as caught:
        check_experts(card, changed)
    gone, other = caught.value.faults
    assert "gone: no such folder" in str(gone)
    assert other.where == "experts.opt"
    assert "is not the expert that the glue was fitted with, or was changed since" in str(other)
    with pytest.raises(MixmergeError, match="the glue is of llama, opt, and the mixture of llama"):
        check_experts(card, [Expert("llama", str(homes["llama"]))])


def test_a_card_that_was_changed_or_damaged(folder: Path, tmp_path: Path) -> None:
    path = folder / CARD
    whole = json.loads(path.read_text())

    def refused(change: Callable[[dict[str, Any]], Any]) -> str:
        raw = json.loads(json.dumps(whole))
        change(raw)
        path.write_text(json.dumps(raw))
        with pytest.raises(CheckpointError) as caught:
            load_latent(folder)
        return str(caught.value)

    assert "was changed after it was written. Fit the mixture again" in refused(
        lambda raw: raw.update(chunk=9)
    )
    assert "is damaged" in refused(lambda raw: raw.pop("mode"))
    assert "is damaged" in refused(lambda raw: raw.update(mode="loud"))
    assert "is damaged" in refused(lambda raw: raw["bridge"].update(heads=5))
    assert "is damaged" in refused(lambda raw: raw["route"].update(primary="nobody"))
    assert "is damaged" in refused(lambda raw: raw.update(experts=3))
    assert "is damaged" in refused(lambda raw: raw.update(extra=3))
    assert "is of version 7" in refused(lambda raw: raw.update(version=7))
    assert "is not a glue's card" in refused(lambda raw: raw.update(format="x"))
    path.write_text("{")
    with pytest.raises(CheckpointError):
        load_latent(folder)
    with pytest.raises(CheckpointError, match=r"holds no glue. A folder with latent.json. mixmerge fit"):
        load_latent(tmp_path)


def test_values_that_were_changed_or_damaged(folder: Path) -> None:
    card, path = load_latent(folder), folder / VALUES
    state = load_file(path)
    other = dict(state)
    other[sorted(other)[0]] = torch.zeros(3)
    save_file(other, path)
    with pytest.raises(CheckpointError, match="its hash differs"):
        load_glue(folder, card)
    for values in (other, {name: one for name, one in state.items() if not name.endswith("slopes")}):
        save_file(values, path)
        raw = json.loads((folder / CARD).read_text())
        known = LatentCard(**{**vars(card), "sha256": digest([path])})
        with pytest.raises(CheckpointError, match="is damaged"):
            load_glue(folder, known)
        assert raw["hash"] != known.hash
    path.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        load_glue(folder, card)


def test_values_that_are_not_finite_are_not_written(card: LatentCard, tmp_path: Path) -> None:
    glue, router = card.blank()
    with torch.no_grad():
        next(iter(glue.parameters())).fill_(float("nan"))
    with pytest.raises(MixmergeError, match="holds NaN or Inf"):
        save_latent(tmp_path, card, glue, router)
    assert not list(tmp_path.iterdir())


def test_the_text_encoder_has_to_be_the_same(
    card: LatentCard, tmp_path: Path, family: Callable[..., Any]
) -> None:
    base = family("bert").base
    route = RouteOptions(k=2, hidden=[8], encoder=str(base))
    made = LatentCard(**{**vars(card), "route": route, "features": 32, "encoder": encoder_hash(str(base))})
    save_latent(tmp_path, made, *made.blank())
    assert str(base) not in (tmp_path / CARD).read_text()
    found = load_latent(tmp_path)
    routing = load_routing(tmp_path, found, encoder=str(base))
    assert routing is not None
    assert set(routing(["text"])[0].scores) == set(NAMES)
    with pytest.raises(CheckpointError, match=r"reads by a text encoder.*compose: \{encoder: PATH\}"):
        load_routing(tmp_path, found)
    with pytest.raises(CheckpointError, match="is not the text encoder that the glue was fitted with"):
        load_routing(tmp_path, found, encoder=str(family("bert_mlm").base))


def test_fixed_routings_and_those_of_the_mixture(card: LatentCard, tmp_path: Path) -> None:
    for route in (None, RouteOptions(kind="fixed", primary="opt")):
        place = tmp_path / str(route is None)
        place.mkdir()
        made = LatentCard(**{**vars(card), "route": route, "features": 0})
        save_latent(place, made, *made.blank())
        found = load_latent(place)
        assert found.primary == (None if route is None else "opt")
        routing = load_routing(place, found)
        if routing is None:
            assert route is None
            continue
        assert routing(["x"])[0].gates == {"llama": 0.5, "opt": 0.5}
        assert not [name for name in load_file(place / VALUES) if name.startswith("router.")]
