"""What a tensor is for, from its name, its number of dimensions and the model's type."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mixmerge.methods.records import Role

# Rows of these belong to tokens or positions, whatever the architecture calls them.
_TABLES = re.compile(
    r"(.*\.)?(embed_tokens|embed_positions|embed_in|embed_out|wte|wpe|shared|word_embeddings|position_embeddings"
    r"|token_type_embeddings|tok_embeddings|lm_head|output_embeddings|relative_attention_bias"
    r"|predictions\.decoder|lm_head\.decoder)(\.weight)?"
)
# Types whose linear layers are Conv1D: inputs x outputs.
_TRANSPOSED = {"gpt2": re.compile(r"(.*\.)?(c_attn|c_proj|c_fc|q_attn)\.weight")}


def role_of(name: str, shape: Sequence[int], model_type: str = "") -> Role:
    """The role of a tensor.

    Args:
        name: of the tensor.
        shape: its shape; the matrix of a linear map has two dimensions.
        model_type: of the model's config.
    """
    if len(shape) != 2:
        return "other"
    if _TABLES.fullmatch(name):
        return "table"
    transposed = _TRANSPOSED.get(model_type)
    return "transposed" if transposed is not None and transposed.fullmatch(name) else "linear"
