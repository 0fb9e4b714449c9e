"""The gate of a bank: trained on the experts' calibration rows, as the written shared model sees them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from mixmerge.engine.calibration_data import Data, experts_of
from mixmerge.engine.output import Output
from mixmerge.engine.target import BANK
from mixmerge.errors import Fault, MixmergeError
from mixmerge.plan import Plan

if TYPE_CHECKING:
    from mixmerge.bank.gates.router import Router
    from mixmerge.bank.gates.router_task import Lessons
    from mixmerge.bank.own_heads import Headed

REPORT = f"{BANK}/training.json"
_WELL = 0.8  # below this share of rows a person is told


def add_gate(
    plan: Plan,
    data: Data,
    output: Output,
    *,
    bank: str,
    device: str,
    gathering: Any = None,
    learning: Any = None,
) -> Mapping[str, Any]:
    """Train and save the gate of a plan, unless an earlier run has done so; returns what training found.

    Args:
        plan: with a bank and a gate.
        data: rows of every expert; some are held out of training, and no other rows are looked at.
        output: with the shared model, its config and its tokenizer.
        bank: hash of the bank.
        device: where the shared model runs.
        gathering: called with ("features", rows done, rows in all).
        learning: called with (epochs done, epochs in all, loss).

    Raises:
        MixmergeError: the model cannot be run on the rows, or rows of an expert give no tokens.
    """
    kept = output.kept(REPORT)
    if kept is not None:
        earlier: dict[str, Any] = json.loads(kept)
        return earlier
    for left in (output.partial / BANK).glob(".gate*"):
        left.unlink()
    from mixmerge.bank.features import features_of
    from mixmerge.bank.files import save_gate
    from mixmerge.bank.gates.router import RouterOptions
    from mixmerge.bank.gates.router_fit import TOKENS, fit_router, held_out
    from mixmerge.bank.gates.router_task import Lessons
    from mixmerge.experts.loading import load_expert

    block = None if plan.bank is None else plan.bank.gate
    asked = plan.recipe.calibration
    if plan.bank is None or block is None or asked is None:
        raise MixmergeError(Fault("plan", "has no gate"))
    encoder = block.encoder if block.features == "text" else None
    model = load_expert(output.partial if encoder is None else encoder, device=device)
    numbers = experts_of(plan)
    rows = [(row, expert) for expert, number in enumerate(numbers) for row in data.rows[number]]
    shown = features_of(
        model, [row for row, _ in rows],
        max_tokens=asked.max_tokens, batch_size=asked.batch_size,
        tokens=TOKENS if block.per_token else 0, layers=block.features == "layers",
        unit=encoder is not None, progress=None if gathering is None else partial(gathering, "features"),
    )  # fmt: skip
    del model
    import torch

    taken = [rows[at][0] for at in shown.rows]
    labels, keys = torch.tensor([rows[at][1] for at in shown.rows]), [row.digest for row in taken]
    gate, trained = fit_router(
        shown.values,
        labels,
        keys,
        RouterOptions.model_validate(block.model_dump(exclude={"encoder"})),
        experts=len(numbers),
        seed=plan.recipe.seed,
        encoder=encoder or "",
        progress=learning,
    )
    report = {**trained.as_json(), "experts": list(plan.bank.experts)}
    if gate.said.task is not None:
        held = held_out(keys, labels, share=block.holdout, seed=plan.recipe.seed, experts=gate.experts)
        lessons = Lessons(taken, labels.tolist(), shown.values, held, asked.max_tokens)
        report["task"] = _second(gate, plan, output, lessons, device, learning)
    save_gate(output.partial / BANK, gate, bank=bank, experts=plan.bank.experts)
    output.keep(REPORT, json.dumps(report, indent=2).encode() + b"\n")
    return report


def _second(
    gate: Router, plan: Plan, output: Output, lessons: Lessons, device: str, learning: Any
) -> Mapping[str, Any]:
    """Train a router by the loss of the experts' tasks; what that found."""
    from mixmerge.bank.files import load_bank
    from mixmerge.bank.gates.refined import TaskTraining
    from mixmerge.bank.gates.router_task import fit_task

    said = gate.said.task or TaskTraining()
    headed = _headed(plan, output, device, said.dtype)
    bank, seed = load_bank(output.partial), plan.recipe.seed
    return fit_task(gate, bank, headed, lessons, said, seed=seed, progress=learning).as_json()


def _headed(plan: Plan, output: Output, device: str, dtype: Literal["float32", "bfloat16"]) -> Headed:
    """The shared model, with the head of every expert where they have their own."""
    from mixmerge.bank.own_heads import Headed
    from mixmerge.experts.loading import load_expert

    if not plan.heads:
        return Headed(load_expert(output.partial, device=device, dtype=dtype))
    named = {head.model: head.expert for head in plan.heads}
    return Headed.load(
        output.partial, [named[number] for number in experts_of(plan)], device=device, dtype=dtype
    )


def notes_of(report: Mapping[str, Any]) -> list[str]:
    """What a person should know of a gate that does not tell the experts' inputs apart, or learned nothing more."""
    if report["accuracy"] is None:
        return [
            "gate: too few rows to hold any out, so nothing says how well it tells the experts' inputs apart"
        ]
    notes = []
    if "task" in report and report["task"]["epoch"] == 0:
        notes.append(
            "gate.task: no epoch had a better loss on the rows held out, so the router stays as it was"
        )
    if report["accuracy"] >= _WELL or "task" in report:
        return notes
    share = f"{100 * report['accuracy']:.1f} % of {report['held_out']} rows held out"
    return [f"gate: only {share} go to their own expert; see {REPORT} for which it takes for which"]
