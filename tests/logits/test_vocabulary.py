"""Which token of a small model is which of the base's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mixmerge.errors import CheckpointError, MixmergeError
from mixmerge.logits.token_texts import texts_of
from mixmerge.logits.vocabulary import check_map, load_map, save_map, shared_by, vocabulary_map


def words(entries: dict[str, int], *, special: tuple[str, ...] = ("</s>",), decoder: Any = None) -> Any:
    """A tokenizer of these tokens."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel(entries, unk_token="<unk>"))
    if decoder is not None:
        made.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=special[0], unk_token="<unk>")


def mapped(base: Any, other: Any, how: str = "intersection", columns: tuple[int, int] | None = None) -> Any:
    sizes = columns or (len(base), len(other))
    return vocabulary_map(
        base, other, base_columns=sizes[0], other_columns=sizes[1], how=how, where="small"
    )  # fmt: skip


def test_equal_vocabularies_are_passed_through(tokenizer: Any) -> None:
    made = mapped(tokenizer, tokenizer, "same")
    assert made.identical
    assert made.same_tokens
    assert shared_by([made, made]) is None
    assert made.spelled([5, 9]) == [5, 9]
    assert made.longest == 1


def test_columns_that_only_one_has_are_not_dropped_in_silence(tokenizer: Any) -> None:
    """The small model's last columns are padding: the base's there get no shift, and the count is said."""
    size = len(tokenizer)
    made = mapped(tokenizer, tokenizer, "same", (size, size + 8))
    assert not made.identical
    assert made.same_tokens
    assert made.as_dict()["covered"] == size
    assert made.as_dict()["other_columns"] == size + 8
    shared = shared_by([made])
    assert shared is not None
    assert shared.columns.tolist() == list(range(size))


def test_tokens_are_the_same_that_stand_for_the_same_bytes() -> None:
    from tokenizers import decoders

    byte_level = words(
        {"<unk>": 0, "</s>": 1, "\u0120the": 2, "the": 3, "\u00c3\u00a9": 4, "\u00c3": 5},
        decoder=decoders.ByteLevel(),
    )
    pieces = words(
        {"<unk>": 0, "<end>": 1, "the": 2, "\u2581the": 3, "\u00e9": 4, "<0xC3>": 5, "zebra": 6},
        special=("<end>",),
        decoder=decoders.Metaspace(),
    )
    assert texts_of(byte_level)[2] == texts_of(pieces)[3] == (False, b" the")
    made = mapped(byte_level, pieces)
    pairs = dict(zip(made.base.tolist(), made.other.tolist(), strict=True))
    assert pairs == {0: 0, 1: 1, 2: 3, 3: 2, 4: 4, 5: 5}  # the tokens that end a text are the same, too
    back = mapped(pieces, byte_level)
    assert 6 not in back.base.tolist()
    assert back.spelled([6]) == [0]  # no token of the other spells a zebra: it is unknown


def test_letters_are_letters_where_bytes_have_tokens_of_their_own() -> None:
    """SentencePiece's models have <0x41> and A, and say A; their bytes come first."""
    from tokenizers import decoders

    pieces = {"<unk>": 0, "</s>": 1, "<0x41>": 2, "<0x42>": 3, "<0xC3>": 4, "A": 5, "\u2581A": 6}
    small = words(pieces, decoder=decoders.Metaspace())
    plain = words(
        {"<unk>": 0, "</s>": 1, "A": 2, "B": 3, "\u0120A": 4, "\u00c3": 5}, decoder=decoders.ByteLevel()
    )

    def pairs(base: Any, other: Any) -> dict[int, int]:
        made = mapped(base, other)
        return dict(zip(made.base.tolist(), made.other.tolist(), strict=True))

    assert pairs(plain, small) == {0: 0, 1: 1, 2: 5, 3: 3, 4: 6, 5: 4}
    assert pairs(small, plain) == {
        0: 0,
        1: 1,
        3: 3,
        4: 5,
        5: 2,
        6: 4,
    }  # A is one token, and its byte is no other
    names = ("<unk>", "</s>", "C", "\u2581A", "A", "<0x43>", "<0xC3>", "<0x42>", "<0x41>")
    again = words({one: at for at, one in enumerate(names)}, decoder=decoders.Metaspace())
    assert pairs(small, again) == {at: again.get_vocab()[one] for one, at in pieces.items()}
    assert mapped(plain, small).spelled([2, 3]) == [5, 3]


