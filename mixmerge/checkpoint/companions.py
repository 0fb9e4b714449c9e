"""Files of a model folder beside config and weights, which go with the weights wherever those go."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What a tokenizer or a processor may consist of, and how to generate.
_KNOWN = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "chat_template.jinja", "chat_template.json", "generation_config.json", "preprocessor_config.json",
    "processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip


def companions(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """Their names, as far as the folder has them; code of the model's own too, if its config names some."""
    names = [name for name in _KNOWN if (folder / name).is_file()]
    if "auto_map" in config:
        names += sorted(path.name for path in folder.glob("*.py"))
    return names
