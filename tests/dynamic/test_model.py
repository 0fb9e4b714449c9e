"""A dynamic model by its promises: rows are alone, a text read whole is a text read token by token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mixmerge.dynamic.model import DynamicModel
from mixmerge.engines.decoding import left_padded
from mixmerge.errors import MixmergeError

Make = Callable[..., DynamicModel]
TEXTS = ("a b c", "one two three four five six", "x", "the quick brown fox jumps", "1 + 2 = ", "hello there")
KINDS = ("token", "prompt", "deep", "text", "second")


def _padded(model: DynamicModel, *, right: bool = False) -> tuple[Tensor, Tensor]:
    tokens = [model.tokenizer(text)["input_ids"] for text in TEXTS]
    if not right:
        return left_padded(tokens, pad=0, device="cpu")
    longest = max(map(len, tokens))
    ids = torch.tensor([one + [0] * (longest - len(one)) for one in tokens])
    mask = torch.tensor([[1] * len(one) + [0] * (longest - len(one)) for one in tokens])
    return ids, mask


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_depends_on_itself_alone(dynamic: Make, kind: str) -> None:
    model = dynamic(kind)
    ids, mask = _padded(model)
    turned = torch.tensor([4, 2, 0, 5, 1, 3])
    with torch.no_grad():
        together = model(ids, mask, texts=TEXTS)
        other = model(ids[turned], mask[turned], texts=[TEXTS[at] for at in turned])
        right_ids, right_mask = _padded(model, right=True)
        right = model(right_ids, right_mask, texts=TEXTS)
        for row, text in enumerate(TEXTS):
            count = int(mask[row].sum())
            alone = model(ids[row : row + 1, -count:], texts=[text])[0]
            torch.testing.assert_close(together[row, -count:], alone, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(right[row, :count], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(other, together[turned], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gate_changes_what_the_base_says(dynamic: Make, kind: str) -> None:
    model = dynamic(kind)
    ids, mask = _padded(model)
    with torch.no_grad():
        mixed, base = model(ids, mask, texts=TEXTS), model(ids, mask, weights=torch.zeros(3))
        assert not torch.allclose(mixed, base, atol=1e-3)
        model.detach()
        torch.testing.assert_close(model.model(ids, attention_mask=mask).logits[:, -1], base[:, -1])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_generated_is_what_a_whole_text_says(dynamic: Make, kind: str) -> None:
    """Teacher-forced and incremental logits agree, by the log-probabilities of each generated token."""
    from mixmerge.dynamic.engine import DynamicEngine
    from mixmerge.engines.records import Request

    model = dynamic(kind)
    engine = DynamicEngine.over(model._running)
    requests = [Request(str(at), text, 4 + at, logprobs=True) for at, text in enumerate(TEXTS)]
    for text, one in zip(TEXTS, engine.generate(requests), strict=True):
        prompt = model.tokenizer(text)["input_ids"]
        tokens = _greedy(model, prompt, text, one.tokens_out)
        whole = torch.tensor([prompt + tokens])
        with torch.no_grad():
            logits = model(whole, prompt=[len(prompt)], texts=[text])[0, len(prompt) - 1 : -1]
        told = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert one.logprobs is not None
        torch.testing.assert_close(torch.tensor(one.logprobs), told, atol=1e-4, rtol=1e-4)
        assert logits.argmax(-1).tolist() == tokens


def _greedy(model: DynamicModel, prompt: list[int], text: str, count: int) -> list[int]:
    tokens: list[int] = []
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens]), prompt=[len(prompt)], texts=[text])
        tokens.append(int(logits[0, -1].argmax()))
    return tokens


@pytest.mark.parametrize("kind", KINDS)
def test_texts_do_not_depend_on_the_batch(dynamic: Make, kind: str) -> None:
    model = dynamic(kind)
    settings: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.7, "top_p": 0.9, "seed": 3}
    together = model.generate(TEXTS, **settings)
    assert model.generate(TEXTS[::-1], **settings)[::-1] == together
    assert [model.generate([text], **settings)[0] for text in TEXTS] == together
    assert len(set(together)) > 1


def test_weights_that_are_said_are_each_expert(dynamic: Make) -> None:
    model = dynamic("token")
    ids, mask = _padded(model)
    rows = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.5, 0], [0, 0, 0], [1, -1, 2]])
    with torch.no_grad():
        together = model(ids, mask, weights=rows)
        for row, weights in enumerate(rows):
            merged = dynamic("token")
            merged.detach()
            for name, site in model.bank.sites.items():
                merged.model.get_parameter(name).data += site.delta(weights)
            count = int(mask[row].sum())
            alone = merged.model(ids[row : row + 1, -count:]).logits[0]
            torch.testing.assert_close(together[row, -count:], alone, atol=1e-4, rtol=1e-4)
    named = [dict(zip(model.experts, row.tolist(), strict=True)) for row in rows]
    with torch.no_grad():
        torch.testing.assert_close(model(ids, mask, weights=named), together)
    texts = model.generate(TEXTS, weights=rows, max_new_tokens=5)
    for at, text in enumerate(TEXTS):
        assert model.generate([text], weights=rows[at], max_new_tokens=5) == [texts[at]]


def test_scores_are_sums_of_log_probabilities(dynamic: Make) -> None:
    model = dynamic("prompt")
    found = model.score(["a b c", "x"], [" d", " y z"])
    alone = model.score(["x"], [" y z"])
    assert found[1] == pytest.approx(alone[0], abs=1e-4)
    tokens = model.tokenizer("a b c")["input_ids"]
    whole = model.tokenizer("a b c d")["input_ids"]
    assert whole[: len(tokens)] == tokens
    with torch.no_grad():
        logits = model(torch.tensor([whole]), prompt=[len(tokens)])[0].log_softmax(-1)
    told = sum(float(logits[at - 1, whole[at]]) for at in range(len(tokens), len(whole)))
    assert found[0] == pytest.approx(told, abs=1e-4)


def test_weights_by_layer_are_explained(dynamic: Make) -> None:
    model = dynamic("prompt")
    first, second = model.explain(["a b c", "x"])
    assert first.experts == model.experts == ("one", "two", "three")
    assert list(first.layers()) == ["0", "1", "lm_head"]
    assert sum(first.mean().values()) == pytest.approx(1, abs=1e-4)
    assert first.mean() != second.mean()
    assert model.explain(["x"])[0].mean() == pytest.approx(second.mean(), abs=1e-4)
    told = model.explain(["x"], weights={"two": 0.25})[0]
    assert told.mean() == {"one": 0, "two": 0.25, "three": 0}
    by_token = dynamic("token").explain(["a b c"])[0]
    assert all(sum(weights) == pytest.approx(1, abs=1e-4) for weights in by_token.sites.values())


def test_a_classifier_with_its_own_head(family: Callable[..., Any], standins: Any) -> None:
    from transformers import AutoTokenizer, BertForSequenceClassification

    folder: Path = family("bert").base
    model = BertForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bank = standins.bank_of(model)
    dynamic = DynamicModel(model, tokenizer, bank, standins.gates["prompt"](model, bank))
    batch = tokenizer(list(TEXTS), padding=True, return_tensors="pt")
    with torch.no_grad():
        together = dynamic(batch["input_ids"], batch["attention_mask"])
        assert together.shape == (len(TEXTS), 2)
        for row, text in enumerate(TEXTS):
            alone = dynamic(tokenizer(text, return_tensors="pt")["input_ids"])
            torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)
    assert len(dynamic.explain(TEXTS)) == len(TEXTS)
    with pytest.raises(MixmergeError, match="does not continue texts"):
        dynamic.generate(["a"])


def test_weights_that_make_no_sense_are_refused(dynamic: Make) -> None:
    model = dynamic("given")
    with pytest.raises(MixmergeError, match="Did you mean 'two'") as raised:
        model.generate(["a"], weights={"tow": 1.0, "one": float("nan")})
    assert len(raised.value.faults) == 2
    with pytest.raises(MixmergeError, match=r"shape \(2,\)"):
        model.generate(["a"], weights=[1.0, 2.0])
    with pytest.raises(MixmergeError, match="came from no folder"):
        model.export([1.0, 0, 0], "out")


def test_a_gate_of_texts_needs_what_embeds_them(family: Callable[..., Any], standins: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(family("llama").base).eval()
    bank = standins.bank_of(model)
    with pytest.raises(MixmergeError, match="features of texts"):
        DynamicModel(model, None, bank, standins.gates["text"](model, bank))
