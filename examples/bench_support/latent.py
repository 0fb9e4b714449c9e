"""What ``examples/bench_latent.py`` times: a primary alone and while it reads peers, over weights on disk."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mixmerge.engines.adapters import BankRows
from mixmerge.engines.decoding import Beside, Decoder, Row
from mixmerge.engines.loading import load_model
from mixmerge.engines.records import Request
from mixmerge.latent.decoders import shape_of
from mixmerge.latent.files import LatentCard, save_latent
from mixmerge.latent.following import Follower
from mixmerge.latent.generating import LatentRows, Told
from mixmerge.latent.interaction import Interaction
from mixmerge.latent.offsets import Reader
from mixmerge.latent.options import BridgeOptions
from mixmerge.latent.peers import latents

PRIMARY = "primary"
NAMES = {"alone": "primary alone", "prompt": "prompt", "chunked": "chunked(32)", "lockstep": "lockstep"}
CHUNK = 32


@dataclass(frozen=True)
class Shape:
    """A model of Llama's kind. Its tokenizer has ``vocabulary`` entries, as far as the texts have so many."""

    width: int
    layers: int
    heads: int
    shared: int
    inner: int
    vocabulary: int


SHAPES = {
    PRIMARY: Shape(576, 30, 9, 3, 1536, 8192),
    "narrow": Shape(384, 16, 6, 2, 1024, 4096),
    "wide": Shape(768, 6, 12, 4, 2048, 6000),
}
SMALL = {
    PRIMARY: Shape(64, 3, 4, 2, 96, 400),
    "narrow": Shape(32, 2, 2, 2, 64, 300),
    "wide": Shape(96, 2, 4, 2, 128, 350),
}


@dataclass(frozen=True)
class Times:
    """Milliseconds of processor time for a step of the batch, one figure a round; the ways take turns."""

    of: Mapping[str, tuple[float, ...]]

    def least(self, way: str) -> float:
        return min(self.of[way])

    def median(self, way: str) -> float:
        return statistics.median(self.of[way])

    def ratios(self, way: str) -> tuple[float, float]:
        """Beside the primary alone: of the least, and of the medians."""
        return self.least(way) / self.least("alone"), self.median(way) / self.median("alone")


@dataclass(frozen=True)
class Work:
    """What the glue costs beside the experts' own forwards.

    Args:
        parameters: of the bridges.
        experts: parameters of the experts.
        reading, forwards: FLOPs of the glue and of the experts' forwards on a prompt.
        token, step: the same for a token that is generated in ``prompt`` mode: of the primary's one forward.
    """

    parameters: int
    experts: int
    reading: float
    forwards: float
    token: float
    step: float


