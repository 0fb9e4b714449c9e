"""The engine of logit fusion: base, reference and experts are one load unit, and answer as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from mixmerge.engines.decoding import Beside, Decoder, Row, Told, plain_text, slides
from mixmerge.engines.loading import Dtype, Loaded
from mixmerge.engines.local import TransformersEngine
from mixmerge.engines.records import Chunk, Generation, Likelihood, Request, Scoring
from mixmerge.errors import Fault, MixmergeError, OutOfMemoryError, collecting
from mixmerge.logits.places import Place, Said
from mixmerge.registry import choices

if TYPE_CHECKING:
    from mixmerge.logits.fusing import Mode, Settings
    from mixmerge.logits.rows import FusedRows, Fusion, Small
    from mixmerge.logits.vocabulary import VocabMap, Vocabulary

R = TypeVar("R", Request, Scoring)
G = TypeVar("G", Generation, Likelihood)
Template = Literal["base", "own"]


class FusionEngine(TransformersEngine):
    """A large base whose next-token logits are shifted as small experts shift their reference.

    What holds for ``TransformersEngine`` holds for it. All models are loaded together, each folder once: experts that
    are adapters of the reference share its weights. A request's ``adapter`` names one that alone answers it.

    A small model with other tokens than the base reads prompts by its own tokenizer, and what is generated as its own
    tokens spell the base's, token by token: it never sees a text that the base has not chosen.

    Args:
        model: of the base, a folder or hub id.
        reference: the small model that experts were tuned from: a folder or hub id, or ``{model, adapter}``.
        experts: name -> small expert, each as ``reference``.
        base_adapter: of the base, where the large model is an adapter of ``model``.
        base_name, reference_name: what a request calls them.
        adapters: further names that a request's ``adapter`` may have -> these names.
        mode, alpha, top_p_base, clip, damping: as of ``fusing.Settings``.
        vocabulary: ``same``: all have the base's tokens; ``intersection``: shifts are of the tokens that all share.
        template: of chats, for small models: the ``base``'s, or their ``own``.
        maps: folder with the vocabulary maps that ``mixmerge fit`` wrote: others are refused then.
        dtype, device, batch_tokens, name: as of ``TransformersEngine``.

    Raises:
        MixmergeError: a setting out of range, an expert of no name, names that are taken; all at once.
    """

    def __init__(
        self,
        model: str,
        *,
        reference: Said,
        experts: Mapping[str, Said],
        base_adapter: str | None = None,
        base_name: str = "base",
        reference_name: str = "reference",
        adapters: Mapping[str, str] | None = None,
        mode: Mode = "one",
        alpha: float | Mapping[str, float] = 1.0,
        top_p_base: float | None = None,
        clip: float | None = None,
        damping: float = 1.0,
        vocabulary: Vocabulary = "same",
        template: Template = "base",
        maps: str | None = None,
        dtype: Dtype = "auto",
        device: str = "cpu",
        batch_tokens: int = 8192,
        name: str | None = None,
    ) -> None:
        from mixmerge.logits.fusing import Settings

        super().__init__(model, dtype=dtype, device=device, batch_tokens=batch_tokens, name=name)
        self._vocabulary, self._template, self._maps = vocabulary, template, maps
        faults: list[Fault] = []
        with collecting(faults):
            self.settings = Settings(mode, alpha, top_p_base, clip, damping)
            self._fixed = self.settings.fixed(tuple(experts))
        self._parts = {base_name: Place(model, base_adapter)}
        for one, said in ((reference_name, reference), *experts.items()):
            with collecting(faults):
                self._parts[one] = Place.of(said, where=f"engine {self.name}: {one}")
        names = [base_name, reference_name, *experts]
        self._aliases = {**{one: one for one in names}, **(adapters or {})}
        faults += self._wrong(names)
        if faults:
            raise MixmergeError(faults)
        self._base, self._experts = base_name, tuple(experts)
        self._small = (reference_name, *experts)
        self._hosts = self._make_hosts()
        self._fusion: Fusion | None = None

    def _wrong(self, names: Sequence[str]) -> list[Fault]:
        """With the names of base, reference and experts, and with what is chosen by name."""
        where, faults = f"engine {self.name}", list[Fault]()
        base, reference, *experts = names
        if not experts:
            faults.append(Fault(f"{where}: experts", "there is none that shifts the base", "One or more"))
        if len(set(names)) < len(names):
            what = f"base {base}, reference {reference} and experts {', '.join(experts)} share a name"
            faults.append(Fault(where, what, "Each its own"))
        faults += [
            Fault(f"{where}: adapter {name}", f"is {part!r}", choices(part, list(names)))
            for name, part in self._aliases.items()
            if part not in names
        ]
        for key, value, known in (
            ("vocabulary", self._vocabulary, ("same", "intersection")),
            ("template", self._template, ("base", "own")),
        ):
            if value not in known:
                faults.append(Fault(f"{where}: {key}", f"is {value!r}", choices(value, list(known))))
        return faults

    def _make_hosts(self) -> dict[str, TransformersEngine]:
        """An engine for each folder that is loaded, with the adapters over it."""
        found: dict[str, TransformersEngine] = {}
        for place in self._parts.values():
            names = {
                name: one.adapter
                for name, one in self._parts.items()
                if one.model == place.model and one.adapter
            }
            found.setdefault(
                place.model,
                TransformersEngine(
                    place.model,
                    adapters=names,
                    dtype=self.dtype,
                    device=self.device,
                    batch_tokens=self.batch_tokens,
                    name=f"{self.name}: {self._called(place.model)}",
                ),
            )
        return found

    def _called(self, model: str) -> str:
        return "/".join(name for name, one in self._parts.items() if one.model == model)

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(self._aliases)

    def add_adapter(self, name: str, folder: str) -> None:
        """Refused: experts are said when the engine is made.

        Raises:
            MixmergeError: always.
        """
        what = "a fusion takes no further adapters"
        raise MixmergeError(
            Fault(f"engine {self.name}: adapter {name}", what, run="Name it among the experts")
        )

    def set(self, settings: Settings) -> None:
        """Other settings from now on; what is loaded stays.

        Raises:
            MixmergeError: an alpha of an expert that there is not.
        """
        self.settings, self._fixed = settings, settings.fixed(self._experts)
        if self._fusion is not None:
            self._fusion = replace(self._fusion, settings=settings, alphas=self._fixed)

    def unload(self) -> None:
        self._fusion = self._loaded = None
        for host in self._hosts.values():
            host.unload()

    def memory(self) -> int | None:
        """Bytes of the weights of all models, those of adapters included."""
        found = [host.memory() for host in self._hosts.values()]
        return None if None in found else sum(one or 0 for one in found)

    # --- one of them alone

    def check(self, requests: Sequence[Request]) -> list[Fault | None]:
        found: list[Fault | None] = []
        for request in requests:
            fault = self._unable(request)
            if fault is None and request.adapter is not None:
                host, adapter = self._alone(request.adapter)
                (fault,) = host.check([replace(request, adapter=adapter)])
            found.append(fault or (self._read(request)[1] if request.adapter is None else None))
        return found

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        if any(one.adapter is not None for one in requests):
            self._refuse(requests)
        return self._shared_out(requests, super().generate, lambda host, some: host.generate(some))

    def stream(self, request: Request) -> Iterator[Chunk]:
        self._refuse([request])
        if request.adapter is None:
            yield from super().stream(request)
            return
        host, adapter = self._alone(request.adapter)
        yield from host.stream(replace(request, adapter=adapter))

    def loglikelihood(self, scorings: Sequence[Scoring]) -> list[Likelihood]:
        """As of ``TransformersEngine``, of the fused distribution: minus infinity for what ``top_p_base`` has cut."""
        self._refuse_adapters(scorings)
        return self._shared_out(scorings, super().loglikelihood, lambda host, some: host.loglikelihood(some))

    def _alone(self, name: str) -> tuple[TransformersEngine, str | None]:
        """Who runs a model by itself, and what it is called there."""
        self._expert()
        part = self._aliases[name]
        place = self._parts[part]
        return self._hosts[place.model], part if place.adapter else None

    def _shared_out(
        self,
        asked: Sequence[R],
        together: Callable[[Sequence[R]], list[G]],
        alone: Callable[[TransformersEngine, list[R]], list[G]],
    ) -> list[G]:
        """Answers in their order: of all models together, and of each host for those that name one of its own."""
        found: dict[int, G] = {}
        fused = [at for at, one in enumerate(asked) if one.adapter is None]
        found.update(zip(fused, together([asked[at] for at in fused]), strict=True))
        by_host: dict[TransformersEngine, list[int]] = {}
        for at, one in enumerate(asked):
            if one.adapter is not None:
                by_host.setdefault(self._alone(one.adapter)[0], []).append(at)
        for host, places in by_host.items():
            some = [replace(asked[at], adapter=self._alone(str(asked[at].adapter))[1]) for at in places]
            found.update(zip(places, alone(host, some), strict=True))
        return [found[at] for at in range(len(asked))]

    # --- all together

    def _load(self) -> Loaded:
        faults: list[Fault] = []
        try:
            for host in self._hosts.values():
                try:
                    host.load()
                except OutOfMemoryError:
                    raise
                except MixmergeError as error:
                    faults += error.faults
            if faults:
                raise MixmergeError(faults)
            self._fusion = self._made()
        except BaseException:
            self.unload()
            raise
        read = [one.loaded.context for one in self._fusion.small if not one.own]
        contexts = [self._fusion.base.context, *read]
        least = min((one for one in contexts if one is not None), default=None)
        return replace(self._fusion.base, context=least)

    def _made(self) -> Fusion:
        from mixmerge.logits.rows import Fusion
        from mixmerge.logits.vocabulary import shared_by

        base = self._hosts[self._parts[self._base].model].whole
        faults: list[Fault] = []
        small: list[Small] = []
        for name in self._small:
            try:
                small.append(self._small_of(name, base))
            except MixmergeError as error:
                faults += error.faults
        if faults:
            raise MixmergeError(faults)
        shared = shared_by([one.map for one in small])
        if shared is not None:
            shared = shared.to(base.model.device)
        adapter = self._base if self._parts[self._base].adapter else None
        return Fusion(base, adapter, tuple(small), self._experts, shared, self.settings, self._fixed)

    def _small_of(self, name: str, base: Loaded) -> Small:
        from mixmerge.logits.rows import Small
        from mixmerge.logits.vocabulary import check_map, load_map

        place = self._parts[name]
        loaded = self._hosts[place.model].whole
        found = self._map_of(name, base, loaded)
        if found.longest > 1 and slides(loaded.model):
            what = "has layers that see a window of tokens, or tell distances by places in a cache, and "
            what += "spells some of the base's tokens by several of its own"
            allowed = "A small model of the base's tokenizer, or one whose layers see everything"
            raise MixmergeError(Fault(f"engine {self.name}: {name}", what, allowed))
        if self._maps is not None:
            kept = load_map(Path(self._maps) / map_file(self._small.index(name)))
            check_map(kept, found, where=f"engine {self.name}: {name}")
        own = not found.same_tokens
        if self._template == "own" and loaded.tokenizer.chat_template != base.tokenizer.chat_template:
            own = True
        return Small(name, loaded, name if place.adapter else None, found, own)

    def _map_of(self, name: str, base: Loaded, small: Loaded) -> VocabMap:
        from mixmerge.logits.vocabulary import vocabulary_map

        return vocabulary_map(
            base.tokenizer,
            small.tokenizer,
            base_columns=columns_of(base.model),
            other_columns=columns_of(small.model),
            how=self._vocabulary,
            where=f"engine {self.name}: {name}",
        )

    def maps(self) -> tuple[VocabMap, ...]:
        """Of the reference, then of each expert."""
        return tuple(one.map for one in self._whole().small)

    def _whole(self) -> Fusion:
        self._expert()
        if self._fusion is None:
            raise MixmergeError(Fault(f"engine {self.name}", "is not loaded"))
        return self._fusion

    def _read(self, request: Request) -> tuple[list[int], Fault | None]:
        tokens, fault = super()._read(request)
        if fault is not None:
            return tokens, fault
        for name, small in zip(self._small, self._whole().small, strict=True):
            context = small.loaded.context
            if not small.own or context is None:
                continue
            count = len(self._prompt(name, small, request))
            if count >= context:
                where = f"request {request.id}: prompt"
                what = f"has {count:,} tokens for {name}"
                return tokens, Fault(where, what, f"{name} reads less than {context:,}")
        return tokens, None

    def _prompt(self, name: str, small: Small, request: Request) -> list[int]:
        """A prompt in a small model's own tokens."""
        host = self._hosts[self._parts[name].model]
        if isinstance(request.prompt, str):
            return small.prompt_of(request.prompt)
        if self._template == "own" or self._whole().base.tokenizer.chat_template is None:
            return host.tokens_of(request.prompt) or small.prompt_of("")
        turns = [{"role": turn.role, "content": turn.content} for turn in request.prompt]
        text = self._whole().base.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        return list(small.loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _decoder(self, rows: Sequence[Row]) -> Decoder:
        expert, whole = self._expert(), self._whole()
        prompts = {
            at: [self._prompt(self._small[at], small, row.request) for row in rows]
            for at, small in enumerate(whole.small)
            if small.own
        }
        beside = self._fused([row.told for row in rows], prompts, rows)
        return Decoder(expert.model, expert.tokenizer, rows, beside=beside, ends=expert.ends, pad=expert.pad)

    def _beside(self, rows: Sequence[Told]) -> Beside:
        whole = self._whole()
        prompts = {
            at: [small.prompt_of(_text_before(whole.base.tokenizer, row)) for row in rows]
            for at, small in enumerate(whole.small)
            if small.own
        }
        return self._fused(rows, prompts)

    def _fused(
        self, told: Sequence[Told], prompts: Mapping[int, Sequence[Sequence[int]]], rows: Sequence[Row] = ()
    ) -> FusedRows:
        from mixmerge.logits.rows import FusedRows

        return FusedRows(self._whole(), told, prompts, rows)


def _text_before(tokenizer: Any, row: Told) -> str:
    """What the base has read before what is scored: the prompt, or less of it where a token reaches over its end."""
    if list(tokenizer(row.text, verbose=False)["input_ids"]) == list(row.prompt):
        return row.text
    return plain_text(tokenizer, row.prompt)


def map_file(place: int) -> str:
    """The file of a small model's vocabulary map, by its place: the reference is 0."""
    return f"vocabulary-{place}.safetensors"


def columns_of(model: Any) -> int:
    """How many logits a model gives."""
    head = model.get_output_embeddings()
    return int(model.config.get_text_config().vocab_size if head is None else head.weight.shape[0])
