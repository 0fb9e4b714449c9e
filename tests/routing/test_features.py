"""Texts to embeddings: TF-IDF, pieces of words, sentence encoders and their cache, and rows made beforehand."""

from __future__ import annotations

import hashlib
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixmerge.decision.records import Query, queries_of
from mixmerge.errors import DependencyError, MixmergeError
from mixmerge.registry import find
from mixmerge.routers.base import Router
from mixmerge.routers.cache import EmbeddingCache
from mixmerge.routers.contract import check_router, sample
from mixmerge.routers.embedders import GivenFeatures, SentenceFeatures
from mixmerge.routers.embedding_files import read_embeddings, write_embeddings
from mixmerge.routers.features import CharacterFeatures, Features, TfidfFeatures, unit
from mixmerge.routers.nearest import NearestRouter
from mixmerge.routers.skills import SkillRouter

TEXTS = [f"{a} {b} of the {c}" for a in ("add", "print") for b in ("number", "list") for c in ("moon", "day")]


def asked(*texts: str) -> list[Query]:
    return [Query(text) for text in texts]


# --- TF-IDF


def _by_sklearn(features: TfidfFeatures, texts: list[str]) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    arrays, terms = features.arrays(), features.values()["vocabulary"]
    vectorizer = TfidfVectorizer(
        sublinear_tf=True, ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b", vocabulary=terms
    )
    vectorizer.idf_ = arrays["idf"]
    return unit(vectorizer.transform(texts) @ arrays["components"])


FITTED = TfidfFeatures(dimensions=6, shape=0.0)


@pytest.fixture(scope="module")
def fitted() -> TfidfFeatures:
    return FITTED.fit(TEXTS)


@given(
    st.lists(st.sampled_from([*" ".join(TEXTS).split(), "Moon", "déjà", "x_1", "—", "\n", "İ"]), min_size=1)
)
def test_tfidf_is_that_of_sklearn(fitted: TfidfFeatures, words: list[str]) -> None:
    text = " ".join(words)
    if not text.strip():
        return
    given = fitted.embed(asked(text))
    np.testing.assert_allclose(given[:, :-4], _by_sklearn(fitted, [text]), atol=2e-6)


def test_tfidf_rows_do_not_depend_on_the_batch(fitted: TfidfFeatures) -> None:
    rows = fitted.embed(asked(*TEXTS))
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    assert np.array_equal(fitted.embed(asked(*TEXTS[::-1]))[::-1], rows)
    assert np.array_equal(np.concatenate([fitted.embed(asked(text)) for text in TEXTS]), rows)
    assert fitted.embed([]).shape == (0, rows.shape[1])
    assert np.isfinite(fitted.embed(asked("nothing that was ever seen", "?"))).all()


def test_a_loaded_router_answers_without_scikit_learn(tmp_path: Path) -> None:
    router = SkillRouter(features=TfidfFeatures()).fit(sample())  # it embeds skills it does not know
    router.save(tmp_path / "router")
    code = (
        "import sys\nfor name in ('sklearn', 'scipy', 'torch'): sys.modules[name] = None\n"
        "from mixmerge.routers.base import Router\n"
        f"print(*Router.load({str(tmp_path / 'router')!r}).score(['adds two moons']).mean[0])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = router.score(["adds two moons"]).mean[0]
    assert [float(x) for x in done.stdout.split()] == expected.tolist()


def test_tfidf_of_texts_without_words() -> None:
    with pytest.raises(MixmergeError, match="features tfidf: the queries hold no words"):
        TfidfFeatures().fit(["?", "!"])
    with pytest.raises(MixmergeError, match="are not fitted"):
        TfidfFeatures().embed(asked("x"))
    with pytest.raises(MixmergeError) as caught:
        TfidfFeatures(dimensions=0, terms=0, shape=-1)
    assert [str(fault) for fault in caught.value.faults] == [
        "features tfidf.dimensions: is 0. 1 or more.",
        "features tfidf.terms: is 0. 1 or more.",
        "features tfidf.shape: is -1. 0 or more.",
    ]


def test_tfidf_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    with pytest.raises(DependencyError, match=r"mixmerge\[route\]"):
        TfidfFeatures().fit(TEXTS)


# --- pieces of words


def test_words_of_one_stem_are_near() -> None:
    algebra, algebraic, poem, upper = CharacterFeatures().embed(
        asked("algebra", "algebraic", "poem", "ALGEBRA")
    )
    assert algebra @ algebraic > 0.6
    assert algebra @ poem < 0.2
    assert np.array_equal(algebra, upper)
    assert CharacterFeatures().embed(asked("?")).tolist() == [[0.0] * 1024]
    with pytest.raises(MixmergeError, match="dimensions: is 8"):
        CharacterFeatures(dimensions=8)


def test_pieces_by_hand() -> None:
    import zlib

    expected = np.zeros(32)
    for piece in (" a", "a ", " a "):
        hashed = zlib.crc32(piece.encode())
        expected[(hashed >> 1) % 32] += 1 if hashed & 1 else -1
    given = CharacterFeatures(dimensions=32).embed(asked("a"))[0]
    np.testing.assert_allclose(given, expected / np.linalg.norm(expected), atol=1e-6)


# --- sentence encoders


@pytest.fixture(scope="module")
def encoder(family: Callable[..., Any]) -> str:
    """A tiny BERT: sentence-transformers takes the mean of its tokens."""
    return str(family("bert", dtype="float32").base)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MIXMERGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _without_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)


