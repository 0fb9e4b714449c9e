"""A PEFT LoRA adapter as exact changes of a base checkpoint's tensors; nothing dense is ever written.

Source: Hu et al., LoRA, arXiv:2106.09685; the file format and its meaning are those of PEFT 0.21.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from mixmerge.checkpoint.adapter_config import AdapterConfig, read_config
from mixmerge.checkpoint.adapter_delta import AdapterDelta, Kind, LoadedDelta
from mixmerge.checkpoint.adapter_experts import Pair, module_of, parameters, place, wanted
from mixmerge.checkpoint.adapter_names import (
    EMBEDDINGS,
    HEADS,
    UNNAMED_TIES,
    BaseNames,
    Part,
    Piece,
    layer_of,
    parse,
)
from mixmerge.checkpoint.header import FLOATS, TensorHeader, read_header
from mixmerge.errors import CheckpointError, Fault

__all__ = ["AdapterDelta", "LoadedDelta", "adapter_file", "read_adapter"]

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_CLASSIFIERS = ("classifier", "score", "qa_outputs", "classification_head", "pre_classifier")
_OWN_HEAD = (
    "It brings a head of its own: merge it with PEFT (merge_and_unload, save_pretrained), name that folder"
)
_QUANTISED = (".qweight", ".absmax", ".quant_map", ".weight_packed", ".SCB", ".weight_scale")
# A rank beyond this many times the tensor's longer side is damage, not a choice.
_MOST_RANK = 2


def adapter_file(folder: Path, *, where: str) -> Path:
    """The file that holds an adapter's tensors: safetensors where there is one, as PEFT prefers too.

    Raises:
        CheckpointError: there is none.
    """
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(
        Fault(
            f"{where}: {folder}",
            "it holds no adapter weights",
            f"{' or '.join(WEIGHTS)} is looked for",
            "Finish the download, or save the adapter again with PEFT's save_pretrained",
        )
    )


def read_adapter(folder: Path, base: Mapping[str, TensorHeader], *, where: str) -> dict[str, AdapterDelta]:
    """What an adapter changes, by the name of the tensor; reads the config and headers only.

    Supported: alpha over r, rsLoRA, rank and alpha patterns, Linear, Conv1D and Embedding layers,
    ``lora_bias``, ``bias: all|lora_only``, ``modules_to_save``, DoRA, and expert tensors that
    ``target_parameters`` names. The one name that may not be in ``base`` is a head's: a base that ties its
    head to its embedding has none, and the expert needs one as soon as the adapter changes either of the two.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors`` or ``adapter_model.bin``; the
            latter is opened by torch's weights-only loader.
        base: every tensor of the model the adapter was trained on.
        where: what refers to it (``models[1].model``), for errors.

    Raises:
        CheckpointError: a file is missing or damaged; the config is refused; or tensors are unknown,
            unpaired, of the wrong shape, or without a place in the base. All faults at once.
    """
    config = read_config(folder, where=where)
    path = adapter_file(folder, where=where)
    if path.suffix == ".bin":
        from mixmerge.checkpoint.pickled import read_bin_header

        tensors = read_bin_header(path)
    else:
        tensors = read_header(path)
    reading = _Reading(config, base, f"{where}: {path}")
    reading.sort(tensors)
    deltas = reading.build()
    if reading.blamed:
        raise CheckpointError(reading.faults())
    return deltas


class _Reading:
    """One adapter being fitted to its base; every fault is kept."""

    def __init__(self, config: AdapterConfig, base: Mapping[str, TensorHeader], where: str) -> None:
        self.config = config
        self.base = base
        self.where = where
        self.blamed: dict[tuple[str, str, str], list[str]] = defaultdict(list)
        self.modules: dict[str, dict[Part, TensorHeader]] = defaultdict(dict)
        self.embeddings: set[str] = set()
        self.whole: dict[str, TensorHeader] = {}
        self.deltas: dict[str, AdapterDelta] = {}

    def blame(self, name: str, what: str, allowed: str = "", run: str = "") -> None:
        """Keep a fault of one tensor or module."""
        self.blamed[what, allowed, run].append(name)

    def faults(self) -> Iterable[Fault]:
        """One fault for all that have it: a wrong base or flag would otherwise give hundreds."""
        for (what, allowed, run), names in self.blamed.items():
            listed = sorted(names)
            more = f" and {len(listed) - 4:,} more" if len(listed) > 4 else ""
            yield Fault(self.where, f"{what}: {', '.join(listed[:4])}{more}", allowed, run)

    # -- what the tensors are -----------------------------------------------------------------------------

    def sort(self, tensors: Mapping[str, TensorHeader]) -> None:
        """Put every tensor where it belongs, by name alone."""
        adapters = set()
        for name, tensor in tensors.items():
            piece = parse(name)
            adapters.add(piece.adapter or "")
            if tensor.dtype not in FLOATS:
                self.blame(f"{name} ({tensor.dtype})", "not floating point", _FLOATS)
            elif piece.part == "full" and not self._is_saved(piece):
                self.blame(
                    name,
                    "of no known kind",
                    "Factors, magnitudes, and what bias and modules_to_save list, are known",
                    _MERGE,
                )
            else:
                self._keep(name, piece, tensor)
        if not tensors:
            self.blame("every tensor", "missing", run="Save the adapter again with PEFT's save_pretrained")
        if len(adapters - {""}) > 1:
            for adapter in adapters - {""}:
                self.blame(adapter, "it holds more than one adapter", "One is allowed")

    def _is_saved(self, piece: Piece) -> bool:
        """Whole tensors are saved on request; embeddings and heads also when the vocabulary grew."""
        module = piece.module.rpartition(".")[0].rpartition(".")[2]
        return self.config.saves(piece.module) or piece.wrapped or module in (*EMBEDDINGS, *HEADS)

    def _keep(self, name: str, piece: Piece, tensor: TensorHeader) -> None:
        if piece.embedding:
            self.embeddings.add(piece.module)
        if piece.part == "full":
            taken = piece.module in self.whole
            self.whole[piece.module] = tensor
        else:
            taken = piece.part in self.modules[piece.module]
            self.modules[piece.module][piece.part] = tensor
        if taken:
            self.blame(name, "there twice, under names that mean the same", run="Keep one of them")

    # -- what they change ---------------------------------------------------------------------------------

    def build(self) -> dict[str, AdapterDelta]:
        """Every change, checked against the base."""
        asked = [*self.whole, *(f"{module}.weight" for module in self.modules)]
        for module in {module_of(module) for module in self.modules}:
            asked += wanted(module, self.config)
        self.names = BaseNames(self.base, asked)
        stacked: dict[str, list[Pair]] = defaultdict(list)
        for module, parts in self.modules.items():
            if self._complete(module, parts):
                inner = module_of(module)
                target = self._find(f"{module}.weight")
                if target is None and parameters(inner, self.config):
                    stacked[inner].append(Pair(module, parts["a"], parts["b"]))
                elif target is None:
                    self._lose(f"{module}.weight")
                else:
                    self._low_rank(module, parts, *target)
        for module, pairs in stacked.items():
            self._experts(module, pairs)
        for name, tensor in self.whole.items():
            self._replace(name, tensor)
        self._untie()
        return self.deltas

    def _find(self, name: str) -> tuple[str, TensorHeader] | None:
        """(name in the expert, the base's tensor); the names differ for a tied head."""
        if found := self.names.find(name):
            return found, self.base[found]
        tied = self.names.tied(name)
        return (name, self.base[tied]) if tied else None

    def _complete(self, module: str, parts: Mapping[Part, TensorHeader]) -> bool:
        sound = "a" in parts and "b" in parts
        if not sound:
            missing = "lora_A" if "a" not in parts else "lora_B"
            self.blame(module, f"no {missing}", run="Save the adapter again: the file is not complete")
        config = self.config
        for there, wants, name, switch in (
            ("magnitude" in parts, config.use_dora, "DoRA magnitude", "use_dora"),
            ("b_bias" in parts, config.lora_bias, "bias of lora_B", "lora_bias"),
        ):
            if there != wants:
                has, setting = ("a", "false") if there else ("no", "true")
                self.blame(module, f"{has} {name}", f"{switch} is {setting} in adapter_config.json")
                sound = False
        return sound

    def _low_rank(
        self, module: str, parts: Mapping[Part, TensorHeader], target: str, weight: TensorHeader
    ) -> None:
        a, b, magnitude = parts["a"], parts["b"], parts.get("magnitude")
        if not self._plain(module, a, b, weight):
            return
        transposed = self._transposed(module, a, b, weight)
        if transposed is None:
            sizes = f"{b.shape[0]:,} x {a.shape[1]:,}, the base {_shape(weight)}"
            self.blame(f"{module} ({sizes})", "of another shape than the base", run=_OTHER_BASE)
        elif magnitude is not None and magnitude.elements != b.shape[0]:
            self.blame(f"{module} ({_shape(magnitude)})", "a DoRA magnitude of another length than lora_B")
        else:
            kind: Kind = "lowrank" if magnitude is None else "dora"
            scale = self.config.scale(self._key(module))
            self._add(AdapterDelta(target, kind, weight, scale, a, b, magnitude, transposed=transposed))
            if "b_bias" in parts:
                self._add_bias(module, parts["b_bias"], scale)

    def _key(self, module: str) -> str:
        """What patterns are matched with: the module, or the parameter where that was targeted."""
        parameter = f"{module}.weight"
        return parameter if parameter in parameters(module, self.config) else module

    def _plain(self, module: str, a: TensorHeader, b: TensorHeader, weight: TensorHeader) -> bool:
        rank = self.config.rank(self._key(module))
        sizes = f"{module} (lora_A {_shape(a)}, lora_B {_shape(b)})"
        if len(a.shape) != 2 or len(b.shape) != 2:
            self.blame(sizes, "factors that are not matrices", "LoRA on convolutions is not read", _MERGE)
        elif not a.shape[0] == b.shape[1] == rank:
            said = f"r and rank_pattern in adapter_config.json say {rank:,}"
            self.blame(sizes, "factors of another rank", said)
        elif rank > _MOST_RANK * max(a.shape[1], b.shape[0]):
            self.blame(sizes, "an absurd rank", f"At most {_MOST_RANK} x the longer side is allowed")
        else:
            return self._is_float(weight)
        return False

    def _is_float(self, weight: TensorHeader) -> bool:
        if weight.dtype in FLOATS:
            return True
        self.blame(
            f"{weight.name} ({weight.dtype})",
            "quantised in the base",
            _FLOATS,
            "Name the model it was quantised from, or dequantise it first",
        )
        return False

    def _transposed(self, module: str, a: TensorHeader, b: TensorHeader, weight: TensorHeader) -> bool | None:
        """Whether the base stores (B @ A) transposed; None where neither way fits."""
        plain = weight.shape == (b.shape[0], a.shape[1])
        turned = weight.shape == (a.shape[1], b.shape[0])
        if module in self.embeddings:
            return True if turned else None
        if plain and turned:
            return self._square_is_transposed(weight)
        return turned if plain or turned else None

    def _square_is_transposed(self, weight: TensorHeader) -> bool:
        """Conv1D always has a bias, of as many values as outputs: the layer's oblong matrices tell."""
        stem = weight.name.removesuffix("weight")
        if f"{stem}bias" not in self.base:
            return False
        votes = self._orientation[layer_of(weight.name)]
        return votes > 0 if votes else self.config.fan_in_fan_out

    @cached_property
    def _orientation(self) -> Counter[str]:
        """For each layer: its oblong matrices stored as (inputs, outputs), less those the other way round."""
        votes: Counter[str] = Counter()
        for name, tensor in self.base.items():
            bias = self.base.get(f"{name.removesuffix('weight')}bias")
            if bias is not None and len(tensor.shape) == 2 and tensor.shape[0] != tensor.shape[1]:
                votes[layer_of(name)] += bias.shape == tensor.shape[1:]
                votes[layer_of(name)] -= bias.shape == tensor.shape[:1]
        return votes

    def _add_bias(self, module: str, vector: TensorHeader, scale: float) -> None:
        name = self.names.find(f"{module}.bias")
        if name is None:
            self.blame(module, "a bias on lora_B, but none on the base's module", run=_OTHER_BASE)
        elif self.base[name].shape != vector.shape:
            sizes = f"{_shape(vector)}, the base {_shape(self.base[name])}"
            self.blame(f"{name} ({sizes})", "of another shape than the base", run=_OTHER_BASE)
        elif self._is_float(self.base[name]):
            self._add(AdapterDelta(name, "bias", self.base[name], scale, b=vector))

    def _experts(self, module: str, pairs: list[Pair]) -> None:
        def find(name: str) -> TensorHeader | None:
            found = self.names.find(name)
            return self.base[found] if found and self.base[found].dtype in FLOATS else None

        deltas, lost = place(module, pairs, config=self.config, find=find)
        for delta in deltas:
            self._add(delta)
        for pair, why in lost:
            self.blame(pair.name, why, run=_MERGE)

    def _replace(self, name: str, tensor: TensorHeader) -> None:
        target = self._find(name)
        if target is None:
            self._lose(name)
            return
        known, weight = target
        if tensor.shape != weight.shape:
            grown = tensor.shape[1:] == weight.shape[1:] and len(tensor.shape) == 2
            hint = "The adapter was trained with a resized vocabulary: resize the base the same way first"
            sizes = f"{_shape(tensor)}, the base {_shape(weight)}"
            run = _OWN_HEAD if self._is_own_head(name) else hint if grown else _OTHER_BASE
            self.blame(f"{name} ({sizes})", "of another shape than the base", run=run)
        elif not self._is_float(weight):
            return
        elif known in self.deltas:
            self.deltas[known] = replace(self.deltas[known], full=tensor)
        else:
            self._add(AdapterDelta(known, "replace", weight, full=tensor))

    def _untie(self) -> None:
        """Where the base ties its head to its embedding, PEFT trains one of them and leaves the other."""
        head = next((target for target in self.deltas if target not in self.base), None)
        embedding = next((target for target in self.deltas if self.names.is_embedding(target)), None)
        if embedding is None or self.names.has_head or not self.config.predicts_tokens:
            return
        if embedding.endswith(UNNAMED_TIES):
            self.blame(
                embedding,
                "changed, but the base uses it under other names too, which it does not store",
                "PEFT changes one of the uses only",
                "Save the base with tie_word_embeddings=False and train on that, or leave this module out",
            )
        elif self.config.ensure_weight_tying:
            if head is not None:  # PEFT keeps the two equal, so the head goes on to follow the embedding
                del self.deltas[head]
        elif head is None:
            self._add(AdapterDelta(f"{HEADS[0]}.weight", "same", self.base[embedding]))

    def _add(self, delta: AdapterDelta) -> None:
        if delta.target in self.deltas:
            self.blame(delta.target, "changed by two modules of the adapter", run=_OTHER_BASE)
        self.deltas[delta.target] = delta

    def _is_own_head(self, name: str) -> bool:
        """Whether a whole tensor is of a head that was made when the adapter was trained, such as a classifier's."""
        return name in self.whole and name.split(".", 1)[0] in _CLASSIFIERS

    def _lose(self, name: str) -> None:
        quantised = any(known.endswith(_QUANTISED) for known in self.base)
        why = "The base is quantised: name the model it was quantised from" if quantised else _OTHER_BASE
        if self._is_own_head(name):
            why = _OWN_HEAD
        self.blame(name, "not in the base", run=why)


_FLOATS = f"Known: {', '.join(FLOATS)}"
_OTHER_BASE = "Name the model the adapter was trained on (base_model_name_or_path in its adapter_config.json)"
_MERGE = "Merge the adapter with PEFT (merge_and_unload, save_pretrained) and name that folder as the model"


def _shape(tensor: TensorHeader) -> str:
    return " x ".join(f"{size:,}" for size in tensor.shape) or "a single value"
