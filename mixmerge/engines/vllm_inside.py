"""The inside of ``VllmEngine``: vLLM in this process. Its memory comes back for certain only when the process ends."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mixmerge.engines.base import Capability, Engine
from mixmerge.engines.local import TransformersEngine
from mixmerge.engines.records import Chunk, Generation, Message, Request
from mixmerge.engines.shortage import is_shortage
from mixmerge.engines.vllm import VllmOptions, read_options
from mixmerge.errors import DependencyError, Fault, MixmergeError

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for
_AT_ONCE = 8
_LEVELS = (1, 2)


@dataclass
class _Loaded:
    llm: Any
    tokenizer: Any
    context: int
    adapters: dict[str, Any]  # vLLM's requests for them
    mixes: bool  # requests with and without an adapter may share a batch
    asleep: int = 0
    streams: int = 0


@dataclass(frozen=True)
class _Asked:
    request: Request
    prompt: list[int]
    limit: int


class VllmInside(Engine):
    """What ``VllmEngine`` says, without a process of its own; its arguments are explained there."""

    capabilities: ClassVar[frozenset[Capability]] = frozenset({"generate", "stream", "logprobs"})
    batch_exact: ClassVar[bool] = False

    def __init__(
        self,
        model: str,
        *,
        adapters: Mapping[str, str] | None = None,
        revision: str | None = None,
        options: VllmOptions | Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name or model)
        self.model, self.revision = model, revision
        self.options = read_options(options, name=self.name)
        self._folders = dict(adapters or {})
        self._loaded: _Loaded | None = None

    @property
    def loaded(self) -> bool:
        return self._loaded is not None and not self._loaded.asleep

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(self._folders)

    def load(self) -> None:
        self._expert()

    def unload(self) -> None:
        self._loaded = None
        gc.collect()  # vLLM ends what it has started when it is collected

    def sleep(self, level: int) -> None:
        """As ``VllmEngine.sleep``."""
        faults = []
        if not self.options.sleep_mode:
            faults.append(
                Fault(f"engine {self.name}: sleep_mode", "is off", "true, for an engine that may sleep")
            )
        if level not in _LEVELS:
            faults.append(Fault(f"engine {self.name}: level", f"is {level!r}", "1 or 2"))
        if faults:
            raise MixmergeError(faults)
        if self._loaded is not None and not self._loaded.asleep:
            self._loaded.llm.sleep(level=level)
            self._loaded.asleep = level

    def memory(self) -> int | None:
        """Bytes of the weights in the files, those of the adapters included; what the cache takes is beside them."""
        return TransformersEngine(self.model, adapters=self._folders, dtype=self.options.dtype).memory()

    def check(self, requests: Sequence[Request]) -> list[Fault | None]:
        return [self._unable(request) or self._read(request)[1] for request in requests]

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        expert, asked = self._expert(), self._asked(requests)
        start, given = time.perf_counter(), dict[int, Any]()
        try:
            for places in _calls(asked, mixes=expert.mixes):
                outputs = expert.llm.generate(
                    [{"prompt_token_ids": asked[at].prompt} for at in places],
                    [_sampling(asked[at]) for at in places],
                    lora_request=[self._lora(asked[at].request) for at in places],
                    use_tqdm=False,
                )
                given.update(zip(places, outputs, strict=True))
        except BaseException:
            self.unload()  # what is left in its queues would be answered with the next batch
            raise
        seconds = time.perf_counter() - start
        return [_generation(one, given[at], seconds) for at, one in enumerate(asked)]

    def stream(self, request: Request) -> Iterator[Chunk]:
        expert, (asked,) = self._expert(), self._asked([request])
        start, engine, shown = time.perf_counter(), expert.llm.llm_engine, ""
        expert.streams += 1
        number = f"stream {expert.streams}"
        prompt = {"prompt_token_ids": asked.prompt}
        engine.add_request(number, prompt, _sampling(asked), lora_request=self._lora(request))
        output = None
        try:
            while engine.has_unfinished_requests():
                for output in engine.step():
                    text = output.outputs[0].text
                    if not output.finished:  # half a character waits
                        text = text.rstrip("\ufffd")
                    if len(text) > len(shown):
                        yield Chunk(text[len(shown) :])
                        shown = text
        finally:
            if output is None or not output.finished:
                engine.abort_request([number])
        yield Chunk("", _generation(asked, output, time.perf_counter() - start))

    # --- what is asked

    def _asked(self, requests: Sequence[Request]) -> list[_Asked]:
        asked, faults = [], []
        for request in requests:
            tokens, fault = self._read(request)
            fault = self._unable(request) or fault
            if fault is not None:
                faults.append(fault)
                continue
            room = self._expert().context - len(tokens)
            asked.append(_Asked(request, tokens, min(request.max_new_tokens, room)))
        if faults:
            raise MixmergeError(faults)
        return asked

    def _read(self, request: Request) -> tuple[list[int], Fault | None]:
        """The tokens of a prompt, and what keeps the expert from answering it."""
        from jinja2 import TemplateError

        where, context = f"request {request.id}: prompt", self._expert().context
        try:
            tokens = _tokens(self._expert().tokenizer, request.prompt)
        except TemplateError as error:
            return [], Fault(where, f"{self.name} refuses these turns: {error}")
        if not tokens:
            return [], Fault(where, f"has no token for {self.name}")
        if len(tokens) >= context:
            return [], Fault(where, f"has {len(tokens):,} tokens", f"{self.name} reads less than {context:,}")
        return tokens, None

    def _lora(self, request: Request) -> Any:
        return None if request.adapter is None else self._expert().adapters[request.adapter]

    # --- loading

    def _expert(self) -> _Loaded:
        if self._loaded is None:
            self._loaded = self._load()
        elif self._loaded.asleep:
            _wake(self._loaded)
        return self._loaded

    def _load(self) -> _Loaded:
        rank = self._rank()
        try:
            from vllm import LLM
            from vllm.lora.request import LoRARequest
            from vllm.platforms import current_platform
        except ModuleNotFoundError as error:
            if error.name != "vllm":
                raise
            what = "vllm is not installed"
            raise DependencyError(
                Fault(f"engine {self.name}", what, run="pip install 'mixmerge[vllm]'")
            ) from error
        adapters = {
            name: LoRARequest(name, at, str(Path(folder).expanduser()))
            for at, (name, folder) in enumerate(self._folders.items(), 1)
        }
        what = "cannot load it"
        try:
            llm = LLM(self.model, **self._given(rank))
            for name, lora in adapters.items():  # now, and not in the middle of the first batch that names it
                what = f"cannot load adapter {name}"
                llm.llm_engine.add_lora(lora)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            if is_shortage(error):
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise MixmergeError(Fault(f"engine {self.name}", f"{what}: {reason}")) from error
        context = int(llm.llm_engine.model_config.max_model_len)
        return _Loaded(llm, llm.get_tokenizer(), context, adapters, mixes=not current_platform.is_cpu())

    def _given(self, rank: int) -> dict[str, Any]:
        """Arguments of vLLM's ``LLM``."""
        options = self.options.model_dump(exclude_none=True, exclude={"sleep_mode", "max_loras"})
        given = {
            **options,
            "revision": self.revision,
            "tokenizer_revision": self.revision,
            "trust_remote_code": False,
            "enable_sleep_mode": self.options.sleep_mode,
            "logprobs_mode": "raw_logprobs",  # before temperature and top_p
            "seed": 0,
        }
        if self._folders:
            given |= {
                "enable_lora": True,
                "max_lora_rank": rank,
                "max_loras": self.options.max_loras or min(len(self._folders), _AT_ONCE),
                "max_cpu_loras": max(len(self._folders), self.options.max_loras or 1),
            }
        return given

    def _rank(self) -> int:
        """Rank that all adapters fit in."""
        ranks, faults = [1], []
        for name, folder in self._folders.items():
            where = f"engine {self.name}: adapter {name}"
            path = Path(folder).expanduser() / "adapter_config.json"
            try:
                config = json.loads(path.read_text(encoding="utf-8"))
                found = max(
                    [int(config["r"]), *(int(one) for one in (config.get("rank_pattern") or {}).values())]
                )
            except OSError as error:
                faults.append(
                    Fault(where, f"cannot read {path}: {error.strerror}", "A folder that PEFT wrote")
                )
            except (ValueError, KeyError, TypeError, AttributeError):
                faults.append(Fault(where, f"{path} tells no rank", "A LoRA adapter of PEFT"))
            else:
                if found > _RANKS[-1]:
                    faults.append(Fault(where, f"has rank {found}", f"vLLM takes {_RANKS[-1]} at most"))
                ranks.append(found)
        if faults:
            raise MixmergeError(faults)
        return next(one for one in _RANKS if one >= max(ranks))


