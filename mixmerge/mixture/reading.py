"""From YAML to a ``MixtureSpec``: everything is read, everything that is wrong is said at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from mixmerge import registry
from mixmerge.aggregate.auto import AUTO, AutoOptions
from mixmerge.aggregate.table import options_of
from mixmerge.decision.policies import Policy
from mixmerge.document import (
    Kind,
    Node,
    Report,
    from_data,
    given,
    load,
    read_file,
    read_mapping,
    read_text,
    show,
    unknown_keys,
)
from mixmerge.document.sections import M, Strict, arguments_of, plain, read_section
from mixmerge.errors import MixmergeError
from mixmerge.mixture.schema import (
    LATER,
    ComposeSpec,
    ExpertSpec,
    GenerateSpec,
    MixtureSpec,
    Parsed,
    PriceSpec,
    RouterSpec,
)
from mixmerge.mixture.wholes import Asked, Whole, whole_of

MIXTURE = Kind("mixture", needs="It needs experts and router")
_KEYS = ["experts", "router", "policy", "compose", "generate"]
_OF_WHOLES = {"fusion": "logits", "latent": "latent"}  # engines that are told all models by a composition
_FORMS = "Either model, or adapter and base, or endpoint and model"


def parse(text: str, *, where: str = "mixture") -> Parsed:
    """Read the text of a mixture. Never raises for what a user can get wrong.

    Args:
        text: YAML.
        where: what to call the document in faults that concern all of it, such as its file name.
    """
    report = Report(MIXTURE)
    return _parsed(load(text, name=where, report=report), text, where, report)


def read(source: str | Path | Mapping[str, Any]) -> Parsed:
    """Read a mixture's file (UTF-8), or a mapping of the same shape. Never raises for what a user can get wrong."""
    report = Report(MIXTURE)
    if isinstance(source, Mapping):
        return _parsed(from_data(source, name="mixture", report=report), "", "mixture", report)
    name = str(source) if len(str(source)) <= 300 and "\n" not in str(source) else "mixture"
    text = read_file(Path(source), name=name, report=report)
    return Parsed(None, report.faults(name), "") if text is None else parse(text, where=name)


def _parsed(root: Node | None, text: str, where: str, report: Report) -> Parsed:
    mixture: MixtureSpec | None = None
    if root is not None and isinstance(root.value, dict):
        mixture = _mixture(root.value, report)
    elif root is not None:
        report.fault(root, f"a mixture is a mapping, got {show(root.value)}", MIXTURE.needs)
    return Parsed(mixture, report.faults(where), text)


def _mixture(top: dict[str, Node], report: Report) -> MixtureSpec | None:
    unknown_keys(top, _KEYS, report)
    names, experts = _experts(top, report)
    compose = _compose(top, names, report)
    whole = _whole(top)
    if whole is not None:
        _check_routing(top, whole, report)
        whole.check(Asked(top, names, experts, compose), report)
    alone = whole is not None and (bool(whole.instead) or given(top, "router") is None)
    router = None if alone else _router(top, report)
    policy = None if alone else _policy(top, names, report)
    generate = _optional(top, "generate", GenerateSpec, "settings of generation", report)
    if report.faulty or (router is None and not alone):
        return None
    return MixtureSpec(
        experts=experts,
        router=router,
        policy=policy,
        compose=compose or ComposeSpec(),
        generate=generate or GenerateSpec(),
    )


def _whole(top: dict[str, Node]) -> Whole | None:
    """The kind of whole that its experts are said to be, however wrong the rest is."""
    compose = given(top, "compose")
    kind = given(compose.value, "kind") if compose is not None and isinstance(compose.value, dict) else None
    return None if kind is None else whole_of(kind.value)


def _check_routing(top: dict[str, Node], whole: Whole, report: Report) -> None:
    """Keys of routing that have no effect on experts which answer as one."""
    for key in ("router", "policy"):
        node = given(top, key)
        if node is not None and whole.instead:
            report.fault(node, f"has no effect: {whole.instead}", run="Remove it")
    policy = given(top, "policy")
    if policy is not None and not whole.instead and given(top, "router") is None:
        report.fault(policy, "has no effect without a router", run="Remove it, or add router")


