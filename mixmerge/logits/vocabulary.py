"""Which token of a small model is which token of the base, said explicitly and kept on disk.

Legend: V columns of the base's logits, W of the small model's, C tokens that both have.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mixmerge.checkpoint.identity import canonical_hash
from mixmerge.errors import CheckpointError, Fault, MixmergeError
from mixmerge.logits.token_texts import Text, fallbacks, spelled_by, texts_of

Vocabulary = Literal["same", "intersection"]
_FORMAT = "mixmerge vocabulary map 1"


@dataclass(frozen=True, eq=False)
class VocabMap:
    """Tokens of a small model beside the base's.

    Args:
        base, other: ``(C,)``: columns of tokens that both have, in the base's order.
        base_columns, other_columns: V and W.
        base_hash, other_hash: of the two tokenizers.
        starts: ``(max(V, tokens of the base) + 1,)``, where each one's spelling begins in ``pieces``; empty where the
            small model reads the base's tokens as they are.
        pieces: tokens of the small model that spell the base's, one after the other.
    """

    base: Tensor
    other: Tensor
    base_columns: int
    other_columns: int
    base_hash: str
    other_hash: str
    starts: Tensor
    pieces: Tensor

    @property
    def same_tokens(self) -> bool:
        """Whether the small model reads the base's tokens as they are."""
        return len(self.starts) == 0

    @property
    def identical(self) -> bool:
        """Whether every column of one is that column of the other."""
        return self.same_tokens and self.base_columns == self.other_columns == len(self.base)

    @cached_property
    def _spellings(self) -> tuple[list[int], list[int]]:
        return self.starts.tolist(), self.pieces.tolist()

    def spelled(self, tokens: Sequence[int]) -> list[int]:
        """The base's tokens in those of the small model, one after the other."""
        if self.same_tokens:
            return list(tokens)
        starts, pieces = self._spellings
        return [piece for token in tokens for piece in pieces[starts[token] : starts[token + 1]]]

    @property
    def longest(self) -> int:
        """The most tokens that spell one of the base's."""
        return 1 if self.same_tokens else int((self.starts[1:] - self.starts[:-1]).max())

    def as_dict(self) -> dict[str, Any]:
        """What it is, as JSON values; its tensors are not in it."""
        return {
            "format": _FORMAT,
            "covered": len(self.base),
            "base_columns": self.base_columns,
            "other_columns": self.other_columns,
            "same_tokens": self.same_tokens,
            "base_hash": self.base_hash,
            "other_hash": self.other_hash,
        }


def vocabulary_map(
    base: Any, other: Any, *, base_columns: int, other_columns: int, how: Vocabulary, where: str
) -> VocabMap:
    """The map between two tokenizers of transformers.

    A token is the same where it stands for the same bytes, however the two write them, or is a special token of the
    same name; the tokens that end a text are the same too. What only one model has columns for has no counterpart.

    Args:
        base, other: tokenizers.
        base_columns, other_columns: of the logits of their models.
        how: ``same``: the vocabularies must be equal, token by token; ``intersection``: those tokens that are.
        where: of the small model, for messages.

    Raises:
        MixmergeError: there is no tokenizer; the vocabularies differ and ``how`` is ``same``; they share no token.
    """
    mine, others = base.get_vocab(), other.get_vocab()
    hashes = tokenizer_hash(base), tokenizer_hash(other)
    if mine == others:
        same = base_columns == other_columns
        known = range(base_columns) if same else sorted(mine.values())
        ids = torch.tensor([at for at in known if at < min(base_columns, other_columns)])
        empty = torch.zeros(0, dtype=torch.long)
        return VocabMap(ids, ids, base_columns, other_columns, *hashes, empty, empty)
    if how == "same":
        shared = len(mine.items() & others.items())
        what = f"its vocabulary of {len(others):,} tokens is not the base's of {len(mine):,}: {shared:,} are the same"
        run = "Say vocabulary: intersection, and see how much it covers"
        raise MixmergeError(Fault(where, what, "Small models of the base's tokenizer", run))
    return _intersection(base, other, base_columns, other_columns, hashes, where)


def _intersection(
    base: Any, other: Any, base_columns: int, other_columns: int, hashes: tuple[str, str], where: str
) -> VocabMap:
    mine, others = texts_of(base), texts_of(other)
    rare = fallbacks(other)
    found: dict[Text, int] = {}
    for at in sorted(others, key=lambda at: (at in rare, at)):
        if at < other_columns:
            found.setdefault(others[at], at)
    single = {others[at]: at for at in rare if at < other_columns}
    pairs = _paired(
        {at: one for at, one in mine.items() if at < base_columns}, fallbacks(base), found, single
    )
    ends = base.eos_token_id, other.eos_token_id
    if None not in ends and ends[1] < other_columns and ends[0] < base_columns:
        pairs[ends[0]] = ends[1]
    ids = sorted(pairs)
    if all(mine[at][0] for at in ids):
        what = "its vocabulary has no token of text in common with the base's"
        raise MixmergeError(Fault(where, what, "A small model of the base's family"))
    starts, pieces = [0], list[int]()
    for at in range(max(base_columns, max(mine) + 1)):  # columns without a token may be drawn, too
        text = mine.get(at, (True, b""))
        spelling = [pairs[at]] if at in pairs else spelled_by(other, text, found, others)
        pieces += [piece for piece in spelling if piece < other_columns] or [_unknown(other)]
        starts.append(len(pieces))
    columns = torch.tensor(ids), torch.tensor([pairs[at] for at in ids])
    return VocabMap(
        *columns, base_columns, other_columns, *hashes, torch.tensor(starts), torch.tensor(pieces)
    )


