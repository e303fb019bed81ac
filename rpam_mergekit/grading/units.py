r"""Units of measurement at the end of an answer: ``12\text{ cm}^2``, ``5 km/h``.

pint knows the units; currencies are added. What it does not know (apples, tickets) is
compared by name.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pint import UnitRegistry

_CURRENCY = ("dollar = [currency] = USD = dollars", "cent_of_dollar = 0.01 * dollar")
_ALIASES = {
    "cent": "cent_of_dollar",
    "cents": "cent_of_dollar",
    "mins": "minute",
    "hrs": "hour",
    "hr": "hour",
    "sec": "second",
    "secs": "second",
    "lbs": "pound",
    "mph": "mile/hour",
    "deg": "degree",
    "degrees": "degree",
}


@dataclass(frozen=True)
class Unit:
    """A unit: its plain name, and pint's expression of it or None."""

    name: str
    expression: str | None

    @classmethod
    def named(cls, text: str) -> Unit | None:
        """Return the unit that `text` (LaTeX or plain) names, None for an empty one."""
        name = _plain(text)
        if not name:
            return None
        return cls(name, _known(name))

    def in_terms_of(self, other: Unit) -> Fraction:
        """Return how many of `other`, of the same dimension, make one of this.

        To 15 digits. Units that pint does not know are the same but for their spelling.
        """
        if self.expression is None or other.expression is None:
            return Fraction(1)
        registry = _registry()
        factor = (1 * registry.parse_units(self.expression)).to(other.expression)
        return Fraction(repr(float(factor.magnitude))).limit_denominator(10**12)


def same_dimension(a: Unit, b: Unit) -> bool:
    """Return whether amounts in `a` can be compared with amounts in `b`."""
    if a.expression is None or b.expression is None:
        return _singular(a.name) == _singular(b.name)
    one, other = (_registry().parse_units(e) for e in (a.expression, b.expression))
    return one.dimensionality == other.dimensionality


_WRAPPED = r"\\text\s*\{[^{}]*\}"
_POWER = r"(?:\s*\^\s*(?:\{\s*-?\d\s*\}|-?\d|\\circ|\{\s*\\circ\s*\}))?"
_TRAILING = re.compile(
    rf"(?P<value>.*?[\d)}}\]])\s*"
    rf"(?P<unit>(?:{_WRAPPED}{_POWER}(?:\s*(?:/|\\cdot)?\s*{_WRAPPED}{_POWER})*)"
    rf"|(?:\^\s*(?:\\circ|\{{\s*\\circ\s*\}})\s*(?:[CF]\b|\\text\s*\{{\s*[CF]\s*\}})?)"
    rf"|(?:(?<=[\d\s])[A-Za-z]{{2,}}(?:{_POWER})(?:\s*/\s*[A-Za-z]+{_POWER})?"
    rf"(?:\s+[A-Za-z]{{2,}})*))",
    re.DOTALL,
)
_THOUSANDS = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_NO_UNIT = re.compile(r"\b(and|or|if|for|mod|where|when|to|base)\b|=")


def split_unit(text: str) -> tuple[str, Unit | None]:
    """Return the value and its unit; (`text`, None) where no unit follows a value."""
    stripped = text.strip()
    if stripped.startswith("\\$"):
        return stripped[2:].strip(), Unit.named("dollar")
    match = _TRAILING.fullmatch(stripped)
    if not match or _NO_UNIT.search(match["unit"]):
        return text, None
    if re.search("[,=]", match["value"]) and not _THOUSANDS.fullmatch(match["value"]):
        return text, None
    unit = Unit.named(match["unit"])
    if unit is None or re.fullmatch(r"[A-Z]", unit.name):
        return text, None
    return match["value"].strip(), unit


def _plain(text: str) -> str:
    text = re.sub(r"\\(?:text|mathrm|mbox|rm)\b", " ", text)
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?", " degree ", text)
    text = text.replace("\\cdot", "*").replace("\\%", "percent").replace("%", "percent")
    text = re.sub(r"[{}$~]|\\[,;! ]", " ", text)
    text = re.sub(r"\bsq(?:uare|\.)?\s+([A-Za-z]+)", r"\1^2", text)
    text = re.sub(r"\bcu(?:bic|\.)?\s+([A-Za-z]+)", r"\1^3", text)
    text = re.sub(r"\s+per\s+", "/", text)
    text = re.sub(r"degree\s+[CF]\b", lambda m: f"deg{m.group()[-1]}", text)
    text = re.sub(r"\s*([\^/*])\s*", r"\1", text)
    return re.sub(r"\s+", " ", text).strip(" .")


def _singular(name: str) -> str:
    return name.casefold().removesuffix("s")


@functools.cache
def _registry() -> UnitRegistry[float]:
    import pint

    registry: UnitRegistry[float] = pint.UnitRegistry(cache_folder=None)
    for definition in _CURRENCY:
        registry.define(definition)
    return registry


@functools.lru_cache(maxsize=4096)
def _known(name: str) -> str | None:
    """Return the expression by which pint knows a unit, None if it does not."""
    import pint

    expression = re.sub(
        r"[A-Za-z]+", lambda m: _ALIASES.get(m.group(), m.group()), name
    )
    expression = expression.replace("^", "**")
    if not re.fullmatch(
        r"[A-Za-z_]+(?:\*\*-?\d)?(?:[*/][A-Za-z_]+(?:\*\*-?\d)?)*", expression
    ):
        return None
    try:
        _registry().parse_units(expression)
    except (pint.errors.PintError, AttributeError, ValueError, TypeError):
        return None
    return expression
