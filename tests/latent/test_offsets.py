"""Which bytes of a text each token stands for, and which tokens of an answer no further text can change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixmerge.engines.local import TransformersEngine
from mixmerge.engines.records import Message, Request
from mixmerge.errors import MixmergeError
from mixmerge.latent.closing import LONGEST, Saying
from mixmerge.latent.offsets import Reader
from mixmerge.latent.records import Reading, upto_of

PIECES = (
    *(
        "the",
        " fox",
        "we're",
        "they'll",
        "'",
        " ",
        "   ",
        "\t",
        "\n",
        "\r\n",
        "\n \n",
        "1",
        "12345",
        "ABC",
        "aB",
    ),
    *("é", "e\u0301", "\u0327", "q\u0307\u0323", "ﬁ", "你好", "😀", "👩‍🚀", "\u200d", "\ufffd", "한", "각"),
    *(", ", ".", "...", "{", " -> ", "<s>", "<|im_end|>", "\ue0f00\ue0f1", "\x00", "ß", " ñ"),
)
TEXT = st.one_of(st.lists(st.sampled_from(PIECES), max_size=12).map("".join), st.text(max_size=20))
NAMES = ("gpt_2", "llama_3", "llama_2", "metaspace", "unigram", "characters")
LOSSLESS = NAMES[:2]


@pytest.fixture(scope="module")
def readers(tokenizers: Mapping[str, Any]) -> dict[str, Reader]:
    return {name: Reader(one, name=name, context=None) for name, one in tokenizers.items()}


def sizes(text: str) -> int:
    return len(text.encode())


def check_order(read: Reading) -> None:
    assert len(read.ids) == len(read.ends) == len(read.seen)
    assert all(a <= b for a, b in pairwise(read.ends))
    assert all(a <= b for a, b in pairwise(read.seen))
    assert all(seen <= end for seen, end in zip(read.seen, read.ends, strict=True))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60)
@given(text=TEXT)
def test_of_a_prompt_every_token_has_read_at_most_what_it_may_contain(
    readers: Mapping[str, Reader], name: str, text: str
) -> None:
    reader = readers[name]
    if not reader.tokenizer(text)["input_ids"]:
        with pytest.raises(MixmergeError, match="has no token"):
            reader.prompt(text)
        return
    read = reader.prompt(text)
    check_order(read)
    assert read.prompt_bytes == sizes(text)
    assert read.seen[-1] == read.ends[-1] == read.prompt_bytes
    assert list(read.ids) == reader.tokenizer(text)["input_ids"]


@pytest.mark.parametrize("name", LOSSLESS)
@settings(max_examples=60)
@given(text=TEXT.filter(lambda text: text and "<" not in text))
def test_bytes_of_byte_level_tokens_lie_between_what_is_seen_and_what_may_be_known(
    readers: Mapping[str, Reader], name: str, text: str
) -> None:
    reader = readers[name]
    read = reader.prompt(text)
    total = 0
    for token, end, seen in zip(read.ids, read.ends, read.seen, strict=True):
        if token not in reader.tokenizer.all_special_ids:
            total += len(reader.tokenizer.convert_ids_to_tokens(token))  # a letter for each byte
        assert seen <= total <= end
    assert total == sizes(text)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=100)
@given(text=TEXT, other=TEXT, data=st.data())
def test_what_follows_never_changes_a_closed_token(
    readers: Mapping[str, Reader], name: str, text: str, other: str, data: st.DataObject
) -> None:
    """The heart of it: whatever stands from a place on, tokens that are closed there stay as they are."""
    at = data.draw(st.integers(0, len(text)))
    limit = sizes(text[:at])

    def closed(whole: str) -> list[tuple[int, int]]:
        ids, ends = readers[name].growth().add(whole)
        assert all(a <= b for a, b in pairwise(ends))
        assert all(end <= sizes(whole) for end in ends)
        return [(token, end) for token, end in zip(ids, ends, strict=True) if end <= limit]

    assert closed(text) == closed(text[:at] + other) == closed(text[:at])


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40)
@given(text=TEXT, cuts=st.lists(st.integers(0, 60), max_size=6))
def test_it_makes_no_difference_how_an_answer_is_handed_over(
    readers: Mapping[str, Reader], name: str, text: str, cuts: list[int]
) -> None:
    growth = readers[name].growth()
    ids: list[int] = []
    ends: list[int] = []
    for cut in [*sorted(cuts), len(text)]:
        new, where = growth.add(text[:cut])
        ids += new
        ends += where
    assert (ids, ends) == readers[name].growth().add(text)
    heard = readers[name].with_answer("Q", text, role="peer")
    check_order(heard)
    assert list(heard.ids[heard.answer_from :]) == ids
    assert list(heard.ends[heard.answer_from :]) == [end + 1 for end in ends]


@pytest.mark.parametrize("name", LOSSLESS)
@settings(max_examples=60)
@given(text=TEXT.filter(lambda text: "<" not in text))
def test_closed_tokens_are_the_text_and_nothing_is_read_twice(
    readers: Mapping[str, Reader], name: str, text: str
) -> None:
    ids, ends = readers[name].growth().add(text)
    heard = readers[name].tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert text.startswith(heard)
    assert sizes(heard) < sizes(text) or not text
    assert not ends or sizes(heard) < ends[-1]


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_is_cut_as_the_tokenizer_cuts_a_whole_text(
    readers: Mapping[str, Reader], name: str
) -> None:
    text = "The lazy dog, we're here; they'll say it isn't 12345.\r\n\r\n    indented code = {a: 1}\n\n \nok alpha "
    ids, ends = readers[name].growth().add(text)
    tokenizer = readers[name].tokenizer
    whole = tokenizer("\n" + text, add_special_tokens=False)["input_ids"]
    first = len(tokenizer("\n", add_special_tokens=False)["input_ids"])
    # An answer goes on where a prompt ends: nothing is put before it, in particular no space.
    own = (
        whole[first:]
        if name in ("llama_2", "metaspace", "unigram")
        else tokenizer(text, add_special_tokens=False)["input_ids"]
    )
    assert ids == own[: len(ids)]
    assert len(own) - len(ids) <= 2
    assert sizes(text) - ends[-1] <= 1


def test_a_tokenizer_that_was_asked_to_pad_and_cut_reads_the_same(tokenizers: Mapping[str, Any]) -> None:
    text = "The lazy dog, we're here; they'll say it isn't 12345.\n"
    for name in NAMES:
        wanted = Reader(tokenizers[name], name=name, context=None).growth().add(text)
        for length in (2, 400):
            tokenizers[name](text, padding="max_length", truncation=True, max_length=length)
            reader = Reader(tokenizers[name], name=name, context=None)
            growth = reader.growth()
            tokenizers[name](text, padding="max_length", truncation=True, max_length=length)
            assert growth.add(text) == wanted
        tokenizers[name](text)


def test_a_text_without_spaces_is_read_in_parts(readers: Mapping[str, Reader]) -> None:
    ids, ends = readers["llama_2"].growth().add("你好" * LONGEST)
    assert ends[0] == 3 * (LONGEST + 1)
    assert ids == readers["llama_2"].growth().add("你好" * 2 * LONGEST)[0][: len(ids)]


def test_bytes_of_one_character_share_its_span(readers: Mapping[str, Reader]) -> None:
    for name in ("gpt_2", "llama_2"):
        read = readers[name].prompt("a𐍈b")  # not in the vocabulary: four tokens
        pieces = [
            (end, seen) for end, seen in zip(read.ends, read.seen, strict=True) if end == 5 and seen < 6
        ]
        assert pieces == [(5, 1), (5, 1), (5, 1), (5, 5)], name
        assert (read.ends[-1], read.seen[-1]) == (6, 6)


def test_an_accent_that_is_composed_belongs_to_its_letter(readers: Mapping[str, Reader]) -> None:
    read = readers["unigram"].prompt("e\u0301 x")
    tokens = readers["unigram"].tokenizer.convert_ids_to_tokens(read.ids)
    assert read.ends[tokens.index("é")] == 3


def test_a_template_takes_the_bytes_before_it(readers: Mapping[str, Reader]) -> None:
    turns = (Message("user", "user"), Message("assistant", " a😀 "), Message("user", "x"))
    for name in ("gpt_2", "llama_2", "characters"):
        read = readers[name].prompt(turns)
        check_order(read)
        assert read.prompt_bytes == 4 + 7 + 1
        assert {0, 4, 11, 12} <= set(read.ends)
        text = readers[name].tokenizer.decode(read.ids[read.ends.index(11) + 1 :])
        assert "user" in text
        assert "assistant" not in text.split("x")[0]
    # without one, contents are joined by empty lines that are in no content
    read = readers["metaspace"].prompt(turns)
    assert read.prompt_bytes == 12
    assert list(read.ids) == readers["metaspace"].tokenizer("user\n\n a😀 \n\nx")["input_ids"]


@settings(max_examples=60)
@given(contents=st.lists(TEXT, min_size=1, max_size=3))
def test_turns_are_found_whatever_they_say(readers: Mapping[str, Reader], contents: list[str]) -> None:
    turns = tuple(Message("user", content) for content in contents)
    for name in ("gpt_2", "llama_2"):
        read = readers[name].prompt(turns)
        check_order(read)
        assert read.prompt_bytes == sum(map(sizes, contents)) == read.seen[-1]


def test_a_template_that_alters_contents_is_refused(tokenizers: Mapping[str, Any]) -> None:
    import copy

    loud = copy.deepcopy(tokenizers["gpt_2"])
    loud.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    with pytest.raises(MixmergeError, match=r"expert loud: prompt: its chat template alters turn 1.*'hello'"):
        Reader(loud, name="loud", context=None).prompt((Message("user", "hello"),))
    loud.chat_template = "{{ raise_exception('no system turns here') }}"
    with pytest.raises(MixmergeError, match="refuses these turns: no system turns"):
        Reader(loud, name="loud", context=None).prompt((Message("system", "hello"),))


def test_a_tokenizer_without_offsets_is_refused() -> None:
    from transformers import ByT5Tokenizer

    with pytest.raises(MixmergeError, match="expert old: its tokenizer does not say which characters"):
        Reader(ByT5Tokenizer(), name="old", context=None)


def test_tokens_without_embeddings_are_refused(tokenizers: Mapping[str, Any]) -> None:
    tokenizer = tokenizers["characters"]
    beyond = tokenizer.convert_tokens_to_ids("z")
    reader = Reader(tokenizer, name="a", context=None, embedded=beyond)
    said = rf"expert a: prompt: holds 'z', token {beyond} of the tokenizer, and the model has embeddings of {beyond}"
    with pytest.raises(MixmergeError, match=said):
        reader.prompt("abcz")
    for role in ("primary", "peer"):
        with pytest.raises(MixmergeError, match=said):
            reader.with_answer("abc", "bz z", role=role)


def test_a_prompt_that_is_too_long_is_refused_or_read_from_its_end(tokenizers: Mapping[str, Any]) -> None:
    text = "0123456789" * 3
    reader = Reader(tokenizers["characters"], name="small", context=10)
    with pytest.raises(MixmergeError, match=r"expert small: prompt: has 31 tokens. small reads less than 10"):
        reader.prompt(text)
    whole = Reader(tokenizers["characters"], name="large", context=None).prompt(text)
    cut = reader.prompt(text, too_long="left")
    assert cut.ids == (whole.ids[0], *whole.ids[-8:])  # it still begins as a text does
    assert cut.ends == (0, *range(23, 31))
    assert (cut.answer_from, cut.prompt_bytes) == (9, 30)
    with pytest.raises(MixmergeError, match=r"has 12 tokens with its answer. small reads 10"):
        reader.with_answer("0123456", "012", role="primary")
    heard = reader.with_answer("0123456", "0123", role="peer")  # what has no room is not read
    assert len(heard.ids) == 10
    assert heard.ends[-2:] == (9, 10)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40)
@given(answer=TEXT)
def test_an_answer_has_the_bytes_of_what_was_said(
    readers: Mapping[str, Reader], name: str, answer: str
) -> None:
    reader = readers[name]
    prompt = "Q: é 1 + 2\nA:"
    read = reader.with_answer(prompt, answer, role="primary")
    check_order(read)
    said = read.ids[read.answer_from :]
    assert said[-1] == reader.tokenizer.eos_token_id
    assert read.prompt_bytes == sizes(prompt) <= min(read.seen[read.answer_from :])
    texts = [reader.said(said[: count + 1]) for count in range(len(said))]
    assert [read.prompt_bytes + sizes(text) for text in texts] == list(read.seen[read.answer_from :])
    assert all(b.startswith(a) for a, b in pairwise(texts))
    if name in LOSSLESS and "<" not in answer and "\ufffd" not in answer:
        assert texts[-1] == answer


LETTERS = st.text(st.sampled_from("a é中😀🎉👍🏽ѣ\u200d各,"), min_size=1, max_size=24)


@pytest.mark.parametrize("name", ["llama_2", "metaspace", *LOSSLESS])
@settings(max_examples=60)
@given(answer=LETTERS)
def test_runs_of_bytes_are_said_as_what_they_spell(
    tokenizers: Mapping[str, Any], readers: Mapping[str, Reader], name: str, answer: str
) -> None:
    """Where a tokenizer falls back to bytes a piece of a run of them, cut within a character, says nothing."""
    ids = tokenizers[name](answer, add_special_tokens=False)["input_ids"]
    assert readers[name].said(ids) == tokenizers[name].decode(ids)


def test_half_a_character_waits_for_the_rest(tokenizers: Mapping[str, Any]) -> None:
    saying = Saying(tokenizers["gpt_2"])
    ids = tokenizers["gpt_2"]("a𐍈b")["input_ids"]
    found = [(saying.add(token), saying.text, saying.bytes)[1:] for token in ids]
    assert found == [("a", 1), ("a", 1), ("a", 1), ("a", 1), ("a𐍈", 5), ("a𐍈b", 6)]


def test_which_text_a_token_may_look_at_is_what_was_handed_over() -> None:
    read = Reading((1,) * 9, (4,) * 9, (1, 2, 4, 4, 5, 6, 7, 8, 9), 4, 4)
    assert upto_of(read, "prompt", 2) == read.seen
    # answer: 5 6 7 8 9; with the first token in, one is there and none is handed over, with the second two are
    assert upto_of(read, "chunked", 2) == (1, 2, 4, 4, 4, 6, 6, 8, 8)
    assert upto_of(read, "chunked", 3) == (1, 2, 4, 4, 4, 4, 7, 7, 7)
    assert upto_of(read, "lockstep", 7) == read.seen
    assert upto_of(read, "chunked", 1) == read.seen


@settings(max_examples=30)
@given(answer=TEXT, chunk=st.integers(1, 5), mode=st.sampled_from(["prompt", "chunked", "lockstep"]))
def test_nobody_looks_further_than_he_has_read(
    readers: Mapping[str, Reader], answer: str, chunk: int, mode: Any
) -> None:
    read = readers["gpt_2"].with_answer("Q", answer, role="primary")
    upto = upto_of(read, mode, chunk)
    assert all(a <= b for a, b in pairwise(upto))
    assert all(a <= b for a, b in zip(upto, read.seen, strict=True))


def test_prompts_are_read_as_the_engine_reads_them(family: Callable[..., Any], tokenizer: Any) -> None:
    folder: Path = family("llama", dtype="float32").base
    turns = (Message("user", "the fox"), Message("assistant", "ok"))
    reader = Reader(tokenizer, name="a", context=64)
    with TransformersEngine(str(folder)) as engine:
        for prompt in ("the quick é 😀", turns):
            (said,) = engine.generate([Request("1", prompt, max_new_tokens=1)])
            assert said.tokens_in == len(reader.prompt(prompt).ids)
