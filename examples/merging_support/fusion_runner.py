"""Run one of FusionBench's methods on trunks of BERT. Started by ``fusion.py`` with FusionBench's own Python.

Argument: a JSON file with ``method``, ``settings``, ``base``, ``experts`` (task: trunk), ``heads`` (task: expert with
its head), ``data`` (task: JSONL with texts), ``tokens`` (task: of a row), ``out``. Imports nothing of mixmerge.

FusionBench leaves reading data to a subclass for RegMean, Fisher and AdaMerging. The three below fill in those hooks
and nothing else; they follow its own classes for GPT-2 and CLIP (what counts as one example, padding in the Gram
matrices, the loss whose gradient is squared). Batches are padded to their longest row.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from fusion_bench import BaseModelPool
from fusion_bench.method import (
    ISO_C_Merge,
    ISO_CTS_Merge,
    TaskArithmeticAlgorithm,
    TaskSingularVectorMerging,
    TiesMergingAlgorithm,
    WUDIMerging,
)
from fusion_bench.method.adamerging.layer_wise_adamerging import LayerWiseAdaMergingAlgorithm
from fusion_bench.method.fisher_merging.fisher_merging import (
    FisherMergingAlgorithm,
    get_param_squared_gradients,
)
from fusion_bench.method.regmean.regmean import RegMeanAlgorithm
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig, BertModel

PREFIX = "bert."


class Job:
    """What the file asks for, and reading models, heads and batches for it."""

    def __init__(self, path: Path) -> None:
        told = json.loads(path.read_text(encoding="utf-8"))
        self.method: str = told["method"]
        self.settings: dict[str, Any] = told["settings"]
        self.base, self.out = Path(told["base"]), Path(told["out"])
        self.experts: dict[str, str] = told["experts"]
        self.heads: dict[str, str] = told["heads"]
        self.data: dict[str, str] = told["data"]
        self.tokens: dict[str, int] = told["tokens"]
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)

    def trunk(self, folder: Path) -> BertModel:
        # Without dropout: FusionBench adapts in training mode, and its own models (CLIP) have none.
        config = BertConfig.from_pretrained(
            self.base, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        model = BertModel(config)
        tensors = load_file(folder / "model.safetensors")
        model.load_state_dict({name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()})
        return model

    def head(self, task: str) -> torch.nn.Linear:
        tensors = load_file(Path(self.heads[task]) / "model.safetensors")
        weight, bias = tensors["classifier.weight"], tensors["classifier.bias"]
        head = torch.nn.Linear(weight.shape[1], weight.shape[0])
        head.load_state_dict({"weight": weight, "bias": bias})
        return head.requires_grad_(False)

    def batches(self, task: str, size: int, *, forever: bool) -> Iterator[dict[str, torch.Tensor]]:
        lines = Path(self.data[task]).read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        draw = random.Random(0)
        while True:
            # In their order where ours are, too: a square of a batch's sum depends on who shares the batch.
            order = draw.sample(range(len(texts)), len(texts)) if forever else list(range(len(texts)))
            for start in range(0, len(order) - size + 1, size):
                rows = [texts[row] for row in order[start : start + size]]
                yield dict(
                    self.tokenizer(
                        rows, truncation=True, max_length=self.tokens[task], padding=True, return_tensors="pt"
                    )
                )
            if not forever:
                return


class Pool(BaseModelPool):
    """Trunks read anew whenever FusionBench asks for one, as its pools of hub models do."""

    def __init__(self, job: Job) -> None:
        super().__init__({"_pretrained_": str(job.base), **job.experts})
        self.job = job

    def load_model(self, model_name_or_config: str, *args: Any, **kwargs: Any) -> BertModel:
        folder = (
            self.job.base
            if model_name_or_config == "_pretrained_"
            else self.job.experts[model_name_or_config]
        )
        return self.job.trunk(Path(folder))

    def load_train_dataset(self, dataset_name: str, *args: Any, **kwargs: Any) -> str:
        return dataset_name  # the hooks below read by the task's name


class Fisher(FisherMergingAlgorithm):  # type: ignore[misc]
    def get_fisher_weights(
        self, model_name: str, model: Any, train_dataset: Any, param_names_to_merge: list[str]
    ) -> dict[str, torch.Tensor]:
        job, seen = self.modelpool.job, 0
        head, found = job.head(model_name), {}
        for batch in job.batches(model_name, job.settings["batch_size"], forever=False):
            if seen >= self.config.num_fisher_examples:
                break
            logits = head(model(**batch).pooler_output)
            expected = torch.softmax(logits, -1).detach().sqrt() * torch.log_softmax(logits, -1)
            model.zero_grad()
            expected.sum().backward()
            squared = get_param_squared_gradients(model=model, param_names_to_merge=param_names_to_merge)
            for name, value in squared.items():
                found[name] = found.get(name, 0) + value.detach()
            seen += len(batch["input_ids"])
        return {name: value / seen for name, value in found.items()}


class RegMean(RegMeanAlgorithm):  # type: ignore[misc]
    def get_regmean_weights(
        self, model_name: str, model: Any, train_dataset: Any, linear_modules_to_merge: dict[str, Any]
    ) -> dict[str, torch.Tensor]:
        job, sums, counts = self.modelpool.job, {}, {}

        def hook_of(name: str) -> Any:
            def hook(module: Any, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
                rows = given[0].detach().reshape(-1, given[0].shape[-1])
                sums[name] = sums.get(name, 0) + rows.T @ rows
                counts[name] = counts.get(name, 0) + len(rows)

            return hook

        handles = [
            module.register_forward_hook(hook_of(name)) for name, module in linear_modules_to_merge.items()
        ]
        seen = 0
        for batch in job.batches(model_name, job.settings["batch_size"], forever=False):
            if seen >= self.config.num_regmean_examples:
                break
            model(**batch)
            seen += len(batch["input_ids"])
        for handle in handles:
            handle.remove()
        return {name: total / counts[name] for name, total in sums.items()}


class AdaMerging(LayerWiseAdaMergingAlgorithm):  # type: ignore[misc]
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: there is no logger, and FusionBench takes it for granted that there is one."""

    def on_test_time_adaptation_start(self) -> None:
        job = self.modelpool.job
        self.heads = {task: job.head(task) for task in job.experts}
        self.loaders = {
            task: job.batches(task, job.settings["batch_size"], forever=True) for task in job.experts
        }

    def get_shuffled_test_loader_iter(self, task: str) -> Any:
        return ((batch,) for batch in self.loaders[task])

    def compute_logits(self, module: Any, images: Any, task: str) -> torch.Tensor:
        return self.heads[task](module(**images).pooler_output)


