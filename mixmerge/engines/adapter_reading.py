"""PEFT's LoRA adapters as factors of a loaded model's layers. r rank, d inputs, o outputs, V entries of vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixmerge.checkpoint.adapter import adapter_file
from mixmerge.checkpoint.adapter_config import AdapterConfig, read_config
from mixmerge.checkpoint.header import read_header
from mixmerge.checkpoint.locate import look_up
from mixmerge.engines.adapters import Factors
from mixmerge.errors import DependencyError, Fault, MixmergeError

if TYPE_CHECKING:
    from torch import Tensor

_NAME = "being_read"  # of an adapter inside PEFT; it leaves PEFT before another one comes
_ALLOWED = "LoRA of linear layers and embeddings, with rsLoRA, DoRA (not of embeddings), lora_bias"
_MERGE = "Merge it into its base (mixmerge merge) and use that folder as a model"


def read_factors(model: Any, folder: str, *, where: str) -> dict[Any, Factors]:
    """What an adapter changes: layer of the model -> factors, on its device and in its type.

    PEFT says which layers are meant and what the file's tensors are; its own layers are taken out again, so that
    the model is as it was.

    Source: Hu et al., LoRA (arXiv:2106.09685), section 4.1; Liu et al., DoRA (arXiv:2402.09353), section 4.1.

    Args:
        model: a causal language model of transformers; hooks of other adapters may be on it.
        folder: as PEFT writes it, or a hub id.
        where: what refers to it, for errors.

    Raises:
        MixmergeError: there is no such adapter; it is damaged, of another base, or has a feature that cannot be
            mixed in a batch.
        DependencyError: peft is not installed.
    """
    place = look_up(folder, None, where=where, adapter=True).folder
    _refuse(read_config(place, where=where), where)
    _file(place, where)
    try:
        import peft
    except ImportError as error:
        raise DependencyError(
            Fault(where, "adapters need peft", run="Run: pip install 'mixmerge[peft]'")
        ) from error
    from safetensors import SafetensorError

    with _without_layers_of_peft(model):
        try:
            _insert(peft, model, place, where)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise MixmergeError(
                Fault(where, f"cannot load it: {reason}", "An adapter of this base")
            ) from error
        found, faults = {}, []
        for path, layer in model.named_modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                fault = _unmixable(path, layer)
                if fault is None:
                    found[layer.get_base_layer()] = _factors(layer)
                else:
                    faults.append(Fault(where, fault, _ALLOWED, _MERGE))
    if not faults and not all(_finite(one) for one in found.values()):
        faults.append(Fault(where, "has values that are not finite"))
    if faults:
        raise MixmergeError(faults)
    return found


def stored_elements(folder: str) -> int | None:
    """Values of factors in an adapter's file; None if it is not here, or not in safetensors."""
    place = Path(folder).expanduser()
    file = place / "adapter_model.safetensors"
    if not file.is_file():
        return None
    return sum(header.elements for name, header in read_header(file).items() if "lora_" in name)


def _refuse(config: AdapterConfig, where: str) -> None:
    wrong = [
        (config.bias != "none", f"bias: {config.bias} replaces the base's biases"),
        (bool(config.modules_to_save), f"modules_to_save replaces {', '.join(config.modules_to_save)}"),
        (bool(config.target_parameters), "target_parameters adapts tensors of a mixture of experts"),
        (config.ensure_weight_tying, "ensure_weight_tying shares factors between layers"),
    ]
    faults = [
        Fault(where, f"{what}, which a mixed batch cannot do", _ALLOWED, _MERGE) for bad, what in wrong if bad
    ]
    if faults:
        raise MixmergeError(faults)


def _file(place: Path, where: str) -> None:
    """That the weights are there: PEFT would look for them on the hub."""
    adapter_file(place, where=where)


