"""Parts of ``merge_real.py``: data, experts, methods, FusionBench and the table."""
