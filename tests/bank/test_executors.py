"""The executors of a bank: each is the plain definition, forward and backward, and none makes what is not needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mixmerge.bank.costs import can_group, cheapest
from mixmerge.bank.mix import Mix, apply, change, fixed
from mixmerge.bank.picks import Shared, picks_of
from mixmerge.bank.records import Entry, Site, side_by_side
from mixmerge.bank.segmented import Segmented
from mixmerge.errors import MixmergeError

EXECUTORS: tuple[Literal["concat", "segmented", "gather"], ...] = ("concat", "segmented", "gather")
RANKS = ((4, 4, 4), (1, 3, 0, 2), (0, 4, 4), (2,), (8,) * 12)


def site_of(
    ranks: tuple[int, ...], *, kind: Any = "linear", dtype: Any = torch.float32, seed: int = 0
) -> Site:
    """12 inputs (of an embedding 12 tokens) and 8 outputs; equal scales for an even seed."""
    draw = torch.Generator().manual_seed(seed)
    entries: list[Entry | None] = []
    for rank in ranks:
        shape = (12, rank) if kind == "embedding" else (rank, 12)
        a = torch.randn(shape, generator=draw, dtype=dtype)
        b = torch.randn(rank, 8, generator=draw, dtype=dtype)
        scale = 0.5 if seed % 2 == 0 else torch.rand(rank, generator=draw) + 0.5
        entries.append(Entry(a, b, scale) if rank else None)
    return side_by_side("m.weight", entries, kind=kind)


def inputs_of(site: Site, rows: int, tokens: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    y = torch.randn(rows, tokens, 8, generator=draw, dtype=site.b.dtype)
    if site.kind == "embedding":
        return torch.randint(0, 12, (rows, tokens), generator=draw), y
    return torch.randn(rows, tokens, 12, generator=draw, dtype=site.b.dtype), y


def mixes_of(site: Site, rows: int, tokens: int, k: int, seed: int) -> Iterator[Mix]:
    """Every kind of decision."""
    draw = torch.Generator().manual_seed(seed)
    experts = len(site.ranks)
    k = min(k, experts)
    own = torch.randint(0, experts, (rows,), generator=draw)
    entries = torch.rand(rows, tokens, experts, generator=draw).argsort(-1)[..., :k]

    def weights(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    yield Mix(weights(rows, experts))
    yield Mix(weights(rows, tokens, experts))
    yield Mix(torch.eye(experts)[own] * weights(rows, 1))
    yield fixed(weights(experts), rows)
    yield fixed(torch.zeros(experts), rows)
    yield Mix(weights(rows, k), entries[:, 0])
    yield Mix(weights(rows, tokens, k), entries)
    yield Mix(weights(rows, site.rank), by="rank")
    yield Mix(weights(rows, tokens, site.rank), by="rank")
    if len(set(site.ranks) - {0}) == 1:
        yield Mix(weights(rows, experts), how="factors")
        yield Mix(weights(rows, tokens, k), entries, how="factors")


@settings(deadline=None, max_examples=25)
@given(
    ranks=st.sampled_from(RANKS),
    kind=st.sampled_from(["linear", "embedding"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    rows=st.integers(1, 5),
    tokens=st.integers(1, 3),
    k=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_executors_are_the_definition(
    ranks: tuple[int, ...], kind: str, dtype: torch.dtype, rows: int, tokens: int, k: int, seed: int
) -> None:
    site = site_of(ranks, kind=kind, dtype=dtype, seed=seed)
    exact = Site(site.name, site.a.double(), site.b.double(), site.scale, site.ranks, site.kind)
    u, y = inputs_of(site, rows, tokens)
    shared, near = (
        Shared(),
        {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float32: 1e-4, torch.float64: 1e-6},
    )
    for mix in mixes_of(site, rows, tokens, k, seed):
        wanted = y.double() + change(exact, u.double() if u.is_floating_point() else u, mix)
        size = max(
            10.0, float(wanted.abs().max()) / 10
        )  # what cancels out has been rounded as what it was of
        for executor in (*EXECUTORS, "auto"):
            for fresh in (False, True, True):  # the third time from what is remembered
                with torch.no_grad():
                    found = apply(site, u, y.clone(), mix, executor=executor, shared=shared, fresh=fresh)  # type: ignore[arg-type]
                assert found.dtype == dtype
                torch.testing.assert_close(found.double(), wanted, atol=near[dtype] * size, rtol=near[dtype])


@pytest.mark.parametrize("product", ["compiled", "batched", "grouped", "loop"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_every_product_of_segments(product: Any, tokens: int) -> None:
    site, shared = site_of((4, 4, 4)), Shared()
    u, y = inputs_of(site, 6, tokens)
    if product == "grouped" and not can_group(site):
        pytest.skip("this torch has none")
    if product == "compiled":
        tokens = 1
    own = torch.tensor([2, 0, 2, 2, 0, 2])  # nobody has expert 1
    by_row = Mix(torch.rand(6, 1), own[:, None])
    units = Mix(torch.rand(6, u.shape[1], 2), torch.tensor([0, 2]).expand(6, u.shape[1], -1))
    for mix, each in ((by_row, u.shape[1]), (units, 1)):
        if product == "compiled" and each > 1:
            continue
        path = Segmented(site, shared.picks(mix, 3), each, product=product)
        found = y.clone().flatten(0, 1)
        path.add_(u.flatten(0, 1), found)
        torch.testing.assert_close(found.view_as(y), y + change(site, u, mix))


@pytest.mark.parametrize("executor", [*EXECUTORS, "auto"])
@pytest.mark.parametrize("ranks", [(2, 2), (1, 0, 3)])
def test_gradients(executor: Any, ranks: tuple[int, ...]) -> None:
    site = site_of(ranks, dtype=torch.float64, seed=1)
    u, y = inputs_of(site, 2, 2)
    for mix in mixes_of(site, 2, 2, 2, seed=3):
        weights = mix.weights.double().clone().requires_grad_(True)

        def through(u: Tensor, y: Tensor, weights: Tensor, mix: Mix = mix) -> Tensor:
            return apply(site, u, y, Mix(weights, mix.entries, mix.by, mix.how), executor=executor)

        given = (u.clone().requires_grad_(True), y.clone().requires_grad_(True), weights)
        assert torch.autograd.gradcheck(through, given)
        plain = change(site, given[0], Mix(weights, mix.entries, mix.by, mix.how))
        wanted = torch.autograd.grad((given[1] + plain).square().sum(), given)
        found = torch.autograd.grad(through(*given).square().sum(), given)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_of_a_table_only_weights_learn(executor: Any) -> None:
    site = site_of((2, 2), kind="embedding", dtype=torch.float64)
    u, y = inputs_of(site, 3, 2)
    weights = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda weights: apply(site, u, y, Mix(weights), executor=executor), (weights,)
    )


def test_factors_get_no_gradient_and_what_is_kept_is_small() -> None:
    site = site_of((4,) * 12)
    site = Site(site.name, site.a.requires_grad_(True), site.b.requires_grad_(True), site.scale, site.ranks)
    u, y = inputs_of(site, 16, 4)
    weights = torch.rand(16, 4, 2, requires_grad=True)
    entries = torch.rand(16, 4, 12).argsort(-1)[..., :2]
    for executor in EXECUTORS:
        kept: list[int] = []

        def keep(one: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(one.numel())
            return one

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
            found = apply(site, u.requires_grad_(True), y, Mix(weights, entries), executor=executor)
        found.sum().backward()
        assert site.a.grad is None
        assert site.b.grad is None
        assert max(kept) <= 16 * 4 * site.rank  # (tokens x ranks), never an output of each expert


class _Largest(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made._base is None:
            self.found = max(self.found, made.numel())
        return made


@pytest.mark.parametrize("learned", [False, True])
def test_no_tensor_of_tokens_by_experts_by_width(learned: bool) -> None:
    experts, tokens, width, rank = 24, 256, 64, 4
    draw = torch.Generator().manual_seed(0)
    factors = torch.randn(2, experts, rank, width, generator=draw)
    site = side_by_side("m.weight", [Entry(a, b) for a, b in zip(*factors, strict=True)])
    u, y = torch.randn(4, tokens // 4, width), torch.randn(4, tokens // 4, width)
    entries = torch.rand(4, tokens // 4, experts).argsort(-1)[..., :2]
    for executor in ("concat", "segmented", "auto"):
        weights = torch.rand(4, tokens // 4, 2, requires_grad=learned)
        with torch.set_grad_enabled(learned), _Largest() as made:
            found = apply(site, u, y, Mix(weights, entries), executor=executor)  # type: ignore[arg-type]
            if learned:
                found.square().sum().backward()
        assert made.found <= max(tokens * experts * rank, 4 * tokens * width), executor
        assert made.found < tokens * experts * width // 4


@pytest.mark.parametrize("executor", [*EXECUTORS, "auto"])
def test_a_row_does_not_see_its_mates(executor: Any) -> None:
    site = site_of((4, 1, 4, 3), seed=1)
    u, y = inputs_of(site, 5, 3)
    for mix in mixes_of(site, 5, 3, 2, seed=5):
        with torch.no_grad():
            together = apply(site, u, y, mix, executor=executor)
            for row in range(5):
                entries = None if mix.entries is None else mix.entries[row : row + 1]
                own = Mix(mix.weights[row : row + 1], entries, mix.by, mix.how)
                alone = apply(site, u[row : row + 1], y[row : row + 1], own, executor=executor)
                torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("executor", [*EXECUTORS, "auto"])
def test_what_overflows_stays_with_its_row(executor: Any) -> None:
    """Half precision: an expert whose products overflow, and a row that has nothing of it."""
    big = Entry(torch.full((4, 8), 3e4, dtype=torch.float16), torch.ones(4, 8, dtype=torch.float16))
    small = Entry(torch.ones(4, 8, dtype=torch.float16), torch.ones(4, 8, dtype=torch.float16))
    site, u = side_by_side("m", [big, small]), torch.ones(2, 1, 8, dtype=torch.float16)
    for mix in (Mix(torch.eye(2)), Mix(torch.eye(2)[:, None])):
        with torch.no_grad():
            found = apply(site, u, torch.zeros_like(u), mix, executor=executor)
        assert not found[0].isfinite().any()
        assert found[1].tolist() == [[32.0] * 8]


@pytest.mark.parametrize("executor", EXECUTORS)
def test_the_order_of_experts_only_permutes(executor: Any) -> None:
    site, order = site_of((4, 1, 3), seed=1), [2, 0, 1]
    other = side_by_side(site.name, [site.entry(expert) for expert in order])
    u, y = inputs_of(site, 4, 2)
    weights, entries = torch.rand(4, 2, 2), torch.rand(4, 2, 3).argsort(-1)[..., :2]
    places = torch.tensor([order.index(expert) for expert in range(3)])
    with torch.no_grad():
        one = apply(site, u, y, Mix(weights, entries), executor=executor)
        two = apply(other, u, y, Mix(weights, places[entries]), executor=executor)
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("executor", [*EXECUTORS, "auto"])
def test_one_expert_is_its_merge_and_no_weight_is_the_base(executor: Any) -> None:
    site = site_of((4, 2, 3), seed=1)
    u, y = inputs_of(site, 3, 2)
    with torch.no_grad():
        for expert in range(3):
            one = torch.eye(3)[expert]
            merged = y + u @ site.delta(one).T
            torch.testing.assert_close(apply(site, u, y, fixed(one, 3), executor=executor), merged)
            listed = Mix(torch.ones(3, 1), torch.full((3, 1), expert))
            torch.testing.assert_close(apply(site, u, y, listed, executor=executor), merged)
        for mix in mixes_of(site, 3, 2, 2, seed=0):
            nothing = Mix(torch.zeros_like(mix.weights), mix.entries, mix.by, mix.how)
            assert torch.equal(apply(site, u, y, nothing, executor=executor), y)


def test_decisions_are_sorted_once_and_changes_are_seen() -> None:
    site, shared = site_of((4, 4, 4)), Shared()
    u, y = inputs_of(site, 4, 1)
    entries = torch.tensor([[0], [1], [0], [2]])
    first, second = (shared.picks(Mix(torch.rand(4, 1), entries), 3) for _ in range(2))
    assert first is not second
    assert first.order is shared.picks(Mix(torch.rand(4, 1), entries), 3).order
    weights = torch.eye(3)[[0, 1, 0, 2]]
    before = apply(site, u, y, Mix(weights), shared=shared)
    weights[0, 0] = 5.0
    after = apply(site, u, y, Mix(weights), shared=shared)
    torch.testing.assert_close(after, y + change(site, u, Mix(weights)))
    assert not torch.equal(before, after)


def test_inference_first_and_gradients_after_it() -> None:
    """What is remembered of a decision, or of a site, must not be what autograd refuses."""
    site, shared = site_of((1, 3), seed=1), Shared()
    u, y = inputs_of(site, 3, 2)
    mix = Mix(torch.rand(3, 2))
    for executor in EXECUTORS:
        with torch.inference_mode():
            apply(site, u, y, mix, executor=executor, shared=shared)
        v = u.clone().requires_grad_(True)
        apply(site, v, y, mix, executor=executor, shared=shared).sum().backward()
        assert v.grad is not None


def test_the_cheapest_depends_on_the_batch() -> None:
    def chosen(experts: int, rows: int, tokens: int, k: int, *, by_row: bool) -> str:
        factors = torch.zeros(experts, 16, 1024)
        site = side_by_side("m", [Entry(one, one) for one in factors])
        shape = (rows, k) if by_row else (rows, tokens, k)
        entries = torch.rand(*shape[:-1], experts).argsort(-1)[..., :k]
        mix = Mix(torch.rand(shape), entries)
        return cheapest(site, picks_of(mix, experts), tokens if by_row else 1)

    with torch.no_grad():
        assert chosen(4, 32, 1, 4, by_row=False) == "concat"  # everybody gets all
        assert chosen(64, 1, 512, 2, by_row=False) == "segmented"
        assert chosen(64, 32, 1, 1, by_row=True) == "segmented"
        assert chosen(8, 32, 64, 1, by_row=True) == "gather"  # long rows with an expert each


def test_tokens_that_get_few_of_many_experts_are_picked_for() -> None:
    weights = torch.zeros(2, 3, 20)
    weights[..., 4], weights[0, 1, 7] = 0.5, 0.25
    found = picks_of(Mix(weights), 20)
    assert found.each == 2
    assert found.used == (4, 7)
    site = site_of((4,) * 20)
    u, y = inputs_of(site, 2, 3)
    for executor in EXECUTORS:
        with torch.no_grad():
            torch.testing.assert_close(
                apply(site, u, y, Mix(weights), executor=executor), y + change(site, u, Mix(weights))
            )
    dense = picks_of(Mix(torch.rand(2, 3, 20)), 20)
    assert dense.entries is None
    assert dense.each == 20


def test_short_factors_go_side_by_side_sooner() -> None:
    site = side_by_side("m", [Entry(one, one) for one in torch.zeros(8, 16, 1024)])
    weights = torch.rand(32, 8).topk(2, -1)
    mix = Mix(torch.zeros(32, 8).scatter(1, weights.indices, weights.values))
    with torch.no_grad():
        assert cheapest(site.to("cpu", torch.bfloat16), picks_of(mix, 8), 1) == "concat"
        assert cheapest(site, picks_of(mix, 8), 1) == "segmented"


def test_a_decision_of_other_tokens_is_refused() -> None:
    """The compiled loop has addresses only."""
    site = site_of((4, 4))
    u, y = inputs_of(site, 2, 3)
    mix = Mix(torch.ones(2, 5, 1), torch.zeros(2, 5, 1, dtype=torch.int64))
    with torch.no_grad(), pytest.raises(ValueError, match="another decision"):
        apply(site, u, y, mix, executor="segmented", fresh=True)


def test_another_number_of_rows_is_refused() -> None:
    site = site_of((2, 2))
    u, y = inputs_of(site, 3, 2)
    with pytest.raises(MixmergeError, match=r"m\.weight sees 3 rows, and the decision is of 2"):
        apply(site, u, y, Mix(torch.ones(2, 2)))
    found = apply(site, u[:1], y[:1], Mix(torch.eye(2)))  # positions that all rows share
    torch.testing.assert_close(found, y[:1] + change(site, u[:1], Mix(torch.eye(2))))


@pytest.mark.parametrize("tokens", [1, 8])
def test_no_device_copies_the_factors_of_all_experts_for_each_row(tokens: int) -> None:
    """Weights of a row, for prompts of some tokens: where nothing was measured, too."""
    site = site_of((4,) * 12).to("meta", torch.float32)
    many = Mix(torch.rand(30, 12))
    one = Mix(torch.rand(30, 1), torch.zeros(30, 1, dtype=torch.int64))
    assert cheapest(site, picks_of(many, 12), tokens) != "gather"
    assert cheapest(site, picks_of(one, 12), tokens) in ("gather", "segmented")
    few = Mix(torch.rand(4, 1), torch.zeros(4, 1, dtype=torch.int64))
    assert cheapest(site, picks_of(few, 12), 1) == "gather"
