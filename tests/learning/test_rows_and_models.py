"""Rows that a model cannot be shown as they are, and models that cannot be shown rows: told, or done right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mixmerge.calibrate.gathering import extend, gather
from mixmerge.data.batches import context_of, make_batches
from mixmerge.data.rows import Row
from mixmerge.engine.merge import merge
from mixmerge.engine.outlook import plan_with_data
from mixmerge.errors import MixmergeError
from mixmerge.experts.loading import load_expert

LONG = [{"prompt": "z" * length, "choices": ["a", "b"]} for length in (200, 20, 30)]
TEXTS = [{"text": "the quick brown fox"}, {"text": "jumps"}, {"text": "over a lazy dog, and 12 more of them"}]


def recipe(folder: Path, method: str, base: Path, experts: list[Path], shown: Any, **options: Any) -> Any:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in shown))
    written = {
        "merge_method": method,
        "models": [{"model": str(expert)} for expert in experts],
        "parameters": options,
        "dtype": "float32",
        "calibration": {"data": str(file)},
    }
    return written if method == "regmean" else {**written, "base_model": str(base)}


@pytest.mark.parametrize("method", ["adamerging", "expert_merging"])
def test_no_row_is_longer_than_the_model_takes(
    method: str, family: Callable[..., Any], clone: Callable[[Path], Path], tmp_path: Path
) -> None:
    """A tokenizer that names no limit, and positions that end at the model's: GPT-2 has no embedding beyond."""
    folders = []
    for folder in (lambda made: (made.base, *made.experts))(family("gpt2", dtype="float32")):
        copy = clone(folder)
        told = json.loads((copy / "tokenizer_config.json").read_text())
        told.pop("model_max_length", None)
        (copy / "tokenizer_config.json").write_text(json.dumps(told))
        folders.append(copy)
    written = recipe(tmp_path, method, folders[0], folders[1:], LONG, steps=2)
    _, outlook = plan_with_data(written)
    assert outlook is not None
    assert merge(written, tmp_path / "out").learned is not None
    limit = json.loads((folders[0] / "config.json").read_text())["n_positions"]
    counted = [seen.tokens for seen in outlook.experts]
    assert all(count is not None and count <= 2 * limit * len(LONG) for count in counted)


def test_positions_that_are_counted_from_the_padding() -> None:
    from transformers import BertConfig, RobertaConfig

    assert context_of(RobertaConfig(max_position_embeddings=514, pad_token_id=1), None) == 512
    assert context_of(BertConfig(max_position_embeddings=512), None) == 512


@pytest.mark.parametrize("pad", [None, 2])
def test_a_classifier_on_a_decoder_finds_the_last_token(
    pad: int | None, tmp_path: Path, tokenizer: Any
) -> None:
    """Its config names no padding, or another than the tokenizer's: in a batch as alone."""
    from transformers import LlamaConfig, LlamaForSequenceClassification, LlamaModel

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=64, num_labels=3, pad_token_id=pad,
    )  # fmt: skip
    for seed, kind in enumerate((LlamaModel, LlamaForSequenceClassification, LlamaForSequenceClassification)):
        torch.manual_seed(seed)
        config.num_labels = 2 + seed
        model = kind(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(tmp_path / str(seed))
        tokenizer.save_pretrained(tmp_path / str(seed))
    loaded = load_expert(tmp_path / "1")
    rows = [Row(text=row["text"]) for row in TEXTS]
    with torch.no_grad():
        (batch,) = make_batches(rows, tokenizer, task="classifier")
        together = loaded.model(**batch.inputs()).logits
        alone = [loaded.model(**each.inputs()).logits[0] for each in
                 make_batches(rows, tokenizer, task="classifier", batch_size=1)]  # fmt: skip
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-5, rtol=1e-5)
    experts = [tmp_path / "1", tmp_path / "2"]
    losses = []
    for size in (1, 3):
        written = recipe(tmp_path, "adamerging", tmp_path / "0", experts, TEXTS, steps=1, rows=3)
        written["calibration"]["batch_size"] = size
        learned = merge(written, tmp_path / f"out{size}").learned
        assert learned is not None
        losses.append(learned.losses[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    merge(recipe(tmp_path, "regmean", tmp_path / "0", experts, TEXTS), tmp_path / "regmean")


@pytest.mark.parametrize("method", ["adamerging", "expert_merging"])
def test_heads_of_two_classes(method: str, bert: Any, tmp_path: Path) -> None:
    """Both have a pooler and a `classifier`: run as one, a choice among several is one class that is always right."""
    base = bert(tmp_path / "base", "BertModel", seed=0)
    experts = [
        bert(tmp_path / "topics", "BertForSequenceClassification", seed=1),
        bert(tmp_path / "picks", "BertForMultipleChoice", seed=2),
    ]
    with pytest.raises(
        MixmergeError, match=r"picks: has the head of a BertForMultipleChoice, .*SequenceCl.*one class"
    ):
        merge(recipe(tmp_path, method, base, experts, TEXTS, steps=1), tmp_path / "out")


@pytest.mark.parametrize("method", ["regmean", "expert_merging"])
def test_models_without_a_tokenizer(
    method: str, family: Callable[..., Any], clone: Callable[[Path], Path], tmp_path: Path
) -> None:
    made = family("llama", dtype="float32")
    base, *experts = (clone(folder) for folder in (made.base, *made.experts))
    for folder in (base, *experts):
        for file in (*folder.glob("*token*"), *folder.glob("vocab*"), *folder.glob("special*")):
            file.unlink()
    written = recipe(tmp_path, method, base, experts, TEXTS)
    for work in (plan_with_data, lambda recipe: merge(recipe, tmp_path / "out")):
        with pytest.raises(MixmergeError, match="has no tokenizer, so it cannot be shown text"):
            work(written)


def test_a_loss_of_nothing(family: Callable[..., Any], tmp_path: Path) -> None:
    made = family("llama", dtype="float32")
    for left_out in ({"hidden_layers": "none"}, {"hidden_weight": 0}):
        options = {"logit_weight": 0, **left_out}
        written = recipe(tmp_path, "expert_merging", made.base, made.experts, TEXTS, **options)
        for work in (plan_with_data, lambda recipe: merge(recipe, tmp_path / "out")):
            with pytest.raises(MixmergeError, match="logit_weight: is 0 and no hidden states are aligned"):
                work(written)


def test_rows_too_short_to_count_are_no_new_rows(family: Callable[..., Any]) -> None:
    expert = load_expert(family("llama", dtype="float32").base)
    rows = [Row(text="long enough"), Row(text="a")]
    first = gather(expert, rows, "gram", fingerprint="m")
    assert extend(first, expert, rows) is first
    more = extend(first, expert, [*rows, Row(text="and another")])
    assert len(more.facts.rows) == 2
