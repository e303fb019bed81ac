r"""Numbers as answers write them: 18, -1,000.5, 5\%, 4.5e33, \frac{1}{2}; exactly."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

# A decimal with this many significant digits may stand for a fraction.
_ROUNDED_DIGITS = 6


@dataclass(frozen=True)
class Number:
    """A number as it was written.

    decimal: with decimals or an exponent; digits, places: its significant digits and
    decimal places where it has no exponent; percent: a percent sign follows; base: the
    subscript that names its base (its value is that of the digits read as decimal).
    """

    value: Fraction
    decimal: bool = False
    digits: int = 0
    places: int = 0
    percent: bool = False
    base: int | None = None


_INTEGER = r"\d+(?:(?:,|\{,\}|\\!,|,\\!)\d{3})*"
_DECIMAL = re.compile(
    rf"(?P<sign>[+-]?)(?P<whole>{_INTEGER}|\d*)(?:\.(?P<part>\d*))?"
    r"(?:(?:[eE]|(?:\\times|\\cdot|\*|\u00d7)10\^)\{?(?P<exponent>[+-]?\d+)\}?)?"
    r"(?P<percent>\\?%)?(?:_\{?(?P<base>\d+)\}?)?"
)
_POWER = re.compile(r"(?P<sign>[+-]?)10\^\{?(?P<exponent>[+-]?\d+)\}?")
_FRACTION = re.compile(
    r"(?P<sign>[+-]?)(?P<whole>\d+)?\\frac"
    r"(?:\{(?P<a>[+-]?\d+)\}|(?P<a1>\d))(?:\{(?P<b>[+-]?\d+)\}|(?P<b1>\d))"
    r"(?P<percent>\\?%)?"
)
_RATIO = re.compile(r"(?P<a>[+-]?\d+)/(?P<b>\d+)(?P<percent>\\?%)?")
_MOST_DIGITS = 400


def number(text: str) -> Number | None:
    r"""Return the number that `text` writes: 18, -1,000.5, 5\%, 4.5e33, \frac{1}{2}.

    None for everything else, and for numbers of over 400 digits.
    """
    text = re.sub(r"\\[,;!: ]|~|\s", "", text.replace("\u2212", "-"))
    text = text.replace("\\%", "%").removeprefix("\\$")
    if len(text) > _MOST_DIGITS:
        return None
    if match := _FRACTION.fullmatch(text):
        top, bottom = (int(match[k] or match[k + "1"]) for k in "ab")
        if not bottom:
            return None
        value = Fraction(top, bottom) + int(match["whole"] or 0)
        sign = -1 if match["sign"] == "-" else 1
        return Number(value=sign * value, percent=bool(match["percent"]))
    if match := _RATIO.fullmatch(text):
        if not int(match["b"]):
            return None
        value = Fraction(int(match["a"]), int(match["b"]))
        return Number(value=value, percent=bool(match["percent"]))
    if match := _POWER.fullmatch(text):
        return _scaled(Fraction(1), match["exponent"], match["sign"])
    match = _DECIMAL.fullmatch(text)
    if not match or not (match["whole"] or match["part"]):
        return None
    whole = re.sub(r"\D", "", match["whole"])
    part = match["part"] or ""
    value = Fraction(int(whole + part or 0), 10 ** len(part))
    scaled = _scaled(value, match["exponent"], match["sign"])
    if scaled is None:
        return None
    return Number(
        value=scaled.value,
        decimal=bool(part.strip("0") or match["exponent"]),
        digits=0 if match["exponent"] else len((whole + part).lstrip("0")),
        places=len(part),
        percent=bool(match["percent"]),
        base=int(match["base"]) if match["base"] else None,
    )


def _scaled(value: Fraction, exponent: str | None, sign: str) -> Number | None:
    power = int(exponent or 0)
    if abs(power) > _MOST_DIGITS:
        return None
    value *= Fraction(10) ** power
    return Number(value=-value if sign == "-" else value)


@dataclass(frozen=True)
class Tolerance:
    """How far a number may lie off the gold one; `relative` is for decimals only."""

    absolute: float | None = None
    relative: float | None = None


def same_number(
    gold: Number, answer: Number, factor: Fraction, tolerance: Tolerance
) -> bool:
    """Return whether `answer` times `factor` is the gold number.

    With a percent sign on one side only, 50 and 50 % are the same (as answers to "what
    percentage"), and so are 0.5 and 50 %.
    """
    if gold.base and answer.base and gold.base != answer.base:
        return False
    values = {answer.value * factor}
    if answer.percent and not gold.percent:
        values |= {value / 100 for value in values}
    if gold.percent and not answer.percent:
        values |= {value * 100 for value in values}
    return any(_close(gold, value, answer, tolerance) for value in values)


def _close(gold: Number, value: Fraction, answer: Number, tolerance: Tolerance) -> bool:
    off = abs(value - gold.value)
    if off == 0:
        return True
    if tolerance.absolute is not None and off <= Fraction(str(tolerance.absolute)):
        return True
    if tolerance.relative is not None and gold.decimal:
        return off <= Fraction(str(tolerance.relative)) * abs(gold.value)
    # 0.333333 stands for 1/3, but 0.3333331 does not.
    endless = Fraction(10) ** _MOST_DIGITS * gold.value % 1 != 0
    rounded = endless and answer.digits >= _ROUNDED_DIGITS and answer.places > 0
    return rounded and off <= Fraction(1, 2 * 10**answer.places)
