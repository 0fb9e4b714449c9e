"""Which device runs what, and what stays in memory."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixmerge.batch.placing import REMOTE, Device, place, seconds
from mixmerge.batch.plan import Batch, Group, Stage, groups
from mixmerge.batch.residence import Residence
from mixmerge.batch.setup import devices_of
from mixmerge.engines.echo import EchoEngine
from mixmerge.errors import EngineDiedError, Fault, MixmergeError
from mixmerge.experts import Expert, ExpertSet

GB = 10**9


def group(name: str, size: int, new: int, *, batches: int = 1, remote: bool = False) -> Group:
    calls = np.array_split(np.arange(batches * 4), batches)
    expert = Expert(name, name, endpoint="http://x" if remote else None)
    made = tuple(Batch(name, part, f"{name}{at}") for at, part in enumerate(calls))
    return Group(name, (expert,), made, size, new, new, remote)


def test_the_longest_comes_first_and_goes_where_it_ends_first() -> None:
    placed = place(
        [group("a", GB, 300), group("b", GB, 100), group("c", GB, 200)],
        [Device("x", 2 * GB), Device("y", 2 * GB)],
    )
    assert {one.device: [g.unit for g in one.groups] for one in placed} == {"x": ["a"], "y": ["c", "b"]}


def test_what_is_loaded_runs_first() -> None:
    placed = place([group("a", GB, 300), group("b", GB, 100)], [Device("x", 4 * GB)], loaded=frozenset({"b"}))
    assert [one.unit for one in placed[0].groups] == ["b", "a"]


def test_an_expert_larger_than_every_device_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(MixmergeError, match=r"experts a: take 9\.00 GB, and the largest device has 4\.00 GB"):
        place([group("a", 9 * GB, 1), group("b", GB, 1)], [Device("x", 4 * GB), Device("y", 2 * GB)])


def test_an_expert_goes_where_it_fits() -> None:
    placed = place([group("big", 3 * GB, 1)], [Device("small", GB), Device("large", 4 * GB)])
    assert [one.device for one in placed] == ["large"]


def test_one_long_group_is_divided_over_devices() -> None:
    devices = [Device("x", 4 * GB), Device("y", 4 * GB)]
    long = group("a", GB, 100_000, batches=8)
    placed = place([long], devices)
    assert sum(len(g.batches) for one in placed for g in one.groups) == 8
    assert [len(one.groups) for one in placed] == [1, 1]
    short = place([group("a", GB, 10, batches=8)], devices)
    assert len(short) == 1, "another load would cost more than it saves"


def test_endpoints_are_placed_apart() -> None:
    placed = place([group("a", GB, 1), group("far", 0, 1, remote=True)], [Device("x", 4 * GB)])
    assert [(one.device, [g.unit for g in one.groups]) for one in placed] == [("x", ["a"]), (REMOTE, ["far"])]


@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.integers(1, 10_000), st.integers(1, 9)), min_size=1, max_size=12
    ),
    st.integers(1, 4),
)
def test_every_batch_is_placed_once_and_no_unit_twice_on_a_device(
    given_groups: list[tuple[int, int, int]], count: int
) -> None:
    made = [group(f"u{at}", size * GB, new, batches=n) for at, (size, new, n) in enumerate(given_groups)]
    placed = place(made, [Device(f"d{at}", 4 * GB) for at in range(count)])
    found = sorted(batch.id for one in placed for g in one.groups for batch in g.batches)
    assert found == sorted(batch.id for one in made for batch in one.batches)
    for one in placed:
        units = [g.unit for g in one.groups]
        assert len(units) == len(set(units))
    longest = max(one.seconds for one in placed)
    assert longest <= sum(map(seconds, made)) + 1e-9


def stage_of(experts: list[int], tokens: list[int]) -> Stage:
    count = len(experts)
    rows = np.arange(count)
    return Stage(
        0,
        rows,
        np.zeros(count, np.int64),
        np.array(experts),
        np.array(tokens),
        np.full(count, 10),
        np.arange(count).astype(np.uint64) * np.uint64(7919),
        np.full(count, -1),
    )


EXPERTS = ExpertSet((Expert("a", "m"), Expert("b", "base", adapter="x"), Expert("c", "base", adapter="y")))


def test_adapters_of_one_base_are_one_group() -> None:
    found = groups(
        stage_of([0, 1, 2, 1], [5, 5, 5, 5]), EXPERTS, {}, budgets=dict.fromkeys(EXPERTS.units(), 1000)
    )
    assert [[one.name for one in g.experts] for g in found] == [["a"], ["b", "c"]]
    assert sorted(found[1].batches[0].calls.tolist()) == [1, 2, 3]


def test_batches_keep_to_their_budget_and_like_lengths() -> None:
    stage = stage_of([0] * 6, [90, 10, 50, 10, 90, 10])
    (found,) = groups(stage, EXPERTS, {}, budgets=dict.fromkeys(EXPERTS.units(), 100))
    for batch in found.batches:
        longest = int(stage.tokens[batch.calls].max()) + 10
        assert len(batch.calls) * longest <= 100 or len(batch.calls) == 1
    assert sum(len(batch.calls) for batch in found.batches) == 6


def test_a_split_batch_comes_back_as_its_halves() -> None:
    stage = stage_of([0] * 4, [10] * 4)
    (whole,) = groups(stage, EXPERTS, {}, budgets=dict.fromkeys(EXPERTS.units(), 1000))
    (split,) = groups(
        stage, EXPERTS, {}, budgets=dict.fromkeys(EXPERTS.units(), 1000), splits={whole.batches[0].id}
    )
    halves = whole.batches[0].halves(stage.keys)
    assert [one.id for one in split.batches] == [one.id for one in halves]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["gpu9"], "device gpu9: is no device that is known. cpu, cuda, or cuda:N"),
        (["cpu:1"], "device cpu:1: is no device"),
        (["cpu", "cpu"], "device cpu: is named twice"),
        (["cpu", "cuda:4000"], "device cuda:4000: is not there: torch sees"),
    ],
)
def test_devices_that_are_not_there(names: list[str], words: str) -> None:
    with pytest.raises(MixmergeError, match=words):
        devices_of(names)


def test_a_device_has_the_memory_that_is_said_or_free() -> None:
    assert devices_of(["cpu"], memory=5) == (Device("cpu", 5),)
    assert devices_of(["cpu"])[0].memory > 1_000_000


# --- memory


def residence(
    memory: int, sizes: dict[str, int], *, pinned: str = "", slow: float = 0.0
) -> tuple[Residence, list[str]]:
    told: list[str] = []

    class Engine(EchoEngine):
        def load(self) -> None:
            time.sleep(slow)
            if self.name.startswith("killed") and told.count("!") < int(self.name[6:]):
                told.append("!")
                raise EngineDiedError(Fault(self.name, "its process was killed"))
            if self.name == "broken":
                raise MixmergeError(Fault("broken", "cannot be loaded"))
            super().load()

        def unload(self) -> None:
            told.append(f"-{self.name}")
            super().unload()

    made = Residence(
        memory,
        open_engine=Engine,
        size=sizes.__getitem__,
        pinned=lambda unit: unit == pinned,
        loaded=lambda unit, _: told.append(f"+{unit}"),
    )
    return made, told


def use(held: Residence, *units: str) -> None:
    for unit in units:
        with held.use(unit) as engine:
            assert engine.loaded


def test_a_load_whose_process_is_killed_is_tried_again() -> None:
    held, told = residence(3, {"killed2": 1})
    use(held, "killed2")
    assert told == ["!", "!", "+killed2"]
    held, told = residence(3, {"killed3": 1})
    with pytest.raises(EngineDiedError):
        use(held, "killed3")
    use(held, "killed3")
    assert told == ["!", "!", "!", "+killed3"]


def test_the_longest_unused_leaves_first() -> None:
    held, told = residence(3, {"a": 1, "b": 1, "c": 1, "d": 2})
    use(held, "a", "b", "c", "a", "d")
    assert told == ["+a", "+b", "+c", "-b", "-c", "+d"]
    use(held, "a")
    assert told[-1] == "+d", "a was still there"


def test_what_is_pinned_stays() -> None:
    held, told = residence(2, {"a": 1, "b": 1, "c": 1, "big": 2}, pinned="a")
    use(held, "a", "b", "c", "b")
    assert told == ["+a", "+b", "-b", "+c", "-c", "+b"]
    with pytest.raises(MixmergeError, match="pinned"):
        use(held, "big")


def test_prepare_loads_ahead_only_beside_what_is_in_use() -> None:
    held, told = residence(2, {"a": 1, "b": 1, "c": 2})
    with held.use("a"):
        held.prepare("b")
        held.prepare("c")
        assert told == ["+a", "+b"]
    held.prepare("c")
    assert told == ["+a", "+b", "-b", "-a", "+c"]


def test_one_that_cannot_be_loaded_can_be_tried_again() -> None:
    held, _ = residence(2, {"broken": 1, "a": 1})
    held.prepare("broken")
    for _ in range(2):
        with pytest.raises(MixmergeError, match="cannot be loaded"):
            use(held, "broken")
    use(held, "a")


def test_two_threads_share_one_load() -> None:
    held, told = residence(2, {"a": 1}, slow=0.05)
    threads = [threading.Thread(target=use, args=(held, "a")) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert told == ["+a"]


def test_who_needs_room_waits_for_it() -> None:
    held, told = residence(1, {"a": 1, "b": 1})
    done = threading.Event()

    def second() -> None:
        use(held, "b")
        done.set()

    with held.use("a"):
        waiting = threading.Thread(target=second)
        waiting.start()
        assert not done.wait(0.05)
    waiting.join(5)
    assert done.is_set()
    assert told == ["+a", "-a", "+b"]
