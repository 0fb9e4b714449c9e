"""Sums of calibration data: against values worked out another way, and the same however rows are cut into batches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixmerge.calibrate.accumulators import added, load_statistics, read_facts, save_statistics, saved_mean
from mixmerge.calibrate.gathering import Measure, extend, gather, real_inputs
from mixmerge.calibrate.kinds import KINDS
from mixmerge.data.batches import make_batches
from mixmerge.data.rows import Row
from mixmerge.errors import MixmergeError
from mixmerge.experts.loading import LoadedExpert, kind_of, load_expert

ROWS = [
    Row(text=text) for text in ("the quick brown fox", "1 + 2 = 3", "lazy", "over the dog, and more of it")
]


@pytest.fixture(scope="module")
def decoder(family: Callable[..., Any]) -> LoadedExpert:
    return load_expert(family("llama", dtype="float32").base)


@pytest.fixture(scope="module")
def classifier(tokenizer: Any) -> LoadedExpert:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    model = BertForSequenceClassification(BertConfig(vocab_size=280, num_labels=3, **sizes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return LoadedExpert(model.eval().requires_grad_(False), tokenizer, "classifier", "tiny")


def close(one: Any, other: Any) -> bool:
    """Within rounding of the largest entry: sums that nearly cancel keep no more digits than that."""
    return bool((one - other).abs().max() <= 1e-5 * other.abs().max())


@pytest.mark.parametrize("kind", ["gram", "second_moment", "fisher"])
def test_batches_and_padding_change_nothing(decoder: LoadedExpert, kind: Any) -> None:
    one = gather(decoder, ROWS, kind, fingerprint="m", measure=Measure(batch_size=1))
    four = gather(decoder, ROWS, kind, fingerprint="m", measure=Measure(batch_size=4))
    assert one.facts == four.facts
    assert all(close(one.sums[name], four.sums[name]) for name in one.sums)
    tokens = sum(batch.tokens for batch in make_batches(ROWS, decoder.tokenizer))
    counted = set(one.facts.counts.values())
    assert counted == ({len(ROWS)} if kind == "fisher" else {tokens})


@pytest.mark.parametrize("kind", ["gram", "second_moment", "fisher"])
def test_adding_up_is_one_pass(
    decoder: LoadedExpert, classifier: LoadedExpert, kind: Any, tmp_path: Path
) -> None:
    for expert in (decoder, classifier):
        whole = gather(expert, ROWS, kind, fingerprint="m")
        first, second = (gather(expert, part, kind, fingerprint="m") for part in (ROWS[:1], ROWS[1:]))
        save_statistics(first, tmp_path / "first")
        for both in (added(load_statistics(tmp_path / "first"), second), extend(first, expert, ROWS)):
            assert both.facts == whole.facts
            assert all(close(both.sums[name], whole.sums[name]) for name in whole.sums)
        assert extend(whole, expert, ROWS) is whole


def test_gram_by_hand(classifier: LoadedExpert) -> None:
    import torch

    seen = {}
    layer = classifier.model.bert.encoder.layer[0]
    handle = layer.intermediate.dense.register_forward_pre_hook(lambda module, given: seen.update(x=given[0]))
    expected = torch.zeros(8, 8)
    for row in ROWS:
        ids = classifier.tokenizer(row.text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            classifier.model(ids)
        expected += seen["x"][0].T @ seen["x"][0]
    handle.remove()
    found = gather(classifier, ROWS, "gram", fingerprint="m")
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    assert close(found.sums[name].float(), expected)
    assert found.facts.same == {
        "bert.encoder.layer.0.attention.self.key.weight": "bert.encoder.layer.0.attention.self.query.weight",
        "bert.encoder.layer.0.attention.self.value.weight": "bert.encoder.layer.0.attention.self.query.weight",
    }
    assert found.facts.counts["bert.pooler.dense.weight"] == len(ROWS)
    moments = gather(classifier, ROWS, "second_moment", fingerprint="m")
    mean, second = found.mean(name), moments.mean(name)
    assert mean is not None
    assert second is not None
    assert close(mean.diagonal(), second)


@pytest.mark.parametrize(
    "name", ["bert.encoder.layer.0.output.dense.weight", "bert.embeddings.word_embeddings.weight"]
)
def test_fisher_of_a_classifier_is_the_exact_expectation(classifier: LoadedExpert, name: str) -> None:
    """Against the definition in full: gradients of every class of every example, one at a time."""
    import torch

    model = classifier.model
    weight = dict(model.named_parameters())[name].requires_grad_(True)
    expected = torch.zeros_like(weight)
    for row in ROWS:
        ids = classifier.tokenizer(row.text, return_tensors="pt")["input_ids"]
        chances = torch.softmax(model(ids).logits[0].detach(), -1)
        for label in range(3):
            loss = torch.nn.functional.cross_entropy(model(ids).logits, torch.tensor([label]))
            (gradient,) = torch.autograd.grad(loss, [weight])
            expected += chances[label] * gradient**2
    weight.requires_grad_(False)
    found = gather(classifier, ROWS, "fisher", fingerprint="m", measure=Measure(batch_size=4))
    assert close(found.sums[name], expected)
    batch_squared = gather(classifier, ROWS, "fisher", fingerprint="m", wanted=[name])
    assert list(batch_squared.sums) == [name]
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_squares_of_batches_by_hand(classifier: LoadedExpert, decoder: LoadedExpert) -> None:
    """As released: of every batch the gradient of ``sum_i sum_k sqrt(p_ik) log p_ik``, squared."""
    import torch

    name = "bert.encoder.layer.0.output.dense.weight"
    weight = dict(classifier.model.named_parameters())[name].requires_grad_(True)
    expected, alone = torch.zeros_like(weight), torch.zeros_like(weight)
    for pair in (ROWS[:2], ROWS[2:]):
        total = torch.zeros_like(weight)
        for row in pair:
            scores = torch.log_softmax(
                classifier.model(classifier.tokenizer(row.text, return_tensors="pt")["input_ids"]).logits[0],
                -1,
            )
            (gradient,) = torch.autograd.grad((scores.detach().exp().sqrt() * scores).sum(), [weight])
            total += gradient
            alone += gradient**2
        expected += total**2
    weight.requires_grad_(False)
    kind = "fisher_batches"
    two = gather(classifier, ROWS, kind, fingerprint="m", measure=Measure(batch_size=2))
    assert close(two.sums[name], expected)
    assert set(two.facts.counts.values()) == {4}
    mean = two.mean(name)
    assert mean is not None
    assert close(mean, expected / 4)
    one = gather(classifier, ROWS, kind, fingerprint="m", measure=Measure(batch_size=1))
    assert close(one.sums[name], alone)  # the classes of a row are still added up before the square
    assert not close(one.sums[name], gather(classifier, ROWS, "fisher", fingerprint="m").sums[name])
    with pytest.raises(MixmergeError, match="settings differs"):
        added(
            one, gather(classifier, [Row(text="new")], kind, fingerprint="m", measure=Measure(batch_size=2))
        )

    # A language model's labels are drawn for each row, whoever shares its batch.
    alike = gather(decoder, ROWS, kind, fingerprint="m", measure=Measure(batch_size=1))
    single = gather(decoder, ROWS, "fisher", fingerprint="m")
    assert all(close(alike.sums[tensor], single.sums[tensor]) for tensor in single.sums)
    parts = [likelihood_gradient(decoder, row, "model.norm.weight") for row in ROWS]
    both = gather(decoder, ROWS, kind, fingerprint="m", measure=Measure(batch_size=3))
    assert close(both.sums["model.norm.weight"], (parts[0] + parts[1] + parts[2]) ** 2 + parts[3] ** 2)
    packed = Measure(batch_size=2, max_tokens=12, layout="packed")
    assert gather(decoder, ROWS, kind, fingerprint="m", measure=packed).sums.keys() == single.sums.keys()


def likelihood_gradient(decoder: LoadedExpert, row: Row, name: str) -> Any:
    """Of one row's drawn labels, as the gathering draws them."""
    import torch

    from mixmerge.calibrate.fisher import _drawn, _generator

    weight = dict(decoder.model.named_parameters())[name].requires_grad_(True)
    (batch,) = make_batches([row], decoder.tokenizer)
    value = _drawn(decoder.model(**batch.inputs()).logits, batch.loss_mask, _generator(0, [row.digest]))
    (gradient,) = torch.autograd.grad(value, [weight])
    weight.requires_grad_(False)
    return gradient


