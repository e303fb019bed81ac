r"""Is an answer right? Gold answers, and what equals them.

math-verify decides whether two mathematical expressions are equal. Around it stands
what it does not tell apart: units, number bases, tuples from sets, how often a value
occurs in a list, very small numbers, multiple choice. Nothing here limits time:
`workers.py` runs it in worker processes that it can kill.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from rpam_mergekit.grading.latex import (
    only_words,
    outer_brackets,
    plain_words,
    split_list,
    squeezed,
    tidy,
    unwrap,
)
from rpam_mergekit.grading.numbers import Tolerance, number, same_number
from rpam_mergekit.grading.units import Unit, same_dimension, split_unit

if TYPE_CHECKING:
    from sympy import Expr

# math-verify warns at every call that its own time limit is off.
logging.getLogger("math_verify").setLevel(logging.ERROR)

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Gold(BaseModel):
    """The right answer of a query.

    values: every one is needed, in any order; each is LaTeX or plain text.
    choices: of a multiple-choice query, the texts of A, B, ...; `values` then holds
        the letter of the right one.
    unit: the unit of the values where they do not name it.
    tolerance, relative_tolerance: how far a number may lie off; the relative one
        counts only for values that are written as decimals, never for whole numbers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    values: tuple[str, ...] = Field(min_length=1)
    choices: tuple[str, ...] = ()
    unit: str | None = None
    tolerance: float | None = Field(default=None, ge=0)
    relative_tolerance: float | None = Field(default=None, ge=0)


def is_correct(gold: Gold, answers: Sequence[str]) -> bool:
    """Return whether `answers` (the last one last) give the gold answer.

    Of several answers the last one counts; where the gold has several values, the
    last ones together may give them.
    """
    if not answers:
        return False
    if gold.choices:
        return _is_choice(gold, answers[-1])
    if len(gold.values) == 1:
        answer = answers[-1]
        return _equal(gold.values[0], answer, gold) or (
            _is_prose(answer) and _equal(gold.values[0], _from_prose(answer), gold)
        )
    values = list(gold.values)
    candidates = [[last] for last in answers[-1:]]
    candidates += _lists(answers[-1])
    candidates.append(list(answers[-len(values) :]))
    return any(_same_items(values, items, gold) for items in candidates)


def quick_verdict(gold: Gold, answers: Sequence[str]) -> bool | None:
    """Return `is_correct` where both sides are plain numbers, None elsewhere.

    Takes microseconds and no computer algebra, whatever the answer.
    """
    if len(gold.values) != 1 or gold.choices or gold.unit or not answers:
        return None
    left, right = number(tidy(gold.values[0])), number(tidy(answers[-1]))
    if left is None or right is None:
        return None
    tolerance = Tolerance(gold.tolerance, gold.relative_tolerance)
    return same_number(left, right, Fraction(1), tolerance)


def _is_choice(gold: Gold, answer: str) -> bool:
    right = gold.values[0]
    text = unwrap(tidy(answer))
    if match := re.fullmatch(
        r"\W*(?:(?:option|choice|answer)\W*)?([A-Za-z])\W*", text, re.IGNORECASE
    ):
        return match.group(1).upper() == right
    named = re.match(r"\W*(?:(?:option|choice)\s+)?\(?([A-Z])[).:]\s*", text)
    if named and named.group(1) in LETTERS[: len(gold.choices)]:
        return named.group(1) == right
    choices = [plain_words(choice) for choice in gold.choices]
    same = [
        LETTERS[n] for n, choice in enumerate(choices) if choice == plain_words(text)
    ]
    return same == [right]


def _equal(gold: str, answer: str, how: Gold) -> bool:
    """Return whether one value equals another, both tidied first."""
    gold, answer = tidy(gold), tidy(answer)
    if not gold or not answer:
        return False
    if squeezed(gold) == squeezed(answer):
        return True
    gold, answer, same_name = _without_names(gold, answer)
    if not same_name:
        return False
    if (verdict := _units_and_numbers(gold, answer, how)) is not None:
        return verdict
    if (verdict := _structure(gold, answer, how)) is not None:
        return verdict
    gold_text, answer_text = unwrap(gold), unwrap(answer)
    if only_words(gold_text) and plain_words(gold_text) == plain_words(answer_text):
        return True
    if gold_text != gold and only_words(gold_text):
        return False  # \text{even} is no product of letters
    return _verify(gold, answer)


