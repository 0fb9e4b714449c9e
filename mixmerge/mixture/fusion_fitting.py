"""A fusion with the best fixed alpha of some rows, on its way into a folder.

The folder has ``fusion.json`` with the score of every alpha and the hashes of experts, the vocabulary maps,
``mixture.yaml``, which names the experts, and a manifest, which names the rows. Experts are not in it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixmerge import __version__
from mixmerge.checkpoint.used_rows import MANIFEST
from mixmerge.data.rows import Row, digests_of, read_rows, sample_rows
from mixmerge.engines.records import Message, Request, Scoring
from mixmerge.errors import CheckpointError, Fault, MixmergeError, collecting
from mixmerge.experts.identity import identities
from mixmerge.mixture.answering import expert_set
from mixmerge.mixture.fusion import LogitsOptions, base_of, engine_options, options_of, shifting
from mixmerge.mixture.saving import owned_in, save_whole
from mixmerge.mixture.schema import GenerateSpec, MixtureSpec
from mixmerge.mixture.wholes import Fitted, Fitting

if TYPE_CHECKING:
    from mixmerge.logits.engine import FusionEngine
    from mixmerge.logits.vocabulary import VocabMap

CARD = "fusion.json"
_FORMAT = "mixmerge fusion 1"


def fit_fusion(spec: MixtureSpec, out: Path, how: Fitting) -> Fitted:
    """Pick the best fixed alpha on rows, and write it with the vocabulary maps; as ``mixture.gluing.fit``.

    Raises:
        MixmergeError: it is fitted already, or there is nothing to fit; rows without prompt or answer; experts that
            cannot be read.
    """
    from mixmerge.bank.publishing import check_free, making
    from mixmerge.logits.engine import FusionEngine, map_file
    from mixmerge.logits.vocabulary import save_map

    told = options_of(spec)
    _refuse(told)
    owned = owned_in(out)
    check_free(out, overwrite=how.overwrite, of=owned)
    faults: list[Fault] = []
    rows: tuple[Row, ...] = ()
    known: dict[str, str] = {}
    with collecting(faults):
        rows = _rows(told)
    with collecting(faults):
        known = identities(expert_set(spec))
    if faults:
        raise MixmergeError(faults)
    inputs = [
        Path(place) for one in spec.experts.values() for place in (one.model, one.adapter, one.base) if place
    ]
    with making(out, overwrite=how.overwrite, of=owned, inputs=inputs) as new:
        engine = FusionEngine(base_of(spec), name="mixture", device=how.device, **engine_options(spec))
        with engine:
            scores = _scores(engine, told, rows, spec.generate, how)
            maps = engine.maps()
        alpha = best_of(scores, least=told.score == "loss")
        for at, one in enumerate(maps):
            save_map(one, new / map_file(at))
        card = _card(told, alpha, scores, known, maps)
        (new / CARD).write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", "utf-8")
        manifest = {
            "mixmerge": __version__,
            "calibration": {"rows": {"alpha": digests_of(rows)}},
        }
        (new / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
        save_whole(spec, new, _compose(told, alpha))
    return Fitted(
        out,
        "fusion",
        told.mode,
        shifting(told, tuple(spec.experts)),
        _facts(card, len(rows)),
        _notes(card, rows),
    )


def _refuse(told: LogitsOptions) -> None:
    if told.folder is not None:
        what = f"the mixture in {told.folder} is fitted already"
        raise MixmergeError(Fault("compose.folder", what, run="Name data to fit another"))
    if told.data is None:
        what = "there is nothing to fit: a fusion answers as it is"
        allowed = "data: FILE and mode: static, to pick the best fixed alpha"
        raise MixmergeError(Fault("compose", what, allowed, "mixmerge ask MIXTURE.yaml PROMPT"))


def _rows(told: LogitsOptions) -> tuple[Row, ...]:
    found = read_rows(str(told.data), split=told.split)
    if told.samples is not None:
        found = sample_rows(found, told.samples, seed=told.seed)
    short = sum(not row.prompt or not row.answer for row in found)
    if short or not found:
        what = f"{short:,} of {len(found):,} rows have no prompt and answer"
        raise MixmergeError(Fault("compose.data", what, '{"prompt": ..., "answer": ...}'))
    return found


def _scores(
    engine: FusionEngine, told: LogitsOptions, rows: Sequence[Row], generate: GenerateSpec, how: Fitting
) -> dict[float, float]:
    """Of each alpha: mean nats of an answer's token after its prompt as it is, or the share of answers that are said
    exactly when they are asked for as ``mixmerge ask`` does, by the likeliest tokens.
    """
    from mixmerge.logits.fusing import Settings

    found: dict[float, float] = {}
    alphas = list(dict.fromkeys(float(one) for one in told.alphas))
    for at, alpha in enumerate(alphas):
        how.progress("alpha", at, len(alphas))
        engine.set(Settings("static", alpha, told.top_p_base, told.clip))
        found[alpha] = _loss(engine, rows) if told.score == "loss" else _exact(engine, rows, generate)
    how.progress("alpha", len(alphas), len(alphas))
    return found


def _loss(engine: FusionEngine, rows: Sequence[Row]) -> float:
    asked = [Scoring(str(at), row.prompt, str(row.answer)) for at, row in enumerate(rows)]
    given = engine.loglikelihood(asked)
    found = -sum(one.total for one in given) / sum(len(one.logprobs) for one in given)
    if not math.isfinite(found):
        cut = sum(not math.isfinite(one.total) for one in given)
        what = f"the answers of {cut:,} of {len(rows):,} rows have no probability at all, whatever the alpha"
        run = "Say score: exact, or leave top_p_base out: it cuts tokens that are in the answers"
        raise MixmergeError(Fault("compose.score", what, run=run))
    return found


def _exact(engine: FusionEngine, rows: Sequence[Row], generate: GenerateSpec) -> float:
    asked = [
        Request(str(at), (Message("user", row.prompt),), generate.max_new_tokens, stop=generate.stop)
        for at, row in enumerate(rows)
    ]
    said = engine.generate(asked)
    return sum(
        one.text.strip() == str(row.answer).strip() for one, row in zip(said, rows, strict=True)
    ) / len(rows)


def best_of(scores: Mapping[float, float], *, least: bool) -> float:
    """The alpha with the best score; of equal ones the nearest to 1, then the smaller.

    Args:
        scores: of alphas.
        least: smaller is better.
    """
    sign = 1 if least else -1
    return min(scores, key=lambda alpha: (sign * scores[alpha], abs(alpha - 1), alpha))


def _card(
    told: LogitsOptions,
    alpha: float,
    scores: Mapping[float, float],
    known: Mapping[str, str],
    maps: Sequence[VocabMap],
) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "alpha": alpha,
        "score": told.score,
        "scores": {f"{one:g}": round(value, 6) for one, value in scores.items()},
        "experts": dict(known),
        "maps": [one.as_dict() for one in maps],
    }


def read_card(folder: str | Path) -> dict[str, Any]:
    """What ``mixmerge fit`` said of a fusion.

    Raises:
        CheckpointError: there is no card, or it is damaged.
    """
    path = Path(folder) / CARD
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        if card["format"] != _FORMAT or not isinstance(card["experts"], dict):
            raise KeyError("format")
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = "holds no fusion that was fitted"
        raise CheckpointError(Fault(str(path), what, run="Fit the mixture again")) from error
    return dict(card)


def _compose(told: LogitsOptions, alpha: float) -> dict[str, Any]:
    """Options of the fitted mixture: what it was told, with the alpha."""
    kept = ("base", "reference", "experts", "top_p_base", "clip", "vocabulary", "template", "dtype")
    found = {key: getattr(told, key) for key in kept if key in told.model_fields_set}
    if isinstance(found.get("experts"), tuple):
        found["experts"] = list(found["experts"])
    return {**found, "mode": "static", "alpha": alpha}


def _facts(card: Mapping[str, Any], rows: int) -> dict[str, Any]:
    covered = [one["covered"] for one in card["maps"]]
    return {key: card[key] for key in ("alpha", "score", "scores")} | {"rows": rows, "covered": covered}


def _notes(card: Mapping[str, Any], rows: Sequence[Row]) -> tuple[str, ...]:
    scores = ", ".join(f"{alpha}: {value:.4g}" for alpha, value in card["scores"].items())
    lines = [f"alpha {card['alpha']:g} of {len(rows):,} rows by {card['score']} ({scores})"]
    first = card["maps"][0]
    if not all(one["same_tokens"] for one in card["maps"]):
        counts = ", ".join(f"{one['covered']:,}" for one in card["maps"])
        lines.append(f"of the base's {first['base_columns']:,} tokens the small models know {counts}")
    return tuple(lines)
