"""``examples/routing_results.py`` on small files of the public data's layout: it runs, and the page is what it says."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
WEAK, STRONG = "mistralai/Mixtral-8x7B-Instruct-v0.1", "gpt-4-1106-preview"
WORDS = (
    "river",
    "add",
    "number",
    "loop",
    "poem",
    "market",
    "train",
    "apple",
    "seven",
    "class",
    "rose",
    "moon",
)


def texts(number: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [f"{' '.join(rng.choice(WORDS, 6))} case {seed} {i}" for i in range(number)]


def prompts(path: Path, asked: list[str], seed: int) -> None:
    rng = np.random.default_rng(seed)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", WEAK, STRONG])
        for text in asked:
            writer.writerow([text, rng.random() < 0.4, rng.random() < 0.8])


def lines(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def routellm(folder: Path) -> None:
    (folder / "mmlu").mkdir(parents=True)
    gsm = texts(60, 1)
    prompts(folder / "gsm8k_responses.csv", gsm, 1)
    lines(folder / "gsm8k_contaminated_prompts.jsonl", [{"eval_prompt": gsm[0]}])
    for seed, subject in ((2, "law"), (3, "botany")):
        prompts(folder / "mmlu" / f"mmlu_{subject}.csv", texts(40, seed), seed)
    lines(folder / "mmlu_contaminated_prompts.jsonl", [{"eval_prompt": texts(40, 2)[5]}])
    asked, rng = texts(20, 4), np.random.default_rng(4)
    lines(
        folder / "mt_bench_question.jsonl",
        [
            {"question_id": i, "category": "math" if i % 2 else "writing", "turns": [text, "And then?"]}
            for i, text in enumerate(asked)
        ],
    )
    lines(
        folder / "mt_bench_judgements.jsonl",
        [
            {"question_id": i, "model": expert, "turn": turn, "score": float(rng.integers(low, 11))}
            for i in range(20)
            for expert, low in ((WEAK, 3), (STRONG, 7))
            for turn in (1, 2)
        ],
    )
    lines(folder / "mt_bench_contaminated_prompts.jsonl", [{"eval_prompt": asked[3]}])


def llmrouter(folder: Path) -> None:
    folder.mkdir(parents=True)
    train, test = texts(80, 5), texts(30, 6)
    test[:4] = train[:4]
    for part, asked, seed in (("train", train, 5), ("test", test, 6)):
        rng = np.random.default_rng(seed)
        scored = [
            {
                "question": text,
                "scores": {f"expert{e}": float(rng.random() < 0.3 + 0.2 * e) for e in range(3)},
            }
            for text in asked
        ]
        (folder / f"scores_{part}.json").write_text(json.dumps(scored), encoding="utf-8")
        known = [{"task_name": "even" if i % 2 else "odd", "query": text} for i, text in enumerate(asked)]
        lines(folder / f"queries_{part}.jsonl", [dict(row) for row in known])
    priced = {
        f"expert{e}": {"size": f"{e + 1}B", "input_price": 0.1 * e, "output_price": 0.2} for e in range(3)
    }
    (folder / "models_candidates.json").write_text(json.dumps(priced), encoding="utf-8")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / "routing_results.py"), *arguments],
        env=os.environ | {"MIXMERGE_DATA": ""},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_page(tmp_path: Path) -> None:
    routellm(tmp_path / "data" / "routellm")
    llmrouter(tmp_path / "data" / "llmrouter")
    out = tmp_path / "page.md"
    options = ("--draws", "1", "--repeats", "1", "--resamples", "100", "--kinds", "length,ridge,knn")
    done = run("--data", str(tmp_path / "data"), "--out", str(out), *options)
    assert done.returncode == 0, done.stderr
    page = out.read_text(encoding="utf-8")
    # One prompt of each is left out, and four of thirty test queries leak.
    for title in ("GSM8K: 59 queries", "MMLU: 79 queries", "MT-Bench: 19 queries"):
        assert f"### {title}" in page
    assert "80 training queries and 30 test queries, of which 4 are" in page
    assert "### Tested on the 26 clean test rows" in page
    for row in ("| ridge |", "| task_mean (told the subject) |", "| random |", "| argmax-label kNN |"):
        assert row in page
    assert "nan" not in page.lower().replace("finance", "")
    shown = done.stdout.splitlines()
    assert len([line for line in shown if line.startswith(("met ", "MISSED"))]) == 7
    assert shown[-1] == str(out)


def test_without_data_it_says_what_it_needs() -> None:
    done = run()
    assert done.returncode == 1
    assert "MIXMERGE_DATA" in done.stderr
    assert "Traceback" not in done.stderr