def test_fisher_of_a_language_model_is_unbiased(decoder: LoadedExpert) -> None:
    """The mean over many seeds comes near the sum over places and all tokens of the vocabulary."""
    import torch

    model, name = decoder.model, "model.norm.weight"
    weight = dict(model.named_parameters())[name].requires_grad_(True)
    ids = decoder.tokenizer("fox", return_tensors="pt")["input_ids"]
    scores = torch.log_softmax(model(ids).logits[0, :-1].float(), -1)
    exact = torch.zeros_like(weight)
    for place in range(scores.shape[0]):
        for token in range(scores.shape[1]):
            (gradient,) = torch.autograd.grad(scores[place, token], [weight], retain_graph=True)
            exact += scores[place, token].detach().exp() * gradient**2
    weight.requires_grad_(False)
    drawn = [
        gather(
            decoder, [Row(text="fox")], "fisher", fingerprint="m", measure=Measure(seed=seed), wanted=[name]
        )
        for seed in range(150)
    ]
    mean = torch.stack([one.sums[name] for one in drawn]).mean(0)
    assert float((mean.sum() - exact.sum()).abs() / exact.sum()) < 0.1
    assert not torch.equal(drawn[0].sums[name], drawn[1].sums[name])


def test_other_labels() -> None:
    import torch
    from transformers import BertConfig

    from mixmerge.calibrate.fisher import expectation

    logits = torch.tensor([0.0, 2.0])
    several = expectation(logits, BertConfig(problem_type="multi_label_classification"))
    assert [factor for _, factor in several] == pytest.approx([0.25, 0.10499358])
    assert expectation(logits[1:], BertConfig(num_labels=1)) == [(logits[1], 1.0)]


