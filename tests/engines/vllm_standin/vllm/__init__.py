"""A stand-in of the part of vLLM 0.32 that the engine calls: its signatures, records and manners, and one fault of
it; a tiny model of transformers answers. On a machine with vLLM, ``test_vllm.py`` runs the real one as well."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


class OutOfMemoryError(RuntimeError):
    """As torch's."""


@dataclass
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = 16
    logprobs: int | None = None
    spaces_between_special_tokens: bool = True


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Any]] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool


@dataclass
class State:
    id: str
    prompt: list[int]
    params: SamplingParams
    lora: LoRARequest | None
    random: torch.Generator
    out: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Any]] = field(default_factory=list)
    finish: str | None = None
    reason: str | None = None
    text: str = ""


class LLMEngine:
    def __init__(self, model: str, max_model_len: int | None, loras: int) -> None:
        self.folder, self.model = model, AutoModelForCausalLM.from_pretrained(model).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        most = self.model.config.max_position_embeddings
        self.model_config = SimpleNamespace(max_model_len=max_model_len or most)
        self.base, self.loras, self.last = self.model, loras, None
        self.states: dict[str, State] = {}
        self.names: dict[int, str] = {}

    def add_lora(self, lora_request: LoRARequest) -> bool:
        from peft import PeftModel

        name, path = lora_request.lora_name, lora_request.lora_path
        if self.last is None:
            self.model = PeftModel.from_pretrained(self.model, path, name).eval()
        else:
            self.model.load_adapter(path, name)
        self.last, self.names[lora_request.lora_int_id] = name, name
        return True

    def remove_lora(self, lora_id: int) -> bool:
        self.model.delete_adapter(self.names[lora_id])
        return True

    def add_request(
        self, request_id: str, prompt: Any, params: SamplingParams, *, lora_request: LoRARequest | None = None
    ) -> str:
        assert isinstance(request_id, str)
        tokens = prompt["prompt_token_ids"]
        if len(tokens) + params.max_tokens > self.model_config.max_model_len:
            raise ValueError("longer than the maximum model length")
        random = torch.Generator().manual_seed(params.seed)
        self.states[request_id] = State(request_id, tokens, params, lora_request, random)
        return f"{request_id}-1a2b"

    def abort_request(self, request_ids: list[str]) -> None:
        for one in request_ids:
            self.states.pop(one, None)

    def has_unfinished_requests(self) -> bool:
        return bool(self.states)

    def step(self) -> list[RequestOutput]:
        anyone = any(state.lora is not None for state in self.states.values())
        outputs = []
        for state in list(self.states.values()):
            if state.params.seed == 13 and state.out:
                raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            name = None if state.lora is None else state.lora.lora_name
            if name is None and anyone and current_platform.is_cpu():
                name = self.last  # the fault
            self.advance(state, self.logits(state, name))
            outputs.append(self.output(state))
            if state.finish is not None:
                del self.states[state.id]
        return outputs

    def logits(self, state: State, name: str | None) -> torch.Tensor:
        ids = torch.tensor([state.prompt + state.out])
        with torch.inference_mode():
            if self.last is None:
                return self.model(ids).logits[0, -1]
            if name is None:
                with self.model.disable_adapter():
                    return self.model(ids).logits[0, -1]
            self.model.set_adapter(name)
            return self.model(ids).logits[0, -1]

    def advance(self, state: State, logits: torch.Tensor) -> None:
        params = state.params
        token = int(logits.argmax())
        if params.temperature > 0:
            share, tokens = (logits / params.temperature).softmax(-1).sort(descending=True)
            share[(share.cumsum(-1) - share) >= params.top_p] = 0
            token = int(tokens[torch.multinomial(share, 1, generator=state.random)])
        state.out.append(token)
        state.logprobs.append({token: SimpleNamespace(logprob=float(logits.log_softmax(-1)[token]), rank=1)})
        text = self.tokenizer.decode(state.out, skip_special_tokens=True)
        found = [(text.find(stop), stop) for stop in params.stop or [] if stop in text]
        if token == self.tokenizer.eos_token_id:
            state.finish, state.text = "stop", text
        elif found:
            state.finish, state.reason, state.text = "stop", min(found)[1], text[: min(found)[0]]
        else:
            held = max((len(stop) - 1 for stop in params.stop or []), default=0)
            state.finish = "length" if len(state.out) == params.max_tokens else None
            state.text = text if state.finish else text[: len(text) - held]

    def output(self, state: State) -> RequestOutput:
        logprobs = None if state.params.logprobs is None else list(state.logprobs)
        one = CompletionOutput(0, state.text, list(state.out), logprobs, state.finish, state.reason)
        return RequestOutput(state.id, state.prompt, [one], state.finish is not None)


class LLM:
    def __init__(
        self,
        model: str,
        *,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        quantization: str | None = None,
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        seed: int = 0,
        gpu_memory_utilization: float = 0.92,
        enforce_eager: bool = False,
        kv_cache_memory_bytes: int | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        enable_prefix_caching: bool | None = None,
        enable_sleep_mode: bool = False,
        logprobs_mode: str = "raw_logprobs",
        enable_lora: bool = False,
        max_loras: int = 1,
        max_lora_rank: int = 16,
        max_cpu_loras: int | None = None,
    ) -> None:
        print("INFO engine starts with", os.environ["VLLM_NO_USAGE_STATS"])
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        assert not trust_remote_code
        assert logprobs_mode == "raw_logprobs"
        if enable_sleep_mode and current_platform.is_cpu():
            raise ValueError("Sleep mode is not supported on current platform.")
        if enable_lora and (max_lora_rank not in RANKS or (max_cpu_loras or max_loras) < max_loras):
            raise ValueError("LoRA options do not fit")
        self.llm_engine = LLMEngine(model, max_model_len, max_loras)
        self.sleeps, self.count, self.whole = enable_sleep_mode, 0, True

    def get_tokenizer(self) -> Any:
        return self.llm_engine.tokenizer

    def generate(
        self,
        prompts: list[Any],
        sampling_params: list[SamplingParams],
        *,
        use_tqdm: bool = True,
        lora_request: list[LoRARequest | None] | None = None,
    ) -> list[RequestOutput]:
        ids = []
        for prompt, params, lora in zip(prompts, sampling_params, lora_request or [], strict=True):
            self.count += 1
            ids.append(str(self.count))
            self.llm_engine.add_request(ids[-1], prompt, params, lora_request=lora)
        done: dict[str, RequestOutput] = {}
        while self.llm_engine.has_unfinished_requests():
            done |= {one.request_id: one for one in self.llm_engine.step() if one.finished}
        return [done[one] for one in ids]

    def sleep(self, level: int = 1) -> None:
        assert self.sleeps
        if level == 2:
            with torch.no_grad():  # those of adapters too: they are among the weights
                for weight in self.llm_engine.base.parameters():
                    weight.zero_()

    def wake_up(self, tags: list[str] | None = None) -> bool:
        return tags is None

    def collective_rpc(self, method: str) -> None:
        assert method == "reload_weights"
        again = AutoModelForCausalLM.from_pretrained(self.llm_engine.folder).state_dict()
        for name, weight in self.llm_engine.base.state_dict().items():
            kept = name.replace(".base_layer", "")
            if kept in again:
                weight.copy_(again[kept])
