"""Floating-point operations that a token costs, from config and headers: nothing is loaded or run.

``2 P + 2 L n H (d_k + d_v)``: a multiplication and an addition for each of the P parameters that a token is multiplied
with, and for each of the n places before it in the L layers with attention, of H heads with keys of d_k and values of
d_v numbers. Norms and biases count as the rest does, softmax and activation functions do not.

Source: Scaling Laws for Neural Language Models (arXiv:2001.08361), table 1 and section 2.1, which leaves out the head
over the vocabulary; here it counts, tied or not. Tables that are only looked up do not. Of the experts of an MoE layer
those count that a token is sent to. Of an adapter beside its base, both count; of a
network with a gate, the factors of all experts, but not the gate.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixmerge.checkpoint.header import TensorHeader, read_header
from mixmerge.checkpoint.reader import read_json
from mixmerge.errors import MixmergeError
from mixmerge.methods.roles import role_of

CONTEXT = 1024  # n
_HEAD = re.compile(
    r"(.*\.)?(lm_head|embed_out|output_embeddings|vocab_projector|predictions\.decoder|lm_head\.decoder)\.weight"
)
_WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration")
_NO_TEXT = re.compile(r"(.*\.)?(vision_tower|vision_model|visual|audio_tower|multi_modal_projector)\..*")
_EXPERT = re.compile(r"(.*\.)?experts\..*")
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = (
    *("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_k", "moe_top_k"),
    *("num_selected_experts", "top_k_experts"),
)


def flops_per_token(folder: Path, beside: Path | None = None, *, context: int = CONTEXT) -> float:
    """Operations of one token behind ``context`` others; NaN where config and headers do not tell.

    That is so of models with an encoder and a decoder, whose tokens pass one of the two, of MoE models whose config
    does not say how many experts a token is sent to, and of weights that are no safetensors.

    Args:
        folder: of the model.
        beside: of an adapter that is run beside it, or of a bank, all of whose factors are.
        context: n, 0 or more; in layers with a window at most that.
    """
    try:
        config, tensors = read_json(folder / "config.json"), _headers(folder)
        added = {} if beside is None else _headers(beside)
    except (MixmergeError, OSError):
        return math.nan
    inner = config.get("text_config")
    text = inner if isinstance(inner, Mapping) else config
    if not tensors or config.get("is_encoder_decoder") is True:
        return math.nan
    low_rank = sum(header.elements for name, header in added.items() if _is_factor(name, header))
    active = _active(tensors, config, text)
    return 2 * (active + low_rank) + _attention(text, context)


def _is_factor(name: str, header: TensorHeader) -> bool:
    """Of an adapter (``lora_A``) or a bank (``a/SITE``); those of tables are looked up."""
    side, _, site = name.partition("/")
    of_bank = side in ("a", "b") and role_of(site, header.shape) != "table"
    return of_bank or ".lora_A." in name or ".lora_B." in name


def _headers(folder: Path) -> dict[str, TensorHeader]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: header for file in files for name, header in read_header(file).items()}


def _active(tensors: Mapping[str, TensorHeader], config: Mapping[str, Any], text: Mapping[str, Any]) -> float:
    """Parameters that a token is multiplied with."""
    every, chosen = _first(text, _COUNTS), _first(text, _CHOSEN)
    total, has_head = 0.0, False
    for name, header in tensors.items():
        if _NO_TEXT.fullmatch(name):
            continue
        if _HEAD.fullmatch(name):
            has_head = True
        elif role_of(name, header.shape) == "table":
            continue
        expert = _EXPERT.fullmatch(name) or (len(header.shape) == 3 and every and header.shape[0] == every)
        total += (
            header.elements * (chosen / every if every and chosen else math.nan)
            if expert
            else header.elements
        )
    kinds = config.get("architectures") or [""]
    if not has_head and str(kinds[0]).endswith(_WITH_HEAD):
        total += _first(text, ("vocab_size",)) * _first(text, ("hidden_size", "n_embd", "d_model"))
    return total


def _attention(text: Mapping[str, Any], context: int) -> float:
    heads = _first(text, ("num_attention_heads", "n_head", "num_heads"))
    if not heads:
        return 0.0
    layers = _first(text, ("num_hidden_layers", "n_layer", "num_layers"))
    each = _first(text, ("head_dim",)) or _first(text, ("hidden_size", "n_embd", "d_model")) / heads
    keys = _first(text, ("qk_nope_head_dim",)) + _first(text, ("qk_rope_head_dim",)) or each
    values = _first(text, ("v_head_dim",)) or each
    window = _first(text, ("sliding_window", "attention_chunk_size"))
    near = min(context, window) if window and text.get("use_sliding_window", True) else context
    kinds = text.get("layer_types")
    if isinstance(kinds, list):
        places = sum(
            near if "sliding" in kind or "chunked" in kind else context
            for kind in map(str, kinds)
            if kind.endswith("attention") and "linear" not in kind
        )
    else:
        places = layers * near
    return 2 * places * heads * (keys + values)


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> float:
    """The first of these numbers that a config has; 0 if it has none."""
    found = (config.get(name) for name in names)
    return next(
        (float(value) for value in found if isinstance(value, int) and not isinstance(value, bool)), 0.0
    )