def _optional(top: dict[str, Node], key: str, model: type[M], what: str, report: Report) -> M | None:
    node = given(top, key)
    return None if node is None else read_section(node, model, report, what=what)


def _compose(top: dict[str, Node], experts: list[str], report: Report) -> ComposeSpec | None:
    node = given(top, "compose")
    if node is None:
        return None
    entries = read_mapping(node, report, "a kind and its options")
    kind = given(entries, "kind")
    name = "answer" if kind is None else read_text(kind, report, "the name of a composition")
    if name is None:
        return None
    known = [*registry.table("composition"), AUTO, *registry.table("whole"), *LATER]
    if kind is not None and name not in known:
        report.fault(kind, f"no composition is called {show(name)}", registry.choices(name, known))
        return None
    rest = Node(node.path, node.line, {key: child for key, child in entries.items() if key != "kind"})
    model = _options_of(name)
    options = read_section(rest, model, report, what="options of a composition")
    if options is None:
        return None
    for key in ("expert", "aggregator", "experts", "proposers"):
        value = getattr(options, key, None)
        for one in (value,) if isinstance(value, str) else value or ():
            if experts and one not in experts:
                what = f"the mixture has no expert {show(one)}"
                report.fault(entries[key], what, registry.choices(one, experts))
    return ComposeSpec(kind=name, options=options.model_dump(mode="json", exclude_unset=True))


def _options_of(kind: str) -> type[BaseModel]:
    whole = whole_of(kind)
    if whole is not None:
        return whole.options
    return Strict if kind in LATER else AutoOptions if kind == AUTO else options_of(kind)


def _experts(top: dict[str, Node], report: Report) -> tuple[list[str], dict[str, ExpertSpec]]:
    """All names, and the experts that could be read."""
    node = given(top, "experts")
    if node is None or node.value in ({}, ()):
        report.fault(
            node or "experts", "the mixture has no experts", run="Add experts:, with NAME: {model: PATH}"
        )
        return [], {}
    found: dict[str, ExpertSpec] = {}
    entries = read_mapping(node, report, "experts by name")
    for name, child in entries.items():
        if not name or name != name.strip():
            report.fault(child, f"{show(name)} is no name of an expert", "Text without spaces at the ends")
        expert = _expert(child, report)
        if expert is not None:
            found[name] = expert
        if report.full:
            break
    return list(entries), found


def _expert(node: Node, report: Report) -> ExpertSpec | None:
    entries = node.value if isinstance(node.value, dict) else {}
    priced = given(entries, "price")
    price = (
        None if priced is None else read_section(priced, PriceSpec, report, what="input and output prices")
    )
    expert = read_section(
        node, ExpertSpec, report, what="what the expert is (model: PATH)", ready={"price": price}
    )
    if expert is None:
        return None
    what = _wrong_form(expert)
    if what:
        report.fault(node, what, _FORMS)
    engines = [name for name in registry.table("engine") if name not in _OF_WHOLES]
    if expert.engine in _OF_WHOLES:
        kind = _OF_WHOLES[expert.engine]
        what = f"{expert.engine} runs several experts as one, not one of them"
        report.fault(entries["engine"], what, f"compose: {{kind: {kind}, ...}}", "Leave engine out")
    elif expert.engine is not None and expert.engine not in engines:
        report.fault(
            entries["engine"],
            f"no engine is called {show(expert.engine)}",
            registry.choices(expert.engine, engines),
        )
    return expert


def _wrong_form(expert: ExpertSpec) -> str:
    """What is wrong with the keys taken together; "" if nothing is."""
    if expert.endpoint is not None:
        if expert.adapter or expert.base:
            return "an expert behind an endpoint has no adapter or base here"
        if expert.engine not in (None, "openai"):
            return f"an expert behind an endpoint is not run by {expert.engine}"
        return "" if expert.model else "the key model is missing: its name behind the endpoint"
    if expert.engine == "openai":
        return "the key endpoint is missing: engine openai asks a server"
    if expert.api_key_env is not None:
        return "api_key_env is for an expert behind an endpoint"
    if expert.adapter is not None or expert.base is not None:
        if expert.model is not None:
            return "model, and adapter or base, are both given"
        return "" if expert.adapter and expert.base else "adapter and base go together"
    return "" if expert.model else "the expert has no model"


