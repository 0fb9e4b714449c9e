"""Peers that read answers along, as they come: what each row gets is what the peer leaves of its whole text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from mixmerge.engines.decoding import slides

if TYPE_CHECKING:
    from mixmerge.latent.records import Memory

PROMPTS = ("name of the cell: kilo and mike give 7, alpha and tango give 42", "kilo", "the lazy dog: 12345")
ANSWERS = (" we're 42 and fox, isn't it. alpha", " the cell is 7, done, and more of it", " fox")
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
# architecture, its configuration, and whether its layers count places in the cache
PEERS = (
    ("Mistral", {**_SIZES, "num_key_value_heads": 2, "sliding_window": 8}, True),
    (
        "GPTNeo",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
        },
        True,
    ),
    ("Mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256}, True),
    (
        "Jamba",  # its states take up what they have kept for one token at a time
        {
            **_SIZES,
            "num_key_value_heads": 2,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
        },
        True,
    ),
    ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, False),
    ("Llama", {**_SIZES, "num_key_value_heads": 2}, False),
)


def made(kind: str, settings: dict[str, Any], tokenizer: Any, folder: Path) -> Path:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=512, pad_token_id=0, bos_token_id=1, eos_token_id=2, **settings
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(config).requires_grad_(False)
        for one in model.parameters():
            one.add_(0.1 * torch.randn(one.shape))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "settings", "counts"), PEERS, ids=[one[0] for one in PEERS])
def test_rows_of_unlike_lengths_are_read_as_whole_texts(
    trio: Any,
    tokenizers: dict[str, Any],
    tmp_path: Path,
    kind: str,
    settings: dict[str, Any],
    counts: bool,
) -> None:
    peer = made(kind, settings, tokenizers["gpt_2"], tmp_path / kind)
    glue = trio.fitted(
        f"after {kind}",
        mode="lockstep",
        depths=((0, "last"), (0.5, 0.5)),
        experts={"a": trio.experts["a"], "peer": peer},
    )
    engine = glue.engine()
    engine.load()
    parts = engine._parts()
    read = parts.experts["peer"]
    assert slides(read._expert().model) is counts
    followers = read.following([(at, 1) for at in range(3)], PROMPTS, parts.glue, torch.float32)
    along = [one.begin(3) for one in followers]
    for upto in range(1, 1 + max(map(len, ANSWERS))):
        texts = [answer[:upto] for answer in ANSWERS]
        along += [more for one in followers if (more := one.follow(texts, 3)) is not None]
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        left = read.read(prompt, answer)
        whole = told(parts.glue.memory("a", [[("peer", left)]], dtype=torch.float32), 0)
        found = [one for memory in along for one in told(memory, row)]
        assert [end for end, _ in found] == [end for end, _ in whole]
        assert found[-1][0] > len(prompt) or row == 2, "the answer was read, too"
        torch.testing.assert_close(
            torch.stack([keys for _, keys in found]),
            torch.stack([keys for _, keys in whole]),
            atol=1e-4,
            rtol=1e-4,
        )


def told(memory: Memory, row: int) -> list[tuple[int, torch.Tensor]]:
    """Of a row's latents, the end of each and its keys at all levels; without the empty latent and padding."""
    there = (memory.counts[row] > 0).nonzero()[:, 0].tolist()
    return [
        (int(memory.ends[row, at]), torch.cat([keys[row, :, at] for keys in memory.keys])) for at in there
    ]
