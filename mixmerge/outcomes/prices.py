"""Price lists: what experts cost for a million tokens, and how large they are."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixmerge.errors import Fault, MixmergeError
from mixmerge.outcomes.files import Faults, document, lines, number, shown
from mixmerge.outcomes.table import Price

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([bBmM]?)\s*")
_FORM = "{expert: {input: 0.2, output: 0.6, size: 7}}, dollars per million tokens and billions of parameters"


def read_prices(path: Path) -> dict[str, Price]:
    """Prices by expert from JSON or YAML.

    Either ``{expert: {input, output, size}}``, or LLMRouter's list of candidates, where they are called
    ``input_price`` and ``output_price`` and other keys (``feature``, ``service``, ...) are passed over. A size is
    billions of parameters, or a text like ``7B`` or ``350M``; it may be left out.

    Raises:
        MixmergeError: it cannot be read, a price is missing, negative or no number.
    """
    given = _yaml(path) if path.suffix.lower() in (".yaml", ".yml") else document(path)
    if not isinstance(given, dict) or not given:
        raise MixmergeError(Fault(str(path), "is no price list", _FORM))
    faults, prices = Faults(path), {}
    for expert, entry in given.items():
        where = f"{path}: {expert}"
        if not isinstance(expert, str) or not isinstance(entry, dict):
            faults.add(where, "is no price", _FORM)
            continue
        found = [_dollars(entry, name, where, faults) for name in ("input", "output")]
        size = _size(entry.get("size"), where, faults)
        if all(price is not None for price in found):
            prices[expert] = Price(float(found[0] or 0.0), float(found[1] or 0.0), size)
    faults.check()
    return prices


def _dollars(entry: Mapping[Any, Any], name: str, where: str, faults: Faults) -> float | None:
    key = name if name in entry else f"{name}_price"
    if key not in entry:
        faults.add(where, f"has no {name} price", _FORM)
        return None
    try:
        value = number(entry[key])
        if math.isnan(value) or value < 0:
            raise ValueError(f"is {entry[key]}")
    except ValueError as error:
        faults.add(f"{where}.{key}", str(error), "Dollars per million tokens, 0 or more")
        return None
    return value


def _size(given: object, where: str, faults: Faults) -> float | None:
    if given is None:
        return None
    match = None if isinstance(given, bool) else _SIZE.fullmatch(str(given))
    if match is None:
        faults.add(
            f"{where}.size", f"is {shown(str(given))}", "Billions of parameters, or a text like 7B or 350M"
        )
        return None
    return float(match[1]) / (1000.0 if match[2] in ("m", "M") else 1.0)


def _yaml(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load("".join(line for _, line in lines(path)))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise MixmergeError(Fault(str(path), f"is no YAML that can be read: {reason}")) from error
