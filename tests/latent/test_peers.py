"""Latents of peers: alone or in any batch, in memory or on disk."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixmerge.errors import OutputError
from mixmerge.latent.peers import latents
from mixmerge.latent.records import Latents, Reading
from mixmerge.latent.store import Store

TEXTS = ("kilo", "Name the cell: é 😀\r\n  gives 42", "the quick brown fox " * 4, "a", "alpha kilo", "mike")


def read(expert: Any) -> list[Reading]:
    return [expert.reader.prompt(text) for text in TEXTS]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma", "gpt2", "gpt_neox", "opt"])
def test_latents_are_the_same_in_any_batch(experts: Mapping[str, Any], architecture: str) -> None:
    expert = experts[architecture]
    readings = read(expert)
    depths = (0, "last", 1, "last")
    alone = [latents(expert, [one], depths)[0] for one in readings]
    both = latents(expert, readings[::-1], depths)[::-1]
    small = latents(expert, readings, depths, batch_tokens=1)
    for at, reading in enumerate(readings):
        assert alone[at].ends.tolist() == list(reading.ends)
        assert alone[at].states[1] is alone[at].states[3]
        assert [len(one) for one in alone[at].states] == [len(reading.ids)] * 4
        for one, other, third in zip(alone[at].states, both[at].states, small[at].states, strict=True):
            assert not one.requires_grad
            assert torch.allclose(one, other, atol=1e-5)
            assert torch.equal(one, third)
        own = sum(one.numel() for one in alone[at].states[:3]) * 4
        assert alone[at].nbytes == own
    # what follows changes nothing that was there before
    longer = expert.reader.with_answer(TEXTS[0], " mike alpha", role="peer")
    more = latents(expert, [longer], depths)[0]
    assert len(longer.ids) > len(readings[0].ids)
    for one, other in zip(alone[0].states, more.states, strict=True):
        assert torch.allclose(one, other[: len(one)], atol=1e-5)


def same(one: Latents | None, other: Latents) -> bool:
    assert one is not None
    states = zip(one.states, other.states, strict=True)
    return torch.equal(one.ends, other.ends) and all(
        torch.equal(a, b) and a.dtype == b.dtype for a, b in states
    )


@pytest.fixture
def made(experts: Mapping[str, Any]) -> tuple[Any, list[Reading], list[Latents]]:
    expert = experts["opt"]
    readings = read(expert)
    return expert, readings, latents(expert, readings, (0, "last", 0))


def keep(store: Store, readings: list[Reading], made: list[Latents]) -> list[str]:
    keys = [store.key("ab", one, (0, "last", 0), "float32") for one in readings]
    for key, one in zip(keys, made, strict=True):
        store.put(key, one)
    return keys


def test_what_is_stored_is_read_again(made: Any, tmp_path: Path) -> None:
    _, readings, wanted = made
    keys = keep(Store(tmp_path / "latents"), readings, wanted)
    again = [Store(tmp_path / "latents").get(*pair) for pair in zip(keys, readings, strict=True)]
    assert all(same(one, other) for one, other in zip(again, wanted, strict=True))
    assert again[0] is not None
    assert again[0].states[0] is again[0].states[2]
    assert not list((tmp_path / "latents").rglob(".*"))


def test_a_key_is_of_everything_that_states_follow_from(made: Any, tmp_path: Path) -> None:
    store, (_, readings, _) = Store(tmp_path), made
    keys = {
        store.key("ab", readings[0], (0, "last"), "float32"),
        store.key("ac", readings[0], (0, "last"), "float32"),
        store.key("ab", readings[1], (0, "last"), "float32"),
        store.key("ab", readings[0], (0, 2), "float32"),
        store.key("ab", readings[0], (0, "last"), "bfloat16"),
    }
    assert len(keys) == 5


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "another's"])
def test_a_damaged_file_is_not_there(made: Any, tmp_path: Path, how: str) -> None:
    _, readings, wanted = made
    store = Store(tmp_path)
    keys = keep(store, readings[:2], wanted[:2])
    path, other = ((tmp_path / key[:2] / f"{key}.latents") for key in keys)
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    new = {"cut": data[:-7], "flipped": bytes(flipped), "empty": b"", "another's": other.read_bytes()}[how]
    path.write_bytes(new)
    assert store.get(keys[0], readings[0]) is None
    assert not path.exists()
    assert not store.has(keys[0])
    store.put(keys[0], wanted[0])
    assert same(store.get(keys[0], readings[0]), wanted[0])


def test_a_disk_that_refuses_leaves_nothing(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, readings, wanted = made
    store = Store(tmp_path / "store")
    key = store.key("ab", readings[0], (0,), "float32")

    def refuse(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OutputError, match=r"cannot be written: No space left on device. Free some space"):
        store.put(key, wanted[0])
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert store.get(key, readings[0]) is None
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        Store(tmp_path / "file").put(key, wanted[0])


def test_what_was_not_used_for_longest_goes(made: Any, tmp_path: Path) -> None:
    _, readings, wanted = made
    store = Store(tmp_path)
    keys = [store.key("ab", one, (0,), "float32") for one in readings]
    for number, key in enumerate(keys[:3]):
        store.put(key, wanted[2])
        os.utime(tmp_path / key[:2] / f"{key}.latents", ns=(number, number))
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.latents"))
    assert same(store.get(keys[0], readings[2]), wanted[2])  # used just now
    bounded = Store(tmp_path, limit=size)
    bounded.put(keys[3], wanted[2])
    left = [at for at in range(4) if bounded.get(keys[at], readings[2]) is not None]
    assert left == [0, 3]
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.latents")) <= size
    dead, alive = (tmp_path / keys[4][:2] / f".new-{name}" for name in ("dead", "alive"))
    for path in (dead, alive):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half of it")
    os.utime(dead, (0, 0))
    # one that is larger than all of it is kept until the next comes
    tiny = Store(tmp_path, limit=1)
    tiny.put(keys[4], wanted[0])
    assert tiny.get(keys[4], readings[0]) is not None
    assert tiny.get(keys[3], readings[2]) is None
    assert not dead.exists()
    assert alive.exists()


def test_what_is_wanted_with_it_makes_no_room(made: Any, tmp_path: Path) -> None:
    _, readings, wanted = made
    store = Store(tmp_path, limit=1)
    keys = [store.key("ab", one, (0,), "float32") for one in readings]
    store.put(keys[0], wanted[0])
    store.put(keys[1], wanted[1])
    assert [store.has(one) for one in keys[:2]] == [False, True]
    store.put(keys[0], wanted[0], beside=keys[:3])
    assert [store.has(one) for one in keys[:2]] == [True, True]
    sizes = [path.stat().st_size for path in tmp_path.rglob("*.latents")]
    assert store.nbytes([*keys, keys[0]]) == sum(sizes) > store.room == 1


def test_processes_that_share_a_folder_keep_to_one_limit(made: Any, tmp_path: Path) -> None:
    _, readings, wanted = made
    keys = [Store(tmp_path).key(str(at), readings[2], (0,), "float32") for at in range(12)]
    Store(tmp_path).put(keys[0], wanted[2])
    limit = 4 * Store(tmp_path).nbytes(keys[:1])
    first, second = Store(tmp_path, limit=limit), Store(tmp_path, limit=limit)
    for at, key in enumerate(keys[1:]):
        (first, second)[at % 2].put(key, wanted[2])
        assert Store(tmp_path).nbytes(keys) <= limit


def test_by_default_half_of_the_disk_is_left(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there already counts as free: else the room would shrink as it fills."""
    _, readings, wanted = made
    free = 10**9

    def usage(place: Any) -> SimpleNamespace:
        assert Path(place).is_dir()
        return SimpleNamespace(free=free)

    monkeypatch.setattr("mixmerge.latent.store.shutil.disk_usage", usage)
    store = Store(tmp_path / "not there yet")
    assert store.room == free // 2
    keys = keep(store, readings, wanted)
    free -= store.nbytes(keys)
    assert Store(tmp_path / "not there yet").room == 10**9 // 2
    free = 0
    full = Store(tmp_path / "not there yet")
    assert full.room == store.nbytes(keys) // 2
    full.put(keys[0], wanted[0])
    assert full.nbytes(keys) <= full.room
