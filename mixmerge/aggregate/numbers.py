"""The number that an answer ends with, in one spelling: ``1,200``, ``1200.0`` and ``2400/2`` are the same vote."""

from __future__ import annotations

import re
from fractions import Fraction

DIGITS = 100  # a number with more of them is no answer that can be compared

# A sign counts where no operand stands before it: 7-5 holds 7 and 5, not -5.
_NUMBER = re.compile(
    r"(?<!\w)(?<![0-9][./])(?P<sign>(?<![\w)\]}])[-+−])?\$?"
    r"(?:(?P<whole>[0-9]{1,3}) (?=[0-9]{1,3}/[0-9]))?"
    r"(?P<number>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:[eE](?P<power>[-+]?[0-9]{1,3})(?![\w.])|/(?P<below>[0-9]+)(?![\w/]))?"
    r"(?!(?:st|nd|rd|th)\b)"
)
_LATEX_FRACTION = re.compile(r"\\[dtc]?frac\s*\{\s*(-?[0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}")
_LATEX_NOISE = re.compile(r"\\[,!;: ]|\\left|\\right|\{,\}")


def last_number(text: str) -> str | None:
    """The last number of a text, as ``-12``, ``0.75`` or, where decimals do not end, ``1/3``; None without any.

    Read are thousands separators (``1,200``), decimals, fractions (``3/4``, ``1 3/4``, LaTeX's ``\\frac{3}{4}``) and
    powers of ten (``1.5e3``). Passed over are digits that belong to a word (``H2O``), ordinals (``3rd``), fractions by
    zero, and numbers of more than ``DIGITS`` digits. Units and percent signs are not looked at.
    """
    plain = _LATEX_FRACTION.sub(r" \1/\2 ", _LATEX_NOISE.sub(_unspaced, text))
    values = map(_value, reversed(list(_NUMBER.finditer(plain))))
    return next((value for value in values if value is not None), None)


def _unspaced(match: re.Match[str]) -> str:
    return "," if match.group() == "{,}" else ""


def _value(match: re.Match[str]) -> str | None:
    digits, below, power = match["number"].replace(",", ""), match["below"], int(match["power"] or 0)
    if len(digits) + len(below or "") + abs(power) > DIGITS or (below and not int(below)):
        return None
    value = Fraction(digits) / int(below or 1) * Fraction(10) ** power
    value = (value + int(match["whole"] or 0)) * (-1 if match["sign"] in ("-", "−") else 1)
    return spelled(value)


def spelled(value: Fraction) -> str:
    """``12``, ``0.75`` or ``1/3``: decimals where they end."""
    rest, places = value.denominator, 0
    for factor in (2, 5):
        count = 0
        while rest % factor == 0:
            rest, count = rest // factor, count + 1
        places = max(places, count)
    if rest > 1:
        return f"{value.numerator}/{value.denominator}"
    if not places:
        return str(value.numerator)
    digits = str(abs(value.numerator) * 10**places // value.denominator).zfill(places + 1)
    return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"
