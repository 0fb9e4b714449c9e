"""What ``examples/bench_dynamic.py`` times: layers and small models with adapters, as PEFT and as a bank run them."""

from __future__ import annotations

import copy
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mixmerge.bank.attach import Attached
from mixmerge.bank.gate import Gate, RowGate, Run
from mixmerge.bank.mix import Mix
from mixmerge.bank.records import Bank, Entry, side_by_side

Ways = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Times:
    """Milliseconds of each round; the ways take turns.

    Args:
        of: way -> one figure a round.
    """

    of: Mapping[str, tuple[float, ...]]

    def usual(self, way: str) -> float:
        return statistics.median(self.of[way])

    def least(self, way: str) -> float:
        return min(self.of[way])

    def over(self, one: str, other: str) -> tuple[float, float]:
        """How many times as much ``one`` takes beyond the base as ``other``: of the least, and of the usual."""
        least = (self.least(one) - self.least("base")) / (self.least(other) - self.least("base"))
        return least, (self.usual(one) - self.usual("base")) / (self.usual(other) - self.usual("base"))

    def times(self, one: str, other: str) -> tuple[float, float]:
        """How many times as much ``one`` takes as ``other``."""
        return self.least(one) / self.least(other), self.usual(one) / self.usual(other)


def timed(ways: Ways, rounds: int, *, clock: Callable[[], float] = time.process_time) -> Times:
    """Each way once a round, in an order that is drawn: whoever follows a slow one finds its caches empty."""
    for call in ways.values():
        call(), call()
    found: dict[str, list[float]] = {way: [] for way in ways}
    order, draw = list(ways), random.Random(0)
    for _ in range(rounds):
        draw.shuffle(order)
        for way in order:
            began = clock()
            ways[way]()
            found[way].append((clock() - began) * 1000)
    return Times({way: tuple(each) for way, each in found.items()})


def adapted(net: nn.Module, *, adapters: int, rank: int, targets: str | list[str]) -> Any:
    """A copy with drawn LoRA adapters ``a0``, ``a1``, ... by PEFT."""
    from peft import LoraConfig, get_peft_model

    made: Any = None
    for number in range(adapters):
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, init_lora_weights=False)
        if made is None:
            made = get_peft_model(copy.deepcopy(net), config, adapter_name=f"a{number}")
        else:
            made.add_adapter(f"a{number}", config)
    return made.eval().requires_grad_(False)


def bank_of(peft: Any, adapters: int) -> Bank:
    """The same adapters side by side."""
    names, sites = [f"a{number}" for number in range(adapters)], {}
    for path, module in peft.named_modules():
        if not hasattr(module, "lora_A") or names[0] not in module.lora_A:
            continue
        entries: list[Entry | None] = [
            Entry(module.lora_A[name].weight.data, module.lora_B[name].weight.data.T, module.scaling[name])
            for name in names
        ]
        tensor = path.removeprefix("base_model.model.") + ".weight"
        sites[tensor] = side_by_side(tensor, entries)
    return Bank(tuple(names), sites, {})


def layer(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width, bias=False)).requires_grad_(False)


def small_model(*, layers: int, width: int) -> nn.Module:
    """Of Llama's kind, with SmolLM2-135M's proportions and random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = max(3, width // 64 // 3 * 3)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=width // heads * heads, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads // 3, intermediate_size=width * 8 // 3, max_position_embeddings=2048,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows that take turns with the adapters.

    Args:
        own: ``(B,)``: whose each row is.
        weights: ``(B, E)``: 1 for a row's own.
    """

    own: tuple[int, ...]
    weights: Tensor

    @classmethod
    def of(cls, rows: int, adapters: int) -> Batch:
        own = tuple(row % adapters for row in range(rows))
        return cls(own, torch.eye(adapters)[torch.tensor(own)])

    @property
    def names(self) -> list[str]:
        return [f"a{each}" for each in self.own]


