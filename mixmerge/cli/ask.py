"""``mixmerge ask``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixmerge.cli.batch import (
    BatchTokens,
    Devices,
    Memory,
    MixturePath,
    Revision,
    TrustEndpoints,
    conditions_of,
)
from mixmerge.cli.route.options import Meta
from mixmerge.cli.show import emit_json, table

if TYPE_CHECKING:
    from mixmerge.batch.records import Answer

_SHOWN = 100  # rows of a table of weights


def ask(
    mixture: MixturePath,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What is asked; - for stdin.")],
    expert: Annotated[
        str | None,
        typer.Option("--expert", help="Who answers; by default the router decides.", show_default=False),
    ] = None,
    meta: Meta = None,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Say on stderr who answers, and why; weights by layer or token."),
    ] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help="Of the answer.", show_default=False)
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", min=0.0, help="0: the likeliest token.", show_default=False),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Of sampling.", show_default=False)
    ] = None,
    device: Devices = None,
    memory: Memory = None,
    batch_tokens: BatchTokens = 8192,
    json: Annotated[bool, typer.Option("--json", help="Print the whole record as JSON.")] = False,
    revision: Revision = None,
    trust_endpoints: TrustEndpoints = False,
) -> None:
    """One answer of a mixture, printed as it comes."""
    from mixmerge.batch.records import Item, Settings
    from mixmerge.cli.route.parsing import parse_options
    from mixmerge.engines.records import Message
    from mixmerge.errors import Fault, MixmergeError
    from mixmerge.mixture import Mixture

    loaded = Mixture.load(mixture, revision=revision, trust_endpoints=trust_endpoints, answers=True)
    text = sys.stdin.read() if prompt == "-" else prompt
    settings = Settings(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    labels = {label: str(value) for label, value in parse_options(meta or (), where="--meta").items()}
    item = Item("prompt", (Message("user", text),), expert, settings, labels)
    conditions = conditions_of(device, memory, batch_tokens, None)
    shown = ""
    answer: Answer | None = None
    for piece in loaded.stream(item, conditions=conditions, explain=explain):
        answer = piece.answer
        if not json and piece.text:
            print(piece.text, end="", flush=True)
            shown += piece.text
    if answer is None or answer.fault is not None:
        raise MixmergeError(answer.fault if answer and answer.fault else Fault("ask", "gave no answer"))
    if json:
        emit_json(record_of(answer))
    elif not shown.endswith("\n"):
        print()
    if explain and not json:
        explained(answer)


def record_of(answer: Answer) -> dict[str, object]:
    """The answer as JSON values."""
    return {
        "answer": answer.text,
        "expert": answer.expert,
        "finish": answer.finish,
        "tokens_in": answer.tokens_in,
        "tokens_out": answer.tokens_out,
        "calls": answer.calls,
        "cost": answer.cost,
        "decision": dict(answer.decision),
        "reason": dict(answer.reason),
    }


def explained(answer: Answer) -> None:
    """Who answered and why, on stderr."""
    decision = answer.decision
    lines = [f"answered by {answer.expert}, {answer.calls} generations, {answer.tokens_out} tokens"]
    if decision:
        lines.append(f"policy {decision['policy']}: {decision['reason'].get('rule', '')}")
        scores = ", ".join(f"{name} {score:.3g}" for name, score in decision["scores"].items())
        lines += [f"expected scores: {scores}"] if scores else []
    lines += [f"{name}: {_plain(value)}" for name, value in answer.reason.items() if name != "weights"]
    print("\n".join(lines), file=sys.stderr)
    if "weights" in answer.reason:
        show_weights(answer.reason["weights"])


def _plain(value: Any) -> str:
    """A reason in words; shares by name with three digits."""
    if isinstance(value, Mapping) and all(isinstance(one, float) for one in value.values()):
        return ", ".join(f"{name} {one:.3g}" for name, one in value.items())
    return str(value)


def show_weights(weights: Mapping[str, Any]) -> None:
    """How much of each expert the answer got, layer by layer or token by token, on stderr."""
    found = dict(weights.get("layers") or enumerate(weights.get("steps", ()), 1))
    rows = [*list(found.items())[:_SHOWN], ("all", list(weights["mean"].values()))]
    shown = [(str(place), *(f"{value:.3f}" for value in values)) for place, values in rows if values]
    of = "layer" if "layers" in weights else "token"
    title = weights.get("title", "weights of the experts")
    table(title, (of, *weights["experts"]), shown, to_stderr=True)
    if weights.get("covered", 1) < 1:
        share = f"{100 * weights['covered']:.1f} % of the base's probability"
        print(f"the small models know tokens that have {share}", file=sys.stderr)
