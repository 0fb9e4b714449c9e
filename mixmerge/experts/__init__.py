"""Experts: what they are, which of them share what is loaded, and what tells two of them apart."""

from __future__ import annotations

from mixmerge.experts.expert import Expert, ExpertSet
from mixmerge.experts.identity import identity

__all__ = ["Expert", "ExpertSet", "identity"]