def _paired(
    mine: Mapping[int, Text], rare: Collection[int], found: Mapping[Text, int], single: Mapping[Text, int]
) -> dict[int, int]:
    """The base's tokens with those of one text. A token that stands for a byte where there is no other, which models
    hardly ever say, is that of such a token, or of one that is no other's.

    Args:
        mine: the base's tokens.
        rare: those of them that stand for a byte where there is no other.
        found: the small model's tokens, those that do so only where no other has the text.
        single: the small model's tokens that do so.
    """
    pairs = {at: found[text] for at, text in mine.items() if at not in rare and text in found}
    taken = set(pairs.values())
    for at in rare:
        other = single.get(mine[at], found.get(mine[at])) if at in mine else None
        if other is not None and other not in taken:
            pairs[at] = other
    return pairs


def _unknown(tokenizer: Any) -> int:
    """What stands for a token that cannot be spelled."""
    known = (tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return next((int(one) for one in known if one is not None), 0)


@dataclass(frozen=True, eq=False)
class Shared:
    """The tokens on which all small models are compared.

    Args:
        columns: ``(C,)``: of the base's logits.
        places: ``(C,)`` of each small model, the reference first.
    """

    columns: Tensor
    places: tuple[Tensor, ...]

    def to(self, device: Any) -> Shared:
        return Shared(self.columns.to(device), tuple(one.to(device) for one in self.places))


def shared_by(maps: Sequence[VocabMap]) -> Shared | None:
    """The tokens that every map covers; None where all columns are the same.

    Raises:
        MixmergeError: no token is in all of them.
    """
    if all(one.identical for one in maps):
        return None
    columns = maps[0].base
    for one in maps[1:]:
        columns = columns[torch.isin(columns, one.base)]
    if len(columns) == 0:
        raise MixmergeError(Fault("vocabulary", "no token is known to all small models and the base"))
    return Shared(columns, tuple(one.other[torch.searchsorted(one.base, columns)] for one in maps))


def tokenizer_hash(tokenizer: Any) -> str:
    """64 hex digits: of a tokenizer's tokens, special tokens, and how it splits a text where that can be told."""
    split: Any = None
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        whole = json.loads(tokenizer.backend_tokenizer.to_str())
        # padding and truncation are settings of a call
        split = {key: whole.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")}
        split["merges"] = (whole.get("model") or {}).get("merges")
    return canonical_hash(
        [sorted(tokenizer.get_vocab().items()), sorted(tokenizer.all_special_tokens), split]
    )


def save_map(made: VocabMap, path: Path) -> None:
    """One safetensors file; what it is of lies in its header, as JSON."""
    from safetensors.torch import save_file

    tensors = {name: getattr(made, name).contiguous() for name in ("base", "other", "starts", "pieces")}
    if torch.equal(tensors["base"], tensors["other"]):
        tensors["other"] = tensors["other"].clone()  # two names of one memory are refused
    if len(tensors["starts"]) == 0:
        del tensors["starts"], tensors["pieces"]
    save_file(tensors, path, {"map": json.dumps(made.as_dict())})


def load_map(path: Path) -> VocabMap:
    """What ``save_map`` wrote.

    Raises:
        CheckpointError: it cannot be read, or is none.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            card = json.loads((file.metadata() or {}).get("map", "{}"))
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
        empty = torch.zeros(0, dtype=torch.long)
        if card["format"] != _FORMAT:
            raise KeyError(card["format"])
        return VocabMap(
            held["base"], held["other"],
            int(card["base_columns"]), int(card["other_columns"]),
            str(card["base_hash"]), str(card["other_hash"]),
            held.get("starts", empty), held.get("pieces", empty),
        )  # fmt: skip
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        what = f"is no vocabulary map: {error}"
        raise CheckpointError(Fault(str(path), what, run="Fit the mixture again")) from error


def check_map(found: VocabMap, made: VocabMap, *, where: str) -> None:
    """Refuse a map of other tokenizers.

    Args:
        found: that was kept.
        made: of the tokenizers that are here.
        where: of the small model.

    Raises:
        MixmergeError: a tokenizer or the size of a model's logits has changed.
    """
    if found.as_dict() != made.as_dict():
        what = "its vocabulary map was made for another tokenizer, of the base or of its own"
        raise MixmergeError(Fault(where, what, "The models it was made for", "Fit the mixture again"))
