"""Outcomes: what every expert scored on every query, the one currency to fit, calibrate and evaluate routers."""

from __future__ import annotations

from mixmerge.outcomes.table import OutcomeTable, Price

__all__ = ["OutcomeTable", "Price"]
