"""The objectives against numbers worked out by hand, and the experts' states against the experts themselves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mixmerge.calibrate.coefficients import CoefficientSpace
from mixmerge.calibrate.deltas import MemoryDeltas
from mixmerge.calibrate.lessons import check_outputs
from mixmerge.calibrate.losses import answers_of, entropy, hidden_loss, logit_loss
from mixmerge.calibrate.mixed import Mixed
from mixmerge.calibrate.objectives import Alignment, AlignmentOptions, Entropy, Schedule, grouped
from mixmerge.calibrate.students import (
    LanguageStudent,
    check_language_model,
    choice_batches,
    choice_logits,
    expert_head,
    left_out,
)
from mixmerge.calibrate.teachers import Teachers
from mixmerge.data.batches import make_batches
from mixmerge.data.rows import Row, joined
from mixmerge.errors import MethodError


def test_entropy_by_hand() -> None:
    logits = torch.tensor(
        [[0.0, 0.0, 0.0, 0.0], [math.log(3.0), 0.0, -torch.inf, -torch.inf], [50.0, 0.0, 0.0, 0.0]]
    )
    wanted = [math.log(4), -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), 0.0]
    assert entropy(logits).tolist() == pytest.approx(wanted, abs=1e-6)
    logits.requires_grad_(True)
    entropy(logits).sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_losses_by_hand() -> None:
    mine, theirs = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert logit_loss(mine, theirs).item() == pytest.approx(kl)
    assert logit_loss(mine, theirs, form="soft_ce").item() == pytest.approx(math.log(2))
    warm = torch.softmax(theirs / 2, -1)[0].tolist()
    wanted = 4 * sum(p * math.log(2 * p) for p in warm)
    assert logit_loss(mine, theirs, temperature=2.0).item() == pytest.approx(wanted, rel=1e-5)
    gaps = [torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]])]
    assert hidden_loss(gaps).item() == pytest.approx((5 / 4 + 10 / 4) / 2)
    assert hidden_loss(gaps, form="sum").item() == pytest.approx(5 / 2 + 10 / 2)


def test_labels_of_which_many_hold_and_numbers_by_hand() -> None:
    mine, theirs = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])
    half, quarter = math.log(2), -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert entropy(theirs, "many").tolist() == pytest.approx([quarter + half])
    assert entropy(torch.tensor([[200.0, -200.0]]), "many").tolist() == [0.0]
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert logit_loss(mine, theirs, answers="many").item() == pytest.approx(kl)
    assert logit_loss(mine, theirs, form="soft_ce", answers="many").item() == pytest.approx(2 * half)
    p = 3**0.5 / (1 + 3**0.5)
    warm = 4 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)))
    assert logit_loss(mine, theirs, temperature=2.0, answers="many").item() == pytest.approx(warm, rel=1e-5)
    numbers = torch.tensor([[1.0], [-2.0]]), torch.tensor([[4.0], [-2.0]])
    for form in ("kl", "soft_ce"):
        found = logit_loss(*numbers, form=form, temperature=3.0, answers="numbers")  # type: ignore[arg-type]
        assert found.tolist() == [4.5, 0.0]
    with pytest.raises(ValueError, match="no entropy"):
        entropy(mine, "numbers")


def test_what_outputs_say() -> None:
    said = [
        ({}, "one"),
        ({"id2label": {"0": "good"}}, "numbers"),
        ({"num_labels": 1, "problem_type": "single_label_classification"}, "numbers"),
        ({"id2label": {"0": "a", "1": "b"}, "problem_type": "regression"}, "numbers"),
        ({"id2label": {"0": "a", "1": "b"}, "problem_type": "multi_label_classification"}, "many"),
        ({"id2label": {"0": "a"}, "problem_type": "multi_label_classification"}, "many"),
    ]
    assert [answers_of(config) for config, _ in said] == [answers for _, answers in said]


def test_other_kinds_are_not_said_to_have_no_head() -> None:
    for name in ("T5ForConditionalGeneration", "BertForMaskedLM"):
        with pytest.raises(MethodError, match=f"coefficients are not learned of a {name} yet"):
            check_outputs("entropy", "other", name)


def test_kl_and_soft_cross_entropy_have_the_same_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    theirs = torch.randn(5, 7, generator=generator)
    found = []
    for form in ("kl", "soft_ce"):
        mine = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
        logit_loss(mine, theirs, form=form, temperature=1.5).sum().backward()  # type: ignore[arg-type]
        found.append(mine.grad)
    torch.testing.assert_close(*found)


def test_every_batch_has_its_turn_before_any_has_another() -> None:
    schedule = Schedule((5, 2), each=2, seed=3)
    seen = [number for step in range(5) for number in schedule.of(step, 0)]
    assert sorted(seen[:5]) == sorted(seen[5:]) == list(range(5))
    assert seen != list(range(10))
    assert sorted(schedule.of(0, 1)) == [0, 1]
    assert (schedule.turn, Schedule((2, 3), each=3).turn) == (3, 1)
    assert schedule.of(4, 0) == Schedule((5, 2), each=2, seed=3).of(4, 0)
    with pytest.raises(MethodError, match="no rows of data for expert 2"):
        Schedule((3, 0))


def test_losses_go_backward_together_up_to_so_many_tokens() -> None:
    parts = [(lambda number=number: torch.tensor(float(number)), 40) for number in range(5)]
    assert [float(loss) for loss in grouped(iter(parts), most=80)] == [1.0, 5.0, 4.0]
    assert [float(loss) for loss in grouped(iter(parts), most=1)] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_rows_with_a_choice_that_is_cut_are_left_out(family: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(family("llama").base)
    short = Row(prompt="the", choices=(" fox", " dog"))
    # Cut to few tokens both choices would be the same.
    long = Row(prompt="the", choices=(" quick brown fox jumps over a", " quick brown fox jumps over the dog"))
    length = max(len(tokenizer("the" + choice)["input_ids"]) for choice in long.choices)
    rows = [short, long, Row(prompt="no choices")]
    whole = choice_batches(rows, tokenizer, max_tokens=length, batch_size=4)
    assert [one.counts for one in whole] == [(2, 2)]
    assert left_out("e", rows, whole) == ()
    cut = choice_batches(rows, tokenizer, max_tokens=length - 1, batch_size=4)
    assert [one.counts for one in cut] == [(2,)]
    assert left_out("e", rows, cut) == (
        "e: 1 of 2 rows are left out: a choice does not fit in max_tokens, or is empty",
    )
    with pytest.raises(MethodError, match="none of 1 rows has two choices that fit"):
        choice_batches([long], tokenizer, max_tokens=length - 1, batch_size=4)


def test_a_collapse_is_said() -> None:
    def predict(expert: int, number: int) -> torch.Tensor:
        predict.calls += 1  # type: ignore[attr-defined]
        early = predict.calls < 25  # type: ignore[attr-defined]
        return torch.eye(2)[torch.tensor([0, 1, 1, 0])] if early else torch.tensor([[0.0, 9.0]] * 4)

    predict.calls = 0  # type: ignore[attr-defined]
    objective = Entropy(predict, [[4]], Schedule((1,)), ["./a"])
    for step in range(60):
        list(objective.losses(step))
    with torch.no_grad():  # a loss that is measured is none of a step
        predict.calls = 0  # type: ignore[attr-defined]
        list(objective.losses(0))
    assert objective.notes() == (
        "./a: 100% of the predictions on its rows are one class, 50% at the start: entropy may have collapsed",
    )


@pytest.fixture
def models(family: Any) -> tuple[Any, list[Any]]:
    from transformers import AutoModelForCausalLM

    made = family("llama", experts=2, dtype="float32")
    base, *experts = (AutoModelForCausalLM.from_pretrained(path) for path in (made.base, *made.experts))
    return base, experts


def test_choices_are_scored_by_their_mean_log_likelihood(
    models: tuple[Any, list[Any]], tokenizer: Any
) -> None:
    model, _ = models
    rows = [
        Row(prompt="the quick", choices=(" brown fox", " dog", " lazy")),
        Row(prompt="1 + 2 =", choices=(" 3", " the fox")),
        Row(text="no choices here"),
        Row(prompt="x" * 90, choices=("cut", "off")),
    ]
    (found,) = choice_batches(rows, tokenizer, max_tokens=40, batch_size=8)
    assert found.counts == (3, 2)
    logits = choice_logits(model, found)
    assert logits.shape == (2, 3)
    assert logits[1, 2] == -torch.inf
    for at, row in enumerate(rows[:2]):
        for number, choice in enumerate(row.choices):
            before = len(tokenizer(row.prompt)["input_ids"])
            ids = torch.tensor([tokenizer(row.prompt + choice)["input_ids"]])
            logs = torch.log_softmax(model(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
            assert logits[at, number].item() == pytest.approx(logs[before - 1 :].mean().item(), abs=1e-4)
    with pytest.raises(MethodError, match="none of 2 rows has two choices"):
        choice_batches(rows[2:], tokenizer, max_tokens=40, batch_size=8)


def test_choices_are_learned_from_as_they_are_scored(
    models: tuple[Any, list[Any]], family: Any, tokenizer: Any
) -> None:
    """The same rows, by `adamerging` and by the metric `choice`: behind a space, unless prompt or choice brings one."""
    from mixmerge.engines.local import TransformersEngine
    from mixmerge.engines.records import Scoring

    rows = [Row(prompt=prompt, choices=("brown fox", " dog")) for prompt in ("the quick", "the quick ")]
    (found,) = choice_batches(rows, tokenizer, max_tokens=40, batch_size=2)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in found.batch.input_ids]
    assert texts == ["the quick brown fox", "the quick dog", "the quick brown fox", "the quick  dog"]
    learned = choice_logits(models[0], found)
    engine = TransformersEngine(str(family("llama", experts=2, dtype="float32").base))
    engine.load()
    asked = [
        Scoring(f"{at} {choice}", row.prompt, joined(row.prompt, choice))
        for at, row in enumerate(rows)
        for choice in row.choices
    ]
    scored = [sum(one.logprobs) / len(one.logprobs) for one in engine.loglikelihood(asked)]
    assert learned.flatten().tolist() == pytest.approx(scored, abs=1e-4)


def test_what_is_remembered_is_what_the_expert_says(
    models: tuple[Any, list[Any]], tokenizer: Any, tmp_path: Path
) -> None:
    model, experts = models
    states = [{name: value.detach().clone() for name, value in one.named_parameters()} for one in experts]
    base = {name: value.detach().clone() for name, value in model.named_parameters()}
    deltas = MemoryDeltas(base, states)
    rows = [Row(text="the quick brown fox jumps over the dog"), Row(text="1 + 2 = 3")]
    batches = make_batches(rows, tokenizer)
    student = LanguageStudent(model, [batches, batches])
    check_language_model(model)
    teachers = Teachers(tmp_path, (1, 2), expert_head(model, deltas, "lm_head.weight"))
    parameters = dict(model.named_parameters())
    layout = CoefficientSpace(granularity="expert", start=1.0).layout(deltas.shapes, 2)
    mixed = Mixed(parameters, deltas, layout, {})
    for number in range(2):
        mixed.build(torch.eye(2)[number : number + 1], everything=True)
        teachers.remember(number, student, [0])
    batch = batches[0]
    keep = batch.attention_mask.bool()
    for number, expert in enumerate(experts):
        final, hidden = teachers.recall(number, 0)
        with torch.no_grad():
            out = expert(**batch.inputs(), output_hidden_states=True)
        torch.testing.assert_close(teachers.logits(final, number), out.logits[keep], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(hidden[1], out.hidden_states[1][keep], atol=1e-5, rtol=1e-4)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == 2 * 3 * int(keep.sum()) * 32 * 4
    # the expert itself is at no distance from what it said, the base is
    options = AlignmentOptions(layers=(1, 2))
    tokens = [[batch.tokens], [batch.tokens]]
    objective = Alignment(student, teachers, tokens, Schedule((1, 1)), options)
    mixed.build(torch.eye(2)[:1], everything=True)
    with torch.no_grad():
        assert objective.loss(0, 0).item() == pytest.approx(0.0, abs=1e-6)
        assert objective.loss(1, 0).item() > 1e-6
        weighted = Alignment(
            student,
            teachers,
            tokens,
            Schedule((1, 1)),
            AlignmentOptions(layers=(1, 2), importance=(1.0, 3.0)),
        )
        (plain,), (thrice,) = objective.losses(0), weighted.losses(0)
        assert thrice.item() == pytest.approx(3 * plain.item(), rel=1e-4)


def test_many_positions_give_the_loss_of_few(
    models: tuple[Any, list[Any]], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = models
    batches = make_batches([Row(text="the quick brown fox jumps over the dog")], tokenizer)

    class Fixed:
        def recall(self, expert: int, number: int) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
            return torch.linspace(-1, 1, batches[0].tokens * 32).reshape(-1, 32), {}

        def logits(self, final: torch.Tensor, expert: int) -> torch.Tensor:
            return final @ torch.linspace(-1, 1, 32 * 280).reshape(32, 280)

    found = []
    for positions in (10_000, 3):
        monkeypatch.setattr("mixmerge.calibrate.objectives.POSITIONS", positions)
        model.zero_grad()
        student = LanguageStudent(model, [batches])
        loss = Alignment(student, Fixed(), [[batches[0].tokens]], Schedule((1,))).loss(0, 0)
        loss.backward()
        found.append((loss.item(), model.lm_head.weight.grad.clone()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-6, rtol=1e-4)
