"""Memory that runs out for real, in a process of its own with a limit."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest

from mixmerge.engines.shortage import is_shortage, within_memory
from mixmerge.errors import MixmergeError, OutOfMemoryError

CHILD = """
import json, resource, sys
from mixmerge.engines.local import TransformersEngine
from mixmerge.engines.records import Request, Scoring
from mixmerge.errors import OutOfMemoryError

engine = TransformersEngine(sys.argv[1], batch_tokens=10**9)
asked = [Request(str(at), "x," * 350 + str(at % 7), 2) for at in range(64)]
alone = [one.text for one in engine.generate(asked[:2])]  # what libraries take once is taken now
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 200 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
told, sizes, kept = [], [len(asked)], []
while True:
    try:
        found = engine.generate(asked[: sizes[-1]])
        break
    except OutOfMemoryError as error:
        told.append([str(fault) for fault in error.faults])
        kept.append(error)  # whoever has the error does not have the tensors
        sizes.append(sizes[-1] // 2)
try:
    engine.loglikelihood([Scoring(str(at), "x," * 350, "y" * 300) for at in range(64)])
except OutOfMemoryError as error:
    told.append([str(fault) for fault in error.faults])
print(json.dumps({"told": told, "sizes": sizes, "same": [one.text for one in found[:2]] == alone[: sizes[-1]]}))
"""


def llama(folder: Path, tokenizer: Any) -> None:
    """Few weights, and activations that take a gigabyte for 64 rows of 700 tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=280,
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=4096,
            max_position_embeddings=2048,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_a_batch_that_does_not_fit_is_told_and_let_go(tokenizer: Any, tmp_path: Path) -> None:
    llama(tmp_path, tokenizer)
    done = subprocess.run(
        [sys.executable, "-P", "-c", CHILD, str(tmp_path)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["told"][0] == found["told"][0][:1], "one fault"
    assert "out of memory on a batch of 64:" in found["told"][0][0]
    assert "fewer requests at once" in found["told"][0][0]
    assert 1 <= found["sizes"][-1] < 64
    assert found["same"]


def test_what_was_made_is_let_go_while_the_error_is_held() -> None:
    class Large:
        pass

    made: list[Any] = []

    def work() -> None:
        large = Large()
        made.append(weakref.ref(large))
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")

    with pytest.raises(OutOfMemoryError, match=r"here: too much: .*you tried 9 bytes\. Less") as caught:
        within_memory(work, where="here", what="too much", run="Less")
    gc.collect()
    assert made[0]() is None
    assert isinstance(caught.value, MixmergeError)


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (MemoryError(), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("std::bad_alloc"), True),
        (OSError("Cannot allocate memory (os error 12)"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
    ],
)
def test_which_errors_are_a_shortage(error: Exception, short: bool) -> None:
    assert is_shortage(error) is short

    def work() -> None:
        raise error

    with pytest.raises(OutOfMemoryError if short else type(error)):
        within_memory(work, where="w", what="x", run="y")


def test_torch_says_so() -> None:
    import torch

    assert is_shortage(torch.OutOfMemoryError("HIP out of memory"))
    with pytest.raises(OutOfMemoryError, match="allocate"):
        within_memory(lambda: torch.empty(2**50), where="w", what="x", run="y")
