"""Fine-tuned transformers as routers: tiny random models and tokenizers, made here, that learn who answers what."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixmerge.decision.records import queries_of
from mixmerge.errors import DependencyError, MixmergeError
from mixmerge.outcomes.table import OutcomeTable
from mixmerge.routers.base import Router
from mixmerge.routers.contract import check_router, sample
from mixmerge.routers.contrastive import ContrastiveRouter
from mixmerge.routers.finetuned import CausalRouter, EncoderRouter
from mixmerge.routers.pretrained import add_labels, label_logits, pack, read_pretrained, unpack

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
# High rates, as the weights are random and not pretrained.
QUICK = {"rate": 1e-2, "pretrained_rate": 3e-3, "epochs": 12, "patience": 12, "length": 32}
SHORT = {**QUICK, "epochs": 1}


def tokenizer_of(texts: tuple[str, ...], *, end: str) -> Any:
    """Words of these texts as tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", end]
    made.train_from_iterator([*texts, "Expert:"], trainers.WordLevelTrainer(special_tokens=special))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", eos_token=end
    )


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = tokenizer_of(sample().queries, end="[SEP]")
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def causal_model(folder: Path, *, tied: bool) -> Path:
    tokenizer = tokenizer_of(sample().queries, end="</s>")
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.3,  # as of a trained model: a query's words reach its last position
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return causal_model(tmp_path_factory.mktemp("causal"), tied=False)


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()


def beats_best_single(router: Router) -> float:
    """By how much the picks are better than the best expert always, on queries not seen in training."""
    table, held = sample(missing=0.0), sample(90, seed=1, missing=0.0)
    told = router.fit(table).score(queries_of(held))
    best = table.score.mean(axis=0).argmax()
    picked = held.score[np.arange(len(held)), told.mean.argmax(axis=1)]
    return float(picked.mean() - held.score[:, best].mean())


def same(first: Router, second: Router) -> bool:
    told = [router.score(["add the digits", "a poem of the moon"]).mean for router in (first, second)]
    return bool((told[0] == told[1]).all())


@pytest.mark.slow
def test_contract_of_the_encoder(encoder: Path) -> None:
    check_router(lambda: EncoderRouter({"path": str(encoder), **QUICK}))


@pytest.mark.slow
def test_contract_of_the_causal_model(causal: Path) -> None:
    check_router(lambda: CausalRouter({"path": str(causal), **QUICK}))


@pytest.mark.slow
def test_contract_of_routerdc_with_an_encoder(encoder: Path) -> None:
    options = {**QUICK, "encoder": str(encoder), "least": 60, "batch": 32}
    check_router(lambda: ContrastiveRouter(options))