def _calls(asked: Sequence[_Asked], *, mixes: bool) -> list[list[int]]:
    """Places of the requests that vLLM gets at once.

    On CPU, vLLM 0.32 gives a request without an adapter the last adapter's weights if one with an adapter shares
    its batch (vllm-project/vllm pull request 48421), so the two kinds go one after the other there.
    """
    plain = [at for at, one in enumerate(asked) if one.request.adapter is None]
    named = [at for at, one in enumerate(asked) if one.request.adapter is not None]
    if mixes:
        plain, named = list(range(len(asked))), []
    return [places for places in (plain, named) if places]


def _wake(expert: _Loaded) -> None:
    if expert.asleep == 1:
        expert.llm.wake_up()
    else:
        expert.llm.wake_up(tags=["weights"])
        expert.llm.collective_rpc("reload_weights")
        for (
            lora
        ) in expert.adapters.values():  # their room is among the weights, and no file of the base fills it
            expert.llm.llm_engine.remove_lora(lora.lora_int_id)
            expert.llm.llm_engine.add_lora(lora)
        expert.llm.wake_up(tags=["kv_cache"])
    expert.asleep = 0


def _tokens(tokenizer: Any, prompt: str | tuple[Message, ...]) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if tokenizer.chat_template is None:
        return list(tokenizer("\n\n".join(turn.content for turn in prompt))["input_ids"])
    turns = [{"role": turn.role, "content": turn.content} for turn in prompt]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _sampling(asked: _Asked) -> Any:
    from vllm import SamplingParams

    request = asked.request
    return SamplingParams(
        max_tokens=asked.limit,
        temperature=request.temperature,
        top_p=request.top_p,
        stop=list(request.stop),
        seed=request.seed,
        logprobs=0 if request.logprobs else None,  # 0: of the token that was taken, and no others
        spaces_between_special_tokens=False,
    )


def _generation(asked: _Asked, output: Any, seconds: float) -> Generation:
    one, request = output.outputs[0], asked.request
    if one.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended request {request.id} with {one.finish_reason}")
    tokens = list(one.token_ids)
    if one.finish_reason == "stop" and not isinstance(one.stop_reason, str):
        tokens.pop()  # a token that ends texts is among them
    logprobs = None
    if request.logprobs:
        logprobs = tuple(
            float(step[token].logprob) for token, step in zip(tokens, one.logprobs, strict=False)
        )
    return Generation(
        id=request.id,
        text=one.text,
        tokens_in=len(asked.prompt),
        tokens_out=len(tokens),
        finish=one.finish_reason,
        seconds=seconds,
        logprobs=logprobs,
    )
