r"""Benchmarks whose rows need a reading of their own; each shows its raw row.

The split is the training one where there is one (for calibration), else the only one
there is: a benchmark to evaluate on, from which no query should be calibrated on.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rpam_mergekit.grading.answers import LETTERS, Gold
from rpam_mergekit.grading.latex import split_list
from rpam_mergekit.grading.responses import boxed
from rpam_mergekit.grading.units import Unit
from rpam_mergekit.questions.rows import UnusableRow, gold_text

MATH = "Please reason step by step, and put your final answer within \\boxed{}."
CHOICE = (
    "Please reason step by step, and put the letter of the right choice within "
    "\\boxed{}."
)
Row = Mapping[str, Any]
Read = tuple[str, Gold, dict[str, Any]]
Reader = Callable[[Row, int], Read]


@dataclass(frozen=True)
class Preset:
    """Where a benchmark lies on the Hub, and how its rows are read.

    split: the default one; evaluation: the split that others evaluate on.
    """

    name: str
    path: str
    configs: tuple[str | None, ...]
    split: str
    evaluation: str
    read: Reader
    instruction: str = MATH


PRESETS: dict[str, Preset] = {}


def _preset(
    name: str,
    path: str,
    *configs: str,
    split: str,
    evaluation: str,
    instruction: str = MATH,
) -> Callable[[Reader], Reader]:
    def register(read: Reader) -> Reader:
        PRESETS[name] = Preset(
            name, path, configs or (None,), split, evaluation, read, instruction
        )
        return read

    return register


@_preset("gsm8k", "openai/gsm8k", "main", split="train", evaluation="test")
def gsm8k(row: Row, index: int) -> Read:
    """Read a row whose answer is a rationale that ends in ``#### N``::

    {"question": "A robe takes 2 bolts of blue fiber and half that ...",
     "answer": "It takes 2/2=<<2/2=1>>1 bolt ...\\n#### 3"}
    """
    _, found, answer = _text(row, "answer").rpartition("####")
    if not found or not answer.strip():
        raise UnusableRow("answer: no '#### N' at its end.")
    return _text(row, "question"), _gold(answer), {}


@_preset(
    "math",
    "EleutherAI/hendrycks_math",
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
    split="train",
    evaluation="test",
)
def math(row: Row, index: int) -> Read:
    r"""Read a row whose answer is the last box of its solution::

    {"problem": "Let \\[f(x) = ...", "level": "Level 5", "type": "Algebra",
     "solution": "For the piecewise function ... $\\boxed{0}$."}
    """
    return _text(row, "problem"), _gold(_box(row)), _kept(row, "level", "type")


@_preset("math500", "HuggingFaceH4/MATH-500", split="test", evaluation="test")
def math500(row: Row, index: int) -> Read:
    r"""Read a row of the 500 held-out problems of MATH::

    {"problem": "Convert the point $(0,3)$ ...", "solution": "We have that ...",
     "answer": "\\left( 3, \\frac{\\pi}{2} \\right)", "subject": "Precalculus",
     "level": 2, "unique_id": "test/precalculus/807.json"}
    """
    kept = _kept(row, "subject", "level", "unique_id")
    return _text(row, "problem"), _gold(_text(row, "answer")), kept


@_preset("minerva", "svc-huggingface/minerva-math", split="test", evaluation="test")
def minerva(row: Row, index: int) -> Read:
    r"""Read a row whose answer is boxed, its unit often beside the box::

    {"problem": "Each of the two Magellan telescopes ...",
     "solution": "Start with: ... =\\boxed{1.6} \\mathrm{~cm}\n\\]",
     "type": "Introduction to Astronomy (8.282J Spring 2006)", "idx": 0}

    Decimal answers are rounded physical values: 1 % off is right.
    """
    solution = _text(row, "solution")
    answer = _box(row)
    after = solution[solution.rindex("\\boxed") :].partition(answer + "}")[2]
    gold = Gold(values=(answer,), unit=_unit_after(after), relative_tolerance=0.01)
    return _text(row, "problem"), gold, _kept(row, "type", "idx")


@_preset(
    "olympiadbench",
    "Hothan/OlympiadBench",
    "OE_TO_maths_en_COMP",
    split="train",
    evaluation="train",
)
def olympiadbench(row: Row, index: int) -> Read:
    r"""Read a row with one or several answers, a unit and a tolerance::

    {"id": 1606, "subfield": "Combinatorics", "context": null,
     "question": "Xenia and Sergey play ...", "solution": ["Sergey can ..."],
     "final_answer": ["$69$,$84$"], "is_multiple_answer": true, "unit": null,
     "answer_type": "Numerical", "error": null}

    Several answers stand in one text, separated by commas. `error` is the tolerance.
    """
    question = _text(row, "question")
    if row.get("context"):
        question = f"{row['context']}\n\n{question}"
    answers = row.get("final_answer")
    if not isinstance(answers, (list, tuple)) or not answers:
        raise UnusableRow(f"final_answer: found {answers!r}, expected a list.")
    values = [str(answer) for answer in answers]
    if row.get("is_multiple_answer") and len(values) == 1:
        values = [v.strip(" $") for v in split_list(_without_inner_dollars(values[0]))]
    error = row.get("error")
    try:
        tolerance = float(str(error).split(",")[0]) if error else None
    except ValueError:
        tolerance = None
    gold = Gold(values=tuple(values), unit=row.get("unit") or None, tolerance=tolerance)
    return question, gold, _kept(row, "id", "subfield", "answer_type")


@_preset("aime24", "HuggingFaceH4/aime_2024", split="train", evaluation="train")
def aime24(row: Row, index: int) -> Read:
    r"""Read a row whose answer is a number from 000 to 999::

    {"id": 60, "problem": "Every morning Aya goes for ...", "solution": "...",
     "answer": "204", "url": "https://artofproblemsolving.com/..."}
    """
    return _text(row, "problem"), _gold(row.get("answer")), _kept(row, "id", "url")


@_preset("aime25", "math-ai/aime25", split="test", evaluation="test")
def aime25(row: Row, index: int) -> Read:
    r"""Read a row whose answer is a number from 0 to 999, as text or as number::

    {"problem": "Find the sum of all integer bases $b>9$ ...", "answer": 70,
     "id": "0"}
    """
    return _text(row, "problem"), _gold(row.get("answer")), _kept(row, "id")


@_preset(
    "gpqa-diamond",
    "Idavidrein/gpqa",
    "gpqa_diamond",
    split="train",
    evaluation="train",
    instruction=CHOICE,
)
def gpqa_diamond(row: Row, index: int) -> Read:
    """Read a multiple-choice row; choices are shuffled by the question's text::

    {"Question": "Two quantum states with energies E1 and E2 ...",
     "Correct Answer": "10^-4 eV", "Incorrect Answer 1": "10^-11 eV",
     "Incorrect Answer 2": "...", "Incorrect Answer 3": "...",
     "Record ID": "rec06pnAkLOr2t2mp", "High-level domain": "Physics"}
    """
    text = _text(row, "Question").strip()
    right = _text(row, "Correct Answer").strip()
    choices = [right]
    choices += [_text(row, f"Incorrect Answer {n}").strip() for n in (1, 2, 3)]
    random.Random(text).shuffle(choices)
    listed = "\n".join(
        f"{letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False)
    )
    gold = Gold(values=(LETTERS[choices.index(right)],), choices=tuple(choices))
    return f"{text}\n\n{listed}", gold, _kept(row, "Record ID", "High-level domain")


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise UnusableRow(f"{name}: found {value!r}, expected a text.")
    return value


def _box(row: Row) -> str:
    boxes = boxed(_text(row, "solution"))
    if not boxes or not boxes[-1].strip():
        raise UnusableRow("solution: holds no \\boxed{} answer.")
    return boxes[-1].strip()


def _gold(answer: Any) -> Gold:
    if answer is None or not str(answer).strip():
        raise UnusableRow(f"answer: found {answer!r}, expected an answer.")
    return Gold(values=(gold_text(str(answer)),))


def _kept(row: Row, *names: str) -> dict[str, Any]:
    return {name: row[name] for name in names if row.get(name) is not None}


def _without_inner_dollars(text: str) -> str:
    return text.replace("$", "")


_AFTER = re.compile(
    r"\s*((?:\\text|\\mathrm|\\rm)?\s*\{[^{}]*\}|\\%|[A-Za-z]+)[^,;.\n=]*"
)


def _unit_after(text: str) -> str | None:
    """Return the unit that follows a box, if pint knows it."""
    match = _AFTER.match(text)
    if not match:
        return None
    unit = Unit.named(re.split(r"\\\]|\$|\\quad|\\\\", match.group())[0])
    return unit.name if unit and unit.expression else None
