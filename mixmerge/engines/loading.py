"""Models of transformers, brought into this process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from mixmerge.engines.adapters import Bank
from mixmerge.engines.decoding import accepted, strange
from mixmerge.engines.shortage import is_shortage
from mixmerge.errors import Fault, MixmergeError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
_CAUSAL = ("CausalLM", "LMHeadModel", "ConditionalGeneration")


@dataclass(frozen=True)
class Loaded:
    """A model that answers, and what is known of it."""

    model: Any
    tokenizer: Any
    context: int | None  # tokens, None if it has no bound
    ends: frozenset[int]
    pad: int
    bank: Bank

    def strange(self, tokens: Iterable[int], *, where: str) -> Fault | None:
        """Of tokens that the model has no embeddings of, the first."""
        return strange(tokens, self.tokenizer, _embedded(self.model), where=where)


def load_model(model: str, revision: str | None, dtype: Dtype, device: str, name: str) -> Loaded:
    """A model with its tokenizer, ready to answer. Arguments as those of ``TransformersEngine``.

    Raises:
        MixmergeError: it cannot be read, lacks tensors, or does not continue texts.
        MemoryError: it does not fit.
    """
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    broken = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError, StrictDataclassError)
    try:
        with no_bars():
            # Said each time: left open, transformers asks on the terminal whether to run a repository's code.
            config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
            _refuse_architecture(config, name)
            loaded, info = AutoModelForCausalLM.from_pretrained(
                model,
                revision=revision,
                dtype="auto" if dtype == "auto" else getattr(torch, dtype),
                output_loading_info=True,
                trust_remote_code=False,
            )
            tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False)
        loaded = loaded.to(device).eval()
    except broken as error:
        if is_shortage(error):
            raise MemoryError(str(error)) from None
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(":")
        raise MixmergeError(
            Fault(
                f"engine {name}", f"cannot load it: {reason}", "A folder with config, weights and tokenizer"
            )
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        what = f"its files lack {len(missing)} tensors, {missing[0]} for one"
        raise MixmergeError(
            Fault(f"engine {name}", what, "A whole model: it would answer from random weights")
        )
    return loaded_of(loaded, tokenizer, name)


def loaded_of(model: Any, tokenizer: Any, name: str) -> Loaded:
    """What is known of a causal language model of transformers that is in this process already.

    Raises:
        MixmergeError: it keeps no keys and values.
    """
    if "past_key_values" not in accepted(model):
        kind = model.config.model_type
        raise MixmergeError(
            Fault(f"engine {name}", f"{kind} keeps no keys and values", "A transformer decoder")
        )
    return Loaded(model, tokenizer, *_limits(model, tokenizer), Bank(model))


def _refuse_architecture(config: Any, name: str) -> None:
    architectures = config.architectures or []
    if architectures and not any(one.endswith(_CAUSAL) for one in architectures):
        what = f"is a {architectures[0]}, which does not continue texts"
        raise MixmergeError(Fault(f"engine {name}", what, "A causal language model"))


def _limits(model: Any, tokenizer: Any) -> tuple[int | None, frozenset[int], int]:
    """Tokens of context, tokens that end a text, and one to pad with."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    given = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = {*(given if isinstance(given, list) else [given]), tokenizer.eos_token_id} - {None}
    pad = tokenizer.pad_token_id
    if pad is None or pad >= _embedded(model):  # one that was added, without a row for it, is a common thing
        pad = 0
    return context, frozenset(int(one) for one in ends), int(pad)


def _embedded(model: Any) -> int:
    """How many tokens the model has embeddings of; its tokenizer may know more."""
    return int(model.get_input_embeddings().weight.shape[0])


def empty_cache(device: str) -> None:
    """Give back what torch keeps of freed memory."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.empty_cache()


@contextmanager
def no_bars() -> Iterator[None]:
    """Without transformers' progress bars: who loads many experts shows progress in another way."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
