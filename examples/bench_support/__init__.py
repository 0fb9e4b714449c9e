"""The parts of ``examples/bench_merge.py``: checkpoints to merge, cases, measuring and reporting."""
