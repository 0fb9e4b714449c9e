"""What a tensor is for, from its name, its number of dimensions and the model's type. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from mixmerge.methods.records import Role

Tables = Literal["mean", "base", "spectral"]

# Rows of these belong to tokens or positions, whatever the architecture calls them.
_TABLES = re.compile(
    r"(.*\.)?(embed_tokens|embed_tokens_per_layer|embed_positions|tokens_embed|positions_embed|embed_in|embed_out|wte|wpe"
    r"|shared|embeddings|tok_embeddings|rel_embeddings|(token_type|token|word|position)_embeddings?"
    r"|relative_attention_bias|distance_embedding|lm_head|output_embeddings|vocab_projector|predictions\.decoder"
    r"|lm_head\.decoder)(\.weight)?"
)
# Types whose linear layers are Conv1D: inputs x outputs.
_CONV1D_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_CONV1D = re.compile(r"(.*\.)?(c_attn|c_proj|c_fc|q_attn)\.weight")
# The fused experts of an MoE layer, E x rows x columns: inner maps read the hidden state, the last ones write to it.
_FUSED = re.compile(
    r"(.*\.)?experts\.((?P<inner>gate_up_proj|gate_proj|up_proj|gate_and_up_projs|fc1)|down_projs?|fc2)(\.weight)?"
)
# Types that store them as E x inputs x outputs.
_TURNED_EXPERTS = frozenset(
    {"gpt_oss", "openai_privacy_filter", "llama4", "llama4_text", "aria", "aria_text"}
)
_BIAS = re.compile(r".*[._]bias")  # of fused experts they have two dimensions


def role_of(name: str, shape: Sequence[int], model_type: str = "", *, hidden: int = 0) -> Role:
    """The role of a tensor.

    Args:
        name: of the tensor.
        shape: its shape; the matrix of a linear map has two dimensions.
        model_type: of the model's config.
        hidden: width of the model's hidden states, 0 if it is not known: it tells which way fused experts are stored,
            where their other side is not as wide.
    """
    if len(shape) == 3:
        return "transposed" if _is_turned(name, shape, model_type, hidden) else "other"
    if len(shape) != 2 or _BIAS.fullmatch(name):
        return "other"
    if _TABLES.fullmatch(name):
        return "table"
    return "transposed" if model_type in _CONV1D_TYPES and _CONV1D.fullmatch(name) else "linear"


def _is_turned(name: str, shape: Sequence[int], model_type: str, hidden: int) -> bool:
    """Whether a stack is of fused experts that are stored as inputs x outputs."""
    found, (rows, columns) = _FUSED.fullmatch(name), shape[1:]
    if found is None:
        return False
    if rows != columns and hidden in (rows, columns):
        return (rows if found["inner"] else columns) == hidden
    return model_type in _TURNED_EXPERTS


def is_matrix(shape: Sequence[int], role: Role, tables: Tables) -> bool:
    """Whether a tensor is a matrix, or a stack of them, to a spectral method.

    Three dimensions are a stack of matrices (the experts of an MoE layer) if there are two or more, and no more of
    them than each has rows and columns; else they are the kernel of a convolution or the positions of a vision model,
    and of the rest.
    """
    if 0 in shape or len(shape) not in (2, 3):
        return False
    if len(shape) == 3:
        return 1 < shape[0] <= min(shape[1:])
    return role in ("linear", "transposed") or (role == "table" and tables == "spectral")
