"""From scores to decisions: the records that every router, policy and runner shares, and the policies."""

from __future__ import annotations

from mixmerge.decision.budgets import calibrate_budget
from mixmerge.decision.calibration import Calibrated, calibrate_abstain, calibrate_threshold
from mixmerge.decision.files import read_calibration, read_policy, write_policy
from mixmerge.decision.policies import KINDS, Policy
from mixmerge.decision.records import Decision, Pick, Query, Scores

__all__ = [
    "KINDS",
    "Calibrated",
    "Decision",
    "Pick",
    "Policy",
    "Query",
    "Scores",
    "calibrate_abstain",
    "calibrate_budget",
    "calibrate_threshold",
    "read_calibration",
    "read_policy",
    "write_policy",
]
