"""Names in a PEFT adapter, and which tensor of a base checkpoint each of them means.

A checkpoint's names and a model's module names agree but for prefixes (GPT-2 is on the hub as ``h.0...`` and
trained as ``transformer.h.0...``) and a few renamed modules, so no table of architectures is needed: the part
from the list of layers on (``h.0.attn.c_attn.weight``, here called the core) is looked up, and the prefixes
that explain most cores are used for all names.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Part = Literal["a", "b", "b_bias", "magnitude", "full"]

# In a base that ties its head to its embedding, the head has no tensor of its own.
HEADS = ("lm_head", "embed_out")
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "shared")
# Embeddings of BERT and T5: what is tied to them has another name than HEADS, is more than a head, or (T5) is
# scaled because it is tied, so that the head cannot be given a tensor of its own.
UNNAMED_TIES = ("word_embeddings.weight", "shared.weight")

# Module names of transformers 5 and what checkpoints call them.
_RENAMED = ((".mlp.", ".block_sparse_moe."),)

_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module)(?=\.)")
_LINEAR = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])(\.(?P<adapter>[^.]+))?\.(?P<leaf>weight|bias)")
_EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<part>[AB])(\.(?P<adapter>[^.]+))?")
_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.(?P<adapter>(?!weight$)[^.]+))?(\.weight)?")
_SAVED = re.compile(r"\.modules_to_save(\.(?P<adapter>[^.]+)(?=\.))?")


@dataclass(frozen=True)
class Piece:
    """What one adapter tensor is.

    Args:
        module: the module it belongs to, as PEFT names it, without ``base_model.model.``; for part ``full``
            the name of the whole tensor instead.
        part: a factor, the bias of factor B, DoRA's magnitude, or a whole tensor.
        embedding: a factor of an embedding, which is stored as (B @ A) transposed.
        adapter: the adapter's name where the key has it.
        wrapped: the whole tensor is the weight under a LoRA layer (``.base_layer.``).
    """

    module: str
    part: Part
    embedding: bool = False
    adapter: str | None = None
    wrapped: bool = False


def parse(name: str) -> Piece:
    """What the tensor called ``name`` is; any name that no rule fits is a whole tensor."""
    name = _WRAPPERS.sub("", name).removeprefix(".").removeprefix("base_model.model.")
    if match := _LINEAR.fullmatch(name):
        part: Part = "a" if match["part"] == "A" else "b"
        if match["leaf"] == "bias":
            part = "b_bias" if part == "b" else "full"  # lora_A never has a bias; as `full` it fits nothing
        if part != "full":
            return Piece(match["module"], part, adapter=match["adapter"])
    if match := _EMBEDDING.fullmatch(name):
        return Piece(match["module"], "a" if match["part"] == "A" else "b", True, match["adapter"])
    if match := _MAGNITUDE.fullmatch(name):
        return Piece(match["module"], "magnitude", adapter=match["adapter"])
    saved = _SAVED.search(name)
    plain = _SAVED.sub("", name, count=1).replace(".base_layer.", ".")
    return Piece(plain, "full", False, saved["adapter"] if saved else None, ".base_layer." in name)


def _split(name: str) -> tuple[str, str]:
    """(prefix, core) of a tensor in a layer, the core beginning with the list's name; else (name, "")."""
    parts = name.split(".")
    for at, part in enumerate(parts):
        if part.isdecimal() and at:
            return "".join(f"{before}." for before in parts[: at - 1]), ".".join(parts[at - 1 :])
    return name, ""


def _module(name: str) -> str:
    """``lm_head`` for ``model.lm_head.weight``; empty for what is not a weight."""
    return name.removesuffix(".weight").rpartition(".")[2] if name.endswith(".weight") else ""


def layer_of(name: str) -> str:
    """``h.0`` for ``h.0.attn.c_attn.weight``; empty outside of layers."""
    prefix, core = _split(name)
    return prefix + ".".join(core.split(".")[:2]) if core else ""


def _common_tail(one: str, other: str) -> int:
    length = 0
    for left, right in zip(reversed(one.split(".")), reversed(other.split(".")), strict=False):
        if left != right:
            break
        length += 1
    return length


def _spellings(name: str) -> Iterable[str]:
    yield name
    for new, old in _RENAMED:
        yield name.replace(new, old)
        yield name.replace(old, new)


class BaseNames:
    """The names of a base checkpoint, and the prefixes by which an adapter's names lead to them.

    Args:
        base: the checkpoint's tensors.
        wanted: every name the adapter will ask for: prefixes are settled from all of them together.
    """

    def __init__(self, base: Iterable[str], wanted: Iterable[str]) -> None:
        self.base = frozenset(base)
        self.prefixes = self._learn(wanted)

    def _learn(self, wanted: Iterable[str]) -> Mapping[str, str]:
        homes: dict[str, list[str]] = defaultdict(list)
        for name in self.base:
            prefix, core = _split(name)
            if core:
                homes[core].append(prefix)
        votes: dict[str, Counter[str]] = defaultdict(Counter)
        for name in set(wanted):
            prefix, core = _split(name)
            found = {home for spelling in _spellings(f".{core}") for home in homes.get(spelling[1:], ())}
            if core and found:
                votes[prefix].update(found)
        settled = {}
        for prefix, homes_found in votes.items():
            # Most names explained; then the prefix itself; then the one that ends like it.
            claims = [
                ((count, home == prefix, _common_tail(home, prefix)), home)
                for home, count in homes_found.items()
            ]
            best = max(claim for claim, _ in claims)
            winners = [home for claim, home in claims if claim == best]
            if len(winners) == 1:
                settled[prefix] = winners[0]
        return settled

    def find(self, name: str) -> str | None:
        """The base's tensor that the adapter calls ``name``; None if there is none, or no telling which."""
        for spelling in _spellings(name):
            if found := self._find(spelling):
                return found
        return None

    def _find(self, name: str) -> str | None:
        if name in self.base:
            return name
        prefix, core = _split(name)
        if core:
            candidate = self.prefixes.get(prefix, prefix) + core
            return candidate if candidate in self.base else None
        for inner, outer in self.prefixes.items():
            candidate = outer + name.removeprefix(inner)
            if name.startswith(inner) and candidate in self.base:
                return candidate
        # Embeddings, norms and heads where no layer settled the prefixes.
        outside = [known for known in self.base if not _split(known)[1]]
        same = [known for known in outside if known.endswith(f".{name}") or name.endswith(f".{known}")]
        return same[0] if len(same) == 1 else None

    @property
    def has_head(self) -> bool:
        """Whether the checkpoint has a head's weight of its own."""
        return any(_module(name) in HEADS for name in self.base)

    def is_embedding(self, name: str) -> bool:
        """Whether ``name`` is the checkpoint's table of token embeddings."""
        return name in self.base and _module(name) in EMBEDDINGS and not _split(name)[1]

    def tied(self, name: str) -> str | None:
        """For a head's weight that the base does not have: the embedding it is tied to, if that is clear."""
        if _module(name) not in HEADS:
            return None
        embeddings = [known for known in self.base if self.is_embedding(known)]
        return embeddings[0] if len(embeddings) == 1 and not embeddings[0].endswith(UNNAMED_TIES) else None
