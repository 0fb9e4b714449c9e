"""Our routers on public outcomes beside published figures; writes docs/routing-results.md.

    python examples/routing_results.py --data DATA [--out docs/routing-results.md] [--draws 20]

DATA (or MIXMERGE_DATA) is a folder with ``routellm/`` (lm-sys/RouteLLM, routellm/evals: gsm8k_responses.csv,
mmlu/*.csv, mt_bench_judgements.jsonl, mt_bench_question.jsonl, *_contaminated_prompts.jsonl) and ``llmrouter/``
(ulab-uiuc/LLMRouter: scores_train.json, scores_test.json, queries_train.jsonl, queries_test.jsonl,
models_candidates.json).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from routing_support import many_experts, two_experts
from routing_support.page import page, summary


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("MIXMERGE_DATA") or None, help="see above"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/routing-results.md"))
    parser.add_argument("--draws", type=int, default=20, help="of labels and folds, for two experts")
    parser.add_argument("--repeats", type=int, default=3, help="of the cross-validation, for nine experts")
    parser.add_argument("--resamples", type=int, default=2000, help="of the bootstrap")
    parser.add_argument("--kinds", help="of routers, with commas between; all by default")
    options = parser.parse_args()
    if options.data is None or not options.data.is_dir():
        raise SystemExit("routing_results: no data. Pass --data FOLDER or set MIXMERGE_DATA; see --help.")
    start = time.perf_counter()
    kinds = options.kinds.split(",") if options.kinds else None
    read = two_experts.data_sets(options.data)
    sets = [
        (data, two_experts.compare(data, draws=options.draws, kinds=kinds or two_experts.KINDS, note=note))
        for data in read
    ]
    found = many_experts.study(
        options.data,
        tried=kinds or list(many_experts.TRIED),
        repeats=options.repeats,
        resamples=options.resamples,
        note=note,
    )
    asked = f"--draws {options.draws} --repeats {options.repeats}" + (
        f" --kinds {options.kinds}" if kinds else ""
    )
    command = f"{asked}: {(time.perf_counter() - start) / 60:.0f} minutes"
    text = page(command=command, draws=options.draws, repeats=options.repeats, sets=sets, found=found)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text, encoding="utf-8")
    for line in summary({data.name: lines for data, lines in sets}, found):
        print(line)
    print(options.out)


if __name__ == "__main__":
    main()
