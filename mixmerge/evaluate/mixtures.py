"""Mixtures whose experts answer as one, asked as a model is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from mixmerge.checkpoint.used_rows import inherited, read_used
from mixmerge.dynamic.folders import MIXTURE, is_dynamic
from mixmerge.engines.base import Capability, Engine
from mixmerge.engines.records import Generation, Request
from mixmerge.errors import Fault, MixmergeError
from mixmerge.evaluate.leaks import Made

if TYPE_CHECKING:
    from mixmerge.mixture import Mixture

TEXTS = "exact, f1, rouge1, rouge2, rougeL or pass@1"  # metrics of what is generated


def is_mixture(model: str, *, folder: bool) -> bool:
    """Whether a model that is judged is a mixture's YAML or fitted folder; a network with a gate is a model.

    Args:
        model: as a user names it.
        folder: there is a folder of that name.
    """
    if not folder:
        return model.lower().endswith((".yaml", ".yml"))
    place = Path(model).expanduser()
    return (place / MIXTURE).is_file() and not is_dynamic(place) and not (place / "config.json").is_file()


def load_whole(model: str, *, where: str) -> Mixture:
    """A mixture that is judged.

    Args:
        model: its YAML or fitted folder.
        where: for messages.

    Raises:
        MixmergeError: its experts answer one by one, or it cannot be read; its folders are gone.
    """
    from mixmerge.mixture import Mixture
    from mixmerge.mixture.hub import spec_from
    from mixmerge.mixture.wholes import whole_of

    spec = spec_from(model)
    if whole_of(spec.compose.kind) is None:
        what = f"{model} is a mixture of several models that answer one by one, and eval judges one"
        run = f"Run mixmerge batch {model} -i QUERIES.jsonl -o ANSWERS.jsonl, and score its answers"
        raise MixmergeError(Fault(where, what, "A model, or a mixture whose experts answer as one", run))
    return Mixture.load(spec, answers=True)


def folders_of(mixture: Mixture) -> tuple[Path, ...]:
    """What it is made of, as far as it is on this machine: what was fitted, and its experts."""
    told = mixture.spec.compose.options.get("folder")
    experts = mixture.spec.experts.values()
    named = [told, *(place for one in experts for place in (one.model, one.adapter, one.base))]
    found = dict.fromkeys(Path(one).expanduser() for one in named if isinstance(one, str))
    return tuple(one for one in found if one.is_dir())


def made_of(mixture: Mixture) -> Made:
    """The rows that what was fitted, or any of its experts, has seen."""
    rows, meant = read_used(inherited(folders_of(mixture)))
    return Made(rows=rows, transductive=meant)


class MixtureEngine(Engine):
    """A mixture as one engine: it generates, as ``mixmerge batch`` does, and is not asked how likely a text is.

    That would be another number for each kind: of an interaction it depends on who is read, and the batch path of
    mixtures, which loads each expert once, brings answers alone.

    Args:
        mixture: whose experts answer as one.
        device: a torch device.
        batch_tokens: of a batch.
        name: what errors call it.
    """

    capabilities: ClassVar[frozenset[Capability]] = frozenset({"generate"})

    def __init__(self, mixture: Mixture, *, device: str, batch_tokens: int, name: str) -> None:
        super().__init__(name)
        self._mixture, self._device, self._batch_tokens = mixture, device, batch_tokens

    @property
    def loaded(self) -> bool:
        """Never between two calls: a job loads experts one after the other."""
        return False

    def load(self) -> None:
        """Nothing: as ``loaded``."""

    def unload(self) -> None:
        """Nothing: as ``loaded``."""

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """As ``Engine.generate``; seconds are not told of each.

        Raises:
            MixmergeError: why requests have no answer, of all of them at once.
        """
        from mixmerge.batch.records import Item, Settings
        from mixmerge.batch.setup import Conditions, devices_of

        self._refuse(requests)
        conditions = Conditions(devices_of([self._device]), self._batch_tokens)
        items = [
            Item(
                one.id,
                one.prompt,
                settings=Settings(one.max_new_tokens, one.temperature, one.top_p, one.stop, one.seed),
            )
            for one in requests
        ]
        answers = self._mixture.answer(items, conditions=conditions)
        faults = [one.fault for one in answers if one.fault is not None]
        if faults:
            raise MixmergeError(faults)
        return [
            Generation(one.id, one.text, one.tokens_in, one.tokens_out, one.finish or "stop", 0.0)
            for one in answers
        ]
