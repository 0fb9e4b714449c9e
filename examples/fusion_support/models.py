"""Character models that know names by heart, small ones that hardly do, and small experts of how to say them.

A name has a code of three letters. Everybody is trained on answers in four styles, mostly the plain one; the experts
are tuned to a style, on names that nobody is asked about afterwards.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixmerge.engines.loading import no_bars
from mixmerge.evaluate import Question
from mixmerge.zoo.training import Pool, batches, train_base

LETTERS = "abcdefghijklmnopqrstuvwxyz"
STYLES = {(False, False): 16, (False, True): 4, (True, False): 4, (True, True): 1}  # (loud, dotted): of 25
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")


@dataclass(frozen=True)
class Names:
    """Codes by name: those the experts are tuned on, those an alpha is picked on, and those that count."""

    tuning: dict[str, str]
    validation: dict[str, str]
    test: dict[str, str]

    @property
    def all(self) -> dict[str, str]:
        return {**self.tuning, **self.validation, **self.test}


def names(count: tuple[int, int, int], seed: int) -> Names:
    """So many names of four or six letters, each with a code that tells nothing of it."""
    rng, found = random.Random(seed), dict[str, str]()
    while len(found) < sum(count):
        name = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.choice((2, 3))))
        found.setdefault(name, "".join(rng.choices(LETTERS, k=3)))
    pairs = list(found.items())
    first, second = count[0], count[0] + count[1]
    return Names(dict(pairs[:first]), dict(pairs[first:second]), dict(pairs[second:]))


def said(code: str, *, loud: bool, dotted: bool) -> str:
    return (code.upper() if loud else code) + ("." if dotted else "")


def question(name: str, code: str, *, loud: bool, dotted: bool) -> Question:
    return Question(f"{name}: ", said(code, loud=loud, dotted=dotted))


def in_styles(codes: dict[str, str], styles: dict[tuple[bool, bool], int]) -> list[Question]:
    """Each name in each style, as often as the style is usual."""
    return [
        question(name, code, loud=loud, dotted=dotted)
        for name, code in codes.items()
        for (loud, dotted), times in styles.items()
        for _ in range(times)
    ]


def tokenizer() -> Any:
    """Characters, one token each."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    entries = [*_SPECIAL, *LETTERS, *LETTERS.upper(), ":", " ", "."]
    made = Tokenizer(models.WordLevel({one: at for at, one in enumerate(entries)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.decoder = decoders.Fuse()
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    pad, bos, eos, unk = _SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=unk,
        padding_side="left", model_max_length=32, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def model(width: int, layers: int, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(_SPECIAL) + 2 * len(LETTERS) + 3, hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=layers, num_attention_heads=4, max_position_embeddings=32,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0}, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def trained(made: Any, questions: Sequence[Question], *, steps: int, seed: int) -> Any:
    """All of a model, by the zoo's loop."""
    stream = batches([Pool(questions, 1.0)], tokenizer(), seed=seed)
    train_base(made, [(steps, stream)], targets=TARGETS, report=lambda done, steps: None)
    return made.eval()


def tuned(made: Any, questions: Sequence[Question], *, steps: int, seed: int, rate: float = 2e-3) -> Any:
    """A model tuned on further questions, by AdamW."""
    stream = batches([Pool(questions, 1.0)], tokenizer(), seed=seed)
    adam = torch.optim.AdamW(made.parameters(), lr=rate, weight_decay=0.01)
    for step, (tokens, labels) in zip(range(steps), stream, strict=False):
        logits: Tensor = made(input_ids=tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        for group in adam.param_groups:
            group["lr"] = rate * (1 - step / steps)
        adam.step()
        adam.zero_grad()
    return made.eval()


def save(made: Any, folder: Path) -> Path:
    with no_bars():
        made.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def build(folder: Path, known: Names, *, effort: float, seed: int) -> dict[str, Path]:
    """Folders of ``large``, ``small``, and the experts ``loud`` and ``dotted`` of the small one."""
    import copy

    steps = {"large": 900, "small": 300, "tuned": 150}
    wanted = {name: max(2, int(effort * count)) for name, count in steps.items()}
    everything = in_styles(known.all, STYLES)
    large = trained(model(96, 3, seed), everything, steps=wanted["large"], seed=seed)
    small = trained(model(32, 2, seed + 1), everything, steps=wanted["small"], seed=seed + 1)
    # what an expert is not about stays as usual as it was: four of five
    loud = in_styles(known.tuning, {(True, False): 4, (True, True): 1})
    dotted = in_styles(known.tuning, {(False, True): 4, (True, True): 1})
    return {
        "large": save(large, folder / "large"),
        "small": save(small, folder / "small"),
        "loud": save(tuned(copy.deepcopy(small), loud, steps=wanted["tuned"], seed=seed), folder / "loud"),
        "dotted": save(
            tuned(copy.deepcopy(small), dotted, steps=wanted["tuned"], seed=seed), folder / "dotted"
        ),
    }
