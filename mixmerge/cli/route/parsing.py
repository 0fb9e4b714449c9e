"""Words of the command line as options, features, policies and queries."""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixmerge.errors import Fault, MixmergeError, OutputError
from mixmerge.registry import choices

if TYPE_CHECKING:
    from mixmerge.decision.lines import QueryLines
    from mixmerge.decision.policies import Policy
    from mixmerge.decision.records import Query
    from mixmerge.outcomes.table import OutcomeTable
    from mixmerge.routers.base import Router
    from mixmerge.routers.features import Features

# What stands behind the colon of ``--features``, where it is one word.
_MAIN = {"sentence": "model", "given": "path"}
_CALL = re.compile(r"(\w+)\s*(?:\((.*)\))?", re.DOTALL)


def parse_options(given: Sequence[str], *, where: str = "--option") -> dict[str, Any]:
    """``["k=20", "worth=0.5"]`` as a mapping: JSON values where they are any, else text.

    Raises:
        MixmergeError: a word without ``=``, or a name twice.
    """
    found: dict[str, Any] = {}
    faults = []
    for word in given:
        name, equals, value = (part.strip() for part in word.partition("="))
        if not equals or not name:
            faults.append(Fault(where, f"{word.strip()!r} is not NAME=VALUE", "As k=20"))
        elif name in found:
            faults.append(Fault(where, f"{name} is given twice"))
        else:
            found[name] = _value(value)
    if faults:
        raise MixmergeError(faults)
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def features_from(text: str | None) -> Features | None:
    """``tfidf``, ``sentence:PATH``, ``given:FILE``, or ``KIND:NAME=VALUE,...``; None stays None.

    Raises:
        MixmergeError: no features of that name, or an option they do not have.
    """
    from mixmerge import registry

    if text is None:
        return None
    name, _, rest = text.partition(":")
    kind = registry.find("features", name)
    options: dict[str, Any] = {}
    if rest:
        single = name in _MAIN and not re.match(r"\w+=", rest)
        options = {_MAIN[name]: rest} if single else parse_options(rest.split(","), where="--features")
    known = [name for name in inspect.signature(kind).parameters if name != "self"]
    faults = [
        Fault(f"--features {name}", f"there is no option {option!r}", choices(option, known))
        for option in options
        if option not in known
    ]
    if faults:
        raise MixmergeError(faults)
    try:
        made: Features = kind(**options)
    except TypeError as error:
        raise MixmergeError(Fault(f"--features {name}", f"a value has the wrong type: {error}")) from error
    return made


def policy_from(
    text: str | None,
    *,
    top_k: int | None = None,
    budget: float | None = None,
    willingness_to_pay: float | None = None,
    fallback: str | None = None,
    abstain_below: float | None = None,
    saved: Policy | None = None,
) -> Policy:
    """The policy that these options ask for; with none of them, the saved one, else argmax.

    A budget takes its trade from the saved policy, if that is of the same budget.

    Raises:
        MixmergeError: options that are of two policies, or a policy that cannot be.
    """
    from mixmerge.decision.policies import Policy

    short = (
        ("top_k", "--top-k", {"k": top_k}),
        ("budget", "--budget", {"budget": budget}),
        ("willingness_to_pay", "--willingness-to-pay", {"willingness_to_pay": willingness_to_pay}),
    )
    given = [one for one in short if None not in one[2].values()]
    fields = None if text is None else _policy_fields(text)
    named = {str(fields["kind"])} if fields is not None else set()
    if len(named | {kind for kind, _, _ in given}) > 1:
        options = [option for _, option, _ in given] + ([] if text is None else [f"--policy {text}"])
        raise MixmergeError(Fault(" and ".join(options), "are two policies", "One of them"))
    for kind, _, more in given:
        fields = {"kind": kind, **(fields or {}), **more}
    if fields is None:
        return (saved or Policy()).but(fallback=fallback, abstain_below=abstain_below)
    if budget is not None and saved is not None and saved.kind == "budget" and saved.budget == budget:
        fields = {**saved.as_dict(), **fields}
    shared = {"fallback": fallback, "abstain_below": abstain_below}
    return Policy(**{**fields, **{name: value for name, value in shared.items() if value is not None}})


