"""The child of ``measure.Engine``: plans once, then merges into every folder named on stdin.

Arguments: the recipe, and the threads (0: the engine's own choice).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from mixmerge.engine.merge import run
from mixmerge.plan import make_plan


def main() -> None:
    began = time.perf_counter()
    plan = make_plan(Path(sys.argv[1]))
    threads = int(sys.argv[2]) or None
    print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)
    for line in sys.stdin:
        spent, began = time.process_time(), time.perf_counter()
        run(plan, Path(line.strip()), threads=threads)
        seconds, cpu = time.perf_counter() - began, time.process_time() - spent
        print(json.dumps({"seconds": seconds, "cpu": cpu}), flush=True)


if __name__ == "__main__":
    main()
