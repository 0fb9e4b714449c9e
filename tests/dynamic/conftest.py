"""Banks and gates in memory, over tiny real models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mixmerge.bank.gate import Features, Gate, RowGate, Run
from mixmerge.bank.mix import Mix
from mixmerge.bank.records import Bank, Entry, side_by_side
from mixmerge.dynamic.model import DynamicModel
from mixmerge.zoo.adapters import save_adapter

EXPERTS = ("one", "two", "three")


class TokenGate(Gate):
    """Two of three experts for each token, by a linear map of each site's inputs."""

    kind = "token"

    def __init__(self, sites: dict[str, int]) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        self.maps = {name: torch.randn(width, len(EXPERTS), generator=draw) for name, width in sites.items()}

    def mix(self, site: str, u: Tensor, run: Run) -> Mix | None:
        if site not in self.maps:
            return None
        weights, entries = (u.float() @ self.maps[site]).topk(2)
        return Mix(weights.softmax(-1), entries)


class PromptGate(Gate):
    """One mixture for a row, by its prompt's hidden states."""

    kind = "prompt"
    features: ClassVar[Features] = "hidden"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.map = nn.Parameter(torch.randn(width, len(EXPERTS), generator=torch.Generator().manual_seed(4)))

    def query(self, features: Tensor) -> Tensor:
        return (features @ self.map).softmax(-1)

    def mix(self, site: str, u: Tensor, run: Run) -> Mix | None:
        return None if run.rows is None else Mix(run.rows)


class DeepGate(PromptGate):
    """The same by the hidden states of all layers."""

    kind = "deep"
    features: ClassVar[Features] = "layers"


class TextGate(PromptGate):
    """The same by a text's length and first letter."""

    kind = "text"
    features: ClassVar[Features] = "text"


class SecondPassGate(Gate):
    """A mixture for each token, by the base's hidden state of it."""

    kind = "second"
    second_pass = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.map = nn.Parameter(torch.randn(width, len(EXPERTS), generator=torch.Generator().manual_seed(5)))

    def mix(self, site: str, u: Tensor, run: Run) -> Mix | None:
        assert run.hidden is not None
        assert run.hidden.shape[:2] == u.shape[:2]
        return Mix((run.hidden.float() @ self.map).softmax(-1))


def embed(texts: list[str]) -> Tensor:
    return torch.tensor([[len(text) / 8.0, ord(text[0]) / 64.0] for text in texts])


def bank_of(model: Any, *, scale: float = 0.08) -> Bank:
    """Three experts of other ranks at every matrix of a model's layers, and of its head."""
    draw, sites, vectors = torch.Generator().manual_seed(1), {}, {}
    for name, value in model.named_parameters():
        if "layers." not in name and "layer." not in name and name != "lm_head.weight":
            continue
        if value.dim() == 2:
            entries: list[Entry | None] = [
                Entry(
                    torch.randn(rank, value.shape[1], generator=draw),
                    torch.randn(rank, value.shape[0], generator=draw) * scale,
                )
                for rank in (1, 3, 2)
            ]
            sites[name] = side_by_side(name, entries)
    return Bank(EXPERTS, sites, vectors)


GATES: dict[str, Callable[[Any, Bank], Gate]] = {
    "given": lambda model, bank: RowGate(),
    "token": lambda model, bank: TokenGate({name: site.a.shape[1] for name, site in bank.sites.items()}),
    "prompt": lambda model, bank: PromptGate(model.config.hidden_size),
    "deep": lambda model, bank: DeepGate(model.config.hidden_size * (model.config.num_hidden_layers + 1)),
    "text": lambda model, bank: TextGate(2),
    "second": lambda model, bank: SecondPassGate(model.config.hidden_size),
}


@pytest.fixture
def dynamic(family: Callable[..., Any]) -> Callable[..., DynamicModel]:
    """``dynamic(gate, name="llama")``: a tiny language model with a bank and a gate, in float32."""

    def make(gate: str, name: str = "llama") -> DynamicModel:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder: Path = family(name).base
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        bank = bank_of(model)
        made = GATES[gate](model, bank)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return DynamicModel(model, tokenizer, bank, made, embed=embed if gate == "text" else None)

    return make


@dataclass(frozen=True)
class Standins:
    """What tests put together themselves."""

    bank_of: Callable[..., Bank]
    gates: dict[str, Callable[[Any, Bank], Gate]]


@pytest.fixture
def standins() -> Standins:
    return Standins(bank_of, GATES)


TARGETS = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")


@dataclass(frozen=True)
class Loras:
    """Adapters over one base, in a folder of their own.

    Args:
        base: model folder, float32.
        adapters: name -> folder.
        experts: the models that they are of.
    """

    base: Path
    adapters: dict[str, Path]
    experts: dict[str, Path]

    def entries(self) -> str:
        """The ``experts`` of a mixture's YAML."""
        lines = [f"  {name}: {{adapter: {path}, base: {self.base}}}" for name, path in self.adapters.items()]
        return "experts:\n" + "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def loras(family: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Loras:
    """Adapters of ranks 2, 4 and 3, some of other layers, over a tiny Llama."""
    made = family("llama", experts=3, dtype="float32")
    base = load_file(made.base / "model.safetensors")
    folder, adapters = tmp_path_factory.mktemp("loras"), {}
    for name, expert, rank, targets in zip(
        EXPERTS, made.experts, (2, 4, 3), (TARGETS, TARGETS[:2], TARGETS), strict=True
    ):
        tuned = load_file(expert / "model.safetensors")
        deltas = {
            key: 6 * (tuned[key] - value) for key, value in base.items() if key.split(".")[-2] in targets
        }
        adapters[name] = folder / name
        save_adapter(adapters[name], deltas, targets=targets, rank=rank)
    return Loras(made.base, adapters, dict(zip(EXPERTS, made.experts, strict=True)))
