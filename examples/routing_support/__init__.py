"""The parts of ``examples/routing_results.py``: the two data sets, the field's routers beside ours, and the page."""
