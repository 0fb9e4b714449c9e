"""Texts and weights that a network cannot be asked with."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from mixmerge.dynamic.model import DynamicModel
from mixmerge.errors import MixmergeError
from mixmerge.experts.encoding import TextEncoder

Make = Callable[..., DynamicModel]


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda model: model.generate("one text"), "prompts: is one text. A list of texts"),
        (lambda model: model.explain("one text"), "texts: is one text"),
        (lambda model: model.score(["a", "b"], ["c"]), "there are 2 prompts and 1 continuations"),
        (lambda model: model.explain(["a", "b " * 100]), "texts[1]: has 200 tokens. 1 to 64"),
        (
            lambda model: model.generate(["a"], weights=[[1.0, 2.0], [1.0]]),
            "weights: are [[1.0, 2.0], [1.0]]",
        ),
        (lambda model: model.generate(["a"], weights="one"), "weights: are 'one'"),
        (lambda model: model.generate(["a"], weights=1.0), "weights: are 1.0. By name, or a number for each"),
        (lambda model: model.generate(["a"], weights={"one": "much"}), "weights.one: is 'much'"),
    ],
)
def test_what_cannot_be_asked(dynamic: Make, ask: Callable[[Any], Any], words: str) -> None:
    with pytest.raises(MixmergeError, match=re.escape(words)):
        ask(dynamic("token", "gpt2"))


def test_an_encoder_reads_what_it_can_of_long_texts(family: Callable[..., Any]) -> None:
    encoder = TextEncoder(family("bert").base)
    assert encoder(["b " * 600, "b"]).isfinite().all()
