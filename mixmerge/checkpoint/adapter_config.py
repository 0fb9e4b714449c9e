"""``adapter_config.json`` of a PEFT LoRA adapter: what it says about the weights; what is refused by name."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mixmerge.checkpoint.reader import read_json
from mixmerge.errors import CheckpointError, Fault

CONFIG = "adapter_config.json"

# Switches whose maths is not a change of weights by B @ A, or not of this base's weights.
_REFUSED = {
    "alora_invocation_tokens": "activated LoRA (aLoRA) acts on some tokens only, so no weights are merged",
    "arrow_config": "Arrow routes every token to other adapters, so no weights are merged",
    "enable_lora": "merged linear layers of PEFT before 0.3 are not supported",
    "kasa_config": "KaSA truncates the base's weights before it adapts them",
    "layer_replication": "layer_replication gives the expert more layers than the base has",
    "megatron_config": "Megatron layers are stored in parts",
    "monteclora_config": "MonteCLoRA samples its weights",
    "trainable_token_indices": "trainable_token_indices replaces single rows of the embedding",
    "use_bdlora": "BD-LoRA's factors are block-diagonal",
    "use_qalora": "QALoRA pools its inputs, so its change is not B @ A",
    "velora_config": "VeLoRA keeps buffers of its own",
}
_READ = frozenset(
    """alpha_pattern auto_mapping bias ensure_weight_tying fan_in_fan_out init_lora_weights lora_alpha
    lora_bias modules_to_save peft_type r rank_pattern target_parameters task_type use_dora
    use_rslora""".split()  # noqa: SIM905
)
# Keys that decide nothing: the tensors that are there say which modules were adapted.
_NO_MATTER = frozenset(
    """base_model_name_or_path corda_config eva_config exclude_modules inference_mode layers_pattern
    layers_to_transform loftq_config lora_dropout lora_ga_config megatron_core peft_version qalora_group_size
    revision runtime_config target_modules""".split()  # noqa: SIM905
)
# Initialisations that start from B @ A = 0, or subtract nothing from the base.
_PLAIN_INITS = ("default", "eva", "gaussian", "mica", "orthogonal")
# These took the first s * B @ A out of the base (LoftQ: quantised it), so the adapter fits another base.
_BASE_CHANGING_INITS = ("corda", "loftq", "lora_ga", "olora", "pissa")

# What PEFT writes (task_type, or else the model's class) for models that do not predict tokens.
_OTHER_TASKS = ("FEATURE_EXTRACTION", "QUESTION_ANS", "SEQ_CLS", "TOKEN_CLS")
_TOKEN_CLASSES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining")

_RUN_OTHER = "Merge it with PEFT (merge_and_unload, save_pretrained) and name that folder as the model"


@dataclass(frozen=True)
class AdapterConfig:
    """The part of the config that decides what the tensors mean; PEFT's names but for one.

    Args:
        predicts_tokens: the adapted model has a head, so a base without one ties it to its embedding.
        rank_pattern, alpha_pattern: (compiled pattern, value) in the file's order; the first match counts.
    """

    r: int
    lora_alpha: float
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    fan_in_fan_out: bool
    ensure_weight_tying: bool
    predicts_tokens: bool
    bias: Literal["none", "all", "lora_only"]
    modules_to_save: tuple[str, ...]
    target_parameters: tuple[str, ...]
    rank_pattern: tuple[tuple[re.Pattern[str], int], ...]
    alpha_pattern: tuple[tuple[re.Pattern[str], float], ...]

    def rank(self, module: str) -> int:
        """The rank PEFT gives this module (its name without ``base_model.model.``)."""
        return next((rank for pattern, rank in self.rank_pattern if pattern.match(module)), self.r)

    def scale(self, module: str) -> float:
        """The factor on B @ A: alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv:2312.03732)."""
        alpha = next(
            (alpha for pattern, alpha in self.alpha_pattern if pattern.match(module)), self.lora_alpha
        )
        rank = self.rank(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def saves(self, name: str) -> bool:
        """Whether ``modules_to_save`` or ``bias`` says that this whole tensor is in the adapter."""
        whole = any(f"{module}." in name for module in self.modules_to_save)
        return whole or (self.bias != "none" and name.endswith(".bias"))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


class _Reading:
    """One config being read; every fault is kept."""

    def __init__(self, raw: dict[str, Any], where: str) -> None:
        self.raw = raw
        self.where = where
        self.faults: list[Fault] = []

    def fault(self, what: str, allowed: str = "", run: str = "") -> None:
        self.faults.append(Fault(self.where, what, allowed, run))

    def flag(self, key: str) -> bool:
        value = self.raw.get(key)
        if value is not None and not isinstance(value, bool):
            self.fault(f"{key} is {value!r}", "true or false is allowed")
        return value is True

    def names(self, key: str) -> tuple[str, ...]:
        value = self.raw.get(key) or []
        if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
            self.fault(f"{key} is {value!r}", "A list of names is allowed")
            return ()
        return tuple(value)

    def alpha(self) -> float:
        value: Any = self.raw.get("lora_alpha")
        if not _is_number(value):
            self.fault(f"lora_alpha is {value!r}", "A finite number is needed")
            return 1.0
        return float(value)

    def rank(self) -> int:
        value: Any = self.raw.get("r")
        if not _is_rank(value):
            self.fault(f"r is {value!r}", "A whole number of at least 1 is needed")
            return 1
        return int(value)

    def predicts_tokens(self) -> bool:
        mapping = self.raw.get("auto_mapping")
        model = str(mapping.get("base_model_class") or "") if isinstance(mapping, dict) else ""
        other = bool(model) and not model.endswith(_TOKEN_CLASSES)
        return not other and self.raw.get("task_type") not in _OTHER_TASKS

    def patterns(self, key: str) -> tuple[tuple[re.Pattern[str], Any], ...]:
        value = self.raw.get(key) or {}
        if not isinstance(value, dict):
            self.fault(f"{key} is {value!r}", "An object of patterns and numbers is allowed")
            return ()
        good = _is_rank if key == "rank_pattern" else _is_number
        read = []
        for pattern, number in value.items():
            if not good(number):
                self.fault(f"{key}[{pattern!r}] is {number!r}", "A number; a rank is whole and at least 1")
                continue
            try:  # as PEFT's get_pattern_key: a whole number of trailing name components
                read.append((re.compile(rf"(.*\.)?({pattern})$"), number))
            except re.error as error:
                self.fault(f"{key}[{pattern!r}] is no regular expression: {error}")
        return tuple(read)

    def bias(self) -> Literal["none", "all", "lora_only"]:
        value = self.raw.get("bias", "none")
        if value == "all":
            return "all"
        if value == "lora_only":
            return "lora_only"
        if value not in ("none", None):
            self.fault(f"bias is {value!r}", "none, all or lora_only is allowed")
        return "none"

    def check_initialisation(self) -> None:
        value = self.raw.get("init_lora_weights")
        name = value.lower() if isinstance(value, str) else ""
        if value is None or isinstance(value, bool) or name in _PLAIN_INITS:
            return
        if name.startswith(_BASE_CHANGING_INITS):
            self.fault(
                f"init_lora_weights is {value!r}, which changed the base's own weights when training began",
                "The adapter fits that changed base only",
                "Save it again with PEFT's path_initial_model_for_weight_conversion; or, if the model named"
                " here is that changed base, set init_lora_weights to true in this file",
            )
        else:
            self.fault(
                f"init_lora_weights {value!r} is not known, so nor is whether it changed the base",
                f"Known: {', '.join(sorted((*_PLAIN_INITS, *_BASE_CHANGING_INITS)))}, true, false",
                _RUN_OTHER,
            )

    def check_keys(self) -> None:
        for key, value in self.raw.items():
            if key in _REFUSED and value not in (None, False, [], {}):
                self.fault(f"{key} is set: {_REFUSED[key]}", run=_RUN_OTHER)
            # A feature of a PEFT to come is switched on by a flag, a name or an object; a bare number is only
            # one of its settings.
            unknown = key not in _REFUSED and key not in _NO_MATTER and key not in _READ
            if unknown and value and not _is_number(value):
                self.fault(
                    f"{key} is not a key this version knows",
                    "It may change what the tensors mean",
                    "If it does not, take it out of this file",
                )


def read_config(folder: Path, *, where: str) -> AdapterConfig:
    """Read and check ``adapter_config.json``.

    Args:
        folder: the adapter's folder.
        where: what refers to it (``models[1].model``), for errors.

    Raises:
        CheckpointError: missing, not a LoRA adapter, a feature that is refused, or values that cannot be; all
            faults at once.
    """
    path = folder / CONFIG
    reading = _Reading(read_json(path), f"{where}: {path}")
    kind = reading.raw.get("peft_type")
    if kind != "LORA":
        reading.fault(f"peft_type is {kind!r}", "Only LORA adapters are read", _RUN_OTHER)
        raise CheckpointError(reading.faults)
    reading.check_keys()
    reading.check_initialisation()
    config = AdapterConfig(
        r=reading.rank(),
        lora_alpha=reading.alpha(),
        use_rslora=reading.flag("use_rslora"),
        use_dora=reading.flag("use_dora"),
        lora_bias=reading.flag("lora_bias"),
        fan_in_fan_out=reading.flag("fan_in_fan_out"),
        ensure_weight_tying=reading.flag("ensure_weight_tying"),
        predicts_tokens=reading.predicts_tokens(),
        bias=reading.bias(),
        modules_to_save=reading.names("modules_to_save"),
        target_parameters=reading.names("target_parameters"),
        rank_pattern=reading.patterns("rank_pattern"),
        alpha_pattern=reading.patterns("alpha_pattern"),
    )
    if reading.faults:
        raise CheckpointError(reading.faults)
    return config
