"""Tiny real experts of six families, each with a tokenizer of its own kind that is trained here."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import Tensor

    from mixmerge.latent.glue import Glue
    from mixmerge.latent.offsets import Reader
    from mixmerge.latent.records import Latents, Reading, View

CONTEXT = 256
TEXTS = (
    "The quick brown fox jumps over the lazy dog, 1 + 2 = 3. We're here; they'll say it isn't 12345.",
    "naïve café, he\u0301llo wo\u0308rld 你好世界 😀 👩‍🚀 done\r\n\r\n    indented\tcode = {a: 1}\n",
    "name of the cell: kilo and mike give 7, alpha and tango give 42; the answer is alpha kilo.",
) * 3
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
BYTES = tuple(f"<0x{number:02X}>" for number in range(256))
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRIPPING = (
    "<s>{% for m in messages %}[{{ m.role }}] {{ m.content | trim }} {% endfor %}"
    "{% if add_generation_prompt %}[say] {% endif %}"
)


def byte_pairs(pieces: Any) -> Any:
    """Byte-level BPE behind a pre-tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pieces
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=list(SPECIAL), show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    return made


def gpt_2() -> Any:
    from tokenizers import pre_tokenizers

    return byte_pairs(pre_tokenizers.ByteLevel(add_prefix_space=False))


def llama_3() -> Any:
    """With offsets that leave out spaces."""
    from tokenizers import Regex, pre_tokenizers, processors

    split = pre_tokenizers.Split(Regex(LLAMA_3), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made = byte_pairs(pre_tokenizers.Sequence([split, level]))
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    return made


def with_bytes(made: Any, texts: Sequence[str]) -> Any:
    """BPE of these texts, which falls back to bytes that are ordinary entries of its vocabulary."""
    from tokenizers import models, trainers

    trainer = trainers.BpeTrainer(
        vocab_size=160, special_tokens=list(SPECIAL), show_progress=False, max_token_length=8
    )
    made.train_from_iterator(texts, trainer)
    learned = json.loads(made.to_str())["model"]
    vocabulary = learned["vocab"]
    vocabulary.update({one: len(vocabulary) + at for at, one in enumerate(BYTES)})
    merges = [tuple(pair) for pair in learned["merges"]]
    made.model = models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    return made


def llama_2() -> Any:
    """It splits nowhere, and puts a space before every text."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    return with_bytes(made, [word for text in TEXTS for word in text.split()])


def metaspace() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first"), decoders.Fuse()]
    )
    return with_bytes(made, TEXTS)


def unigram() -> Any:
    """Composes accents and knows no bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=list(SPECIAL), unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    return made


def characters() -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    known = sorted({one for text in TEXTS for one in text})
    vocabulary = {one: at for at, one in enumerate([*SPECIAL, *known])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    return made


def finished(made: Any, *, begins: bool, template: str | None) -> Any:
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    pad, bos, eos, unk = SPECIAL
    if begins:
        added = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, made.token_to_id(bos))]
        )
        before = made.post_processor
        made.post_processor = added if before is None else processors.Sequence([before, added])
    whole = PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    whole.chat_template = template
    return whole


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, Any]:
    """By name; the first two lose no byte of a text."""
    return {
        "gpt_2": finished(gpt_2(), begins=False, template=CHATML),
        "llama_3": finished(llama_3(), begins=True, template=None),
        "llama_2": finished(llama_2(), begins=True, template=STRIPPING),
        "metaspace": finished(metaspace(), begins=False, template=None),
        "unigram": finished(unigram(), begins=False, template=None),
        "characters": finished(characters(), begins=True, template=CHATML),
    }


_BLOCKS = {"num_attention_heads": 4, "max_position_embeddings": CONTEXT}
_GROUPED = {**_BLOCKS, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}
# family -> (class, configuration, tokenizer); widths and numbers of layers all differ
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("Llama", {**_GROUPED, "hidden_size": 32, "num_hidden_layers": 3}, "gpt_2"),
    "qwen3": ("Qwen3", {**_GROUPED, "hidden_size": 40, "num_hidden_layers": 4}, "llama_3"),
    "gemma": ("Gemma", {**_GROUPED, "hidden_size": 24, "num_hidden_layers": 2}, "llama_2"),
    "gpt2": ("GPT2", {"n_embd": 48, "n_layer": 4, "n_head": 4, "n_positions": CONTEXT}, "metaspace"),
    "gpt_neox": (
        "GPTNeoX",
        {**_BLOCKS, "hidden_size": 56, "num_hidden_layers": 3, "intermediate_size": 64},
        "unigram",
    ),
    "opt": (
        "OPT",
        {**_BLOCKS, "hidden_size": 16, "word_embed_proj_dim": 20, "num_hidden_layers": 5, "ffn_dim": 32},
        "characters",
    ),
}


@dataclass(frozen=True)
class Tiny:
    """As an engine has a loaded expert."""

    name: str
    model: Any
    tokenizer: Any
    reader: Reader


def _model(family: str) -> Any:
    import torch
    import transformers

    kind, settings, _ = FAMILIES[family]
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=512, pad_token_id=0, bos_token_id=1, eos_token_id=2, **settings
    )
    suffix = "LMHeadModel" if family == "gpt2" else "ForCausalLM"
    with torch.random.fork_rng():
        torch.manual_seed(sorted(FAMILIES).index(family))
        model = getattr(transformers, kind + suffix)(config).eval().requires_grad_(False)
        for _, one in sorted(model.named_parameters()):
            one.add_(0.1 * torch.randn(one.shape))
    return model


