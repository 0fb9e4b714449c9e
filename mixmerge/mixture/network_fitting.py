"""A network on its way into a folder: the bank of its experts, and the gate that is fitted to it.

The folder has ``bank/`` with the factors of all experts and the gate, ``mixture.yaml``, which names experts and base,
and a manifest, which names the rows the gate learned from. Experts and base are not in it or changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixmerge import __version__, registry
from mixmerge.checkpoint.locate import locate
from mixmerge.checkpoint.used_rows import MANIFEST, inherited
from mixmerge.data.rows import Row, digests_of, read_rows, sample_rows
from mixmerge.errors import Fault, MixmergeError
from mixmerge.mixture.gated import AdaptersOptions, base_of
from mixmerge.mixture.saving import owned_in, save_network
from mixmerge.mixture.schema import MixtureSpec
from mixmerge.mixture.wholes import Fitted, Fitting

if TYPE_CHECKING:
    from mixmerge.bank.cards import BankCard
    from mixmerge.bank.gate import Gate
    from mixmerge.bank.records import Bank

_WHERE = "compose.gate"


def fit_network(spec: MixtureSpec, out: Path, how: Fitting) -> Fitted:
    """Fit the bank and the gate of the network that a mixture's experts are; as ``mixture.gluing.fit``."""
    return _Network(spec, how).fit(out)


