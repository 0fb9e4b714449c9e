"""A mixture at work: its router fitted or loaded, and decisions for queries."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from mixmerge.batch.job import Progress
from mixmerge.batch.records import Answer
from mixmerge.batch.setup import Conditions
from mixmerge.decision.files import FILE, read_policy
from mixmerge.decision.policies import Policy
from mixmerge.decision.records import Decision, Query, as_queries
from mixmerge.errors import Fault, MixmergeError, collecting
from mixmerge.experts.identity import check_folders
from mixmerge.mixture.answering import expert_set
from mixmerge.mixture.asking import Asked, Piece, answers, as_finished, stream
from mixmerge.mixture.batching import Batched, Files, run
from mixmerge.mixture.fitting import outcomes_of, same_experts, unfitted
from mixmerge.mixture.hub import refuse_revision, spec_from
from mixmerge.mixture.schema import ExpertSpec, MixtureSpec, no_router
from mixmerge.mixture.wholes import whole_of
from mixmerge.routers.base import Router


@dataclass(frozen=True, eq=False)
class Mixture:
    """Experts, the router that scores them, and the policy that decides; or one whole of them, such as a network.

    Args:
        spec: what the YAML says.
        router: fitted; its experts are those of the spec. None where they are one whole that has none.
        policy: decides.
    """

    spec: MixtureSpec
    router: Router | None
    policy: Policy

    @classmethod
    def load(
        cls,
        source: str | Path | Mapping[str, Any] | MixtureSpec,
        *,
        revision: str | None = None,
        trust_endpoints: bool = False,
        answers: bool = False,
    ) -> Self:
        """Read a mixture, and fit its router on its outcomes or load it from its folder.

        Args:
            source: a YAML file; a folder that ``save`` or ``mixmerge fit MIXTURE.yaml`` wrote; a mapping of
                the YAML's shape; what one says; or the hub id (``org/name``) of a repository with such a folder,
                whose relative paths are then those in the repository.
            revision: branch, tag or commit of a hub id; refused of anything else.
            trust_endpoints: a mixture of the hub may send prompts, and keys of the environment, to the servers that
                it names.
            answers: its experts are to answer, so their folders have to be there; to route, they need not.

        Raises:
            MixmergeError: every fault of the YAML; or outcomes or a router that cannot be read, or that know
                other experts than the mixture; or a folder that is no fitted mixture. Of a hub id: what
                ``mixmerge.mixture.hub`` says, such as a path that leads out of the repository.
        """
        if isinstance(source, MixtureSpec):
            refuse_revision(source, revision)
            spec = source
        else:
            spec = spec_from(source, revision=revision, trust_endpoints=trust_endpoints)
        faults: list[Fault] = []
        router: Router | None = None
        whole = whole_of(spec.compose.kind)
        if whole is None or spec.router is not None:
            with collecting(faults):
                router = _loaded(spec) if spec.routed.folder else unfitted(spec).fit(outcomes_of(spec))
        with collecting(faults):
            if whole is not None:
                whole.ready(spec, answers)
            elif answers:
                check_folders(expert_set(spec))
        if faults:
            raise MixmergeError(faults)
        return cls(spec, None, Policy()) if router is None else cls.of(spec, router)

    @classmethod
    def of(cls, spec: MixtureSpec, router: Router) -> Self:
        """A mixture of what a YAML says and its fitted router.

        Raises:
            MixmergeError: the policy beside the router cannot be read, or is of another one.
        """
        return cls(spec, router, _policy(spec, router))

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write the mixture as one folder, whole or not at all; ``load`` reads it, and ``Router.load`` its router.

        In it are the router's files; ``policy.json``, if there is a policy of its own; and ``mixture.yaml`` with the
        rest. Experts are named, not copied: their local paths are written from the root.

        Raises:
            OutputError: the folder exists (with ``overwrite``: and is no router's), or cannot be written.
            MixmergeError: its experts are one network, which ``mixmerge fit`` writes.
        """
        from mixmerge.mixture.saving import save

        save(self, Path(folder), overwrite=overwrite)

    @property
    def experts(self) -> Mapping[str, ExpertSpec]:
        """By name, in the order of the YAML."""
        return self.spec.experts

    @property
    def routing(self) -> Router:
        """Its router.

        Raises:
            MixmergeError: it has none: its experts are one network.
        """
        if self.router is None:
            raise MixmergeError(no_router(self.spec.compose.kind))
        return self.router

    def route(self, queries: Iterable[str | Query], *, explain: bool = False) -> list[Decision]:
        """Who answers each query.

        Args:
            queries: texts or queries.
            explain: the reasons also hold what the router says: neighbours, clusters, skills.

        Raises:
            MixmergeError: the policy cannot decide: costs are not known, or a budget is not calibrated; there is no
                router.
        """
        asked, router = as_queries(queries), self.routing
        reasons = router.reasons(asked) if explain else None
        return self.policy.decide(router.score(asked), asked, version=router.version, reasons=reasons)

    def answer(self, asked: Iterable[Asked], *, conditions: Conditions | None = None) -> list[Answer]:
        """Answers of the picked experts, composed as the mixture says, in the order asked.

        Args:
            asked: texts, queries or requests; a text is a user's turn of a chat.
            conditions: where it runs; by default on the CPU.

        Raises:
            MixmergeError: a composition that is not available; an expert that fits into no device. What keeps one
                request from being answered is in its ``Answer.fault``.
        """
        return answers(self, asked, conditions=conditions)

    def as_finished(
        self, asked: Iterable[Asked], *, conditions: Conditions | None = None
    ) -> AsyncIterator[Answer]:
        """Answers as they finish: ``async for answer in mixture.as_finished(queries)``. As ``answer`` otherwise."""
        return as_finished(self, asked, conditions=conditions)

    def stream(
        self, asked: Asked, *, conditions: Conditions | None = None, explain: bool = False
    ) -> Iterator[Piece]:
        """One answer as it comes: word by word where one expert answers and its engine can. As ``answer`` otherwise.

        With ``explain`` the reason of a network's answer has ``weights``: how much of each expert it got, by layer.
        """
        return stream(self, asked, conditions=conditions, explain=explain)

    def batch(
        self,
        input: str | Path,
        output: str | Path,
        *,
        conditions: Conditions | None = None,
        overwrite: bool = False,
        unordered: bool = False,
        explain: bool = False,
        progress: Progress | None = None,
    ) -> Batched:
        """Answer a file of requests; what was killed goes on with the same call. As ``mixmerge batch``.

        Args:
            input: OpenAI batch JSONL, JSONL, CSV or text.
            output: answers, in the format that goes with the input's.
            conditions: where it runs; by default on the CPU.
            overwrite: replace an output that exists, and start again.
            unordered: write answers as they come.
            explain: write decisions and reasons too.
            progress: told (what, done, in all).

        Raises:
            MixmergeError: as ``mixmerge.mixture.batching.run``.
        """
        files = Files(Path(input), Path(output), overwrite=overwrite, unordered=unordered, explain=explain)
        return run(self, files, conditions or Conditions(), progress=progress)


def _loaded(spec: MixtureSpec) -> Router:
    folder = str(spec.routed.folder)
    router = Router.load(folder)
    same_experts(tuple(spec.experts), router.experts, f"the router in {folder}")
    return router


def _policy(spec: MixtureSpec, router: Router) -> Policy:
    if spec.policy is not None:
        return spec.policy
    folder = spec.routed.folder
    if folder is not None and (Path(folder) / FILE).is_file():
        return read_policy(folder, router=router.version)
    return Policy()
