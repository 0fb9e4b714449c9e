"""Experts as models of transformers: language models, encoders with a head, adapters, merged trunks with a head."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from mixmerge.data.batches import padding
from mixmerge.errors import DependencyError, Fault, MixmergeError
from mixmerge.registry import choices

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["causal", "classifier", "other"]
Dtype = Literal["float32", "bfloat16", "float16", "auto"]
HEADS, HEAD_WEIGHTS = "heads", "head.safetensors"
_CAUSAL = ("ForCausalLM", "LMHeadModel")


@dataclass(frozen=True)
class LoadedExpert:
    """A model in evaluation mode that wants no gradients, and its tokenizer.

    Args:
        model: of transformers.
        tokenizer: None if its folder has none.
        kind: what its logits are: ``causal`` of the next token, ``classifier`` of the classes of a text; of any other
            model nothing is known of its outputs.
        name: for messages.
    """

    model: Any
    tokenizer: Any
    kind: Kind
    name: str

    @property
    def prefix(self) -> str:
        """What stands before the names of the trunk, such as ``bert.``; empty for a bare trunk."""
        found: str = self.model.base_model_prefix
        return f"{found}." if found and hasattr(self.model, found) else ""


def load_expert(
    model: str | Path,
    *,
    adapter: str | Path | None = None,
    revision: str | None = None,
    adapter_revision: str | None = None,
    device: str = "cpu",
    dtype: Dtype = "float32",
) -> LoadedExpert:
    """Load an expert by the class its config names.

    Args:
        model: a folder or a hub id.
        adapter: a PEFT adapter, folder or hub id, which is merged into the weights; takes the package ``peft``.
        revision, adapter_revision: branch, tag or commit on the hub.
        device: a torch device.
        dtype: of the weights in memory.

    Raises:
        MixmergeError: no such dtype; it cannot be read, lacks tensors, or is of a class that transformers does not
            have.
        DependencyError: an adapter, and no ``peft``.
    """
    import torch
    from transformers import AutoConfig

    name = str(model) if adapter is None else f"{model}+{adapter}"
    _check_dtype(dtype, name)
    check_device(device, name)
    with _reading(name):
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
        found, info = _class_of(config, name).from_pretrained(
            model,
            revision=revision,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            output_loading_info=True,
            trust_remote_code=False,
        )
    _refuse_missing(info["missing_keys"], name)
    if adapter is not None:
        found = _adapted(found, adapter, adapter_revision, name)
    return _ready(found, _tokenizer(model, revision, name), device, name)


def load_with_head(
    folder: str | Path,
    head: str,
    *,
    device: str = "cpu",
    dtype: Dtype = "float32",
) -> LoadedExpert:
    """The merged trunk of a folder with one expert's head. Nothing else is the expert's.

    Args:
        folder: as ``mixmerge merge`` writes it.
        head: a folder of its ``heads/``.
        device: a torch device.
        dtype: of the weights in memory; ``auto``: as most of the trunk is stored.

    Raises:
        MixmergeError: no such head or dtype; or trunk and head do not make a whole model.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig

    folder = Path(folder)
    known = heads_of(folder)
    if head not in known:
        allowed = (
            choices(head, list(known)) if known else "It keeps no heads: its experts had none of their own"
        )
        raise MixmergeError(Fault(str(folder), f"no head is called {head!r}", allowed))
    name = f"{folder} with head {head}"
    _check_dtype(dtype, name)
    check_device(device, name)
    with _reading(name):
        config = AutoConfig.from_pretrained(folder / HEADS / head, trust_remote_code=False)
        kind = _class_of(config, name)
        own = load_file(folder / HEADS / head / HEAD_WEIGHTS)
        trunk = _stored(folder)
        prefix = f"{kind.base_model_prefix}."
        held = _type_of(trunk) if dtype == "auto" else getattr(torch, dtype)
        inside = {tensor: value for tensor, value in trunk.items() if tensor.startswith(prefix)}
        bare = {f"{prefix}{tensor}": value for tensor, value in trunk.items()}
        state = (inside or bare) | own
        found, info = kind.from_pretrained(
            None, config=config, state_dict=state, dtype=held, output_loading_info=True
        )
    _refuse_missing(info["missing_keys"], name)
    return _ready(found, _tokenizer(folder, None, name), device, name)


def outline(folder: Path, name: str) -> Any:
    """The model of a folder without its values, on the meta device: what layer each of its tensors belongs to.

    Raises:
        MixmergeError: it is of a class that transformers does not have.
    """
    import torch

    config = read_config(folder, name)
    kind = _class_of(config, name)
    with _reading(name), torch.device("meta"):
        return (kind._from_config if hasattr(kind, "_from_config") else kind.from_config)(config).eval()


