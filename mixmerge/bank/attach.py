"""A bank at work in a loaded model: hooks at its sites; the model's own weights stay as they are.

Legend as in ``gate``; o outputs of a site, n length of a vector.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mixmerge.bank.folded import Folded
from mixmerge.bank.gate import Gate, Run
from mixmerge.bank.mix import How, Mix
from mixmerge.bank.picks import Shared
from mixmerge.bank.records import Bank, Site
from mixmerge.bank.run import Again, run
from mixmerge.bank.vectors import Slope, mixed_vectors
from mixmerge.checkpoint.adapter_names import HEADS
from mixmerge.errors import Fault, MixmergeError


class Attached:
    """A bank and a gate on a model. Outside ``running`` the model is its base, bit for bit.

    Args:
        model: of transformers, in evaluation mode.
        bank: of this model's tensors; moved to its device and type.
        gate: says what each token gets.

    Raises:
        MixmergeError: sites that the model lacks, or whose shape is another; layers that do not see each token of
            each row.
    """

    def __init__(self, model: nn.Module, bank: Bank, gate: Gate) -> None:
        like = next(model.parameters())
        self.model, self.gate = model, gate
        self.bank = bank.to(like.device, like.dtype)
        gate.bind(self.bank)
        self._lock = threading.RLock()
        self._run: Run | None = None
        self.shared = Shared()
        self._short: tuple[torch.dtype, dict[Site, Site]] | None = None
        self.log: list[tuple[str, Mix]] | None = None
        self._handles = _Hooks(self).install()

    def detach(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def running(self, run: Run | None = None) -> Iterator[None]:
        """Within it the model is the mixture. One thread at a time; it may be nested, and None is the base alone."""
        with self._lock:
            before, self._run = self._run, run
            try:
                yield
            finally:
                self._run = before

    def folding(self, weights: Tensor, how: How = "outputs") -> Folded:
        """One mixture for all rows as changed tensors, for ``within``; they are made when they are first wanted.

        Args:
            weights: ``(E,)``.
            how: as in ``Mix``.
        """
        held = {
            name: [place]
            for name, place in places(self.model, {**self.bank.sites, **self.bank.vectors}).items()
        }
        for name, site in self.bank.sites.items():
            head = self.model.get_output_embeddings() if site.tied else None  # type: ignore[operator]
            if head is not None:
                held[name].append((head, "weight"))
        return Folded(held, self.bank, weights, how)

    @contextmanager
    def within(self, folded: Folded) -> Iterator[None]:
        """Within it the model's own weights are those of one mixture: a constant gate at no cost. One thread at a time.

        Holds the changed tensors beside the kept ones, which come back as they were.
        """
        with self.running(), folded.held():
            yield

    @contextmanager
    def folded(self, weights: Tensor, how: How = "outputs") -> Iterator[None]:
        """``within`` of a mixture that is made for this. Arguments as of ``folding``."""
        with self.within(self.folding(weights, how)):
            yield

    @contextmanager
    def logged(self) -> Iterator[list[tuple[str, Mix]]]:
        """Within it every decision is kept: (site, its mix), in the order of the layers."""
        before, self.log = self.log, []
        try:
            yield self.log
        finally:
            self.log = before

    def by_row(self, u: Tensor) -> Tensor:
        """``(B, T, d)`` of what a layer may see as ``(B * T, d)``, or ``(B, d)`` of one token of each row.

        Raises:
            MixmergeError: a layer that sees something else than every token of every row.
        """
        if u.dim() != 2 or self._run is None:
            return u
        known = self._run.rows if self._run.hidden is None else self._run.hidden
        rows = 1 if known is None else len(known)
        if len(u) % rows:
            what = f"a layer sees {tuple(u.shape)} for {rows} rows"
            raise MixmergeError(Fault("bank", what, "Layers that see every token of every row"))
        return u.view(rows, -1, u.shape[-1])

    def like(self, site: Site, y: Tensor) -> Site:
        """The site in the type of what it is added to, where that is shorter than the bank's, as under autocast.

        Such factors are made once for a site, and kept until another type is asked for.
        """
        if y.dtype is site.b.dtype or y.dtype not in _SHORT:
            return site
        if self._short is None or self._short[0] is not y.dtype:
            self._short = y.dtype, {}
        held = self._short[1]
        if site not in held:
            with torch.inference_mode(False):  # it is kept, and a gate may be trained afterwards
                held[site] = site.to(site.b.device, y.dtype)
        return held[site]

    def decide(self, site: str, u: Tensor) -> Mix | None:
        """What the gate says now; None outside ``running``."""
        if self._run is None:
            return None
        mix = self.gate.mix(site, u, self._run)
        if self.log is not None and mix is not None:
            self.log.append((site, mix))
        return mix


def places(model: nn.Module, names: Mapping[str, Any]) -> dict[str, tuple[nn.Module, str]]:
    """Tensor names of a checkpoint to (module, attribute) of a model, with or without the prefix of its trunk.

    A head goes by any of the names that checkpoints have for heads.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    head = getattr(model, "get_output_embeddings", lambda: None)()
    known = dict(model.named_modules(remove_duplicate=False))
    found = {}
    for name in names:
        for spelled in (name, prefix + name, name.removeprefix(prefix)):
            path, _, attribute = spelled.rpartition(".")
            if path in known and isinstance(getattr(known[path], attribute, None), Tensor):
                found[name] = known[path], attribute
                break
        else:
            if head is not None and name in _HEADS:
                found[name] = head, "weight"
    return found


