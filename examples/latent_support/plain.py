"""Rows without glue: each expert alone, routing, a vote, a relay by text, and a LoRA adapter on the second expert."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from merging_support.stages import stage, write_json

from latent_support.experts import FIRST, SECOND
from latent_support.suite import LONGEST, Suite, judged, right, router, score
from latent_support.world import DIGITS, OWN, operands
from mixmerge.evaluate import Question, answers, load

OUTCOMES = "of the experts' own questions"  # what routers learn from
TARGETS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
RATE = 4e-3  # the highest learning rate of the adapter
LONGER = 3  # times the steps of the glue: by then it has learned most of what it can
PLAIN = (
    "relay by text",
    f"{FIRST} alone",
    f"{SECOND} alone",
    "routing",
    "vote",
    "LoRA on the primary",
)
Given = dict[str, list[str]]  # split -> of each question the answer


def run_plain(suite: Suite, *, lora: Callable[[], int]) -> None:
    """All rows of this file; each is kept.

    Args:
        lora: says how many parameters the adapter may have at least.
    """
    _row(suite, f"{FIRST} alone", lambda: _alone(suite, suite.expert(FIRST)))
    _row(suite, f"{SECOND} alone", lambda: _alone(suite, suite.expert(SECOND)))
    _row(suite, "routing", lambda: score(suite, _mixture(suite, {"kind": "argmax"}, "answer")))
    _row(suite, "vote", lambda: score(suite, _mixture(suite, {"kind": "top_k", "k": 2}, "vote")))
    _row(suite, "relay by text", lambda: _relay(suite), control=False)
    told = {"lora": [RATE, LONGER], **suite.made_from}
    stage(suite.folder, "lora", told, lambda out: _train_lora(suite, lora(), out))
    _row(
        suite, "LoRA on the primary", lambda: _alone(suite, f"{suite.expert(SECOND)}+{suite.folder / 'lora'}")
    )


def make_outcomes(suite: Suite) -> None:
    """What routers learn from."""
    stage(suite.folder, "outcomes.jsonl", {"rows": OUTCOMES, **suite.made_from}, partial(_outcomes, suite))


def _row(suite: Suite, name: str, given: Callable[[], Given], *, control: bool = True) -> None:
    def write(out: Path) -> None:
        found = given()
        write_json(out, {"name": name, "control": control, "right": judged(suite, found), "given": found})

    told = {"row": name, "longer": LONGER, "outcomes": OUTCOMES, **suite.made_from}
    stage(suite.folder, f"results/{name.replace(' ', '-')}.json", told, write)


def _mixture(suite: Suite, policy: Mapping[str, Any], compose: str) -> dict[str, Any]:
    return {
        "experts": {name: {"model": suite.expert(name)} for name in (FIRST, SECOND)},
        "router": router(suite),
        "policy": dict(policy),
        "compose": {"kind": compose},
        "generate": {"max_new_tokens": LONGEST},
    }


def _alone(suite: Suite, model: str) -> Given:
    expert = load(model)
    return {
        split: answers(expert, [one.prompt for one in some], max_new_tokens=LONGEST)
        for split, some in suite.exam.items()
    }


def _outcomes(suite: Suite, out: Path) -> None:
    """Which of the experts' own questions each can answer, but for what is held out. Queries are not among them: both
    experts fail there, and what nobody can do says nothing of who comes nearest."""
    import numpy as np

    from mixmerge.outcomes.table import OutcomeTable

    world = suite.world
    codes, some, kept = (suite.exam[task] for task in OWN)
    rows = [one for one in codes if one.prompt.split()[1] not in world.held_names]
    rows += [one for one in some if operands(one) not in world.held_cells]
    rows += [one for one in kept if one.answer.rstrip(":") not in world.held_names]
    prompts = [one.prompt for one in rows]
    columns = []
    for name in (FIRST, SECOND):
        given = answers(load(suite.expert(name)), prompts, max_new_tokens=LONGEST)
        columns.append([float(right(text, one)) for text, one in zip(given, rows, strict=True)])
    OutcomeTable(
        ids=tuple(map(str, range(len(rows)))),
        queries=tuple(prompts),
        experts=(FIRST, SECOND),
        score=np.array(columns).T,
    ).write(out)


def _relay(suite: Suite) -> Given:
    """The ceiling: who knows how to ask both experts writes names as the digits that the first one says, and asks the
    second one; the digit of a keeper that the second one names is asked of the first one."""
    first, second = load(suite.expert(FIRST)), load(suite.expert(SECOND))

    def digits(names: Sequence[str]) -> dict[str, str]:
        unique = list(dict.fromkeys(name for name in names if name not in DIGITS))
        said = answers(first, [f"code {name}" for name in unique], max_new_tokens=1)
        return dict(zip(unique, said, strict=True))

    found: Given = {}
    for split, some in suite.exam.items():
        prompts = [one.prompt for one in some]
        if split == OWN[0]:
            found[split] = answers(first, prompts, max_new_tokens=1)
            continue
        codes = digits([name for one in some for name in operands(one)])
        asked = [" ".join(codes.get(word, word) for word in prompt.split(" ")) for prompt in prompts]
        said = answers(second, asked, max_new_tokens=LONGEST)
        keepers = [text.partition(":") for text in said]
        codes = digits([name for name, colon, _ in keepers if colon])
        found[split] = [name + colon + codes.get(name, "") if colon else name for name, colon, _ in keepers]
    return found


def _train_lora(suite: Suite, parameters: int, out: Path) -> None:
    """An adapter on every matrix of the second expert's layers, of the least rank with so many parameters: AdamW on the
    lessons of the glue."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mixmerge.zoo.training import Pool, batches

    torch.manual_seed(suite.seed)
    folder = suite.expert(SECOND)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    sizes = [one.weight.shape for name, one in model.named_modules() if name.split(".")[-1] in TARGETS]
    rank = -(-parameters // sum(map(sum, sizes)))
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    trained = [one for one in model.parameters() if one.requires_grad]
    adam = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.01)
    steps = LONGER * suite.steps.glue
    rows: list[Question] = list(suite.lessons)
    data = batches([Pool(rows, 1.0)], tokenizer, seed=suite.seed)
    model.train()
    for step, (tokens, labels) in enumerate(islice(data, steps)):
        logits = model(input_ids=tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for group in adam.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 30) * (1 - step / steps)
        adam.step()
        adam.zero_grad()
    model.save_pretrained(out)