def read_config(folder: Path, name: str) -> Any:
    """The config of transformers in a folder.

    Raises:
        MixmergeError: transformers does not know such a model.
    """
    from transformers import AutoConfig

    with _reading(name):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def read_tokenizer(folder: Path, name: str) -> Any:
    """The tokenizer in a folder; None if there is none.

    Raises:
        MixmergeError: it cannot be read.
    """
    return _tokenizer(folder, None, name)


def heads_of(folder: str | Path) -> tuple[str, ...]:
    """The names of the heads a merged folder keeps, sorted."""
    return tuple(sorted(path.parent.name for path in Path(folder).glob(f"{HEADS}/*/{HEAD_WEIGHTS}")))


def check_device(device: str, name: str) -> None:
    """Raise unless torch finds a device here.

    Raises:
        MixmergeError: it does not.
    """
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        what = f"cannot be put on the device {device!r}: {reason}"
        raise MixmergeError(Fault(name, what, "cpu, or a device that torch finds here")) from error


def _ready(model: Any, tokenizer: Any, device: str, name: str) -> LoadedExpert:
    model = model.to(device).eval().requires_grad_(False)
    know_padding(model, tokenizer)
    return LoadedExpert(model, tokenizer, kind_of(type(model).__name__), name)


def check_tokenizer(tokenizer: Any, name: str) -> None:
    """Raise unless a model can be shown text.

    Raises:
        MixmergeError: it has no tokenizer.
    """
    if tokenizer is None:
        raise MixmergeError(Fault(name, "has no tokenizer, so it cannot be shown text"))


def know_padding(model: Any, tokenizer: Any) -> None:
    """Tell a classifier what fills up its lines: one on a decoder finds a text's last token by it.

    Its config often names no padding, of which transformers takes no batches, or another than the tokenizer pads with,
    after which the class would be that of a padding token.
    """
    if tokenizer is not None and kind_of(type(model).__name__) == "classifier":
        model.config.get_text_config().pad_token_id = padding(tokenizer)


def kind_of(architecture: str) -> Kind:
    """What the logits of a class of transformers are."""
    if architecture.endswith("ForSequenceClassification"):
        return "classifier"
    return "causal" if architecture.endswith(_CAUSAL) else "other"


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Without progress bars; what transformers raises for files it cannot use is a fault of the user's."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    broken = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError, StrictDataclassError)
    try:
        yield
    except broken as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(":")
        raise MixmergeError(
            Fault(name, f"cannot be loaded: {reason}", "A folder with config and weights")
        ) from error
    finally:
        if shown:
            logging.enable_progress_bar()


def _class_of(config: Any, name: str) -> Any:
    import transformers

    named = config.architectures[0] if config.architectures else ""
    found = getattr(transformers, named, None) if named else transformers.AutoModel
    if found is None:
        raise MixmergeError(
            Fault(name, f"transformers has no class {named}", "A model whose class is built in")
        )
    return found


def _refuse_missing(missing: Any, name: str) -> None:
    lacking = sorted(missing)
    if lacking:
        what = f"its files lack {len(lacking)} tensors, {lacking[0]} for one"
        raise MixmergeError(Fault(name, what, "A whole model: it would work with random weights"))


def _check_dtype(dtype: str, name: str) -> None:
    if dtype not in get_args(Dtype):
        raise MixmergeError(Fault(f"{name}: dtype", f"is {dtype!r}", choices(dtype, list(get_args(Dtype)))))


def _type_of(tensors: Mapping[str, Tensor]) -> Any:
    """The floating type that most entries have."""
    counts: Counter[Any] = Counter()
    for one in tensors.values():
        if one.is_floating_point():
            counts[one.dtype] += one.numel()
    return counts.most_common(1)[0][0]


def _stored(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return dict(load_file(folder / "model.safetensors"))
    files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return {name: value for file in files for name, value in load_file(folder / file).items()}


def _tokenizer(model: str | Path, revision: str | None, name: str) -> Any:
    from transformers import AutoTokenizer

    folder = Path(model)
    if folder.is_dir() and not any(folder.glob("*token*")) and not (folder / "vocab.txt").exists():
        return None
    with _reading(f"the tokenizer of {name}"):
        return AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False)


def _adapted(model: Any, adapter: str | Path, revision: str | None, name: str) -> Any:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise DependencyError(
            Fault(
                name, "using an adapter as a model takes the package peft", run="pip install mixmerge[peft]"
            )
        ) from error
    with _reading(name):
        return PeftModel.from_pretrained(model, str(adapter), revision=revision).merge_and_unload()