def algorithm(job: Job) -> Any:
    """FusionBench's algorithm with the settings asked for, else those of its published configuration."""
    told = {
        name: value
        for name, value in job.settings.items()
        if name not in ("batch_size", "exclude_embeddings")
    }
    names = [f"embeddings.{part}_embeddings.weight" for part in ("word", "position", "token_type")]
    left_out = {"exclude_keys": names if job.settings.get("exclude_embeddings") else None}
    match job.method:
        case "task_arithmetic":
            return TaskArithmeticAlgorithm(**told)
        case "ties":
            return TiesMergingAlgorithm(remove_keys=[], **told)
        case "tsv_m":
            return TaskSingularVectorMerging(**told, **left_out)
        case "iso_c":
            return ISO_C_Merge(**told, **left_out)
        case "iso_cts":
            return ISO_CTS_Merge(**told, **left_out)
        case "wudi":
            return WUDIMerging(**told, **left_out)
        case "fisher":
            return Fisher(exclude_param_names_regex=[], **told)
        case "regmean":
            return RegMean(exclude_param_names_regex=[], weight_transpose=True, **told)
        case "adamerging":
            given = {
                "weights": None,
                "optimizer": "adam",
                "clamp_weights": False,
                "tie_weights": True,
                "strict": False,
            }
            return AdaMerging(DictConfig(given | told))
    raise SystemExit(f"{job.method}: not among the methods that are run here")


def main() -> None:
    torch.manual_seed(0)
    job = Job(Path(sys.argv[1]))
    merged = algorithm(job).run(Pool(job))
    job.out.mkdir(parents=True)
    tensors = {
        f"{PREFIX}{name}": tensor.detach().contiguous() for name, tensor in merged.state_dict().items()
    }
    save_file(tensors, job.out / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