def _units_and_numbers(gold: str, answer: str, how: Gold) -> bool | None:
    """Return the verdict where units differ or both sides are numbers, else None."""
    value, unit = split_unit(gold)
    unit = unit or (Unit.named(how.unit) if how.unit else None)
    other, other_unit = split_unit(answer)
    factor = Fraction(1)
    if unit and other_unit and unit != other_unit:
        if not same_dimension(unit, other_unit):
            return False
        factor = other_unit.in_terms_of(unit)
    left, right = number(value), number(other)
    if left is not None and right is not None:
        tolerance = Tolerance(how.tolerance, how.relative_tolerance)
        return same_number(left, right, factor, tolerance)
    if factor != 1:
        return False
    if (value, other) == (gold, answer):
        return None
    return _equal(value, other, how.model_copy(update={"unit": None}))


def _structure(gold: str, answer: str, how: Gold) -> bool | None:
    """Return the verdict on lists, sets, tuples and unions; None for single values."""
    if "\\cup" in gold and "\\cup" in answer:
        return _same_items(gold.split("\\cup"), answer.split("\\cup"), how)
    outer, inner = outer_brackets(gold)
    other_outer, other_inner = outer_brackets(answer)
    if outer in ("", "\\{\\}"):
        items = split_list(inner)
        if len(items) < 2 and outer == "":
            return None
        if other_outer not in ("", "\\{\\}"):
            return False
        candidates = [split_list(other_inner), *_lists(other_inner)]
        return any(_same_items(items, c, how) for c in candidates)
    items = split_list(inner)
    if len(items) < 2:
        return None
    if other_outer != outer and (other_outer or outer != "()"):
        return False
    others = split_list(other_inner)
    return len(items) == len(others) and all(
        _equal(a, b, how) for a, b in zip(items, others, strict=True)
    )


def _same_items(gold: Sequence[str], answer: Sequence[str], how: Gold) -> bool:
    """Return whether two lists hold the same values equally often, in any order."""
    if len(gold) != len(answer):
        return False
    left = list(answer)
    for value in gold:
        found = next((i for i, o in enumerate(left) if _equal(value, o, how)), None)
        if found is None:
            return False
        del left[found]
    return True


def _lists(text: str) -> list[list[str]]:
    """Return other ways to read a list: in braces, or with commas in its numbers."""
    _, inner = outer_brackets(tidy(text))
    spaced = [item for item in re.split(r",(?:\s|\\ )+", inner) if item.strip()]
    return [split_list(inner), spaced]


_NAME = re.compile(r"\s*([A-Za-z](?:_\{?\w+\}?)?(?:\([a-z]\))?)\s*(?:=|\\in)\s*([^=]+)")


def _without_names(gold: str, answer: str) -> tuple[str, str, bool]:
    """Return both without ``x =`` before them, and whether the names can be one."""
    left, right = _NAME.fullmatch(gold), _NAME.fullmatch(answer)
    if left and right:
        if left[1] != right[1]:
            return gold, answer, False
        return left[2], right[2], True
    lists = any(len(split_list(m[2])) > 1 and "=" in m[2] for m in (left, right) if m)
    if left and not lists and "=" not in answer:
        return left[2], answer, True
    if right and not lists and "=" not in gold:
        return gold, right[2], True
    return gold, answer, True


def _verify(gold: str, answer: str) -> bool:
    """Return math-verify's verdict; numbers that it would round first are compared."""
    from math_verify import parse, verify

    left, right = (
        parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (gold, answer)
    )
    if not left or not right:
        return False
    if all(getattr(side[0], "is_number", False) for side in (left, right)):
        same = _same_value(left[0], right[0])
        if same is not None:
            return same
    return bool(verify(left, right, timeout_seconds=None))


def _same_value(left: Expr, right: Expr) -> bool | None:
    """Return whether two sympy numbers agree to 12 digits, None if they have none."""
    if left == right or left.is_infinite or right.is_infinite:
        return bool(left == right)
    values = [side.doit().evalf(30) for side in (left, right)]
    if not all(value.is_Float or value.is_Integer for value in values):
        return None
    return bool(abs(values[0] - values[1]) <= max(map(abs, values)) * 1e-12)


def _is_prose(text: str) -> bool:
    """Return whether an answer is a sentence, such as "It is 5"."""
    words = text.split()
    return len(words) > 2 and bool(re.fullmatch(r"[A-Za-z]{2,}[,:]?", words[0]))


def _from_prose(text: str) -> str:
    """Return what math-verify takes from a sentence as its answer, "" for nothing."""
    from math_verify import parse

    found = parse(text, parsing_timeout=None)
    return found[-1] if found and isinstance(found[-1], str) else ""
