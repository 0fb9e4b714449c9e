"""Which layer of a model each tensor of its checkpoint belongs to; the model has no values for that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from mixmerge.bank.attach import places
from mixmerge.experts.loading import outline

Place = Literal["linear", "turned", "embedding", "vector", "other"]


@dataclass(frozen=True)
class Layout:
    """Where the tensors of a checkpoint are in its model.

    Args:
        places: name of a tensor -> the weight of a linear map, stored as (outputs, inputs) or ``turned``; a table that
            tokens are looked up in; a bias or gain; or what a bank has no place for. Names that the model lacks are
            not there.
        modules: name of a tensor -> path of its layer in the model.
        table: name of the table that the head is tied to; empty if it is not.
        head: name the head's tensor has, or would have; empty for a model without one.
        shared: layers that use the tied table beside the model's own embedding and head.
    """

    places: Mapping[str, Place]
    modules: Mapping[str, str]
    table: str = ""
    head: str = ""
    shared: tuple[str, ...] = ()


def layout_of(folder: Path, names: Iterable[str]) -> Layout:
    """The layout of a model folder.

    Args:
        folder: with a config.
        names: of the tensors to place: the checkpoint's, and others of a bank's.

    Raises:
        MixmergeError: transformers does not know such a model.
    """
    model = outline(folder, str(folder))
    paths = {id(module): path for path, module in model.named_modules()}
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and table is not None and head.weight is table.weight
    found = places(model, dict.fromkeys(names))
    tables = [name for name, (module, _) in found.items() if module is table]
    users = [
        paths[id(module)]
        for module in model.modules()
        if tied and getattr(module, "weight", None) is table.weight and module not in (table, head)
    ]
    return Layout(
        {name: _place(module, attribute) for name, (module, attribute) in found.items()},
        {name: paths[id(module)] for name, (module, _) in found.items()},
        tables[0] if tied and tables else "",
        "" if head is None else f"{paths[id(head)]}.weight",
        tuple(users),
    )


def _place(module: nn.Module, attribute: str) -> Place:
    from transformers.pytorch_utils import Conv1D

    value: Tensor = getattr(module, attribute)
    if value.dim() == 1 and attribute in ("weight", "bias"):
        return "vector"
    if attribute != "weight" or value.dim() != 2:
        return "other"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, Conv1D):
        return "turned"
    return "linear" if isinstance(module, nn.Linear) else "other"
