"""Mixtures: experts, the router that picks among them and the policy that decides, declared in a YAML.

``parse`` and ``read`` turn YAML into a ``MixtureSpec`` and collect every fault of it, each with its path and line;
``Mixture.load`` also reads the outcomes or the fitted router it names, and routes.
"""

from __future__ import annotations

from mixmerge.mixture.reading import parse, read
from mixmerge.mixture.schema import ExpertSpec, MixtureSpec, Parsed, PriceSpec, RouterSpec
from mixmerge.mixture.wiring import Mixture

__all__ = ["ExpertSpec", "Mixture", "MixtureSpec", "Parsed", "PriceSpec", "RouterSpec", "parse", "read"]