def _router(top: dict[str, Node], report: Report) -> RouterSpec | None:
    node = given(top, "router")
    if node is None:
        report.fault("router", "the mixture has no router", run="Add router: {kind: ..., outcomes: FILE}")
        return None
    entries = node.value if isinstance(node.value, dict) else {}
    ready: dict[str, Any] = {}
    fitted = given(entries, "folder") is not None
    unused = [name for name in ("kind", "outcomes", "options", "features", "seed") if given(entries, name)]
    if fitted:
        for name in unused:
            report.fault(entries[name], "has no effect on a fitted router", run="Remove it, or remove folder")
    elif isinstance(node.value, dict):
        for name in ("kind", "outcomes"):
            if given(entries, name) is None:
                report.fault(node, f"the key {name} is missing", "kind and outcomes, or folder")
        ready = _of_kind(entries, report)
    return read_section(node, RouterSpec, report, what="kind and outcomes", ready=ready)


def _of_kind(entries: dict[str, Node], report: Report) -> dict[str, Any]:
    """Options and features, checked against what this kind of router takes."""
    ready: dict[str, Any] = {}
    kind = given(entries, "kind")
    row = _named(kind, "router", report)
    if kind is not None and not isinstance(kind.value, str):
        ready["kind"] = None  # said already
    options, features = given(entries, "options"), given(entries, "features")
    if row is None:
        return ready | {name: {} for name, node in (("options", options), ("features", features)) if node}
    router = registry.load(row.target)
    if row.reference:
        what = f"{router.kind} looks at the outcomes of the very queries it scores, which nobody has here"
        report.fault(entries["kind"], what, "It is there to evaluate others")
    if options is not None:
        found = read_section(options, router.options_type, report, what="options")
        ready["options"] = {} if found is None else found.model_dump(exclude_unset=True)
    if features is not None:
        if not router.embeds:
            report.fault(features, f"{router.kind} uses no features", run="Remove it")
        ready["features"] = _features(features, report)
    return ready


def _features(node: Node, report: Report) -> dict[str, Any]:
    entries = read_mapping(node, report, "kind and options of features")
    kind = given(entries, "kind")
    if kind is None:
        if isinstance(node.value, dict):
            report.fault(node, "the key kind is missing")
        return {}
    made = _named(kind, "features", report)
    if made is None:
        return {}
    arguments = arguments_of(made, name="features")
    rest = Node(node.path, node.line, {name: child for name, child in entries.items() if name != "kind"})
    found = read_section(rest, arguments, report, what="options of features")
    return {"kind": kind.value, **({} if found is None else found.model_dump(exclude_unset=True))}


def _named(node: Node | None, kind: str, report: Report) -> Any:
    """The row of a name of the registry, or None with a fault."""
    name = None if node is None else read_text(node, report, f"the name of a {kind}")
    if node is None or name is None:
        return None
    try:
        return registry.find(kind, name)
    except MixmergeError as error:
        report.take(error, node)
        return None


def _policy(top: dict[str, Node], experts: list[str], report: Report) -> Policy | None:
    node = given(top, "policy")
    if node is None:
        return None
    entries = read_mapping(node, report, "kind and numbers of a policy")
    if not isinstance(node.value, dict):
        return None
    unknown_keys(entries, list(Policy.model_fields), report)
    try:
        policy = Policy.model_validate(plain(entries, Policy))
    except MixmergeError as error:
        for fault in error.faults:
            at = entries.get(fault.where.removeprefix("policy."), node)
            what = fault.what if at is not node else f"{fault.where}: {fault.what}"
            report.fault(at, what, fault.allowed, fault.run)
        return None
    for name, expert in policy.experts().items():
        if experts and expert not in experts:
            report.fault(
                entries[name],
                f"the mixture has no expert {show(expert)}",
                registry.choices(expert, experts),
            )
    if policy.k is not None and experts and policy.k > len(experts):
        report.fault(entries["k"], f"there are only {len(experts)} experts", f"At most {len(experts)}")
    return policy
