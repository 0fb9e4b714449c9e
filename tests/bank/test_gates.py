"""Each gate against numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mixmerge.bank.fitting import fit_gate
from mixmerge.bank.fitting_closed import right_vectors
from mixmerge.bank.fitting_jointly import routing_loss
from mixmerge.bank.fitting_steps import balance_loss, entropy_of
from mixmerge.bank.gate import Run
from mixmerge.bank.gates.average_activation import AverageActivationGate, AverageActivationOptions
from mixmerge.bank.gates.choosing import chosen, standard_scores, standardised
from mixmerge.bank.gates.glider import GliderGate, GliderOptions
from mixmerge.bank.gates.lora_mixer import LoraMixerGate, LoraMixerOptions
from mixmerge.bank.gates.lorahub import LorahubGate, LorahubOptions
from mixmerge.bank.gates.phatgoose import PhatgooseGate, PhatgooseOptions
from mixmerge.bank.gates.places import Places
from mixmerge.bank.gates.xlora import XLoraGate, XLoraOptions
from mixmerge.bank.mix import Mix, dense
from mixmerge.bank.records import Bank, Entry, side_by_side
from mixmerge.errors import MixmergeError

SITE = "model.layers.0.m.weight"
EVEN, ODD, HALVES = [1.0, -1.0, 1.0, -1.0], [-1.0, 1.0, -1.0, 1.0], [1.0, 1.0, -1.0, -1.0]


def bank_of(*entries: Entry | None) -> Bank:
    experts = tuple(f"e{number}" for number in range(len(entries)))
    return Bank(experts, {SITE: side_by_side(SITE, list(entries))}, {})


def ones(rank: int, inputs: int) -> Entry:
    return Entry(torch.ones(rank, inputs), torch.ones(rank, 3))


def three(inputs: int = 4) -> Places:
    return Places.of(bank_of(ones(1, inputs), ones(2, inputs), ones(1, inputs)))


def filled(gate: Any, rows: list[list[float]], site: str = SITE) -> Any:
    with torch.no_grad():
        gate.prototypes[site].copy_(torch.tensor(rows))
    return gate.eval().requires_grad_(False)


def weights_of(mix: Mix | None, experts: int) -> Tensor:
    assert mix is not None
    return dense(mix, experts)


def softmax(*scores: float) -> list[float]:
    total = sum(math.exp(one) for one in scores)
    return [math.exp(one) / total for one in scores]


def test_the_best_of_all_renormalised_are_a_softmax_of_the_best() -> None:
    scores = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    whole = torch.softmax(scores / 0.7, -1)
    values, entries = whole.topk(3, -1)
    found = chosen(scores, 3, temperature=0.7)
    assert found.entries is not None
    assert torch.equal(found.entries, entries)
    torch.testing.assert_close(found.weights, values / values.sum(-1, keepdim=True))
    assert chosen(scores, 9).entries is None
    absent = torch.tensor([True, False, False, False, False, False, True])
    left = dense(chosen(scores, 6, absent=absent), 7)
    assert left[..., absent].eq(0).all()
    torch.testing.assert_close(left.sum(-1), torch.ones(2, 5))


def test_standard_scores_are_those_of_two_layer_norms() -> None:
    draw = torch.Generator().manual_seed(0)
    u = torch.randn(2, 3, 16, generator=draw) * 4 + 2
    v = standardised(torch.randn(5, 16, generator=draw))
    torch.testing.assert_close(standard_scores(u, v), standardised(u) @ v.T / 4, rtol=1e-4, atol=1e-5)


def test_phatgoose_by_hand() -> None:
    gate = filled(PhatgooseGate(three(), PhatgooseOptions()), [EVEN, HALVES, ODD])
    u = torch.tensor([[[6.0, 4.0, 6.0, 4.0], [2.0, 2.0, -2.0, -2.0]]])  # a mean of 5; four times as long
    found = weights_of(gate.mix(SITE, u, Run()), 3)
    # Scores: 4 / 2 for the first, 0, -2; then 0, 2, 0: the better of equal ones.
    torch.testing.assert_close(found[0, 0], torch.tensor([*softmax(2, 0), 0.0]), rtol=1e-4, atol=1e-5)
    assert math.isclose(float(found[0, 1, 1]), softmax(2, 0)[0], rel_tol=1e-4)
    assert int((found[0, 1] > 0).sum()) == 2


def test_an_expert_that_is_not_there_gets_nothing_and_others_share() -> None:
    bank = bank_of(ones(1, 4), None, ones(1, 4))
    gate = filled(PhatgooseGate(Places.of(bank), PhatgooseOptions()), [ODD, EVEN, HALVES])
    found = weights_of(gate.mix(SITE, torch.tensor([[EVEN]]), Run()), 3)
    torch.testing.assert_close(found[0, 0], torch.tensor([softmax(-2, 0)[0], 0, softmax(-2, 0)[1]]))


def test_a_bias_goes_with_its_weight_and_all_else_as_said() -> None:
    gate = filled(PhatgooseGate(three(), PhatgooseOptions()), [EVEN, HALVES, ODD])
    u = torch.tensor([[EVEN]])
    beside, own = gate.mix("model.layers.0.m.bias", u, Run()), gate.mix(SITE, u, Run())
    assert torch.equal(weights_of(beside, 3), weights_of(own, 3))
    for elsewhere, inputs in (
        ("model.norm.weight", u),
        ("model.embed_tokens.weight", torch.tensor([[1, 2]])),
    ):
        found = weights_of(gate.mix(elsewhere, inputs, Run()), 3)
        torch.testing.assert_close(found, torch.full((1, 1, 3), 1 / 3))
    silent = PhatgooseGate(three(), PhatgooseOptions(others="base"))
    assert silent.mix("model.norm.weight", u, Run()) is None


def test_right_vectors_are_those_of_the_dense_change() -> None:
    draw = torch.Generator().manual_seed(3)
    entry = Entry(
        torch.randn(3, 8, generator=draw),
        torch.randn(3, 5, generator=draw),
        torch.tensor([0.1, 5.0, 1.0]),  # of each rank, so A alone does not say it
    )
    whole = entry.b.T @ (torch.as_tensor(entry.scale)[:, None] * entry.a)
    _, _, right = torch.linalg.svd(whole)
    found = right_vectors(entry, 4)
    torch.testing.assert_close((found[:3] * right[:3]).sum(-1).abs(), torch.ones(3))
    assert found[3].eq(0).all()
    assert (found[:3].gather(1, found[:3].abs().argmax(1, keepdim=True)) > 0).all()


def axis(number: int, inputs: int = 4, size: float = 1.0) -> Entry:
    a = torch.zeros(2, inputs)
    a[0, number], a[1, (number + 1) % inputs] = size, size / 2
    return Entry(a, torch.eye(2))


def test_arrow_by_hand() -> None:
    bank = bank_of(axis(0), axis(1, size=3.0), axis(2))
    gate = fit_gate("arrow", {"top_k": 2, "temperature": 2.0}, bank)
    found = weights_of(gate.mix(SITE, torch.tensor([[[-4.0, 1.0, 2.0, 9.0]]]), Run()), 3)
    first, third = softmax(4 / 2, 2 / 2)
    torch.testing.assert_close(found[0, 0], torch.tensor([first, 0.0, third]))
    mixed = fit_gate("arrow", {"mix": "factors"}, bank).mix(SITE, torch.ones(1, 1, 4), Run())
    assert mixed is not None
    assert mixed.how == "factors"


def test_smile_by_hand() -> None:
    bank = bank_of(axis(0), axis(2))
    u = torch.tensor([[[3.0, 4.0, 4.0, 2.0]]])
    one = fit_gate("smile", {"top_k": 2}, bank)
    torch.testing.assert_close(weights_of(one.mix(SITE, u, Run()), 2)[0, 0], torch.tensor(softmax(3, 4)))
    two = fit_gate("smile", {"top_k": 2, "gate_k": 2}, bank)
    lengths = (5.0, math.sqrt(20))
    torch.testing.assert_close(weights_of(two.mix(SITE, u, Run()), 2)[0, 0], torch.tensor(softmax(*lengths)))
    default = fit_gate("smile", {}, bank)
    assert weights_of(default.mix(SITE, u, Run()), 2)[0, 0].tolist() == [0, 1]
    assert default.mix("model.norm.weight", u, Run()) is None


@pytest.mark.parametrize(
    ("score", "scores"),
    [("dot", (8.0, 0.0)), ("standardised", (2.0, 0.0)), ("cosine", (1.0, 0.0))],
)
def test_average_activation_by_hand(score: Any, scores: tuple[float, float]) -> None:
    places = Places.of(bank_of(ones(1, 4), ones(1, 4)))
    gate = filled(AverageActivationGate(places, AverageActivationOptions(score=score)), [EVEN, HALVES])
    found = weights_of(gate.mix(SITE, 2 * torch.tensor([[EVEN]]), Run()), 2)
    torch.testing.assert_close(found[0, 0], torch.tensor(softmax(*scores)), rtol=1e-4, atol=1e-5)


def test_glider_adds_more_of_a_near_query_than_of_a_far_one() -> None:
    gate = filled(GliderGate(three(), GliderOptions(), 2), [EVEN, HALVES, ODD])
    gate.purposes.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]]))
    rows = gate.query(torch.tensor([[5.0, 0.0], [1.0, 1.0]]))
    near = 3 / math.sqrt(2)
    torch.testing.assert_close(rows, torch.tensor([[103.0, 0.0, -103.0], [near, near, -near]]))
    found = weights_of(gate.mix(SITE, torch.tensor([[EVEN], [HALVES]]), Run(rows)), 3)
    torch.testing.assert_close(found[0, 0], torch.tensor([1.0, 0, 0]))
    second = torch.tensor([*softmax(near, near + 2), 0.0])
    torch.testing.assert_close(found[1, 0], second, rtol=1e-4, atol=1e-5)
    fixed = GliderGate(three(), GliderOptions(alpha=7.0), 2)
    fixed.purposes.copy_(gate.purposes)
    torch.testing.assert_close(fixed.query(torch.tensor([[5.0, 0.0]])), torch.tensor([[7.0, 0.0, -7.0]]))
    with pytest.raises(MixmergeError, match="no features of the queries"):
        gate.mix(SITE, torch.tensor([[EVEN]]), Run())


def test_xlora_by_hand() -> None:
    other = "model.layers.1.m.weight"
    entries: list[Entry | None] = [ones(1, 4), ones(1, 4)]
    bank = Bank(("a", "b"), {name: side_by_side(name, entries) for name in (SITE, other)}, {})
    hidden, u = torch.tensor([[[1.0, 2.0], [0.0, 1.0]]]), torch.zeros(1, 2, 4)
    shared = XLoraGate(Places.of(bank), XLoraOptions(temperature=0.5), 2)
    assert shared.classifier[-1].weight.shape == (2, 2)
    with torch.no_grad():
        shared.classifier[-1].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        shared.classifier[-1].bias.copy_(torch.tensor([0.0, 0.5]))
    run = Run(hidden=hidden)
    found = weights_of(shared.mix(SITE, u, run), 2)[0]
    torch.testing.assert_close(found, torch.tensor([softmax(2, 5), softmax(0, 3)]))
    assert torch.equal(found, weights_of(shared.mix(other, u, run), 2)[0])
    layers = XLoraGate(Places.of(bank), XLoraOptions(scope="layer", top_k=1, depth=2, size=5), 2).eval()
    assert layers.classifier[-1].weight.shape == (4, 5)
    with torch.no_grad():
        layers.classifier[-1].weight.zero_()
        layers.classifier[-1].bias.copy_(torch.tensor([1.0, 0.0, 0.0, 1.0]))
    assert weights_of(layers.mix(SITE, u, run), 2)[0].tolist() == [[1, 0], [1, 0]]
    assert weights_of(layers.mix(other, u, run), 2)[0].tolist() == [[0, 1], [0, 1]]
    with pytest.raises(MixmergeError, match="hidden states"):
        shared.mix(SITE, u, Run())


def test_lora_mixer_spreads_while_it_learns_and_chooses_afterwards() -> None:
    gate = LoraMixerGate(three(), LoraMixerOptions(top_k=1))
    with torch.no_grad():
        gate.prototypes[SITE].copy_(torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0]]))
    u = torch.tensor([[[1.0, 3.0, 2.0, 9.0]]])
    learning = weights_of(gate.train().mix(SITE, u, Run()), 3)
    torch.testing.assert_close(learning[0, 0].detach(), torch.tensor(softmax(1, 3, 2)))
    assert weights_of(gate.eval().mix(SITE, u, Run()), 3)[0, 0].tolist() == [0, 1, 0]


def test_losses_of_routing_by_hand() -> None:
    p = torch.tensor([[0.5, 0.5], [1.0, 0.0]], requires_grad=True)
    picked = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert balance_loss(p, picked).item() == pytest.approx(2 * 0.75)
    assert entropy_of(p).item() == pytest.approx(math.log(2) / 2)
    assert float(balance_loss(torch.eye(2), torch.eye(2))) == pytest.approx(1)
    real, own = torch.tensor([[True, True, False]]), torch.tensor([0])
    log = [(SITE, Mix(torch.cat([p, torch.tensor([[0.0, 1.0]])])[None])), ("model.norm.weight", Mix(p))]
    places = Places.of(bank_of(ones(1, 4), ones(1, 4)))

    def loss(balance: float, entropy: float, domain: float) -> Tensor:
        options = LoraMixerOptions(balance=balance, entropy=entropy, domain=domain, top_k=1)
        return routing_loss(log, real, own, options, sites=places)

    assert loss(1, 0, 0).item() == pytest.approx(0.75)
    assert loss(0, 1, 0).item() == pytest.approx(-math.log(2) / 2)
    assert loss(0, -1, 0).item() == pytest.approx(math.log(2) / 2)
    assert loss(0, 0, 1).item() == pytest.approx(math.log(2) / 2)
    for weights in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        (slope,) = torch.autograd.grad(loss(*weights), p)
        assert slope.abs().sum() > 0


def test_lorahub_and_the_mean_are_constants() -> None:
    gate = LorahubGate(2, LorahubOptions())
    gate.weights.copy_(torch.tensor([-1.5, 0.25]))
    found = gate.mix(SITE, torch.zeros(3, 2, 4), Run())
    assert found is not None
    assert (found.how, found.weights.tolist()) == ("factors", [[-1.5, 0.25]] * 3)
    mean = fit_gate("mean", {}, bank_of(*[ones(1, 4)] * 4))
    assert (
        weights_of(mean.mix("model.norm.weight", torch.zeros(2, 5, 4), Run()), 4).flatten().tolist()
        == [0.25] * 8
    )


def ranks_of(kind: str, said: dict[str, Any], bank: Bank, u: Tensor, **given: Tensor) -> Tensor:
    gate = fit_gate(kind, said, bank, given={f"{SITE}.{name}": value for name, value in given.items()})
    gate.bind(bank)
    found = gate.mix(SITE, u, Run())
    assert found is not None
    assert found.by == "rank"
    return found.weights[0, 0]


def test_ranks_that_a_router_chooses() -> None:
    bank = bank_of(ones(3, 2))
    router = torch.tensor([[0.0, 0.0], [math.log(3), 0.0], [0.0, -math.log(3)]])  # sigmoids: 1/2, 3/4, 1/4
    u = torch.ones(1, 1, 2)
    found = ranks_of("smora", {"active": 2}, bank, u, router=router)
    torch.testing.assert_close(found, torch.tensor([3 * 0.4, 3 * 0.6, 0.0]))  # alpha / 3 becomes alpha / 2
    plain = ranks_of("smora", {"active": 2, "gain": 1.0}, bank, u, router=router)
    torch.testing.assert_close(plain, torch.tensor([2 * 0.4, 2 * 0.6, 0.0]))
    moved = ranks_of(
        "smora", {"active": 2, "gain": 10.0}, bank, u, router=router, bias=torch.tensor([0, 0, 1.0])
    )
    torch.testing.assert_close(moved, torch.tensor([0.0, 20 * 0.375, 20 * 0.625]))


def test_ranks_that_their_own_factors_choose() -> None:
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
    bank = bank_of(Entry(a, torch.ones(3, 3)))
    u = torch.tensor([[[3.0, -4.0]]])  # A u: 3, -4, -2
    assert ranks_of("flylora", {"active": 1}, bank, u).tolist() == [0, 1, 0]
    assert ranks_of("flylora", {"active": 1, "by": "signed"}, bank, u).tolist() == [1, 0, 0]
    d = torch.tensor([0.0, 0.0, -3.0])
    assert ranks_of("flylora", {"active": 1}, bank, u, bias=d).tolist() == [0, 0, 1]
    assert ranks_of("self_rank", {"active": 2}, bank, u).tolist() == [1, 1, 0]  # cosines: .6, .8, .14
    soft = ranks_of("self_rank", {"active": 2, "values": "softmax"}, bank, u)
    first, second = softmax(0.6, 0.8)
    torch.testing.assert_close(soft, torch.tensor([2 * first, 2 * second, 0.0]))


def test_arrow_is_that_of_peft(family: Any, tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    from peft.tuners.lora import ArrowConfig, create_arrow_model
    from transformers import AutoModelForCausalLM

    from mixmerge.bank.attach import Attached

    folder, paths, found = family("llama").base, [], {}
    targets = ["q_proj", "down_proj"]
    for number in range(3):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM")
        adapted = peft.get_peft_model(model, config)
        draw = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for name, value in adapted.named_parameters():
                if "lora_" in name:
                    drawn = torch.randn(value.shape, generator=draw) * 0.3
                    # Singular values far apart: fifteen power iterations find the first.
                    fall = torch.tensor([1.0, 0.1, 0.1, 0.1])
                    value.copy_(drawn * fall if "lora_B" in name else drawn)
                    site = name.removeprefix("base_model.model.").split(".lora_")[0] + ".weight"
                    found.setdefault(site, [{} for _ in range(3)])[number][name.split("lora_")[1][0]] = (
                        value.clone()
                    )
        paths.append(str(tmp_path / str(number)))
        adapted.save_pretrained(paths[-1])
    bank = Bank(
        ("0", "1", "2"),
        {
            site: side_by_side(site, [Entry(one["A"], one["B"].T, 6 / 4) for one in parts])
            for site, parts in found.items()
        },
        {},
    )
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(3, 280, (2, 9), generator=torch.Generator().manual_seed(9))
    attached = Attached(base, bank, fit_gate("arrow", {"top_k": 2, "temperature": 0.7}, bank))
    with torch.no_grad(), attached.running(Run()):
        ours = base(ids).logits
    attached.detach()
    theirs = create_arrow_model(base, paths, ArrowConfig(top_k=2, router_temperature=0.7, rng_seed=0)).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours, theirs(ids).logits, rtol=1e-4, atol=1e-5)


def test_only_what_is_learned_is_given() -> None:
    with pytest.raises(MixmergeError, match="there is no such place"):
        ranks_of(
            "smora",
            {},
            bank_of(ones(3, 2)),
            torch.ones(1, 1, 2),
            router=torch.ones(3, 2),
            _gains=torch.ones(3),
        )