class Table:
    """Experts and a glue that has something to say, in a folder and in memory.

    Args:
        folder: for all files.
        texts: tokenizers learn from them, and prompts are taken from them.
        shapes: of the experts, the primary first.
        width: s.
    """

    def __init__(
        self, folder: Path, texts: Sequence[str], shapes: Mapping[str, Shape], *, width: int
    ) -> None:
        self.folder, self.texts = folder, list(texts)
        for name, shape in shapes.items():
            write_expert(folder / name, shape, self.texts, seed=len(name))
        self.loaded = {name: load_model(str(folder / name), None, "float32", "cpu", name) for name in shapes}
        self.readers = {
            name: Reader(one.tokenizer, name=name, context=one.context) for name, one in self.loaded.items()
        }
        told = tuple(shape_of(one.model, name=name, hash=name) for name, one in self.loaded.items())
        card = LatentCard(
            told, "prompt", CHUNK, 4, BridgeOptions(width=width), None, "refuse"
        )  # Q = 4 stacks, as by default
        self.glue, router = card.blank()
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, one in self.glue.named_parameters():
                if name.endswith("write"):  # nothing is written before training; zeros would cost as much
                    one.copy_(0.01 * torch.randn(one.shape, generator=draw))
        self.glue.requires_grad_(False).eval()
        save_latent(folder, card, self.glue, router)

    @property
    def peers(self) -> tuple[str, ...]:
        return tuple(name for name in self.loaded if name != PRIMARY)

    def places(self) -> str:
        """Of the experts, as the engine takes them: JSON."""
        return json.dumps({name: {"model": str(self.folder / name)} for name in self.loaded})

    def prompts(self, count: int, tokens: int) -> list[str]:
        """Texts of about so many tokens of the primary."""
        draw = random.Random(1)
        reader = self.readers[PRIMARY]
        texts = [draw.choice(self.texts)[: 10 * tokens] for _ in range(count)]
        return [reader.tokenizer.decode(reader.prompt(one).ids[:tokens]) for one in texts]

    def decoder(self, way: str, prompts: Sequence[str], tokens: int) -> Decoder:
        """A batch at its start, and what is read beside."""
        expert = self.loaded[PRIMARY]
        reads = tuple((name, 1 / len(self.loaded)) for name in self.peers)
        readings = [self.readers[PRIMARY].prompt(one) for one in prompts]
        rows = [
            Row(Request(str(at), text, tokens, 1.0, seed=at), list(reading.ids), tokens)
            for at, (text, reading) in enumerate(zip(prompts, readings, strict=True))
        ]
        beside: Beside = BankRows(expert.bank, [None] * len(rows))
        if way != "alone":
            memory, followers = self._memory(way, prompts)
            beside = LatentRows(
                Interaction(expert.model, self.glue, PRIMARY),
                self.readers[PRIMARY],
                [Told(one, reads) for one in readings],
                memory,
                followers=followers,
                mode="prompt" if way == "prompt" else "chunked",
                chunk=1 if way == "lockstep" else CHUNK,
            )
        return Decoder(expert.model, expert.tokenizer, rows, beside=beside, ends=frozenset(), pad=expert.pad)

    def _memory(self, way: str, prompts: Sequence[str]) -> tuple[Any, list[Follower]]:
        if way == "prompt":
            left = {name: self._left(name, prompts) for name in self.peers}
            return self.glue.memory(
                PRIMARY, [[(name, left[name][at]) for name in self.peers] for at in range(len(prompts))]
            ), []
        followers = [
            Follower(
                self.loaded[name].model,
                self.readers[name],
                name,
                self.glue,
                rows=range(len(prompts)),
                columns=[column] * len(prompts),
                prompts=[self.readers[name].prompt(one) for one in prompts],
                dtype=torch.float32,
            )
            for column, name in enumerate(self.peers, start=1)
        ]
        return self.glue.blank(PRIMARY, len(prompts)), followers

    def _left(self, name: str, prompts: Sequence[str]) -> list[Any]:
        readings = [self.readers[name].prompt(one) for one in prompts]
        return latents(self.loaded[name], readings, self.glue.peer_depths(name))

    def work(self, tokens: int) -> Work:
        """Of a prompt of so many tokens to every expert, by arithmetic: a multiplication and an addition are two."""
        glue, size = self.glue, self.glue.options.width
        own = {name: weights_of(one.model) for name, one in self.loaded.items()}
        latent = tokens * len(self.peers)
        reader = self.glue.shapes[PRIMARY].width
        token = glue.levels * 2 * (2 * reader * size + 2 * size * size + 2 * latent * size)
        told = sum(
            2 * tokens * (self.glue.shapes[name].width * size + 2 * size * size) for name in self.peers
        )
        return Work(
            parameters=sum(one.numel() for one in glue.parameters()),
            experts=sum(one.numel() for each in self.loaded.values() for one in each.model.parameters()),
            reading=float(tokens * token + glue.levels * told),
            forwards=float(sum(2 * tokens * one for one in own.values())),
            token=float(token),
            step=float(2 * own[PRIMARY]),
        )


def weights_of(model: Any) -> int:
    """Weights that each token is multiplied with: those of the embedding only as the head."""
    return sum(one.numel() for name, one in model.named_parameters() if one.dim() > 1)


def timed(table: Table, *, rows: int, prompt: int, tokens: int, rounds: int) -> Times:
    """Each way once a round, in an order that is drawn; prompts are read before the clock starts."""
    prompts = table.prompts(rows, prompt)
    found: dict[str, list[float]] = {way: [] for way in NAMES}
    draw = random.Random(0)
    for number in range(rounds + 1):
        order = list(NAMES)
        draw.shuffle(order)
        for way in order:
            steps = tokens if number else 1  # the first round touches all weights, and does not count
            decoder = table.decoder(way, prompts, steps + 1)
            decoder.step()
            began = time.process_time()
            for _ in range(steps):
                decoder.step()
            if number:
                found[way].append(1000 * (time.process_time() - began) / steps)
    return Times({way: tuple(each) for way, each in found.items()})


def write_expert(folder: Path, shape: Shape, texts: Sequence[str], *, seed: int) -> None:
    """Random weights in bfloat16, and a byte-level BPE tokenizer of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=shape.vocabulary, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=shape.width,
                num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads,
                num_key_value_heads=shape.shared,
                intermediate_size=shape.inner,
                max_position_embeddings=2048,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
