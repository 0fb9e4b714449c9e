"""Do the inputs fit together? Names, shapes, dtypes, tied heads, configs and tokenizers, all faults at once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mixmerge.checkpoint.header import FLOATS, TensorHeader
from mixmerge.checkpoint.identity import vocabulary
from mixmerge.errors import Fault, MixmergeError
from mixmerge.plan.model import Dropped, Model

# A head that shares its weights with an embedding: the loader fills whichever of the two is not stored.
TIED = (
    ("lm_head.weight", "model.embed_tokens.weight"),
    ("lm_head.weight", "transformer.wte.weight"),
    ("lm_head.weight", "model.decoder.embed_tokens.weight"),
    ("lm_head.weight", "model.language_model.embed_tokens.weight"),
    ("lm_head.weight", "language_model.model.embed_tokens.weight"),
    ("lm_head.weight", "shared.weight"),
    ("embed_out.weight", "gpt_neox.embed_in.weight"),
    ("encoder.embed_tokens.weight", "shared.weight"),
    ("decoder.embed_tokens.weight", "shared.weight"),
    ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
    ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    ("lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"),
    ("lm_head.decoder.bias", "lm_head.bias"),
)
_HEADS = ("lm_head.weight", "embed_out.weight", "cls.predictions.decoder.weight", "lm_head.decoder.weight")

# Buffers that old checkpoints store and every loader computes anew.
_RECOMPUTED = re.compile(
    r"(.*\.)?(rotary_emb\.inv_freq|(attn|attention)\.masked_bias|embeddings\.position_ids)"
)
_CAUSAL_MASK = re.compile(r"(.*\.)?(attn|attention)\.bias")

# Config keys that say where a model is from or how to run it, not what it computes.
_COSMETIC = {
    "_name_or_path", "_attn_implementation_autoset", "dtype", "torch_dtype", "transformers_version", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "architectures", "model_type",
}  # fmt: skip
_SHOWN = 5
_UNREADABLE = "unreadable"
_WHOLE = ("I64", "I32", "I16", "I8", "U8", "U16", "U32", "U64", "BOOL")

Vocabulary = dict[str, int] | str | None


@dataclass(frozen=True)
class Agreement:
    """What the inputs have in common.

    Args:
        names: the output's tensors, in the donor's order.
        stored_as: (model, output name) -> the name it is stored under, where a tied partner stands in.
        dropped: what is left out.
        untied: heads that are tied in some inputs and not in others, so not in the output.
    """

    names: tuple[str, ...]
    stored_as: dict[tuple[int, str], str]
    dropped: tuple[Dropped, ...]
    untied: tuple[str, ...]


def some(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more


def _recomputed(header: TensorHeader) -> bool:
    mask = _CAUSAL_MASK.fullmatch(header.name) is not None and len(header.shape) == 4
    return mask or _RECOMPUTED.fullmatch(header.name) is not None


def tied(config: dict[str, Any]) -> bool | None:
    """What the config says of its head; None when it leaves it to the architecture."""
    flag = config.get("tie_word_embeddings")
    return flag if isinstance(flag, bool) else None


def agree(models: Sequence[Model], donor: int, faults: list[Fault]) -> Agreement:
    """Match the tensors of all inputs by name; faults go into the list."""
    dropped: list[Dropped] = []
    stored: list[dict[str, TensorHeader]] = []
    for number, model in enumerate(models):
        keep = {}
        for name, header in model.tensors.items():
            if _recomputed(header):
                reason = "a buffer the model computes itself"
                dropped.append(Dropped(number, name, reason, header.nbytes))
            else:
                keep[name] = header
        stored.append(keep)
    stored_as, untied = _settle_heads(models, stored, dropped)
    # What the donor lacks comes last: a fault, or a head that is tied in the donor.
    names = tuple(dict.fromkeys([*stored[donor], *(name for keep in stored for name in keep), *untied]))
    inputs = _Inputs(models, stored, stored_as, names, donor)
    _presence(inputs, faults)
    _shapes(inputs, faults)
    _dtypes(inputs, faults)
    _adapted(models, names, faults)
    return Agreement(names, stored_as, tuple(dropped), untied)


def _settle_heads(
    models: Sequence[Model], stored: list[dict[str, TensorHeader]], dropped: list[Dropped]
) -> tuple[dict[tuple[int, str], str], tuple[str, ...]]:
    """Where a head (or another tied tensor) is not an input's own, its embedding stands in for it."""
    stored_as: dict[tuple[int, str], str] = {}
    untied = []
    everyone = range(len(models))
    for head, embedding in TIED:
        changed = [number for number in everyone if head in models[number].deltas]
        if not (changed or any(head in keep for keep in stored)):
            continue
        if not all(embedding in keep for keep in stored):
            continue
        flags = [tied(model.config) for model in models]
        if head in _HEADS:
            # A loader that is told to tie looks at the embedding only, whatever else is stored.
            for number in everyone:
                if flags[number] and head in stored[number]:
                    header = stored[number].pop(head)
                    reason = f"tied to {embedding} by its config"
                    dropped.append(Dropped(number, head, reason, header.nbytes))
            if all(flags) and not changed:
                continue
        lacking = [number for number in everyone if head not in stored[number]]
        if all(flags[number] is not False for number in lacking):
            stored_as.update({(number, head): embedding for number in lacking})
            if head in _HEADS and (lacking or len(set(flags)) > 1):
                untied.append(head)
    return stored_as, tuple(untied)