def test_a_token_that_is_not_there_is_spelled(tokenizer: Any) -> None:
    import json

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    whole["model"]["merges"] = []
    kept = [one for one in whole["model"]["vocab"] if len(one) == 1 or one.startswith("<")]
    whole["model"]["vocab"] = {one: at for at, one in enumerate(kept)}
    for one in whole["added_tokens"]:
        one["id"] = whole["model"]["vocab"][one["content"]]
    letters = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(whole)), eos_token="</s>"
    )
    made = mapped(tokenizer, letters)
    text = "the quick brown fox"
    tokens = tokenizer(text)["input_ids"]
    assert len(tokens) < len(text)
    assert letters.decode(made.spelled(tokens)) == text
    assert made.longest == max(len(made.spelled([one])) for one in range(len(tokenizer)))
    shared = shared_by([made, mapped(tokenizer, tokenizer)])
    assert shared is not None
    assert torch.equal(shared.columns, made.base)
    assert torch.equal(shared.places[1], made.base)


def test_a_spelling_has_the_bytes_of_the_token() -> None:
    """A tokenizer that puts a space before every text would say another word in the middle of one."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    entries = {"<unk>": 0, "</s>": 1, "\u2581fo": 2, "fo": 3, "x": 4, "\u2581": 5, "\u2581\u2581": 6}
    made = Tokenizer(
        models.BPE(
            {**entries, "f": 7, "o": 8},
            [("f", "o"), ("\u2581", "fo"), ("\u2581", "\u2581")],
            unk_token="<unk>",
        )
    )
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    made.decoder = decoders.Metaspace()
    spaced = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")
    base = words({"<unk>": 0, "</s>": 1, "fox": 2, " fox": 3, "fizz": 4, "x": 5})
    found = mapped(base, spaced)
    assert [found.spelled([at]) for at in (2, 3)] == [[3, 4], [2, 4]]
    assert 0 in found.spelled([4])  # as it cuts it, for want of better
    base.add_tokens(["  ", "   "])  # runs of spaces, as code models add them: no special tokens
    found = mapped(base, spaced)
    assert texts_of(base)[6] == (False, b"  ")
    assert [found.spelled([at]) for at in (6, 7)] == [[6], [6, 5]]


def test_a_column_without_a_token_can_be_drawn(tokenizer: Any) -> None:
    other = words({"<unk>": 0, "</s>": 1, "a": 2})
    made = mapped(tokenizer, other, columns=(len(tokenizer) + 8, 3))
    assert made.spelled([len(tokenizer) + 7]) == [0]


def test_vocabularies_that_differ_are_refused(tokenizer: Any) -> None:
    other = words({"<unk>": 0, "</s>": 1, "x": 2})
    with pytest.raises(MixmergeError) as error:
        mapped(tokenizer, other, "same")
    assert "its vocabulary of 3 tokens is not the base's of 280" in str(error.value)
    assert "vocabulary: intersection" in str(error.value)
    alien, stranger = words({"<unk>": 0, "<s1>": 1, "qq": 2}, special=("<s1>",)), words({"<nil>": 0, "zz": 1})
    with pytest.raises(MixmergeError, match="no token of text in common"):
        mapped(stranger, alien)


def test_a_map_is_kept_with_the_hashes_of_both(
    tokenizer: Any, tmp_path: Path, clone: Callable[..., Any]
) -> None:
    other = words({"<unk>": 0, "</s>": 1, "a": 2, "b": 3})
    for made in (mapped(tokenizer, tokenizer), mapped(tokenizer, other)):
        save_map(made, tmp_path / "map.safetensors")
        found = load_map(tmp_path / "map.safetensors")
        assert found.as_dict() == made.as_dict()
        for name in ("base", "other", "starts", "pieces"):
            assert torch.equal(getattr(found, name), getattr(made, name))
        check_map(found, made, where="small")
    turned = words({"<unk>": 0, "</s>": 1, "b": 2, "a": 3})
    with pytest.raises(MixmergeError, match="made for another tokenizer"):
        check_map(found, mapped(tokenizer, turned), where="small")
    (tmp_path / "map.safetensors").write_bytes(b"no map")
    with pytest.raises(CheckpointError, match="is no vocabulary map"):
        load_map(tmp_path / "map.safetensors")
