"""LoRA on the experts of a mixture-of-experts layer, which PEFT targets by ``target_parameters``.

The adapter's names say the module only (``mlp.experts``, and ``mlp.experts.base_layer`` for its second
parameter), so which parameter a pair of factors belongs to is read off the shapes. The base may store one
whole, ``(experts, outputs, inputs)`` or ``(experts, inputs, outputs)``, or as matrices of single experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from mixmerge.checkpoint.adapter_config import AdapterConfig
from mixmerge.checkpoint.adapter_delta import AdapterDelta
from mixmerge.checkpoint.header import TensorHeader

# A fused parameter of transformers 5 -> the modules of one expert in a checkpoint, stacked along the outputs.
_PARTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}


@dataclass(frozen=True)
class Pair:
    """The factors of one adapted parameter, as named in the adapter."""

    name: str
    a: TensorHeader
    b: TensorHeader


@dataclass(frozen=True)
class _Home:
    """One way to lay a parameter out: the base's tensors, each with its slot of the stacked factors."""

    parameter: str
    experts: int
    outputs: int
    inputs: int
    transposed: bool
    tensors: tuple[tuple[TensorHeader, tuple[int, int, int] | None], ...]


def module_of(name: str) -> str:
    """``mlp.experts.base_layer`` -> ``mlp.experts``: each further parameter of a module nests one deeper."""
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return name


def parameters(module: str, config: AdapterConfig) -> list[str]:
    """The names of the parameters of this module that may have been targeted."""
    leaves = {target.rpartition(".")[2] for target in config.target_parameters}
    named = [f"{module}.{leaf}" for leaf in sorted(leaves)]
    return [
        name
        for name in named
        if any(name == target or name.endswith(f".{target}") for target in config.target_parameters)
    ]


def wanted(module: str, config: AdapterConfig) -> Iterable[str]:
    """Every base tensor name that could be asked for, for the first expert: enough to settle the prefixes."""
    for parameter in parameters(module, config):
        yield parameter
        for parts in _PARTS.get(parameter.rpartition(".")[2], ()):
            yield from (f"{module}.0.{part}.weight" for part in parts)


def _whole(parameter: str, tensor: TensorHeader) -> list[_Home]:
    if len(tensor.shape) == 2:
        return [_Home(parameter, 1, *tensor.shape, False, ((tensor, None),))]
    if len(tensor.shape) != 3:
        return []
    experts, first, second = tensor.shape
    return [
        _Home(parameter, experts, first, second, False, ((tensor, None),)),
        _Home(parameter, experts, second, first, True, ((tensor, None),)),
    ]


def _split(module: str, parameter: str, find: Callable[[str], TensorHeader | None]) -> list[_Home]:
    homes = []
    for parts in _PARTS.get(parameter.rpartition(".")[2], ()):
        tensors: list[tuple[TensorHeader, tuple[int, int, int] | None]] = []
        outputs, inputs, expert = 0, 0, 0
        while (first := find(f"{module}.{expert}.{parts[0]}.weight")) is not None:
            outputs, inputs = 0, first.shape[-1]
            for part in parts:
                tensor = find(f"{module}.{expert}.{part}.weight")
                if tensor is None or len(tensor.shape) != 2 or tensor.shape[1] != inputs:
                    return []
                tensors.append((tensor, (expert, outputs, outputs + tensor.shape[0])))
                outputs += tensor.shape[0]
            expert += 1
        if expert:
            homes.append(_Home(parameter, expert, outputs, inputs, False, tuple(tensors)))
    return homes


def place(
    module: str,
    pairs: Iterable[Pair],
    *,
    config: AdapterConfig,
    find: Callable[[str], TensorHeader | None],
) -> tuple[list[AdapterDelta], list[tuple[Pair, str]]]:
    """The deltas of one module's expert tensors.

    Args:
        module: as PEFT names it.
        pairs: every pair of factors of the module.
        find: the base's tensor for an adapter's name.

    Returns:
        the deltas, and the pairs that have no place with the reason.
    """
    homes: list[_Home] = []
    for parameter in parameters(module, config):
        tensor = find(parameter)
        homes += _whole(parameter, tensor) if tensor is not None else _split(module, parameter, find)
    fits = {pair.name: [home for home in homes if _fits(pair, home, config)] for pair in pairs}
    deltas: list[AdapterDelta] = []
    lost: list[tuple[Pair, str]] = []
    taken: Mapping[str, list[str]] = {
        home.parameter: [name for name, found in fits.items() if home in found] for home in homes
    }
    for pair in pairs:
        found = fits[pair.name]
        if not found:
            lost.append((pair, "shapes that fit no parameter of the base that target_parameters names"))
        elif len(found) > 1 or len(taken[found[0].parameter]) > 1:
            lost.append((pair, "shapes that do not tell which parameter is changed, or which way round"))
        else:
            deltas += _deltas(pair, found[0], config)
    return deltas, lost


def _fits(pair: Pair, home: _Home, config: AdapterConfig) -> bool:
    stacked = home.experts * config.rank(home.parameter)
    return pair.a.shape == (stacked, home.inputs) and pair.b.shape == (home.outputs, stacked)


def _deltas(pair: Pair, home: _Home, config: AdapterConfig) -> Iterable[AdapterDelta]:
    for tensor, slot in home.tensors:
        yield AdapterDelta(
            target=tensor.name,
            kind="lowrank",
            weight=tensor,
            scale=config.scale(home.parameter),
            a=pair.a,
            b=pair.b,
            transposed=home.transposed,
            experts=home.experts,
            slot=slot,
        )
