"""A fixed mixture as one PEFT adapter, for PEFT or for vLLM. Legend as in ``records``."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from mixmerge import __version__
from mixmerge.bank.factors import scaled
from mixmerge.bank.fixed import Placed, Weights, mixture_of, placed
from mixmerge.bank.mix import How
from mixmerge.bank.publishing import making
from mixmerge.bank.records import Bank, Entry
from mixmerge.checkpoint.adapter_config import CONFIG
from mixmerge.checkpoint.adapter_delta import read_values
from mixmerge.checkpoint.used_rows import MANIFEST, inherited
from mixmerge.errors import Fault, MixmergeError
from mixmerge.experts.loading import kind_of

WEIGHTS = "adapter_model.safetensors"
Runner = Literal["peft", "vllm"]
MOST_OF_VLLM = 512
_PREFIX = "base_model.model."
_CHECKPOINT = "Export a checkpoint instead (export_checkpoint)"


def export_adapter(
    bank: Bank,
    weights: Weights,
    out: str | Path,
    *,
    base: str | Path,
    base_name: str | None = None,
    how: How = "outputs",
    runner: Runner = "peft",
    network: Path | None = None,
    overwrite: bool = False,
) -> int:
    """Write ``sum_e w_e delta_e`` as a LoRA adapter of the base, exact: ranks side by side, never A and B apart.

    All scales are in ``lora_B``, and alpha equals the rank everywhere, so the factor PEFT applies is 1. Embeddings are
    ``lora_embedding``; the head of a tied table gets its factors too; biases are saved by ``bias: all`` and norms by
    ``modules_to_save``. For ``vllm`` all modules get one rank, filled up with zeros.

    Source: Hu et al., LoRA, arXiv:2106.09685; the file format is that of PEFT 0.21.

    Args:
        bank: of experts over ``base``.
        weights: ``(E,)``, or by name, 0 for those not named.
        out: folder; appears when it is whole.
        base: the folder the bank was made for.
        base_name: what the adapter calls its base; by default that folder.
        how: as in ``Mix``.
        network: the folder that the bank is of, whose manifest names the rows its gate and experts have seen. What is
            known of them, and of the base, is written beside the adapter.
        runner: who is to load it. vLLM's LoRA has linear layers alone, and 512 ranks at most.
        overwrite: an adapter that is there is replaced.

    Returns:
        its largest rank: of vLLM, ``max_lora_rank`` has to be that or more.

    Raises:
        CheckpointError: the base cannot be read.
        MixmergeError: a bank of another base; nothing changes; what vLLM cannot load, by name. All faults at once.
        OutputError: it exists, or cannot be written.
    """
    made = placed(base, mixture_of(bank, weights, how=how))
    modules = _modules(made)
    faults = _vllm_faults(made, modules) if runner == "vllm" else []
    if not modules:
        what = "changes no matrix, so there are no factors to write"
        faults.append(Fault("weights", what, "A mixture that changes something", _CHECKPOINT))
    if faults:
        raise MixmergeError(faults)
    most = max(one.rank for one in modules.values())
    if runner == "vllm":
        modules = {path: one.filled(most) for path, one in modules.items()}
    tensors = {
        f"{_PREFIX}{path}.{name}": value for path, one in modules.items() for name, value in one.files()
    }
    saved, norms, biases = _vectors(made, modules)
    tensors |= saved
    config = _config(made, modules, base_name or str(base), norms, biases)
    with making(Path(out), overwrite=overwrite, of=[CONFIG], inputs=[made.base.path]) as new:
        save_file(tensors, new / WEIGHTS, metadata={"format": "pt"})
        (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        facts = {"mixmerge": __version__, **inherited(lineage(made, network))}
        (new / MANIFEST).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return most


def lineage(made: Placed, network: Path | None) -> list[Path]:
    """The folders whose manifests tell which rows a mixture has seen."""
    return list(dict.fromkeys([made.base.path, *([] if network is None else [network])]))


@dataclass(frozen=True)
class _Module:
    """The factors of one layer.

    Args:
        a: ``(r, d)``; of a table ``(r, V)``.
        b: ``(o, r)``, every scale in it.
        table: of an embedding.
        turned: of a Conv1D.
    """

    a: Tensor
    b: Tensor
    table: bool
    turned: bool

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    def filled(self, rank: int) -> _Module:
        """The same with as many ranks of zeros as are missing."""
        missing = rank - self.rank
        a, b = (
            torch.nn.functional.pad(*one) for one in ((self.a, (0, 0, 0, missing)), (self.b, (0, missing)))
        )
        return _Module(a.contiguous(), b.contiguous(), self.table, self.turned)

    def files(self) -> list[tuple[str, Tensor]]:
        """Names behind the layer's, and tensors."""
        if self.table:
            return [("lora_embedding_A", self.a), ("lora_embedding_B", self.b)]
        return [("lora_A.weight", self.a), ("lora_B.weight", self.b)]