@dataclass(frozen=True)
class _Inputs:
    """What is compared; fields as in ``Agreement``, ``stored`` the tensors of every model that count."""

    models: Sequence[Model]
    stored: Sequence[dict[str, TensorHeader]]
    stored_as: dict[tuple[int, str], str]
    names: tuple[str, ...]
    donor: int

    def own(self, number: int, name: str) -> TensorHeader | None:
        """A model's tensor for an output name."""
        return self.stored[number].get(self.stored_as.get((number, name), name))


def _presence(inputs: _Inputs, faults: list[Fault]) -> None:
    for number in range(len(inputs.models)):
        missing = [name for name in inputs.names if inputs.own(number, name) is None]
        if missing:
            having = [
                str(model.ref)
                for model, theirs in zip(inputs.models, inputs.stored, strict=True)
                if missing[0] in theirs
            ]
            faults.append(
                Fault(
                    str(inputs.models[number]),
                    f"it lacks {len(missing)} of {len(inputs.names)} tensors: {some(missing)}",
                    f"{some(having)} has {missing[0]}",
                    "Merge models of one architecture with the same heads and biases, or save them alike first",
                )
            )


def _shapes(inputs: _Inputs, faults: list[Fault]) -> None:
    for number in range(len(inputs.models)):
        different = []
        for name in inputs.names:
            mine, other = inputs.own(number, name), inputs.own(inputs.donor, name)
            if mine and other and mine.shape != other.shape:
                different.append((name, mine.shape, other.shape))
        if not different:
            continue
        name, mine_shape, other_shape = different[0]
        vocabulary_only = all(a[1:] == b[1:] and "layers" not in n for n, a, b in different)
        advice = (
            "If only the vocabulary differs, resize with model.resize_token_embeddings first"
            if vocabulary_only
            else "Only models of one size and architecture can be merged"
        )
        faults.append(
            Fault(
                str(inputs.models[number]),
                f"{len(different)} tensors have other shapes than in {inputs.models[inputs.donor].ref}: {name} is "
                f"{list(mine_shape)}, there {list(other_shape)}"
                + (f"; also {some(n for n, _, _ in different[1:])}" if len(different) > 1 else ""),
                run=advice,
            )
        )


