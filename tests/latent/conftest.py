"""Tiny experts that differ in family, width, depth and tokenizer, and glue between them that has something to say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mixmerge.experts import Expert

CONTEXT = 192
TEXTS = [
    "the quick brown fox jumps over the lazy dog, 1 + 2 = 3",
    "one two three four five six",
    "grün 漢字 ok",
]
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48},
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40},
    ),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 40, "n_layer": 2, "n_head": 2}),
}


def _tokenizer(kind: str) -> Any:
    """``words``: byte-level BPE; ``letters``: a token a byte; ``pieces``: spaces as in SentencePiece's models."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    if kind == "pieces":
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    alphabet = sorted({*pre_tokenizers.ByteLevel.alphabet(), *"".join(TEXTS), "▁"})
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + 4 + (0 if kind == "letters" else 40),
        special_tokens=["<pad>", "<s>", "</s>", "<unk>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def write_expert(folder: Path, kind: str, *, tokenizer: str, seed: int, **settings: Any) -> Path:
    """A model with random weights that are not small, so that its texts depend on all of what it reads."""
    import torch
    import transformers

    made = _tokenizer(tokenizer)
    config_class, model_class, shape = KINDS[kind]
    length = {"n_positions" if kind == "gpt2" else "max_position_embeddings": CONTEXT}
    config = getattr(transformers, config_class)(
        vocab_size=len(made),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **{**shape, **length, **settings},
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, model_class)(config).eval()
        with torch.no_grad():
            for one in model.parameters():
                one.add_(torch.randn_like(one) * 0.1)
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Fitted:
    """A folder with glue, and where its experts are.

    Args:
        folder: of the glue.
        experts: as engines take them.
    """

    folder: Path
    experts: Mapping[str, Mapping[str, str]]

    def engine(self, **options: Any) -> Any:
        from mixmerge.latent.engine import LatentEngine

        return LatentEngine(str(self.folder), experts=self.experts, **options)


@dataclass
class Trio:
    """Three experts, ``a``, ``b`` and ``c``, and glue between them."""

    root: Path
    experts: dict[str, Path] = field(default_factory=dict)

    def fitted(
        self,
        name: str,
        *,
        mode: str = "prompt",
        chunk: int = 3,
        depths: Any = 2,
        route: Mapping[str, Any] | None = None,
        too_long: str = "refuse",
        scale: float = 0.3,
        experts: Mapping[str, Path] | None = None,
    ) -> Fitted:
        """Glue with random values; with ``scale`` 0 as it is before training."""
        import torch

        from mixmerge.engines.loading import load_model
        from mixmerge.latent.decoders import shape_of
        from mixmerge.latent.files import LatentCard, expert_hash, save_latent
        from mixmerge.latent.options import BridgeOptions
        from mixmerge.latent.settings import RouteOptions

        places = dict(experts or self.experts)
        shapes = tuple(
            shape_of(
                load_model(str(place), None, "auto", "cpu", one).model,
                name=one,
                hash=expert_hash(Expert(one, str(place))),
            )
            for one, place in places.items()
        )
        told = None if route is None else RouteOptions.model_validate(route)
        card = LatentCard(shapes, mode, chunk, depths, BridgeOptions(width=16, heads=2), told, too_long, 64)  # type: ignore[arg-type]
        glue, router = card.blank(seed=3)
        draw = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for key, one in glue.named_parameters():
                if key.endswith("write"):
                    one.copy_(torch.randn(one.shape, generator=draw) * scale)
        folder = self.root / name
        folder.mkdir(exist_ok=True)
        save_latent(folder, card, glue, router)
        return Fitted(folder, {one: {"model": str(place)} for one, place in places.items()})


@pytest.fixture(scope="session")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    root = tmp_path_factory.mktemp("trio")
    made = Trio(root)
    for at, (name, kind, tokenizer) in enumerate(
        [("a", "llama", "words"), ("b", "gpt_neox", "letters"), ("c", "gpt2", "pieces")]
    ):
        made.experts[name] = write_expert(root / name, kind, tokenizer=tokenizer, seed=at)
    return made