def test_sentences_are_the_means_of_their_tokens(encoder: str, cache: Path) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(encoder).eval(), AutoTokenizer.from_pretrained(encoder)
    features = find("features", "sentence")(model=encoder, batch=3).fit(TEXTS)
    rows = features.embed(asked(*TEXTS))
    assert rows.dtype == np.float32
    for text, row in zip(TEXTS, rows, strict=True):
        with torch.inference_mode():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        np.testing.assert_allclose(row, unit(hidden.mean(0).numpy()), atol=1e-5)
    again = SentenceFeatures(model=encoder, cache=False).fit(TEXTS).embed(asked(*TEXTS[::-1]))[::-1]
    np.testing.assert_allclose(again, rows, atol=1e-6)
    assert features.values()["dimensions"] == rows.shape[1] == 32
    assert features.embed([]).shape == (0, 32)


def test_a_prefix_is_part_of_the_text(encoder: str, cache: Path) -> None:
    plain = SentenceFeatures(model=encoder).embed(asked("query: moon", "moon"))
    prefixed = SentenceFeatures(model=encoder, prefix="query: ").embed(asked("moon"))
    np.testing.assert_allclose(prefixed[0], plain[0], atol=1e-6)
    assert plain[0] @ plain[1] < 0.9999


def test_what_is_cached_takes_no_encoder(encoder: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = SentenceFeatures(model=encoder).fit(TEXTS).embed(asked(*TEXTS))
    (file,) = (cache / "embeddings").glob("*.sqlite")
    assert file.stat().st_size > 0
    _without_encoders(monkeypatch)
    assert np.array_equal(SentenceFeatures(model=encoder).embed(asked(*TEXTS)), rows)
    with pytest.raises(DependencyError, match=r"needs sentence-transformers.*mixmerge\[embed\]"):
        SentenceFeatures(model=encoder).embed(asked("new"))
    with pytest.raises(DependencyError):
        SentenceFeatures(model=encoder, cache=False).embed(asked(TEXTS[0]))


def test_a_router_with_sentences(encoder: str, cache: Path, tmp_path: Path) -> None:
    check_router(lambda: NearestRouter({"k": 5}, features=SentenceFeatures(model=encoder)), learns=False)


def test_another_model_in_the_same_place(
    encoder: str, cache: Path, clone: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = clone(Path(encoder))
    router = NearestRouter({"k": 3}, features=SentenceFeatures(model=str(folder))).fit(sample(12))
    router.save(tmp_path / "router")
    loaded = Router.load(tmp_path / "router")
    loaded.score(["moon"])
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"gelu"', '"relu"'))
    with pytest.raises(MixmergeError, match="is not the model the router was fitted with"):
        Router.load(tmp_path / "router").score(["moon"])
    assert config != (folder / "config.json").read_text()


def test_models_that_cannot_be_had(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(
        MixmergeError, match=r"model nobody/nothing: is no folder, and cannot be had from the hub"
    ):
        SentenceFeatures(model="nobody/nothing").embed(asked("x"))
    with pytest.raises(MixmergeError, match="cannot load it"):
        SentenceFeatures(model=str(tmp_path)).embed(asked("x"))
    with pytest.raises(MixmergeError, match="batch: is 0"):
        SentenceFeatures(batch=0)


# --- the cache


def _rows(texts: list[str], *, dimensions: int = 4) -> dict[str, Any]:
    seeds = [int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) for text in texts]
    made = [np.random.default_rng(seed).standard_normal(dimensions) for seed in seeds]
    return {text: row.astype(np.float32) for text, row in zip(texts, made, strict=True)}


def _same(given: dict[str, Any], expected: dict[str, Any]) -> bool:
    return given.keys() == expected.keys() and all(np.array_equal(given[t], expected[t]) for t in given)


def test_the_cache_gives_back_what_it_got(tmp_path: Path) -> None:
    kept, rows = EmbeddingCache(tmp_path / "deep" / "a.sqlite"), _rows([f"text {n}" for n in range(1200)])
    assert kept.get(["text 1"]) == {}
    kept.put(rows)
    kept.put(_rows(["text 1"]))
    assert _same(kept.get([*rows, "unknown"]), rows)
    assert kept.get(["text 1"], dimensions=5) == {}


def test_damaged_rows_are_as_if_they_were_not_there(tmp_path: Path) -> None:
    kept, rows = EmbeddingCache(tmp_path / "a.sqlite"), _rows(["a", "b", "c"])
    kept.put(rows)
    with sqlite3.connect(kept.path) as file:
        vectors = dict(file.execute("SELECT age, vector FROM embedding"))
        file.execute("UPDATE embedding SET vector = ? WHERE age = 1", (b"\x00" + vectors[1][1:],))
        file.execute("UPDATE embedding SET vector = 'text' WHERE age = 2")
    assert _same(kept.get(["a", "b", "c"]), {"c": rows["c"]})
    kept.put(rows)
    assert _same(kept.get(["a", "b", "c"]), rows)


@pytest.mark.parametrize("cut", [0, 10, 100, 5000])
def test_a_damaged_file_is_made_again(tmp_path: Path, cut: int) -> None:
    kept, rows = EmbeddingCache(tmp_path / "a.sqlite"), _rows([f"text {n}" for n in range(300)])
    kept.put(rows)
    whole = kept.path.read_bytes()
    kept.path.write_bytes(whole[:cut] + b"\xff" * (len(whole) - cut))
    found = kept.get(list(rows))
    assert all(np.array_equal(found[text], rows[text]) for text in found)
    assert len(found) < len(rows)
    kept.put(rows)
    kept.put(rows)
    assert _same(kept.get(list(rows)), rows)


def test_the_cache_is_bounded_and_the_oldest_go(tmp_path: Path) -> None:
    kept = EmbeddingCache(tmp_path / "a.sqlite", limit=10 * 16)
    for n in range(25):
        kept.put(_rows([f"text {n}"]))
    assert sorted(kept.get([f"text {n}" for n in range(25)])) == sorted(f"text {n}" for n in range(15, 25))
    kept.put(_rows([f"text {n}" for n in range(100, 140)]))
    assert len(kept.get([f"text {n}" for n in range(140)])) == 10


def test_no_place_for_a_cache(encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("MIXMERGE_CACHE", str(tmp_path / "file"))
    assert SentenceFeatures(model=encoder).embed(asked("moon")).shape == (1, 32)
    folder = EmbeddingCache(tmp_path)
    folder.put(_rows(["a"]))
    assert folder.get(["a"]) == {}


WRITER = """
import sys
import numpy as np
from pathlib import Path
from mixmerge.routers.cache import EmbeddingCache
kept, start = EmbeddingCache(Path(sys.argv[1])), int(sys.argv[2])
for n in range(start, start + 60):
    kept.put({f"text {n}": np.full(8, n, np.float32), f"text {n + 1}": np.full(8, n + 1, np.float32)})
    found = kept.get([f"text {n}", f"text {n + 1}"])
    assert {text: row.tolist() for text, row in found.items()} == {
        f"text {m}": [m] * 8 for m in (n, n + 1)}, found
"""


def test_two_processes_share_a_cache(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    writers = [
        subprocess.Popen([sys.executable, "-P", "-c", WRITER, str(path), str(start)], stderr=subprocess.PIPE)
        for start in (0, 30)
    ]
    for writer in writers:
        _, errors = writer.communicate()
        assert writer.returncode == 0, errors.decode()
    found = EmbeddingCache(path).get([f"text {n}" for n in range(91)])
    assert len(found) == 91
    assert all(row.tolist() == [int(text[5:])] * 8 for text, row in found.items())


# --- given


@pytest.mark.parametrize("name", ["rows.safetensors", "rows.npy"])
def test_given_rows(name: str, tmp_path: Path) -> None:
    table = sample(60)
    rows = np.random.default_rng(0).standard_normal((60, 8))
    write_embeddings(tmp_path / name, table.ids, rows)
    read = read_embeddings(tmp_path / name)
    np.testing.assert_array_equal(read.embedding, rows.astype(np.float32))
    assert list(read.place) == list(table.ids)
    router = NearestRouter({"k": 1, "worth": 0}, features=GivenFeatures(path=str(tmp_path / name))).fit(table)
    again = router.score(queries_of(table)[::-1]).mean[::-1]
    known = ~np.isnan(table.score)
    np.testing.assert_allclose(again[known], table.score[known], atol=1e-6)
    router.save(tmp_path / "router")
    loaded = Router.load(tmp_path / "router")
    (tmp_path / name).unlink()
    brought = Query("what", embedding=(3 * rows[7]).astype(np.float32))
    np.testing.assert_allclose(loaded.score([brought]).mean[0], again[7], atol=1e-6)


def test_given_rows_in_memory() -> None:
    features: Features = find("features", "given").of(["a", "b"], np.array([[3.0, 4], [0, 2]]))
    given = features.fit(["x"]).embed([Query("x", id="b"), Query("y", id="a")])
    assert given.dtype == np.float32
    np.testing.assert_allclose(given, [[0, 1], [0.6, 0.8]], atol=1e-7)


def test_queries_without_the_right_embedding() -> None:
    features = GivenFeatures.of(["a"], np.ones((1, 3))).fit(["x"])
    wrong = [
        Query("x", id="a"),
        Query("x", id="long", embedding=np.ones(4, np.float32)),
        Query("x", id="nan", embedding=np.array([1, np.nan, 0], np.float32)),
        Query("x", id="unknown"),
    ]
    with pytest.raises(MixmergeError) as caught:
        features.embed(wrong)
    assert [str(fault) for fault in caught.value.faults] == [
        "query long: its embedding has shape (4,). 3 finite numbers.",
        "query nan: its embedding is not finite. 3 finite numbers.",
        "query unknown: brings no embedding. 3 finite numbers.",
    ]
    with pytest.raises(MixmergeError, match="and 15 more like these"):
        features.embed([Query("x", id=f"u{n}") for n in range(20)])
    with pytest.raises(MixmergeError, match="are not fitted"):
        GivenFeatures().embed(asked("x"))
    with pytest.raises(MixmergeError, match="need the embeddings of the outcomes' queries"):
        GivenFeatures().fit(["x"])


def test_files_of_embeddings_that_are_wrong(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    for ids, rows, words in (
        (["a", "a"], np.ones((2, 2)), "the id 'a' is there twice"),
        (["a"], np.ones((2, 2)), "has 1 ids for 2 rows"),
        (["a"], np.ones(2), r"have shape \(2,\)"),
        (["a"], np.array([[1, np.inf]]), "the embedding of 'a' is not finite"),
    ):
        with pytest.raises(MixmergeError, match=words):
            write_embeddings(tmp_path / "x.npy", ids, rows)
    with pytest.raises(MixmergeError, match="is no file of embeddings"):
        write_embeddings(tmp_path / "x.csv", ["a"], np.ones((1, 2)))
    np.save(tmp_path / "alone.npy", np.ones((1, 2)))
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "objects.ids.json").write_text('["a"]')
    save_file({"embedding": np.ones((1, 2), np.float32)}, tmp_path / "bare.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    (tmp_path / "rows.csv").write_text("a,1")
    np.save(tmp_path / "numbers.npy", np.ones((1, 2)))
    (tmp_path / "numbers.ids.json").write_text("[1]")
    for name, words in (
        ("missing.npy", "cannot be read"),
        ("alone.npy", "cannot be read"),
        ("objects.npy", "cannot be read"),
        ("bare.safetensors", "no metadata 'ids'"),
        ("torn.safetensors", "cannot be read"),
        ("rows.csv", "is no file of embeddings"),
        ("numbers.npy", "not a JSON list of strings"),
    ):
        with pytest.raises(MixmergeError, match=words):
            read_embeddings(tmp_path / name)
