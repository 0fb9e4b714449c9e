"""One expert more for a fitted network: its factors beside the others', and its part of the gate, fitted alone.

The folder it comes from stays as it is. Kinds of gates that weigh all their experts by one fit refuse (``Gate.grows``).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixmerge import registry
from mixmerge.checkpoint.adapter_config import CONFIG
from mixmerge.checkpoint.locate import locate
from mixmerge.checkpoint.used_rows import MANIFEST
from mixmerge.data.rows import Row, read_rows
from mixmerge.dynamic.folders import is_dynamic
from mixmerge.errors import Fault, MixmergeError
from mixmerge.mixture.gated import AdaptersOptions
from mixmerge.mixture.gluing import silent
from mixmerge.mixture.network import check_fitted
from mixmerge.mixture.network_fitting import facts_of, history
from mixmerge.mixture.saving import is_fitted, network_of_yaml, owned_in, save_network, spec_of
from mixmerge.mixture.schema import MixtureSpec
from mixmerge.mixture.wholes import Fitted, Progress

if TYPE_CHECKING:
    from mixmerge.bank.assembling import Changes
    from mixmerge.bank.gate import Gate
    from mixmerge.dynamic.folders import Parts

_FULL = "rank: at most so many at every matrix"


@dataclass(frozen=True)
class Newcomer:
    """An expert that comes later.

    Args:
        name: that the network has not yet.
        place: folder or hub id of an adapter of the network's base, or of a full model.
        data: rows of text, for gates that learn from them.
        rank: of a full model's factors.
    """

    name: str
    place: str
    data: str | None = None
    rank: int | None = None


def check_folder(place: Path) -> None:
    """Refuse a twin merge by its name: it is no mixture, and its router was trained for the experts of its recipe.

    Raises:
        MixmergeError: the folder is one.
    """
    if is_dynamic(place) and not is_fitted(place):
        what = "was merged: its shared model and its router are of the experts of its recipe"
        run = "Add the expert to the recipe, and run: mixmerge merge RECIPE.yaml OUT"
        raise MixmergeError(Fault(str(place), what, "A folder that mixmerge fit made", run))


def add(
    spec: MixtureSpec,
    out: str | Path,
    newcomer: Newcomer,
    *,
    overwrite: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Fitted:
    """Write a fitted network with one more expert at its end, whole or not at all.

    For the experts it has the gate is what it was. A gate that needs no rows is the one that fitting anew gives; one
    that learns from rows of each expert learns the newcomer's part from its rows alone.

    Args:
        spec: of a fitted network.
        out: the folder to make.
        newcomer: the expert.
        overwrite: replace a fitted mixture that is there; never the one that is read.
        device: on which the base runs where the gate learns with it.
        progress: told how far it is.

    Raises:
        OutputError: the folder exists, or cannot be written.
        MixmergeError: all that is wrong: a mixture that is no fitted network, a gate that takes no further experts, a
            name that is taken, another base, factors that are not finite, rows that are missing or not wanted.
    """
    if spec.compose.kind != "adapters":
        what = "was fitted for the experts it has, and takes no further ones"
        run = "Name it in the mixture's YAML, and fit that: mixmerge fit MIXTURE.yaml OUT"
        raise MixmergeError(Fault("mixture", what, "A network of adapters (compose: {kind: adapters})", run))
    check_fitted(spec, True)
    return _Addition(spec, newcomer, device, progress or silent).write(Path(out), overwrite=overwrite)


class _Addition:
    """A newcomer on its way into a network's copy."""

    def __init__(self, spec: MixtureSpec, newcomer: Newcomer, device: str, progress: Progress) -> None:
        self._spec, self._new, self._device, self._progress = spec, newcomer, device, progress
        self._told = AdaptersOptions.model_validate(spec.compose.options)
        self._where = f"experts.{newcomer.name}"

    def write(self, out: Path, *, overwrite: bool) -> Fitted:
        from mixmerge.bank.building import fingerprint_of
        from mixmerge.bank.files import extend_bank, load_bank
        from mixmerge.bank.gate_files import save_gate
        from mixmerge.bank.publishing import check_free, making

        owned = owned_in(out)
        faults: list[Fault] = []
        parts = self._parts(faults)
        check_free(out, overwrite=overwrite, of=owned, inputs=[] if parts is None else [parts.folder])
        folder, rows = self._folder(faults), self._rows(faults)
        gate = None if parts is None else self._gate(parts, faults)
        whole = self._whole(folder, faults)
        if parts is not None and folder is not None:
            self._check_base(parts, folder, faults)
        if faults or parts is None or folder is None or gate is None or whole is None:
            raise MixmergeError(faults)
        with making(out, overwrite=overwrite, of=owned, inputs=[parts.folder, parts.base, folder]) as new:
            self._progress("bank", 0, 1)
            changes, name = self._changes(parts, folder), self._new.name
            card = extend_bank(parts.folder, new, name, changes, fingerprint=fingerprint_of(folder))
            self._progress("bank", 1, 1)
            grown = self._grown(gate, load_bank(new), parts, rows)
            save_gate(new / "bank", grown, bank=card.hash, experts=card.experts)
            save_network(whole, new, base=str(self._told.base or parts.base))
            told = history(card, grown, {name: rows} if rows else {}, [parts.folder, folder])
            (new / MANIFEST).write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", "utf-8")
        facts = {**facts_of(card, parts.base), "added": name}
        fixed = grown.fixed()
        notes: tuple[str, ...] = ()
        if fixed is not None:
            facts["weight"] = float(fixed[0][-1])
            if not facts["weight"]:
                notes = (f"{name} has the weight 0: the mixture is what it was, until it is fitted anew",)
        return Fitted(out, "network", grown.kind, card.experts, facts, notes)

    def _parts(self, faults: list[Fault]) -> Parts | None:
        """Where the network is, if its base is the one it was made for."""
        from mixmerge.dynamic.folders import checked_card, parts_of

        try:
            parts = parts_of(str(self._told.folder), base=self._told.base)
            checked_card(parts)
        except MixmergeError as error:
            faults += error.faults
            return None
        return parts

    def _gate(self, parts: Parts, faults: list[Fault]) -> Gate | None:
        """The network's gate; what speaks against a further expert, and against these rows."""
        from mixmerge.bank.cards import read_card
        from mixmerge.bank.fitting import grows_not
        from mixmerge.bank.gate_files import load_gate

        try:
            card = read_card(parts.folder)
            gate = load_gate(parts.bank, bank=card.hash, earlier=card.earlier, experts=card.experts)
        except MixmergeError as error:
            faults += error.faults
            return None
        learns = "rows of each expert" in registry.find("gate", gate.kind).wants
        if not gate.grows:
            faults.append(grows_not(gate.kind, where=f"{parts.folder}: gate"))
        elif learns and self._new.data is None:
            what = f"{gate.kind} learns from rows of each expert, and none are given"
            faults.append(Fault(self._where, what, "Some of what it was trained on", "Add --data FILE"))
        elif not learns and self._new.data is not None:
            what = f"{gate.kind} learns nothing from rows of a further expert"
            faults.append(Fault("--data", what, run="Leave it out"))
        return gate

    def _folder(self, faults: list[Fault]) -> Path | None:
        """The expert's, downloaded if it is on the hub."""
        try:
            folder = locate(self._new.place, None, where=self._where)
        except MixmergeError as error:
            faults += error.faults
            return None
        adapter = (folder / CONFIG).is_file()
        if adapter and self._new.rank is not None:
            faults.append(
                Fault("--rank", "has no effect on an adapter", "It is for full models", "Leave it out")
            )
        elif not adapter and self._new.rank is None:
            what = "is a full model, and no size is said"
            faults.append(Fault(self._where, what, _FULL, "Add --rank N"))
        return folder

    def _whole(self, folder: Path | None, faults: list[Fault]) -> MixtureSpec | None:
        """What the YAML says with the expert in it."""
        name = self._new.name
        if name in self._spec.experts:
            known = f"Experts: {', '.join(self._spec.experts)}"
            faults.append(Fault(self._where, f"an expert is called {name!r} already", known, "Another name"))
            return None
        if folder is None:
            return None
        data = network_of_yaml(self._spec)
        place = str(folder) if Path(self._new.place).exists() else self._new.place
        if (folder / CONFIG).is_file():
            data["experts"][name] = {"adapter": place, "base": data["compose"].get("base")}
        else:
            data["experts"][name] = {"model": place}
        try:
            return spec_of(data)
        except MixmergeError as error:
            faults += error.faults
            return None

    def _check_base(self, parts: Parts, folder: Path, faults: list[Fault]) -> None:
        """An adapter of another base than those that are there."""
        from mixmerge.bank.adapters import base_faults

        if not (folder / CONFIG).is_file():
            return
        there = {name: Path(one.adapter) for name, one in self._spec.experts.items() if one.adapter}
        faults += base_faults({**there, self._new.name: folder}, parts.base)

    def _rows(self, faults: list[Fault]) -> tuple[Row, ...]:
        if self._new.data is None:
            return ()
        try:
            return read_rows(self._new.data)
        except MixmergeError as error:
            faults += error.faults
            return ()

    def _changes(self, parts: Parts, folder: Path) -> Changes:
        from mixmerge.bank.building import adapter_entries, compact_changes, to_low_rank
        from mixmerge.checkpoint.reader import open_checkpoint

        if (folder / CONFIG).is_file():
            headers = open_checkpoint(parts.base, name=str(parts.base)).tensors
            return compact_changes(adapter_entries(folder, headers, where=f"expert {self._new.name}"))
        return to_low_rank(folder, parts.base, rank=self._new.rank)

    def _grown(self, gate: Gate, bank: Any, parts: Parts, rows: Sequence[Row]) -> Gate:
        from mixmerge.bank.fitting import with_expert
        from mixmerge.experts.encoding import TextEncoder
        from mixmerge.experts.loading import load_expert

        def tell(what: str, done: int, steps: int, loss: float | None) -> None:
            self._progress(f"gate: {what}", done, steps)

        encoder = self._told.encoder
        return with_expert(
            gate,
            bank,
            model=load_expert(parts.base, device=self._device) if rows else None,
            rows=rows,
            encode=None if encoder is None else TextEncoder(encoder, device=self._device),
            progress=tell,
            where=f"{parts.folder}: gate",
        )
