"""Pretrained transformers inside routers: read, fine-tuned, kept as arrays and JSON, and made again without network.

B texts in a batch, T tokens, W the width of the hidden states.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mixmerge.errors import DependencyError, Fault, MixmergeError
from mixmerge.routers.base import State
from mixmerge.routers.training import TrainedOptions

if TYPE_CHECKING:
    import torch

Kind = Literal["encoder", "causal"]
_PREFIX = "model."  # of its weights among a router's arrays
_STEP = 32  # texts are padded to a multiple of this: what a text is computed with depends on its length alone


class PretrainedOptions(TrainedOptions):
    """Of a pretrained model that is fine-tuned.

    Args:
        length: tokens of a text that are read, at most; what is beyond is cut off.
        pretrained_rate: learning rate of its weights; ``rate`` is that of what is new.
        device: where torch runs it, such as ``cuda``.
    """

    length: int = Field(256, ge=8)
    pretrained_rate: float = Field(5e-5, gt=0)
    device: str = "cpu"
    batch: int = Field(16, ge=1)
    epochs: int = Field(10, ge=1)
    patience: int = Field(3, ge=1)
    holdout: float = Field(0.15, gt=0, lt=1)


@dataclass(frozen=True, eq=False)
class Pretrained:
    """A model and its tokenizer.

    Args:
        kind: ``encoder``, whose hidden states are averaged, or ``causal``, whose last one is read.
        model: a transformers model in float32.
        tokenizer: of transformers.
        length: tokens at most.
    """

    kind: Kind
    model: Any
    tokenizer: Any
    length: int

    def tokens(self, texts: Sequence[str], *, suffix: str = "") -> list[list[int]]:
        """The tokens of each text, cut, and those of ``suffix`` behind; at least one."""
        end = self.tokenizer(suffix, add_special_tokens=False)["input_ids"] if suffix else []
        limit = max(self._limit() - len(end), 1)
        rows = self.tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"] if texts else []
        return [[*row, *end] or [self._padding()] for row in rows]

    def _limit(self) -> int:
        positions = getattr(self.model.config, "max_position_embeddings", None) or self.length
        return int(min(self.length, self.tokenizer.model_max_length, positions))

    def _padding(self) -> int:
        return int(self.tokenizer.pad_token_id or 0)

    def hidden(self, rows: Sequence[Sequence[int]], *, width: int | None = None) -> torch.Tensor:
        """``(B, W)``: the mean of the hidden states of a text, or for a causal model that of its last token.

        Args:
            rows: tokens of B texts.
            width: T, to which they are padded; by default the longest.
        """
        import torch

        width = width or max(map(len, rows))
        padded = [[*row, *[self._padding()] * (width - len(row))] for row in rows]
        lengths = torch.tensor([len(row) for row in rows], device=self.model.device)
        mask = (torch.arange(width, device=self.model.device) < lengths[:, None]).long()
        ids = torch.tensor(padded, device=self.model.device)
        body = self.model if self.kind == "encoder" else self.model.base_model
        states: torch.Tensor = body(input_ids=ids, attention_mask=mask).last_hidden_state
        if self.kind == "causal":
            return states[torch.arange(len(rows), device=states.device), lengths - 1]
        return (states * mask[..., None]).sum(dim=1) / lengths[:, None]

    def embed(self, rows: Sequence[Sequence[int]], *, batch: int) -> torch.Tensor:
        """``(Q, W)`` of any number of texts without gradients, whatever their order."""
        import torch

        self.model.eval()
        made = torch.empty(len(rows), self.width)
        with torch.no_grad():
            for index, width in _alike([len(row) for row in rows], batch, limit=self._limit()):
                made[index] = self.hidden([rows[i] for i in index], width=width).cpu()
        return made

    @property
    def width(self) -> int:
        return int(self.model.config.hidden_size)


def _alike(lengths: Sequence[int], batch: int, *, limit: int) -> Iterator[tuple[list[int], int]]:
    """Places of texts in batches of one padded width, and that width."""
    widths: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        widths.setdefault(max(min(-(-length // _STEP) * _STEP, limit), length), []).append(i)
    for width, places in sorted(widths.items()):
        for start in range(0, len(places), batch):
            yield places[start : start + batch], width


def read_pretrained(path: str, *, kind: Kind, length: int, device: str) -> Pretrained:
    """A model from a folder, or from the hub if there is no folder of that name.

    Raises:
        MixmergeError: there is no such model, it is of another kind, or the device does not exist.
    """
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    local = Path(path).is_dir()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=local)
        auto = AutoModel if kind == "encoder" else AutoModelForCausalLM
        model = auto.from_pretrained(path, local_files_only=local, dtype="float32")
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MixmergeError(
            Fault(f"model {path}", f"cannot be read: {first}", f"A folder or hub id of a transformers {kind}")
        ) from error
    if model.config.is_encoder_decoder:
        raise MixmergeError(Fault(f"model {path}", "is an encoder-decoder", f"A transformers {kind}"))
    return Pretrained(kind, _on(model, device), tokenizer, length)


def _on(model: Any, device: str) -> Any:
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:  # torch raises the latter where it was built without CUDA
        first = str(error).splitlines()[0]
        raise MixmergeError(Fault(f"device {device}", f"is not there: {first}", "cpu, cuda")) from error


def pack(net: Pretrained) -> State:
    """Its weights as float32 arrays, its configuration and tokenizer as JSON values.

    Raises:
        MixmergeError: the tokenizer has files that are not text.
    """
    weights = {name: tensor.detach().cpu().numpy() for name, tensor in net.model.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        net.tokenizer.save_pretrained(folder)
        try:
            files = {
                path.name: path.read_text(encoding="utf-8")
                for path in sorted(Path(folder).iterdir())
                if path.is_file()
            }
        except UnicodeDecodeError as error:
            raise MixmergeError(
                Fault("tokenizer", "has files that are not text", run="Use a model with a tokenizer.json")
            ) from error
    return State(
        {f"{_PREFIX}{name}": weight.copy() for name, weight in weights.items()},
        {"config": json.loads(net.model.config.to_json_string()), "tokenizer": files},
    )


def unpack(state: State, *, kind: Kind, length: int, device: str) -> Pretrained:
    """The model that ``pack`` kept; nothing is read from elsewhere."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    given: Mapping[str, Any] = state.values["config"]
    config = AutoConfig.for_model(**given)
    auto = AutoModel if kind == "encoder" else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        model = auto.from_config(config, dtype=torch.float32)
    model.load_state_dict(
        {
            name.removeprefix(_PREFIX): torch.tensor(array)
            for name, array in state.arrays.items()
            if name.startswith(_PREFIX)
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, text in state.values["tokenizer"].items():
            (Path(folder) / Path(name).name).write_text(text, encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return Pretrained(kind, _on(model, device).eval(), tokenizer, length)


def add_labels(net: Pretrained, names: Sequence[str]) -> NDArray[np.int64]:
    """Give a causal model one new token for each name, all with log-odds 0: ``(E,)`` their ids."""
    import torch

    labels = [f"<|expert:{name}|>" for name in names]
    net.tokenizer.add_tokens(labels, special_tokens=True)
    ids = np.array(net.tokenizer.convert_tokens_to_ids(labels), np.int64)
    size = max(net.model.get_input_embeddings().weight.shape[0], int(ids.max()) + 1)
    net.model.resize_token_embeddings(size, mean_resizing=False)
    head = net.model.get_output_embeddings()
    with torch.no_grad():
        head.weight[torch.from_numpy(ids)] = 0.0
        if head.bias is not None:
            head.bias[torch.from_numpy(ids)] = 0.0
    return ids


def label_logits(net: Pretrained, hidden: torch.Tensor, ids: NDArray[np.int64]) -> torch.Tensor:
    """``(B, E)``: what the model gives the label tokens to come next, from ``(B, W)`` last hidden states."""
    import torch
    from torch.nn import functional

    head = net.model.get_output_embeddings()
    at = torch.from_numpy(ids).to(head.weight.device)
    bias = None if head.bias is None else head.bias[at]
    return functional.linear(hidden.to(head.weight.device), head.weight[at], bias)


def adapted(net: Pretrained, *, rank: int) -> Any:
    """The causal model with LoRA on every linear layer but the output, by peft; all else is frozen.

    Raises:
        DependencyError: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise DependencyError(
            Fault("router causal: lora", "needs peft", run="pip install 'mixmerge[peft]'")
        ) from error
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(net.model, config)