def test_the_encoder_learns_and_needs_its_folder_no_more(encoder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(encoder, tmp_path / "copy")
    router = EncoderRouter({"path": str(copy), **QUICK})
    assert beats_best_single(router) > 0.2
    router.save(tmp_path / "router")
    shutil.rmtree(copy)
    assert same(Router.load(tmp_path / "router"), router)


def test_the_causal_model_learns_and_needs_its_folder_no_more(causal: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(causal, tmp_path / "copy")
    router = CausalRouter({"path": str(copy), **QUICK})
    assert beats_best_single(router) > 0.2
    router.save(tmp_path / "router")
    shutil.rmtree(copy)
    assert same(Router.load(tmp_path / "router"), router)


def test_routerdc_tunes_an_encoder(encoder: Path, tmp_path: Path) -> None:
    router = ContrastiveRouter({**QUICK, "encoder": str(encoder), "least": 100, "batch": 32})
    assert beats_best_single(router) > 0.2
    router.save(tmp_path / "router")
    assert same(Router.load(tmp_path / "router"), router)


def test_lora_trains_adapters_and_label_tokens_only(causal: Path) -> None:
    pytest.importorskip("peft")
    router = CausalRouter({"path": str(causal), **QUICK, "lora": 4})
    assert beats_best_single(router) > 0.2
    before = transformers.LlamaForCausalLM.from_pretrained(causal).state_dict()
    assert router.state is not None
    after = {name.removeprefix("model."): array for name, array in router.state.arrays.items()}
    assert not [name for name in after if "lora" in name], "adapters are merged"
    words = len(before["lm_head.weight"])
    np.testing.assert_array_equal(after["lm_head.weight"][:words], before["lm_head.weight"].numpy())
    name = "model.embed_tokens.weight"
    np.testing.assert_array_equal(after[name][:words], before[name].numpy())
    moved = "model.layers.0.self_attn.q_proj.weight"
    assert (after[moved] != before[moved].numpy()).any()


def test_only_label_rows_of_a_tied_embedding_are_trained(tmp_path: Path) -> None:
    folder = causal_model(tmp_path / "tied", tied=True)
    router = CausalRouter({"path": str(folder), **SHORT}).fit(sample(40))
    before = transformers.LlamaForCausalLM.from_pretrained(folder).get_input_embeddings().weight
    assert router.state is not None
    after = router.state.arrays["model.model.embed_tokens.weight"]
    np.testing.assert_array_equal(after[: len(before)], before.detach().numpy())
    assert (after[router.state.arrays["labels"]] != 0).any()
    assert router.score(["a poem"]).mean.shape == (1, 4)


def test_without_peft_lora_says_what_to_install(causal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(DependencyError, match="peft"):
        CausalRouter({"path": str(causal), **SHORT, "lora": 2}).fit(sample(20))


def test_label_logits_are_the_models_own(causal: Path) -> None:
    net = read_pretrained(str(causal), kind="causal", length=32, device="cpu")
    ids = add_labels(net, ["one", "two"])
    with torch.no_grad():
        net.model.get_output_embeddings().weight[torch.from_numpy(ids)] = torch.randn(2, 32)
    net.model.eval()
    rows = net.tokens(["add two numbers", "a poem of the moon and the river"], suffix="\nExpert:")
    with torch.no_grad():
        given = label_logits(net, net.hidden(rows), ids)
        for row, logits in zip(rows, given, strict=True):
            whole = net.model(input_ids=torch.tensor([row])).logits[0, -1]
            torch.testing.assert_close(logits, whole[ids], atol=1e-5, rtol=1e-5)


def test_padding_does_not_matter(encoder: Path) -> None:
    net = read_pretrained(str(encoder), kind="encoder", length=32, device="cpu")
    texts = ["add", "python function loop class return import", "moon " * 50]
    rows = net.tokens(texts)
    assert [len(row) for row in rows] == [1, 6, 32], "cut at the length"
    together = net.embed(rows, batch=2)
    for i, row in enumerate(rows):
        torch.testing.assert_close(net.embed([row], batch=1)[0], together[i], atol=1e-6, rtol=0)
    with torch.no_grad():
        states = net.model(input_ids=torch.tensor([rows[1]])).last_hidden_state[0]
    torch.testing.assert_close(states.mean(dim=0), together[1], atol=1e-6, rtol=0)
    assert net.embed([], batch=2).shape == (0, 32)


@pytest.mark.parametrize("kind", ["encoder", "causal"])
def test_a_packed_model_is_the_same(kind: Any, encoder: Path, causal: Path) -> None:
    path = encoder if kind == "encoder" else causal
    net = read_pretrained(str(path), kind=kind, length=32, device="cpu")
    again = unpack(pack(net), kind=kind, length=32, device="cpu")
    texts = ["add the digits", "unheard-of words"]
    assert again.tokens(texts) == net.tokens(texts)
    rows = net.tokens(texts)
    assert torch.equal(again.embed(rows, batch=8), net.embed(rows, batch=8))


@pytest.mark.parametrize("kind", [EncoderRouter, CausalRouter])
def test_hard_tables(kind: type[Router], encoder: Path, causal: Path) -> None:
    options = {"path": str(encoder if kind is EncoderRouter else causal), **SHORT}
    texts = sample(12).queries
    ids = tuple(str(i) for i in range(12))
    alike = OutcomeTable(ids, texts, ("a", "b"), np.tile([1.0, 0.0], (12, 1)))
    told = kind(options).fit(alike).score(["", "x"][1:])
    np.testing.assert_allclose(told.mean, [[1, 0]], atol=0.05)
    one = OutcomeTable(ids[:1], texts[:1], ("a",), np.array([[0.5]]))
    np.testing.assert_allclose(kind(options).fit(one).score(["x"]).mean, [[0.5]])
    wide = OutcomeTable(ids, texts, ("a", "b"), np.random.default_rng(0).normal(50, 9, (12, 2)))
    told = kind(options).fit(wide).score(["x"])
    assert (np.abs(told.mean - 50) < 30).all()
    left = kind(options).fit(sample(20)).remove_expert("code")
    assert left.score(["x"]).mean.shape == (1, 3)


def test_wrong_options(encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(MixmergeError, match="router encoder: path: Field required"):
        EncoderRouter()
    with pytest.raises(MixmergeError, match="no such option"):
        EncoderRouter({"path": str(encoder), "lora": 4})
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "nowhere"):
        for kind in (EncoderRouter, CausalRouter):
            with pytest.raises(MixmergeError, match=rf"model {path}: cannot be read"):
                kind({"path": str(path), **SHORT}).fit(sample(10))
    with pytest.raises(MixmergeError, match="device meadow: is not there"):
        EncoderRouter({"path": str(encoder), **SHORT, "device": "meadow"}).fit(sample(10))
