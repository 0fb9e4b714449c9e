"""From scores to decisions: the records that every router, policy and runner shares, and the policies."""

from __future__ import annotations

from mixmerge.decision.records import Decision, Pick, Query, Scores

__all__ = ["Decision", "Pick", "Query", "Scores"]