def _insert(peft: Any, model: Any, place: Path, where: str) -> None:
    """PEFT's layers into the model, with the adapter's values; every fault of the fit."""
    config = peft.LoraConfig.from_pretrained(str(place))
    config.inference_mode = True
    config.init_lora_weights = True  # the file has all values; some other ways change the base
    wrapped = peft.PeftModel(
        model, config, adapter_name=_NAME, autocast_adapter_dtype=False, low_cpu_mem_usage=True
    )
    values = peft.utils.load_peft_weights(str(place), device="cpu")
    whole = {name: values.pop(name) for name in list(values) if "lora_" not in name}
    changed = sorted(name for name, value in whole.items() if not _same(model, name, value))
    if changed:
        raise MixmergeError(Fault(where, f"replaces whole tensors, {changed[0]} for one", _ALLOWED, _MERGE))
    result = peft.set_peft_model_state_dict(wrapped, values, adapter_name=_NAME, low_cpu_mem_usage=True)
    missing = sorted(name for name in result.missing_keys if _NAME in name)
    strange = sorted(result.unexpected_keys)
    faults = [
        Fault(where, f"{what} {len(names)} tensors, {names[0]} for one", "An adapter of this base")
        for what, names in (("its file lacks", missing), ("the base has no place for", strange))
        if names
    ]
    if faults:
        raise MixmergeError(faults)


def _same(model: Any, name: str, value: Tensor) -> bool:
    """Whether the base has this tensor already: PEFT saves embeddings that are adapted, or may have grown."""
    inner = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    held = {place.replace(".base_layer.", "."): one for place, one in model.named_parameters()}
    # a tied head goes by its embedding's name
    own = held.get(inner, model.get_input_embeddings().weight if inner.endswith("lm_head.weight") else None)
    if own is None or own.shape != value.shape:
        return False
    return bool((own.detach().cpu() == value.to(own.dtype)).all())


@contextmanager
def _without_layers_of_peft(model: Any) -> Iterator[None]:
    """Takes out at the end what PEFT put in, also where it stopped in the middle."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    try:
        yield
    finally:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, BaseTunerLayer):
                    setattr(parent, name, child.get_base_layer())
        if hasattr(model, "peft_config"):
            del model.peft_config


def _unmixable(path: str, layer: Any) -> str | None:
    """Why rows of a batch cannot have this layer each in their own way."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    base = layer.get_base_layer()
    if type(base) is nn.Embedding:
        return f"{path}: DoRA of an embedding cannot be mixed" if layer.use_dora.get(_NAME) else None
    if not isinstance(base, nn.Linear | Conv1D) or not layer.lora_A:
        return f"{path}: a layer of {type(base).__name__} cannot be mixed"
    if ".experts." in path:
        return f"{path}: does not see every token of every row"
    if _NAME in layer.lora_variant and not layer.use_dora.get(_NAME):
        return f"{path}: {type(layer.lora_variant[_NAME]).__name__} cannot be mixed"
    return None


def _factors(layer: Any) -> Factors:
    import torch
    from torch import nn

    base, alpha = layer.get_base_layer(), float(layer.scaling[_NAME])
    kind = base.weight if base.weight.is_floating_point() else None

    def made(value: Tensor) -> Tensor:
        dtype = value.dtype if kind is None else kind.dtype
        return value.detach().to(device=base.weight.device, dtype=dtype).contiguous()

    with torch.inference_mode(False), torch.no_grad():
        if isinstance(base, nn.Embedding):
            a, b = layer.lora_embedding_A[_NAME].float(), layer.lora_embedding_B[_NAME].float()
            return Factors(made(a), made(b.T * alpha))
        a, last = layer.lora_A[_NAME].weight.float(), layer.lora_B[_NAME]
        b = last.weight.float() * alpha  # (o, r)
        offset = None if last.bias is None else last.bias.float() * alpha
        if not layer.use_dora.get(_NAME):
            return Factors(made(a), made(b.T), None, None if offset is None else made(offset))
        whole = base.weight.detach().cpu().float()
        whole = (whole if isinstance(base, nn.Linear) else whole.T) + b @ a
        scale = layer.lora_magnitude_vector[_NAME].weight.float() / torch.linalg.norm(whole, dim=1)
        offset = None if base.bias is None else (1 - scale) * base.bias.detach().cpu().float()
        return Factors(
            made(a), made((b * scale[:, None]).T), made(scale), None if offset is None else made(offset)
        )


def _finite(one: Factors) -> bool:
    held = (one.a, one.b, one.scale, one.offset)
    return all(bool(value.isfinite().all()) for value in held if value is not None)