def test_real_inputs_of_every_shape() -> None:
    import torch

    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    value = torch.arange(6.0).reshape(2, 3, 1)
    for shaped in (value, value.reshape(6, 1)):
        found = real_inputs(shaped, mask)
        assert found is not None
        assert found.flatten().tolist() == [0, 1, 3]
    pooled = real_inputs(torch.ones(2, 1), mask)
    assert pooled is not None
    assert len(pooled) == 2
    assert real_inputs(torch.ones(4, 1), mask) is None
    assert real_inputs(torch.ones(4, 1), torch.ones(2, 3)) is not None


def test_saved_statistics_are_guarded(classifier: LoadedExpert, tmp_path: Path) -> None:
    found = gather(classifier, ROWS, "second_moment", fingerprint="m")
    folder = tmp_path / "sums"
    save_statistics(found, folder)
    facts = read_facts(folder)
    assert facts == found.facts
    shared = "bert.encoder.layer.0.attention.self.value.weight"
    one, other = saved_mean(folder, facts, shared), found.mean(shared)
    assert one is not None
    assert other is not None
    assert close(one, other)
    assert saved_mean(folder, facts, "no.such.tensor") is None
    assert json.loads((folder / "statistics.json").read_text())["rows"] == sorted(row.digest for row in ROWS)
    with pytest.raises(MixmergeError, match="4 rows are in both"):
        added(found, found)
    other_model = gather(classifier, [Row(text="new")], "second_moment", fingerprint="other")
    with pytest.raises(MixmergeError, match="model differs: m and other"):
        added(found, other_model)
    data = bytearray((folder / "statistics.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "statistics.safetensors").write_bytes(data)
    with pytest.raises(MixmergeError, match="its statistics are damaged"):
        load_statistics(folder)
    with pytest.raises(MixmergeError, match="holds no statistics"):
        load_statistics(tmp_path)


def test_what_cannot_be_gathered(classifier: LoadedExpert, family: Callable[..., Any]) -> None:
    bare = load_expert(family("bert", dtype="float32").base)
    assert bare.kind == "other"
    with pytest.raises(MixmergeError, match="it predicts neither a token nor a class"):
        gather(bare, ROWS, "fisher", fingerprint="m")
    with pytest.raises(MixmergeError, match="has no tokenizer"):
        gather(LoadedExpert(classifier.model, None, "classifier", "x"), ROWS, "gram", fingerprint="m")
    with pytest.raises(MixmergeError, match="none of 0 rows"):
        gather(classifier, [], "gram", fingerprint="m")
    assert [kind_of(name) for name in ("GPT2LMHeadModel", "LlamaForCausalLM", "BertModel")] == [
        "causal",
        "causal",
        "other",
    ]


def test_values_that_are_not_finite(classifier: LoadedExpert) -> None:
    from copy import deepcopy

    broken = deepcopy(classifier.model)
    broken.bert.embeddings.word_embeddings.weight.data.fill_(float("nan"))
    with pytest.raises(MixmergeError, match="statistics that are not finite"):
        gather(LoadedExpert(broken, classifier.tokenizer, "classifier", "x"), ROWS, "gram", fingerprint="m")


def test_no_row_is_longer_than_the_expert_takes(classifier: LoadedExpert) -> None:
    long = Row(text="z" * 500)
    found = gather(classifier, [long], "second_moment", fingerprint="m", measure=Measure(max_tokens=400))
    counts = {count for name, count in found.facts.counts.items() if "layer" in name}
    assert counts == {64}  # of the tokenizer; the model would take 512


def test_gradients_of_one_line_are_gone_before_the_next(
    decoder: LoadedExpert, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes as much as the model: two at a time were a quarter of what gathering took."""
    import weakref

    import torch

    made: list[Any] = []
    alive: list[int] = []
    real = torch.autograd.grad

    def grad(*arguments: Any, **options: Any) -> Any:
        alive.append(sum(one() is not None for one in made))
        found = real(*arguments, **options)
        made.extend(weakref.ref(one) for one in found if one is not None)
        return found

    monkeypatch.setattr(torch.autograd, "grad", grad)
    gather(decoder, ROWS, "fisher", fingerprint="m")
    assert len(made) > len(alive) == len(ROWS)
    assert set(alive) == {0}


def test_a_map_that_saw_the_input_of_another_only_at_first_has_no_sum() -> None:
    import torch

    from mixmerge.calibrate.gathering import Sums, watching

    one, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    mask, sums = torch.ones(1, 2), Sums(None)
    with watching({"one": one, "other": other}, KINDS["gram"], sums) as watch:
        for shared in (True, False):
            watch.begin(mask)
            value = torch.ones(1, 2, 3)
            one(value)
            other(value if shared else torch.zeros(1, 2, 3))
    assert sums.counts == {"one": 4}
    assert sums.same == {}