def share(model: nn.Module, name: str, weight: nn.Parameter) -> None:
    """Put a weight into a model, by its name without adapters."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    setattr(getattr(module, "base_layer", module), attribute, weight)


class Three:
    """A base, the same under PEFT, and the same under a bank, on one set of the base's weights.

    Args:
        net: the base.
        adapters, rank: how many, and of which rank.
        rows: of a batch.
        dtype: of all of it; the base is changed to it.
    """

    def __init__(
        self, net: nn.Module, *, adapters: int, rank: int, rows: int, dtype: torch.dtype = torch.float32
    ) -> None:
        net = net.to(dtype)
        linear = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
        targets = [name for name in linear if name != "lm_head"]
        self.base, self.batch = net, Batch.of(rows, adapters)
        self.peft = adapted(net, adapters=adapters, rank=rank, targets=targets).to(dtype)
        self.bank, self.ours = bank_of(self.peft, adapters), copy.deepcopy(net)
        for name, weight in net.named_parameters():  # copies of a matrix are not equally fast
            share(self.ours, name, weight)
            share(self.peft.base_model.model, name, weight)
        self.attached = Attached(self.ours, self.bank, RowGate())

    @contextmanager
    def mixture(self) -> Iterator[None]:
        with torch.inference_mode(), self.attached.running(Run(self.batch.weights)):
            yield


def peft_merging_one_by_one(three: Three, u: Tensor) -> Callable[[], Tensor]:
    """The same by PEFT: merge a row's adapter into the layer, use it, take it out again."""
    layer = three.peft.base_model.model[0]

    def call() -> Tensor:
        rows = []
        for row, name in enumerate(three.batch.names):
            layer.merge(adapter_names=[name])
            rows.append(layer(u[row]))
            layer.unmerge()
        return torch.stack(rows)

    return call


def merging_one_by_one(three: Three, u: Tensor) -> Callable[[], Tensor]:
    """For each row of a layer the merged weight, and its product, with as little work as that takes."""
    site, weight = three.bank.sites["0.weight"], three.base[0].weight  # type: ignore[index]
    entries = [site.entry(number) for number in range(len(site.ranks))]

    def call() -> Tensor:
        rows = []
        for row, number in enumerate(three.batch.own):
            one = entries[number]
            merged = torch.addmm(weight, (one.b * one.scale[:, None]).T, one.a)
            rows.append(u[row] @ merged.T)
        return torch.stack(rows)

    return call


class Drawn(Gate):
    """Top-k of drawn scores for each token: what is timed is the bank, not the gate."""

    kind = "drawn"

    def __init__(self, experts: int, k: int, tokens: int) -> None:
        super().__init__()
        scores = torch.rand(1, tokens, experts)
        self.weights, self.entries = scores.topk(k, dim=-1)

    def mix(self, site: str, u: Tensor, run: Run) -> Mix:
        return Mix(self.weights.clone(), self.entries.clone())  # a new decision for each call


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that is made within it, views of others not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        held = {one.untyped_storage().data_ptr() for one in args if isinstance(one, Tensor)}
        for one in made if isinstance(made, tuple | list) else (made,):
            if isinstance(one, Tensor) and one.untyped_storage().data_ptr() not in held:
                self.found = max(self.found, one.numel())
        return made


def decoding(model: Any, ids: Tensor, **more: Any) -> Callable[[], object]:
    """One token after a prompt, on a cache that is cut back to the prompt each time."""
    from transformers import DynamicCache

    cache = DynamicCache()
    model(ids, past_key_values=cache, **more)
    step = ids[:, :1]

    def call() -> object:
        logits = model(step, past_key_values=cache, **more).logits
        cache.crop(-1)
        return logits

    return call