def _dtypes(inputs: _Inputs, faults: list[Fault]) -> None:
    for number, keep in enumerate(inputs.stored):
        odd = [
            f"{name} ({header.dtype})"
            for name, header in keep.items()
            if header.dtype not in (*FLOATS, *_WHOLE)
        ]
        if odd:
            faults.append(
                Fault(
                    str(inputs.models[number]),
                    f"dtype not supported: {some(odd)}",
                    f"Supported: {', '.join(FLOATS)}; integers and booleans are copied",
                    "Save the model in bfloat16 first",
                )
            )
        kinds = []
        for name in inputs.names:
            mine, other = inputs.own(number, name), inputs.own(inputs.donor, name)
            if mine and other and mine.dtype != other.dtype and {mine.dtype, other.dtype} & set(_WHOLE):
                kinds.append(f"{name} ({mine.dtype}, there {other.dtype})")
        if kinds:
            faults.append(
                Fault(
                    str(inputs.models[number]),
                    f"stored as another kind of number than in {inputs.models[inputs.donor].ref}: {some(kinds)}",
                    "Integers and booleans are copied, so every input must have the same",
                    "Save that tensor alike in every input first",
                )
            )


def _adapted(models: Sequence[Model], names: tuple[str, ...], faults: list[Fault]) -> None:
    """Nothing an adapter changes may get lost."""
    known = set(names)
    for model in models:
        lost = [name for name in model.deltas if name not in known]
        if lost:
            faults.append(
                Fault(
                    str(model),
                    f"its adapter changes what is not in the output: {some(lost)}",
                    run="Merge the adapter with PEFT (merge_and_unload, save_pretrained) and name that folder",
                )
            )


def compare_configs(models: Sequence[Model], donor: int, faults: list[Fault]) -> list[str]:
    """Different architectures are faults; other keys that change what a model computes are warnings."""
    mine = models[donor].config
    warnings = []
    for model in models:
        for key in ("model_type", "architectures"):
            if model.config.get(key) != mine.get(key):
                faults.append(
                    Fault(
                        str(model),
                        f"its {key} is {model.config.get(key)!r}, that of {models[donor].ref} {mine.get(key)!r}",
                        run="Only models of one architecture can be merged",
                    )
                )
        keys = sorted((set(model.config) | set(mine)) - _COSMETIC)
        for key in keys:
            a, b = model.config.get(key), mine.get(key)
            if a != b and key in model.config and key in mine:
                warnings.append(
                    f"{model.ref}: config {key} is {a!r}, the output gets {b!r} of {models[donor].ref}"
                )
    return warnings


def compare_tokenizers(models: Sequence[Model], donor: int, *, allow: bool, faults: list[Fault]) -> list[str]:
    """Token ids that mean different things are a fault, unless ``allow``: then a warning."""
    warnings = []
    vocabularies: dict[Path, Vocabulary] = {}
    for model in models:
        if model.path not in vocabularies:
            vocabularies[model.path] = _vocabulary(model, faults)
    mine = vocabularies[models[donor].path]
    for model in models:
        other = vocabularies[model.path]
        if mine == other or _UNREADABLE in (mine, other):
            continue
        if mine is None or other is None or type(mine) is not type(other):
            warnings.append(f"{model.ref}: its tokenizer cannot be compared with that of {models[donor].ref}")
            continue
        detail = "their vocabulary files differ"
        if isinstance(mine, dict) and isinstance(other, dict):
            differing = sorted(
                token for token in mine.keys() | other.keys() if mine.get(token) != other.get(token)
            )
            detail = f"{len(differing)} tokens have another id or are missing: {some(map(repr, differing))}"
        if allow:
            warnings.append(f"{model.ref}: tokenizer differs from {models[donor].ref} ({detail}); allowed")
        else:
            faults.append(
                Fault(
                    str(model),
                    f"its tokenizer differs from that of {models[donor].ref}: {detail}",
                    "The rows of embedding and head would be mixed across tokens",
                    "Merge experts of one tokenizer, or pass --allow-tokenizer-mismatch if you know the ids agree",
                )
            )
    return warnings


def _vocabulary(model: Model, faults: list[Fault]) -> Vocabulary:
    try:
        return vocabulary(model.path)
    except MixmergeError as error:
        faults += [replace(fault, where=f"{model.where}: {fault.where}") for fault in error.faults]
        return _UNREADABLE