@pytest.fixture(scope="session")
def experts(tokenizers: Mapping[str, Any]) -> Iterator[dict[str, Tiny]]:
    """By family. Shared: that nobody changes their weights is checked at the end."""
    from mixmerge.latent.offsets import Reader

    found = {}
    for family, (_, _, name) in FAMILIES.items():
        tokenizer = tokenizers[name]
        found[family] = Tiny(
            family, _model(family), tokenizer, Reader(tokenizer, name=family, context=CONTEXT)
        )
    before = {name: copy.deepcopy(one.model.state_dict()) for name, one in found.items()}
    yield found
    for name, one in found.items():
        state = one.model.state_dict()
        assert all(bool((state[key] == value).all()) for key, value in before[name].items()), name
        assert not hooks_of(one.model), name


def hooks_of(model: Any) -> list[Any]:
    """Ours on any part of a model; transformers puts some of its own there, and leaves them."""
    every = [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    return [hook for hook in every if getattr(hook, "__module__", "").startswith("mixmerge")]


@dataclass(frozen=True)
class Row:
    """A prompt and answer as a primary and its peers read them."""

    read: Reading
    peers: tuple[tuple[str, Latents], ...]


@dataclass(frozen=True)
class Table:
    """Experts around a glue that has been stirred, so that peers are heard."""

    glue: Glue
    experts: Mapping[str, Tiny]

    def row(
        self,
        primary: str,
        peers: Sequence[str],
        prompt: Any,
        answer: str = "",
        *,
        mode: str = "prompt",
        tokens: int | None = None,
        handed: int | None = None,
    ) -> Row:
        """Args: ``tokens`` of the answer that are there, of which the peers have been ``handed`` some; None: all."""
        from dataclasses import replace

        from mixmerge.latent.peers import latents

        reader = self.experts[primary].reader
        read = reader.with_answer(prompt, answer, role="primary", end=False)
        if tokens is not None:
            stop = read.answer_from + tokens
            read = replace(read, ids=read.ids[:stop], ends=read.ends[:stop], seen=read.seen[:stop])
        said = read.ids[read.answer_from :]
        text = "" if mode == "prompt" else reader.said(said if handed is None else said[:handed])
        found = []
        for name in peers:
            heard = self.experts[name].reader.with_answer(prompt, text, role="peer")
            found.append((name, latents(self.experts[name], [heard], self.glue.peer_depths(name))[0]))
        return Row(read, tuple(found))

    def view(
        self,
        primary: str,
        rows: Sequence[Row],
        *,
        mode: Any = "prompt",
        chunk: int = 1,
        gates: Any = None,
        side: str = "right",
    ) -> tuple[View, dict[str, Tensor]]:
        """What is seen, and what the model is called with."""
        import torch

        from mixmerge.latent.records import View, upto_of

        longest = max(len(row.read.ids) for row in rows)
        shape = (len(rows), longest)
        ids, mask, seen, upto = (torch.zeros(shape, dtype=torch.long) for _ in range(4))
        for at, row in enumerate(rows):
            size = len(row.read.ids)
            part = slice(0, size) if side == "right" else slice(longest - size, longest)
            ids[at, part] = torch.tensor(row.read.ids)
            mask[at, part] = 1
            seen[at, part] = torch.tensor(row.read.seen)
            upto[at, part] = torch.tensor(upto_of(row.read, mode, chunk))
        memory = self.glue.memory(primary, [row.peers for row in rows])
        positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        return View(memory, gates, seen, upto), given

    def logits(self, primary: str, view: View, given: Mapping[str, Tensor]) -> Tensor:
        import torch

        from mixmerge.latent.interaction import Interaction

        model = self.experts[primary].model
        with torch.no_grad(), Interaction(model, self.glue, primary).running(view):
            found: Tensor = model(**given).logits
        return found


@pytest.fixture(scope="session")
def table(experts: Mapping[str, Tiny]) -> Callable[..., Table]:
    """``table(names=None, *, depths=3, stirred=True, **options of bridges)``."""
    import torch

    from mixmerge.latent.decoders import shape_of
    from mixmerge.latent.glue import Glue
    from mixmerge.latent.options import BridgeOptions

    def make(
        names: Sequence[str] | None = None,
        *,
        depths: Any = 3,
        stirred: bool = True,
        start: Any = "write",
        null: bool = True,
        primary: str | None = None,
    ) -> Table:
        shapes = [
            shape_of(experts[name].model, name=name, hash=name.encode().hex()) for name in names or experts
        ]
        options = BridgeOptions(width=24, heads=3, start=start, null=null)
        glue = Glue(shapes, depths, options, primary=primary)
        if stirred:
            draw = torch.Generator().manual_seed(5)
            with torch.no_grad():
                for _, one in sorted(glue.named_parameters()):
                    one.add_(0.15 * torch.randn(one.shape, generator=draw))
        return Table(glue, experts)

    return make


@pytest.fixture(scope="session")
def homes(experts: Mapping[str, Tiny], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of some of the experts, as a user has them."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    root, found = tmp_path_factory.mktemp("homes"), {}
    for name in ("llama", "gpt_neox", "opt"):
        found[name] = root / name
        experts[name].model.save_pretrained(found[name])
        experts[name].tokenizer.save_pretrained(found[name])
    return found


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
        from mixmerge.experts import Expert
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
def trio(tokenizers: Mapping[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Trio:
    """On disk: ``b`` reads letter by letter, so that it has least room."""
    made = Trio(tmp_path_factory.mktemp("trio"))
    for name, family, tokenizer in (
        ("a", "llama", "gpt_2"),
        ("b", "gpt_neox", "characters"),
        ("c", "gpt2", "metaspace"),
    ):
        made.experts[name] = made.root / name
        _model(family).save_pretrained(made.experts[name])
        tokenizers[tokenizer].save_pretrained(made.experts[name])
    return made
