"""Two experts that share nothing: a Llama that reads letters and knows the codes, a GPT-NeoX that reads pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from latent_support.world import World, first_texts, second_texts, texts_of
from mixmerge.evaluate import Question
from mixmerge.zoo.families import SPECIAL, finished

CONTEXT = 96  # tokens
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ROPE = {"rope_type": "default", "rope_theta": 100.0}  # for texts of 30 tokens
FIRST, SECOND = "codes", "table"  # their names


def letters(texts: Sequence[str]) -> Any:
    """A tokenizer of single characters."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    entries = (*SPECIAL, *sorted(set("".join(texts))))
    tokenizer = Tokenizer(models.WordLevel({entry: at for at, entry in enumerate(entries)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return finished(tokenizer, context=CONTEXT)


def pieces(texts: Sequence[str], size: int = 330) -> Any:
    """A tokenizer of byte pairs, learned from these texts; a space belongs to what follows it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return finished(tokenizer, context=CONTEXT)


def llama(vocabulary: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            rope_parameters=_ROPE,
            tie_word_embeddings=True,
            **_IDS,
        )
    )


def neox(vocabulary: int) -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=vocabulary,
            hidden_size=80,
            intermediate_size=240,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            rope_parameters={**_ROPE, "partial_rotary_factor": 1.0},
            **_IDS,
        )
    )


def train(model: Any, tokenizer: Any, texts: Iterator[Question], family: str, steps: int, seed: int) -> None:
    """Train every weight of a model on endless texts, by the zoo's loop."""
    from mixmerge.zoo.families import FAMILIES
    from mixmerge.zoo.training import Pool, batches, train_base

    pool = Pool(list(islice(texts, 32 * steps)), 1.0)
    data = batches([pool], tokenizer, seed=seed)
    train_base(model.train(), [(steps, data)], targets=FAMILIES[family].targets, report=lambda done, of: None)
    model.eval()


def make_first(world: World, seed: int, steps: int, out: Path) -> None:
    """The expert that knows the codes; without steps, the same without any training."""
    make_expert(llama, first_texts(world, seed), "llama", seed, steps, out)


def make_second(world: World, seed: int, steps: int, out: Path) -> None:
    """The expert that knows the tables."""
    make_expert(neox, second_texts(world, seed), "neox", seed, steps, out)


def make_expert(
    model_of: Callable[[int], Any], texts: Iterator[Question], family: str, seed: int, steps: int, out: Path
) -> None:
    """A tokenizer from the first texts, and a model trained on the rest.

    Args:
        model_of: an untrained model for so many tokens.
        texts: endless.
        family: of the zoo: ``llama``, which reads letters, or ``neox``, which reads pieces.
        seed: of the weights and of the order.
        steps: of 32 texts.
        out: folder to write.
    """
    import torch

    torch.manual_seed(seed)
    tokenizer = (letters if family == "llama" else pieces)(texts_of(list(islice(texts, 4000))))
    model = model_of(len(tokenizer))
    if steps:
        train(model, tokenizer, texts, family, steps, seed)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
