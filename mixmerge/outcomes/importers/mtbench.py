"""MT-Bench: a JSONL file of judgements, joined with one of questions.

The score is the mean over the turns that were judged, divided by 10: so from 0.1 to 1. A judgement of -1, which
FastChat writes where it could not read the judge's, is missing. The query is the first turn, all that a router sees
before it decides; later turns are metadata ``turn_2``, ``turn_3``, ... The category is ``task``.
Source: lm-sys/RouteLLM, routellm/evals/mt_bench; lm-sys/FastChat, fastchat/llm_judge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixmerge.errors import Fault, MixmergeError
from mixmerge.outcomes.building import Builder
from mixmerge.outcomes.files import Faults, Place, number, objects, shown
from mixmerge.outcomes.glance import Glance, Source
from mixmerge.outcomes.table import OutcomeTable

SCALE = 10.0
UNREAD = -1.0
_KEYS = ("question_id", "model", "turn", "score")


@dataclass
class _Judged:
    at: Place
    turns: dict[object, float] = field(default_factory=dict)


def sniff(seen: Glance) -> bool:
    return not seen.folder and seen.shape == "jsonl" and all(key in seen.columns for key in _KEYS)


def read(source: Source) -> OutcomeTable:
    """Read judgements and questions.

    The questions are ``source.queries``, or else the file beside the judgements whose name has ``question`` for
    ``judgements``.

    Raises:
        MixmergeError: a file is missing or damaged, a judgement has no question, two judge the same turn.
    """
    asked = source.queries or source.path.with_name(source.path.name.replace("judgements", "question"))
    if asked == source.path or not asked.exists():
        raise MixmergeError(
            Fault(
                str(source.path), "holds judgements without the questions", run="Pass the file with queries="
            )
        )
    builder = Builder(source.path)
    judged = _judgements(source.path, builder.faults)
    questions = _questions(asked, builder.faults)
    builder.faults.check()
    for question in [one for one in judged if one not in questions]:
        at = next(iter(judged[question].values())).at
        builder.faults.add(at, f"judges question {question!r}", f"{asked} does not have it")
    for question, (at, entry) in questions.items():
        if question not in judged:
            continue
        turns = entry["turns"]
        later = {f"turn_{n}": turn for n, turn in enumerate(turns[1:], start=2)}
        query = builder.query(
            at, turns[0], name=str(question), metadata={"task": entry.get("category"), **later}
        )
        if query is None:
            continue
        for expert, one in judged[question].items():
            known = [score for score in one.turns.values() if not math.isnan(score)]
            builder.cell(one.at, query, expert, {"score": sum(known) / len(known) / SCALE if known else None})
    return builder.table()


def _judgements(path: Path, faults: Faults) -> dict[object, dict[object, _Judged]]:
    judged: dict[object, dict[object, _Judged]] = {}
    for line, row in objects(path, faults):
        at = Place(path, line)
        missing = [key for key in _KEYS if key not in row]
        if missing or not all(isinstance(row[key], int | str) for key in _KEYS[:3]):
            faults.add(at, f"lacks {', '.join(missing) or 'a name'}", f"Needed: {', '.join(_KEYS)}")
            continue
        try:
            score = number(row["score"])
            if not (math.isnan(score) or score == UNREAD or 0 <= score <= SCALE):
                raise ValueError(f"is {score:g}")
        except ValueError as error:
            faults.add(at.column("score"), str(error), f"0 to {SCALE:g}, or {UNREAD:g} where it is missing")
            continue
        one = judged.setdefault(row["question_id"], {}).setdefault(row["model"], _Judged(at))
        if row["turn"] in one.turns:
            faults.add(
                at, f"judges turn {row['turn']} of {shown(str(row['model']))} again", "One judgement a turn"
            )
        one.turns[row["turn"]] = math.nan if score == UNREAD else score
    return judged


def _questions(path: Path, faults: Faults) -> dict[object, tuple[Place, dict[str, Any]]]:
    questions: dict[object, tuple[Place, dict[str, Any]]] = {}
    for line, row in objects(path, faults):
        turns = row.get("turns")
        if not isinstance(row.get("question_id"), int | str) or not isinstance(turns, list) or not turns:
            faults.add(
                Place(path, line),
                "is no question",
                '{"question_id": 81, "category": "...", "turns": ["..."]}',
            )
            continue
        questions[row["question_id"]] = (Place(path, line), row)
    return questions