def _policy_fields(text: str) -> dict[str, Any]:
    match = _CALL.fullmatch(text.strip())
    if match is None:
        raise MixmergeError(Fault("--policy", f"{text!r} is no policy", "KIND or KIND(NAME=VALUE, ...)"))
    inner = (match[2] or "").strip()
    return {"kind": match[1], **(parse_options(inner.split(","), where="--policy") if inner else {})}


def saved_policy(folder: Path, router: Router) -> Policy | None:
    """The policy that calibration left in the router's folder, if there is one.

    Raises:
        MixmergeError: it is damaged, or of another router.
    """
    from mixmerge.decision.files import FILE, read_policy

    return read_policy(folder, router=router.version) if (folder / FILE).exists() else None


def queries_from(
    prompt: str | None, file: str | None, *, field: str | None, metadata: Sequence[str] = ()
) -> tuple[Query, ...] | QueryLines:
    """What is asked: the prompt with its metadata, or the lines of a file; of standard input for ``-``.

    Raises:
        MixmergeError: neither or both, or lines that are no queries.
    """
    import sys

    from mixmerge.decision.lines import parse_queries, stream_queries
    from mixmerge.decision.records import Query

    if (prompt is None) == (file is None):
        what = "there is nothing to ask" if prompt is None else "there is a prompt, and -i names queries too"
        raise MixmergeError(Fault("PROMPT", what, "A prompt, or -i FILE with one on each line (- for stdin)"))
    if prompt is not None:
        labels = {name: str(value) for name, value in parse_options(metadata, where="--meta").items()}
        try:
            return (Query(prompt, metadata=labels),)
        except MixmergeError as error:
            faults = [Fault("PROMPT", one.what, one.allowed, one.run) for one in error.faults]
            raise MixmergeError(faults) from error
    if metadata:
        raise MixmergeError(Fault("--meta", "is of a prompt", run="Give the lines of the file such fields"))
    if file == "-":
        return parse_queries(sys.stdin.buffer, name="stdin", field=field)
    return stream_queries(str(file), field=field)


def unseen_rows(
    table: OutcomeTable, routers: dict[str, Router], *, unseen: bool, allow_trained: bool
) -> OutcomeTable:
    """The outcomes to measure routers on: not those they were fitted on, unless that is asked for.

    Raises:
        MixmergeError: some were fitted on and neither option says what to do with them, or none is left.
    """
    from mixmerge.evaluate.routing import unseen as not_fitted_on

    clean = not_fitted_on(table, routers)
    if allow_trained or len(clean) == len(table):
        return table
    if not unseen:
        what = f"{len(table) - len(clean):,} of its {len(table):,} queries were fitted on"
        run = "Pass --unseen to leave them out, or --allow-trained"
        raise MixmergeError(Fault("--data", what, "Queries that are new to the routers", run))
    if not len(clean):
        raise MixmergeError(Fault("--data", "all its queries were fitted on", "Outcomes of other queries"))
    return clean


def is_mixture(path: Path) -> bool:
    """Whether a mixture's YAML or hub id is meant, and no table of outcomes or router, by the name."""
    from mixmerge.outcomes.glance import SUFFIXES

    end = path.suffix.lower()
    if end in (".yaml", ".yml"):
        return True
    if os.path.lexists(path) or end in SUFFIXES:
        return False
    from mixmerge.mixture.hub import is_hub_id  # slow to import: only for what is not here

    return is_hub_id(path)


def check_free(path: Path, *, overwrite: bool) -> None:
    """Refuse to write where something is, before any work is done.

    Raises:
        OutputError: it exists and is not to be replaced.
    """
    if path.exists() and not overwrite:
        raise OutputError(Fault(str(path), "exists already", run="Choose another name, or pass --overwrite"))
