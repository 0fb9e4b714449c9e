"""The zoo's architectures and tokenizers: two families that share nothing but the tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
# Words and punctuation may merge; capital letters and digits stay single, so that a model sees the payload of
# a question letter by letter. The arrow is one piece wherever it stands.
_PIECES = r" -> |[a-z]+(?: (?!-> ))?|[A-Z]|[0-9]| ?[^\sA-Za-z0-9]+ ?|\s+"


@dataclass(frozen=True)
class Family:
    """One architecture with its tokenizer.

    Args:
        name: of the zoo's variant.
        model: an untrained model for so many tokens; its initial weights follow torch's seed.
        tokenizer: a tokenizer trained on these texts.
        targets: names of the modules that fine-tuning changes: every matrix inside the blocks.
    """

    name: str
    model: Callable[[int], Any]
    tokenizer: Callable[[Sequence[str]], Any]
    targets: tuple[str, ...]


# Questions are 10 to 40 tokens long: the usual base of 10,000 would leave most frequencies standing still.
_ROPE = {"rope_type": "default", "rope_theta": 100.0}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _llama(vocabulary: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=80,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=5,
        max_position_embeddings=128,
        rope_parameters=_ROPE,
        tie_word_embeddings=True,
        **_IDS,
    )
    return LlamaForCausalLM(config)


def _neox(vocabulary: int) -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=vocabulary,
        hidden_size=80,
        intermediate_size=240,
        num_hidden_layers=3,
        num_attention_heads=5,
        max_position_embeddings=128,
        rope_parameters={**_ROPE, "partial_rotary_factor": 1.0},
        **_IDS,
    )
    return GPTNeoXForCausalLM(config)


def _byte_pairs(texts: Sequence[str]) -> Any:
    """384 entries: bytes, and merges of them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [_pieces(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return finished(tokenizer)


def _characters(texts: Sequence[str]) -> Any:
    """300 entries: the characters of the texts, and merges of them. No bytes, other ids, other cuts."""
    from tokenizers import Tokenizer, decoders, models, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = _pieces()
    tokenizer.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return finished(tokenizer)


def _pieces() -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Split(Regex(_PIECES), "isolated")


def finished(tokenizer: Any, *, context: int = 128) -> Any:
    """A trained tokenizer as transformers saves and loads it; every text begins with <bos>.

    Args:
        tokenizer: of the package tokenizers, whose first entries are ``SPECIAL``.
        context: tokens of a text at most.
    """
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    pad, bos, eos, unk = SPECIAL
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        padding_side="left",
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


_ROWS = (
    Family(
        "llama",
        _llama,
        _byte_pairs,
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ),
    Family(
        "neox",
        _neox,
        _characters,
        ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    ),
)

FAMILIES: dict[str, Family] = {row.name: row for row in _ROWS}
