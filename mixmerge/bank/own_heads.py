"""One trunk with the heads of several experts at once: every row of a batch goes through its own expert's.

Legend: B rows, E experts, C classes of the expert that has most.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from mixmerge.errors import Fault, MixmergeError
from mixmerge.experts.loading import HEAD_WEIGHTS, HEADS, LoadedExpert, load_with_head


class OwnHead(nn.Module):
    """A layer that is another one for rows of another expert.

    Args:
        each: of every expert, alike but for the number of outputs.
    """

    def __init__(self, each: Sequence[nn.Module]) -> None:
        super().__init__()
        self.each = nn.ModuleList(each)
        self.owners: Sequence[int] = ()

    def forward(self, x: Tensor) -> Tensor:
        """``(B, .., h)`` to ``(B, .., C)``: minus infinity for classes that a row's expert has not."""
        owners = torch.tensor(self.owners, device=x.device)
        places, parts = [], []
        for expert in sorted(set(self.owners)):
            at = (owners == expert).nonzero()[:, 0]
            places.append(at)
            parts.append(self.each[expert](x[at]))
        widest = max(part.shape[-1] for part in parts)
        padded = [
            nn.functional.pad(part, (0, widest - part.shape[-1]), value=float("-inf")) for part in parts
        ]
        return torch.cat(padded)[torch.cat(places).argsort()]


class Headed:
    """A merged trunk under the heads of all its experts.

    Args:
        expert: the trunk with the first expert's head, whose layers are replaced.
        layers: those layers; none where all experts answer through the same.
    """

    def __init__(self, expert: LoadedExpert, layers: Sequence[OwnHead] = ()) -> None:
        self.expert, self.layers = expert, tuple(layers)

    @classmethod
    def load(
        cls,
        folder: Path,
        heads: Sequence[str],
        *,
        device: str = "cpu",
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> Headed:
        """The trunk of a merged folder, and the heads that it keeps.

        Args:
            folder: as ``mixmerge merge`` writes it.
            heads: names in its ``heads/``, in the order of the experts.
            device: a torch device.
            dtype: of the weights in memory.

        Raises:
            MixmergeError: no such head; heads of different layers.
        """
        from safetensors.torch import load_file

        expert = load_with_head(folder, heads[0], device=device, dtype=dtype)
        stored = [load_file(folder / HEADS / name / HEAD_WEIGHTS) for name in heads]
        for name, tensors in zip(heads, stored, strict=True):
            if tensors.keys() != stored[0].keys():
                what = f"the head {name!r} has other layers than {heads[0]!r}, so no batch goes through both"
                raise MixmergeError(Fault(str(folder), what, "Experts of one class of transformers"))
        layers = []
        for path in dict.fromkeys(name.rpartition(".")[0] for name in stored[0]):
            own = OwnHead([_with(expert.model.get_submodule(path), path, tensors) for tensors in stored])
            expert.model.set_submodule(path, own)
            layers.append(own)
        return cls(expert, layers)

    def of(self, owners: Sequence[int]) -> LoadedExpert:
        """The model for a batch whose rows are of these experts."""
        for layer in self.layers:
            layer.owners = tuple(owners)
        return self.expert


def _with(module: nn.Module, path: str, tensors: dict[str, Tensor]) -> nn.Module:
    """The same layer with the values of a head's file."""
    made = copy.deepcopy(module)
    for name, value in module.named_parameters(recurse=False):
        stored = tensors.get(f"{path}.{name}")
        if stored is not None:
            made.register_parameter(name, nn.Parameter(stored.to(value), requires_grad=False))
    return made
