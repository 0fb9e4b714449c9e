"""One answer in a process of its own: the most anonymous memory it held, as JSON.

python -P -m bench_support.latent_child FOLDER EXPERT READS EXPERTS PROMPT
"""

from __future__ import annotations

import json
import os
import sys

from bench_support.measure import PeakMemory


def main() -> None:
    """Imports what an answer needs first, so that the difference is what experts and latents take."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    from mixmerge.engines.records import Request
    from mixmerge.latent.engine import LatentEngine

    torch.set_num_threads(1)
    folder, expert, reads, experts, prompt = sys.argv[1:]
    engine = LatentEngine(folder, experts=json.loads(experts), expert=expert, dtype="float32")
    request = Request("one", prompt, 16, reads=tuple((name, gate) for name, gate in json.loads(reads)))
    with PeakMemory(os.getpid()) as before:
        pass
    with PeakMemory(os.getpid()) as watched:
        engine.generate([request])
    print(json.dumps({"before": before.peak, "peak": watched.peak}))


if __name__ == "__main__":
    main()
