"""What learning coefficients costs beside a plain forward and backward pass of one model, in one run.

    python examples/bench_learn.py [--experts 4] [--tokens 1024] [--precision float32] [--layers 30] [--repeats 5]
                                  [--threads 1] [--density 0.2]
    python examples/bench_learn.py --attention

A model of SmolLM2-135M's geometry with random weights, and experts a little off it, are written to a folder in
bfloat16. Plain: forward, backward and gradients of every tensor of one such model, on the same tokens and loss.
Learning: the same pass, the inner products of all gradients with all deltas, the step, and the weights made anew.
Passes of the two take turns; the figures are medians. Exits with 1 if a step takes more than 1.3 times the processor
time. On a machine that others use too, only one thread gives times that mean something. ``--density`` below 1 is for
deltas trimmed and sign-elected, as AdaMerging++ has them. With ``--attention`` it times torch's fused attention beside
the plain form instead, forward and backward: what ``quick_attention`` chooses between.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BAR = 1.3


def write_models(folder: Path, experts: int, layers: int) -> list[Path]:
    """A base and experts in bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, num_hidden_layers=layers, num_attention_heads=9, num_key_value_heads=3,
        intermediate_size=1536, tie_word_embeddings=True, max_position_embeddings=8192,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    folders = []
    for number in range(experts + 1):
        folders.append(folder / ("base" if number == 0 else f"expert{number}"))
        model.save_pretrained(folders[-1])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.002 * torch.randn_like(parameter)
    return folders


class NextToken:
    """Cross-entropy of the next token: the plainest loss there is."""

    def __init__(self, model: Any, ids: Any) -> None:
        self.model, self.ids = model, ids

    def losses(self, step: int) -> Iterator[Any]:
        yield self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss

    def notes(self) -> tuple[str, ...]:
        return ()


def bench(options: argparse.Namespace, folder: Path) -> float:
    """Print the figures; the ratio of the two."""
    import torch
    from transformers import LlamaForCausalLM

    from mixmerge.calibrate.coefficients import CoefficientSpace
    from mixmerge.calibrate.mixed import Mixed
    from mixmerge.engine.streams import FileDeltas, tensor_cuts
    from mixmerge.engine.worker import Adapters
    from mixmerge.plan import make_plan

    torch.set_num_threads(options.threads)
    base, *experts = write_models(folder, options.experts, options.layers)
    plan = make_plan(
        {
            "merge_method": "task_arithmetic",
            "base_model": str(base),
            "models": [{"model": str(expert)} for expert in experts],
            "parameters": {"weight": 0.3},
        }
    )
    dtype = getattr(torch, options.precision)
    tasks = [task for task in plan.tasks if not task.copied]
    deltas = FileDeltas(tasks, Adapters())
    if options.density < 1:
        shares = dict.fromkeys(deltas.shapes, [options.density] * options.experts)
        deltas = FileDeltas(tasks, Adapters(), cuts=tensor_cuts(deltas, shares))
    model = LlamaForCausalLM.from_pretrained(base, dtype=dtype).eval()
    ids = torch.randint(0, 49152, (options.tokens // 256, 256), generator=torch.Generator().manual_seed(1))
    space = CoefficientSpace()
    layout = space.layout(deltas.shapes, deltas.experts)
    known = dict(model.named_parameters())
    mixed = Mixed({name: known[name] for name in deltas.shapes}, deltas, layout, {})
    free = space.free(layout.start).requires_grad_(True)
    adam = torch.optim.Adam([free], lr=1e-3)
    objective = NextToken(model, ids)

    def plain() -> None:
        model.requires_grad_(True)
        for loss in objective.losses(0):
            loss.backward()
        model.zero_grad(set_to_none=True)

    def learning() -> dict[str, float]:
        began = time.process_time()
        mixed.gradient.zero_()
        with mixed.watched():
            for loss in objective.losses(0):
                loss.backward()
        passed = time.process_time()
        adam.zero_grad()
        (space.coefficients(free) * mixed.gradient).sum().backward()
        adam.step()
        mixed.build(space.coefficients(free.detach()))
        return {"pass and products": passed - began, "rebuild": time.process_time() - passed}

    plain(), learning()
    times: dict[str, list[float]] = {"plain": [], "learning": [], "pass and products": [], "rebuild": []}
    for _ in range(options.repeats):
        began = time.process_time()
        plain()
        times["plain"].append(time.process_time() - began)
        began = time.process_time()
        parts = learning()
        times["learning"].append(time.process_time() - began)
        for name, seconds in parts.items():
            times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    elements = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{elements / 1e6:.0f} M parameters in {options.precision}, {options.experts} experts in bfloat16, ",
        end="",
    )
    trimmed = f"trimmed to {options.density:g} and sign-elected, " if options.density < 1 else ""
    print(
        f"{trimmed}{ids.numel():,} tokens a step, {torch.get_num_threads()} threads; medians of {options.repeats}"
    )
    for name, seconds in medians.items():
        print(f"  {name:<18} {seconds:8.3f} s of processor time")
    ratio = statistics.median(b / a for a, b in zip(times["plain"], times["learning"], strict=True))
    print(f"  learning / plain   {ratio:8.2f}   (bar: {BAR})")
    return ratio


def bench_attention(options: argparse.Namespace) -> None:
    """Print milliseconds of processor time of both forms, for rows of several lengths."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.set_num_threads(options.threads)
    forms = {"fused": SDPBackend.FLASH_ATTENTION, "plain": SDPBackend.MATH}
    print(f"attention of {options.tokens:,} tokens, 9 heads of 64, forward and backward; medians, ms")
    for precision in ("float32", "bfloat16"):
        for length in (32, 64, 128, 256, 512):
            shape = (max(1, options.tokens // length), 9, length, 64)
            inputs = [
                torch.randn(shape, dtype=getattr(torch, precision), requires_grad=True) for _ in range(3)
            ]
            mask = torch.zeros(shape[0], 1, length, length, dtype=inputs[0].dtype)
            times: dict[str, list[float]] = {form: [] for form in forms}
            for _ in range(options.repeats + 1):  # the first is not counted
                for form, backend in forms.items():
                    began = time.process_time()
                    with sdpa_kernel(backend):
                        found = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=mask)
                    found.sum().backward()
                    times[form].append(1e3 * (time.process_time() - began))
            fused, plain = (statistics.median(times[form][1:]) for form in forms)
            print(f"  {precision:<9} {length:>4} tokens a row: ", end="")
            print(f"fused {fused:8.1f}, plain {plain:8.1f}, fused / plain {fused / plain:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--density", type=float, default=1.0)
    parser.add_argument("--attention", action="store_true")
    options = parser.parse_args()
    if options.attention:
        bench_attention(options)
        return
    with tempfile.TemporaryDirectory(prefix="mixmerge-bench-") as folder:
        ratio = bench(options, Path(folder))
    raise SystemExit(0 if ratio <= BAR else 1)


if __name__ == "__main__":
    main()