class _Hooks:
    """What is put on a model for a bank."""

    def __init__(self, attached: Attached) -> None:
        self.attached, self.bank, self.model = attached, attached.bank, attached.model
        self.faults: list[Fault] = []

    def install(self) -> list[Any]:
        found = places(self.model, {**self.bank.sites, **self.bank.vectors})
        lacking = sorted({*self.bank.sites, *self.bank.vectors} - set(found))
        if lacking:
            what = f"{type(self.model).__name__} has no {lacking[0]}"
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            raise MixmergeError(Fault("bank", what + more, "A bank runs on the base it was made for"))
        handles = [self._site(*found[name], site) for name, site in self.bank.sites.items()]
        handles += [self._vector(*found[name], name) for name in self.bank.vectors]
        tied = [site for site in self.bank.sites.values() if site.tied]
        handles += [self._head(site) for site in tied]
        if self.faults:
            for handle in handles:
                handle.remove()
            raise MixmergeError(self.faults)
        return handles

    def _site(self, module: nn.Module, attribute: str, site: Site) -> Any:
        from transformers.pytorch_utils import Conv1D

        weight = getattr(module, attribute)
        width = site.a.shape[0] if site.kind == "embedding" else site.a.shape[1]
        wanted = (width, site.b.shape[1])
        stored = wanted if site.kind == "embedding" or isinstance(module, Conv1D) else wanted[::-1]
        if attribute != "weight" or not isinstance(module, nn.Linear | nn.Embedding | Conv1D):
            self.faults.append(
                Fault(f"bank: {site.name}", f"is of a layer of {type(module).__name__}", _LAYERS)
            )
        elif tuple(weight.shape) != stored:
            what = f"is for {wanted[0]} to {wanted[1]}, and the model's is {tuple(weight.shape)}"
            self.faults.append(Fault(f"bank: {site.name}", what, "A bank runs on the base it was made for"))

        if site.kind == "embedding" and isinstance(module, nn.Embedding):
            return self._table(module, site)

        return module.register_forward_hook(self._hook(site))

    def _hook(self, site: Site) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        """Of a linear layer."""
        attached, again, fresh = self.attached, None, site.kind == "linear"

        def hook(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            nonlocal again
            u = given[0]
            if attached._run is None or u.dim() != 3:
                return self._changed(site, u, output)
            mix = attached.decide(site.name, u)
            if mix is None:
                return None
            if again is not None and again.add(u, output, mix):
                return output
            found = run(attached.like(site, output), u, output, mix, shared=attached.shared, fresh=fresh)
            kept = found is output and mix.by_row  # a token's weights are never asked for again
            again = Again.of(site, output, mix, attached.shared) if kept else None
            return found

        return hook

    def _table(self, module: nn.Embedding, site: Site) -> Any:
        # Gemma's table multiplies what it looks up.
        factor = getattr(module, "embed_scale", None)
        used = site if factor is None else replace(site, scale=site.scale * float(factor))
        own = type(module).forward is not nn.Embedding.forward and factor is None
        if own and any(True for _ in module.children()):
            what = f"is of a {type(module).__name__}, which does more than look rows up"
            self.faults.append(Fault(f"bank: {site.name}", what, _LAYERS))
            return _Nothing()
        numbers = _Numbers(module) if own else None

        def hook(
            _: nn.Module, given: tuple[Tensor, ...], named: dict[str, Any], output: Tensor
        ) -> Tensor | None:
            return self._changed(used, given[0] if numbers is None else numbers(given, named), output)

        return module.register_forward_hook(hook, with_kwargs=True)

    def _head(self, site: Site) -> Any:
        """A tied head: its change is that of the table, the other way round."""
        turned = Site(site.name, site.b, site.a.T.contiguous(), site.scale, site.ranks)
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        if head is None:
            return _Nothing()

        return head.register_forward_hook(self._hook(turned))

    def _changed(self, site: Site, u: Tensor, y: Tensor) -> Tensor | None:
        attached = self.attached
        if attached._run is None:
            return None
        linear = site.kind == "linear"  # its output is its own; a table's may be read again as a hidden state
        flat = linear and u.dim() == 2
        u = attached.by_row(u) if flat else u
        mix = attached.decide(site.name, u)
        if mix is None:
            return None
        rows = attached.by_row(y) if flat else y
        found = run(attached.like(site, y), u, rows, mix, shared=attached.shared, fresh=linear)
        return found.view_as(y) if flat else found

    def _vector(self, module: nn.Module, attribute: str, name: str) -> Any:
        deltas = self.bank.vectors[name]  # (E, n)
        length = tuple(getattr(module, attribute).shape)
        if length != tuple(deltas.shape[1:]):
            what = f"is of {deltas.shape[1]} numbers, and the model's is {length}"
            self.faults.append(Fault(f"bank: {name}", what, "A bank runs on the base it was made for"))
            return _Nothing()
        slope = None if attribute == "bias" else Slope(module)

        def hook(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            u = self.attached.by_row(given[0])
            mix = self.attached.decide(name, u)
            if mix is None:
                return None
            added = self._mixed(name, deltas, mix)  # (B, 1 or T, n)
            if output.dim() == 2:
                y = self.attached.by_row(output)
                return (y + added if slope is None else torch.addcmul(y, slope(u), added)).view_as(output)
            if output.dim() == 4:
                added = added.unsqueeze(1 if _heads_first(output, added.shape[1]) else 2)
            return output + added if slope is None else torch.addcmul(output, slope(given[0]), added)

        return module.register_forward_hook(hook)

    def _mixed(self, name: str, deltas: Tensor, mix: Mix) -> Tensor:
        """What a vector gets; kept with the decision, since decoding asks the same again."""
        picks = self.attached.shared.picks(mix, len(deltas))
        found: Tensor | None = picks.paths.get(name)
        if found is None:
            found = mixed_vectors(deltas, picks).view(len(mix.weights), -1, deltas.shape[1])
            if mix.by_row and not picks.trained:
                picks.paths[name] = found
        return found


class _Numbers:
    """Which rows a table looks up that is given something else, such as a mask to count places by.

    What it does is asked of it, with the number of each row in the place of the row.
    """

    def __init__(self, module: nn.Embedding) -> None:
        weight = module.weight
        numbers = torch.arange(len(weight), dtype=torch.float64, device=weight.device)[:, None]
        self._table = copy.copy(module)
        self._table._parameters = {"weight": nn.Parameter(numbers, requires_grad=False)}
        self._table._forward_hooks = OrderedDict()

    def __call__(self, given: tuple[Tensor, ...], named: Mapping[str, Any]) -> Tensor:
        """``(B, T)``."""
        found: Tensor = self._table(*given, **named)
        return found.squeeze(-1).long()


def _heads_first(output: Tensor, tokens: int) -> bool:
    """Whether what a norm of heads gives is ``(B, heads, T, n)`` and not ``(B, T, heads, n)``.

    Where there are as many heads as tokens, memory tells: a linear layer writes all heads of a token together.
    """
    if output.shape[1] != output.shape[2]:
        return tokens > 1 and output.shape[2] == tokens
    return output.stride(1) < output.stride(2)


class _Nothing:
    def remove(self) -> None:
        """Nothing was put on."""


_SHORT = (torch.bfloat16, torch.float16)
_HEADS = tuple(f"{head}.weight" for head in HEADS)
_LAYERS = "Linear layers, Conv1D and embeddings can have factors"