def _modules(made: Placed) -> dict[str, _Module]:
    layout = made.layout
    found = {
        layout.modules[name]: _module(one, turned=layout.places[name] == "turned")
        for name, one in made.entries.items()
    }
    if made.head is not None:
        found[layout.head.removesuffix(".weight")] = _module(made.head, turned=False)
    return found


def _module(entry: Entry, *, turned: bool) -> _Module:
    one = scaled(entry)
    b = (one.b.float() * torch.as_tensor(one.scale)[:, None]).T
    table = one.kind == "embedding"
    a = (one.a.T if table else one.a).float()
    return _Module(a.contiguous().clone(), b.contiguous().clone(), table, turned)


def _vectors(made: Placed, modules: Mapping[str, _Module]) -> tuple[dict[str, Tensor], list[str], bool]:
    """Tensors to save whole, the norms among their layers, and whether there are biases of other layers."""
    layout = made.layout
    gains = {
        layout.modules[name]
        for name, place in layout.places.items()
        if place == "vector" and not _is_bias(name)
    }
    norms = sorted({layout.modules[name] for name in made.vectors} & gains)
    tensors: dict[str, Tensor] = {}
    biases = False
    for name, header in made.base.tensors.items():
        path = layout.modules.get(name, "")
        if name not in made.vectors and path not in norms:
            continue
        value = torch.from_numpy(read_values(header))
        if name in made.vectors:
            value = value + made.vectors[name].float()
        leaf = name.rpartition(".")[2]
        inner = "base_layer." if path in modules else ""
        biases = biases or path not in norms
        tensors[f"{_PREFIX}{path}.{inner}{leaf}"] = value
    return tensors, norms, biases


def _is_bias(name: str) -> bool:
    return name.endswith(".bias")


def _config(
    made: Placed, modules: Mapping[str, _Module], base_name: str, norms: list[str], biases: bool
) -> dict[str, Any]:
    ranks = Counter(one.rank for one in modules.values())
    usual = max(ranks, key=lambda rank: (ranks[rank], -rank))
    # ``^``: PEFT lets a pattern match the end of a name too.
    others = {f"^{re.escape(path)}": one.rank for path, one in modules.items() if one.rank != usual}
    named = made.base.config.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else ""
    causal = kind_of(architecture) == "causal"
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal else None,
        "auto_mapping": None
        if causal
        else {"base_model_class": architecture, "parent_library": "transformers"},
        "base_model_name_or_path": base_name,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "target_modules": sorted(modules),
        "modules_to_save": norms or None,
        "bias": "all" if biases else "none",
        "fan_in_fan_out": any(one.turned for one in modules.values()),
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _vllm_faults(made: Placed, modules: Mapping[str, _Module]) -> list[Fault]:
    refused: dict[str, list[str]] = defaultdict(list)
    for path, one in modules.items():
        if one.table or f"{path}.weight" == made.layout.head:
            refused["vLLM's LoRA has no tables or heads"].append(path)
        elif one.turned:
            refused["vLLM's LoRA has no Conv1D"].append(path)
        elif one.rank > MOST_OF_VLLM:
            refused[f"vLLM's LoRA has {MOST_OF_VLLM} ranks at most"].append(f"{path} ({one.rank})")
    for name in made.vectors:
        refused["vLLM's LoRA has no biases or norms"].append(name)
    faults = []
    for why, names in refused.items():
        more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
        faults.append(Fault("vllm", f"{', '.join(names[:3])}{more}: {why}", "Linear layers", _CHECKPOINT))
    return faults
