"""Batches of tokens: masks by hand, order, packing, chats, pairs, and what is too short."""

from __future__ import annotations

from typing import Any

import pytest

from mixmerge.data.batches import make_batches
from mixmerge.data.rows import Row
from mixmerge.errors import MixmergeError


def spelled(tokenizer: Any, batch: Any, number: int) -> tuple[str, str]:
    """(the real tokens of a line, those to be predicted) as text."""
    ids, mask, loss = batch.input_ids[number], batch.attention_mask[number].bool(), batch.loss_mask[number]
    assert not (loss & ~mask).any()
    return tokenizer.decode(ids[mask]), tokenizer.decode(ids[loss])


def test_masks_of_text_and_answers(tokenizer: Any) -> None:
    rows = [Row(text="xyz"), Row(prompt="1 + 2 = ", answer="3!"), Row(prompt="ab")]
    (batch,) = make_batches(rows, tokenizer)
    assert [spelled(tokenizer, batch, at) for at in range(3)] == [
        ("xyz", "yz"),
        ("1 + 2 = 3!", " 3!"),  # the token across the border is the answer's
        ("ab", "b"),
    ]
    assert batch.rows == (0, 1, 2)
    assert batch.labels is None
    assert batch.tokens == int(batch.attention_mask.sum())
    assert (batch.input_ids[batch.attention_mask == 0] == tokenizer.pad_token_id).all()
    assert batch.attention_mask[0].tolist() == [1, 1, 1] + [0] * (batch.input_ids.shape[1] - 3)


def test_order_and_batch_size(tokenizer: Any) -> None:
    rows = [Row(text="z" * size) for size in (5, 2, 9, 3)]
    given = make_batches(rows, tokenizer, batch_size=3)
    assert [batch.rows for batch in given] == [(0, 1, 2), (3,)]
    shortest = make_batches(rows, tokenizer, batch_size=2, order="length")
    assert [batch.rows for batch in shortest] == [(1, 3), (0, 2)]
    assert [batch.input_ids.shape[1] for batch in shortest] == [3, 9]
    cut = make_batches(rows, tokenizer, max_tokens=4)[0]
    assert cut.attention_mask.sum(1).tolist() == [4, 2, 4, 3]


def test_packing_fills_lines_and_parts_rows(tokenizer: Any) -> None:
    rows = [Row(text="xx"), Row(prompt="zz", answer="yy"), Row(text="qqqqq")]
    (batch,) = make_batches(rows, tokenizer, layout="packed", max_tokens=9)
    assert batch.rows == (0, 1, 2)
    assert [spelled(tokenizer, batch, at) for at in range(2)] == [
        ("xx</s>zzyy</s>", "x</s>yy</s>"),
        ("qqqqq</s>", "qqqq</s>"),
    ]
    with pytest.raises(MixmergeError, match="packed is for language models"):
        make_batches(rows, tokenizer, layout="packed", task="classifier")


def test_a_chat_is_shown_by_the_template(tokenizer: Any) -> None:
    from copy import deepcopy

    rows = [Row(messages=(("user", "hi"),), answer="ho"), Row(text="zz")]
    with pytest.raises(MixmergeError, match=r"no chat template, and 1 rows are chats \(0\)"):
        make_batches(rows, tokenizer)
    chatty = deepcopy(tokenizer)
    shown = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    chatty.chat_template = shown + "{% if add_generation_prompt %}<a>{% endif %}"
    (batch,) = make_batches(rows, chatty)
    assert spelled(chatty, batch, 0) == ("<user>hi<a>ho", "ho")


def test_a_classifier_gets_texts_pairs_and_labels(tokenizer: Any) -> None:
    rows = [Row(text="ab", label=1), Row(text="a", text_pair="b", label=0), Row(prompt="q", label=2)]
    (batch,) = make_batches(rows, tokenizer, task="classifier")
    assert batch.labels is not None
    assert batch.labels.tolist() == [1, 0, 2]
    assert not batch.loss_mask.any()
    (some,) = make_batches([*rows, Row(text="z")], tokenizer, task="classifier")
    assert some.labels is None
    assert some.input_ids.shape[0] == 4


def test_pairs_keep_their_types() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(
        models.WordLevel({"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3, "b": 4}, unk_token="[PAD]")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    of_bert = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip
    rows = [Row(text="a", text_pair="b b"), Row(text="a")]
    (batch,) = make_batches(rows, of_bert, task="classifier")
    assert batch.input_ids.tolist() == [[1, 3, 2, 4, 4, 2], [1, 3, 2, 0, 0, 0]]
    assert batch.token_type_ids is not None
    assert batch.token_type_ids.tolist() == [[0, 0, 0, 1, 1, 1], [0] * 6]
    assert set(batch.inputs()) == {"input_ids", "attention_mask", "token_type_ids"}


def test_rows_that_are_too_short(tokenizer: Any) -> None:
    rows = [Row(text="z"), Row(text="zz")]
    assert [batch.rows for batch in make_batches(rows, tokenizer)] == [(1,)]
    with pytest.raises(MixmergeError, match="none of 1 rows gives two tokens"):
        make_batches(rows[:1], tokenizer)
    assert make_batches(rows[:1], tokenizer, task="classifier")[0].rows == (0,)