@contextmanager
def quietly() -> Iterator[None]:
    """Without what PEFT and transformers say about each other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def decoded(three: Three, ids: Tensor) -> dict[str, Callable[[], object]]:
    """One token of each row after a prompt."""
    return {
        "base": decoding(three.base, ids),
        "peft": decoding(three.peft, ids, adapter_names=three.batch.names),
        "ours": decoding(three.ours, ids),
    }


def read(three: Three, ids: Tensor) -> dict[str, Callable[[], object]]:
    """A prompt of each row."""
    return {
        "base": lambda: three.base(ids),
        "peft": lambda: three.peft(ids, adapter_names=three.batch.names),
        "ours": lambda: three.ours(ids),
    }


def through(three: Three, u: Tensor) -> dict[str, Callable[[], object]]:
    """One layer."""
    layer = three.peft.base_model.model[0]
    return {
        "base": lambda: three.base[0](u),  # type: ignore[index]
        "peft": lambda: layer(u, adapter_names=three.batch.names),
        "ours": lambda: three.ours[0](u),  # type: ignore[index]
    }


def measured_constants() -> dict[str, float]:
    """The parts of ``mixmerge.bank.costs`` by name, on one thread: each from a product or copy that it dominates."""
    from mixmerge.kernels import loops

    count, rank, width, rows = 8, 16, 1024, 256
    a, x, z = torch.randn(count, rank, width), torch.randn(rows, width), torch.randn(rows, rank)
    wide, little, table = torch.randn(width, 128), torch.randn(4, 4), torch.randn(32 * rank, width)
    ends = torch.arange(1, count + 1, dtype=torch.int32) * (rows // count)
    few = torch.arange(1, count + 1, dtype=torch.int32) * 4
    units, whole = torch.arange(rows) * 7 % rows, torch.arange(len(table)) * 7 % len(table)
    y, grouped = torch.zeros(rows, width), torch.nn.functional.grouped_mm
    own, gains = torch.arange(rows).view(count, -1), torch.ones(rows, rank)
    edges, ranks = torch.arange(count + 1) * own.shape[1], torch.arange(count + 1) * rank
    held = (a, a, units, edges, ranks, gains, z)
    sizes = (rows, width, width, count * rank, count, rank, rows)
    places = torch.tensor([*(one.data_ptr() for one in held), *sizes])
    scores = torch.randint(0, 64, (64,))
    each = torch.arange(64)
    short, turned = x.bfloat16(), a.transpose(1, 2).bfloat16()
    small, one = a[:, :4, :4].bfloat16().contiguous(), x[:32, None].bfloat16()
    wide_short, each_own = wide.bfloat16(), torch.randn(32, width, rank).bfloat16()
    ways: dict[str, Callable[[], object]] = {
        "CALL": lambda: little @ little,
        "SEGMENT": lambda: grouped(z[:32, :4].contiguous(), a[:, :4, :4].contiguous(), offs=few),
        "READ": lambda: x[:1] @ a.view(-1, width).T,
        "COPY": lambda: table.index_select(0, whole),
        "MOVE": lambda: x.index_select(0, units),
        "SPREAD": lambda: y.index_add_(0, units, x),
        "WIDE": lambda: x @ wide,
        "THIN": lambda: grouped(x, a.transpose(1, 2), offs=ends),
        "COMPILED": lambda: loops.add_pairs(x.data_ptr(), y.data_ptr(), places.data_ptr()),
        "SHORT_WIDE": lambda: short @ wide_short,
        "SHORT_THIN": lambda: torch.bmm(short.view(count, -1, width), turned),
        "SHORT_ROW": lambda: torch.bmm(one, each_own),
        "SHORT_SEGMENT": lambda: grouped(z[:32, :4].bfloat16(), small, offs=few),
        "SORT": lambda: torch.searchsorted(scores.sort(stable=True)[0], each, right=True, out_int32=True),
    }
    amounts = {
        "READ": a.numel() * 4, "COPY": table.numel() * 4, "MOVE": x.numel() * 4, "SPREAD": x.numel() * 4,
        "WIDE": rows * width * 128, "THIN": rows * width * rank, "COMPILED": 2 * rows * width * rank,
        "SHORT_WIDE": rows * width * 128, "SHORT_THIN": rows * width * rank, "SHORT_ROW": 32 * width * rank,
    }  # fmt: skip
    with torch.inference_mode():
        found = timed(ways, 200)
    spent = {way: found.least(way) * 1000 for way in ways}
    spent["SEGMENT"] /= count
    spent["SHORT_SEGMENT"] /= count
    return {way: amounts[way] / one if way in amounts else one for way, one in spent.items()}