class _Network:
    """A network on its way into a folder."""

    def __init__(self, spec: MixtureSpec, how: Fitting) -> None:
        self._spec, self._device, self._progress, self._overwrite = (
            spec,
            how.device,
            how.progress,
            how.overwrite,
        )
        self._told = AdaptersOptions.model_validate(spec.compose.options)
        if self._told.folder is not None:
            what = f"the network in {self._told.folder} is fitted already"
            raise MixmergeError(Fault("compose.folder", what, run="Name gate and data to fit another"))

    def fit(self, out: Path) -> Fitted:
        from mixmerge.bank.building import bank_of, compact, fingerprint_of
        from mixmerge.bank.files import load_bank, save_bank
        from mixmerge.bank.gate_files import save_gate
        from mixmerge.bank.publishing import check_free, making

        told, owned = self._told, owned_in(out)
        check_free(out, overwrite=self._overwrite, of=owned)
        faults: list[Fault] = []
        base, experts = self._places(faults)
        rows, given = self._rows(faults), self._given(faults)
        encoder = _located(told.encoder, "compose.encoder", faults)
        if faults:
            raise MixmergeError(faults)
        with making(out, overwrite=self._overwrite, of=owned, inputs=[base, *experts.values()]) as new:
            self._progress("bank", 0, 1)
            bank = bank_of(base, experts, rank=told.rank, energy=told.energy, budget=told.budget)
            hashes = {name: fingerprint_of(folder) for name, folder in experts.items()}
            bank = bank if told.bits is not None else compact(bank)
            card = save_bank(new, bank, base=fingerprint_of(base), hashes=hashes, bits=told.bits)
            self._progress("bank", 1, 1)
            gate = self._gate(load_bank(new), base, rows, given, encoder)
            save_gate(new / "bank", gate, bank=card.hash, experts=card.experts)
            save_network(self._spec, new, base=str(base_of(self._spec.experts, told.base)))
            facts = history(card, gate, rows, [base, *experts.values()])
            (new / MANIFEST).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", "utf-8")
        return Fitted(out, "network", gate.kind, card.experts, facts_of(card, base))

    def _places(self, faults: list[Fault]) -> tuple[Path, dict[str, Path]]:
        """Folders of the base and of the experts; what is on the hub is downloaded."""
        from mixmerge.bank.building import fingerprint_of

        found: dict[str, Path] = {}
        others: dict[str, str] = {}
        named = base_of(self._spec.experts, self._told.base)
        base = _located(named, "compose.base", faults) or Path()
        try:
            others[str(base)] = fingerprint_of(base) if base.parts else ""
        except MixmergeError as error:
            faults += error.faults
        for name, one in self._spec.experts.items():
            where = f"experts.{name}"
            try:
                found[name] = locate(str(one.adapter or one.model), None, where=where)
                if one.base in (None, named):
                    continue
                own = str(locate(str(one.base), None, where=f"{where}.base"))
                if own not in others:
                    others[own] = fingerprint_of(own)
            except MixmergeError as error:
                faults += error.faults
                continue
            if others.get(str(base)) and others[own] != others[str(base)]:
                what = f"is of the base {one.base}, and the network runs in {base}"
                faults.append(Fault(where, what, "Adapters of one base", "Fit a mixture for each base"))
        return base, found

    def _rows(self, faults: list[Fault]) -> dict[str, tuple[Row, ...]]:
        """What the gate learns from, by expert; of one source for all, under a name of its own."""
        data = self._told.data
        sources = data if isinstance(data, dict) else {} if data is None else {"all": data}
        found: dict[str, tuple[Row, ...]] = {}
        for name, source in sources.items():
            try:
                rows = read_rows(source, split=self._told.split)
            except MixmergeError as error:
                faults += error.faults
                continue
            count = self._told.samples
            found[name] = rows if count is None else sample_rows(rows, count, seed=self._told.seed)
        return found

    def _gate(
        self,
        bank: Bank,
        base: Path,
        rows: Mapping[str, tuple[Row, ...]],
        given: Mapping[str, Any],
        encoder: Path | None,
    ) -> Gate:
        from mixmerge.bank.fitting import fit_gate
        from mixmerge.experts.encoding import TextEncoder
        from mixmerge.experts.loading import load_expert

        asked = dict(self._told.gate or {})
        kind = str(asked.pop("kind"))
        wants = registry.find("gate", kind).wants

        def tell(what: str, done: int, steps: int, loss: float | None) -> None:
            self._progress(f"gate: {what}", done, steps)

        return fit_gate(
            kind,
            asked,
            bank,
            model=load_expert(base, device=self._device) if rows or "model" in wants else None,
            rows=rows,
            given=given,
            encode=None if encoder is None else TextEncoder(encoder, device=self._device),
            seed=self._told.seed,
            progress=tell,
            where=_WHERE,
        )

    def _given(self, faults: list[Fault]) -> dict[str, Any]:
        """Tensors of a router that was trained elsewhere."""
        if self._told.given is None:
            return {}
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(self._told.given))
        except (OSError, SafetensorError) as error:
            what = f"{self._told.given} cannot be read: {error}"
            faults.append(Fault("compose.given", what, "A safetensors file"))
            return {}


def _located(place: str | None, where: str, faults: list[Fault]) -> Path | None:
    """A folder, downloaded if it is on the hub; None where there is none."""
    if place is None:
        return None
    try:
        return locate(place, None, where=where)
    except MixmergeError as error:
        faults += error.faults
        return None


def history(
    card: BankCard, gate: Gate, rows: Mapping[str, tuple[Row, ...]], folders: Sequence[Path]
) -> dict[str, Any]:
    """What was fitted of what; with it, evaluation knows which rows are none to score it by."""
    used = {name: digests_of(found) for name, found in rows.items()}
    found: dict[str, Any] = {
        "mixmerge": __version__,
        "network": {"base": card.base, "experts": dict(card.hashes), "bank": card.hash, "gate": gate.kind},
    }
    if used:
        found["calibration"] = {"rows": used}
    return found | inherited(folders)


def facts_of(card: BankCard, base: Path) -> dict[str, Any]:
    headers = [path.stat().st_size for path in base.glob("*.safetensors")]
    return {
        "base": str(base),
        "sites": len(card.sites),
        "parameters": card.parameters,
        "bytes": card.nbytes,
        "base_bytes": sum(headers),
        "hash": card.hash,
    }
