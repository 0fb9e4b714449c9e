"""Where the states of a causal language model of transformers are read and added to, whatever its family."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from mixmerge.engines.decoding import accepted
from mixmerge.errors import Fault, MixmergeError
from mixmerge.latent.records import Shape

Place = int | Literal["last"]


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The decoder of a model.

    Args:
        trunk: what gives the last states of a text, below the head; called as the model is.
        layers: its layers, in order.
        width: d, of what passes between them.
        final: width of the last state.
    """

    trunk: nn.Module
    layers: nn.ModuleList
    width: int
    final: int

    @classmethod
    def of(cls, model: Any, *, name: str = "") -> Anatomy:
        """By shape: the longest list of modules in the decoder whose members take hidden states, in no other such list.

        Args:
            model: of transformers.
            name: for messages.

        Raises:
            MixmergeError: there is none, or no trunk below a head.
        """
        # Not ``base_model``: OPT's head asks the decoder inside it.
        trunk = model.get_decoder()
        if trunk is model:  # Llama 4 says so of itself
            trunk = next((one for one in model.children() if hasattr(one, "config") and _lists(one)), model)
        lists = _lists(trunk)
        if not lists or trunk is model:
            what = f"{type(model).__name__} has no list of layers that hand on hidden states"
            allowed = "A decoder of transformers with a language modelling head"
            raise MixmergeError(Fault(f"expert {name}" if name else "expert", what, allowed))
        layers = max(lists, key=len)
        width = int(model.config.get_text_config().hidden_size)
        head = model.get_output_embeddings()
        return cls(trunk, layers, width, width if head is None else int(head.weight.shape[1]))


def shape_of(model: Any, *, name: str, hash: str) -> Shape:
    """What the glue must know of a model.

    Args:
        model: of transformers.
        name: of the expert.
        hash: of the expert.

    Raises:
        MixmergeError: it is no decoder, or keeps no keys and values, without which no engine answers or reads along.
    """
    found = Anatomy.of(model, name=name)
    if "past_key_values" not in accepted(model):
        what = f"{model.config.model_type} keeps no keys and values"
        raise MixmergeError(Fault(f"expert {name}", what, "A transformer decoder"))
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    final = 0 if found.final == found.width else found.final
    return Shape(name, found.width, len(found.layers), hash, vocabulary, final)


@contextmanager
def reading(model: Any, depths: Collection[Place]) -> Iterator[dict[Place, Tensor]]:
    """Within it, each forward leaves its states at these depths in the dict, ``(B, T, d)``.

    Args:
        model: of transformers, or its ``Anatomy``.
        depths: as ``Level.peer``, of layers that it has.
    """
    anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
    found: dict[Place, Tensor] = {}
    with ExitStack() as stack:
        for depth in dict.fromkeys(depths):
            _hook(stack, anatomy, depth, _keeping(found, depth))
        yield found


@contextmanager
def writing(model: Any, changes: Mapping[int, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Within it, the states at these depths are replaced by what the functions make of them.

    Args:
        model: of transformers, or its ``Anatomy``; its weights are not touched.
        changes: depth -> function of ``(B, T, d)``.
    """
    anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
    with ExitStack() as stack:
        for depth, change in changes.items():
            _hook(stack, anatomy, depth, change)
        yield


def _lists(trunk: nn.Module) -> list[nn.ModuleList]:
    """Lists of layers; a layer's own, such as its experts, are left out."""
    found: dict[str, nn.ModuleList] = {}
    for name, one in trunk.named_modules():  # what is outside comes first
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(one, nn.ModuleList) and not inside and _layered(one):
            found[name] = one
    return list(found.values())


def _layered(modules: nn.ModuleList) -> bool:
    return len(modules) > 0 and all(
        next(iter(inspect.signature(one.forward).parameters), "") == "hidden_states" for one in modules
    )


def _keeping(found: dict[Place, Tensor], depth: Place) -> Callable[[Tensor], Tensor | None]:
    def keep(states: Tensor) -> None:
        found[depth] = states

    return keep


def _hook(
    stack: ExitStack, anatomy: Anatomy, depth: Place, change: Callable[[Tensor], Tensor | None]
) -> None:
    """``change`` gets the states there, and what it returns, if anything, takes their place."""

    def before(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        if args:
            new = change(args[0])
            return None if new is None else ((new, *args[1:]), given)
        new = change(given["hidden_states"])
        return None if new is None else (args, {**given, "hidden_states": new})

    def after(module: nn.Module, args: Any, out: Any) -> Any:
        if isinstance(out, Tensor):
            return change(out)
        new = change(out[0])  # of a tuple the states, of a trunk's output the last ones
        return None if new is None else (new, *out[1:])

    if depth == 0:
        handle = anatomy.layers[0].register_forward_pre_hook(before, with_kwargs=True)
    elif depth == "last":
        handle = anatomy.trunk.register_forward_hook(after)
    else:
        handle = anatomy.layers[depth - 1].register_forward_hook(after)
    stack.callback(handle.remove)
