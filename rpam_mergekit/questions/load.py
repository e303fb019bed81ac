"""The queries of a data set, with their gold answers.

A JSONL file, one query a line::

    {"question": "What is 7 + 5?", "answer": "12"}
    {"messages": [{"role": "user", "content": "..."}], "answer": ["-1", "2"]}

or a data set of the Hugging Face Hub, through `datasets`; benchmarks have presets
(`benchmarks.py`). An `answer` may be a number, a text, or a list of values that are all
needed; of a text with a rationale, what follows ``####`` or stands in the last
``\\boxed{}`` is the answer. `choices` makes it a multiple-choice query, whose answer is
a letter; `unit`, `tolerance` and `relative_tolerance` say how numbers compare.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from rpam_mergekit.errors import RpamError, refuse, suggestion
from rpam_mergekit.grading.answers import LETTERS, Gold
from rpam_mergekit.questions.benchmarks import PRESETS, Preset
from rpam_mergekit.questions.rows import (
    MOST_FINDINGS,
    Dataset,
    UnusableRow,
    column_of,
    gold_text,
    read_rows,
)

QUESTION_COLUMNS = ("question", "problem", "prompt", "instruction", "query")
ANSWER_COLUMNS = ("answer", "gold", "target")


class Question(BaseModel):
    """A query as it is put to a model.

    index: its row in the data set, from 0; question: its text without instructions;
    messages: the conversation to answer; source: where it comes from, and further
    fields of its row.
    """

    model_config = ConfigDict(frozen=True)

    index: int
    question: str
    messages: tuple[dict[str, str], ...]
    gold: Gold
    source: dict[str, Any] = {}


@dataclass(frozen=True)
class QuestionSet:
    """Queries in the order in which they are asked.

    description: what tells this set from others, for the header of sample files, with
    the SHA-256 digest of all its queries; notes: what was left out.
    """

    questions: tuple[Question, ...]
    description: dict[str, Any]
    notes: tuple[str, ...] = field(default=())


def load_questions(
    dataset: Dataset,
    *,
    system: str | None = None,
    instruction: str | None = None,
    shuffle: int | None = None,
) -> QuestionSet:
    """Return the queries of `dataset`, ready to be put to a model.

    `instruction` follows each question after an empty line (None: the preset's, "" for
    none), `system` is the first message; with `shuffle` the order is random with that
    seed. Raises `RpamError` if the data set cannot be read, or, with a finding for
    every bad line (at most 20), if it is malformed.
    """
    preset = _preset_of(dataset)
    if instruction is None:
        instruction = preset.instruction if preset else ""
    rows, where = read_rows(dataset, preset, PRESETS)
    name = _name(dataset)
    questions: list[Question] = []
    problems: list[str] = []
    for index, row in enumerate(rows):
        try:
            text, gold, source, conversation = _read(row, index, dataset, preset)
        except UnusableRow as unusable:
            problems.append(f"{where(index)}: {unusable}")
            continue
        questions.append(
            Question(
                index=index,
                question=text,
                messages=_messages(text, conversation, system, instruction),
                gold=gold,
                source={"dataset": name, "row": index, **source},
            )
        )
    notes = _left_out(problems, preset is not None and bool(questions))
    if not questions:
        raise RpamError(f"--dataset: {dataset.name} holds no queries.")
    digest = hashlib.sha256()
    for question in questions:
        digest.update(question.model_dump_json(exclude={"source"}).encode())
    if shuffle is not None:
        random.Random(f"questions/{shuffle}").shuffle(questions)
    description = {
        "name": name,
        "preset": preset.name if preset else None,
        "config": dataset.config,
        "split": dataset.split or (preset.split if preset else None),
        "revision": dataset.revision,
        "system": system,
        "instruction": instruction,
        "shuffle": shuffle,
        "digest": digest.hexdigest(),
    }
    return QuestionSet(tuple(questions), description, notes)


def _left_out(problems: list[str], tolerated: bool) -> tuple[str, ...]:
    """Return a note on rows that are left out; refuse them unless they are `tolerated`.

    Benchmarks have rows that are no questions; a file of the user's should have none.
    """
    if problems and tolerated:
        return (f"{len(problems)} rows were left out; the first: {problems[0]}",)
    if len(problems) > MOST_FINDINGS:
        more = len(problems) - MOST_FINDINGS
        problems = [*problems[:MOST_FINDINGS], f"{more} more problems."]
    refuse(problems)
    return ()


def _preset_of(dataset: Dataset) -> Preset | None:
    """Return the preset that a data set names or is called by; None: it has none."""
    name = dataset.preset or (dataset.name if dataset.name in PRESETS else None)
    if name is not None and name not in PRESETS:
        raise RpamError(
            f"--preset: unknown preset '{name}'.{suggestion(name, PRESETS)}"
        )
    return PRESETS[name] if name else None


def _name(dataset: Dataset) -> str:
    """Return what a data set is called; of a file, whose folder may move, its name."""
    path = Path(dataset.name)
    return path.name if path.exists() else dataset.name


def _read(
    row: dict[str, Any], index: int, dataset: Dataset, preset: Preset | None
) -> tuple[str, Gold, dict[str, Any], list[dict[str, str]] | None]:
    """Return a row's question, answer, other fields, and conversation if it has one.

    Raises `UnusableRow`.
    """
    if preset is None:
        return _read_row(row, dataset)
    text, gold, source = preset.read(row, index)
    return text, gold, source, None


def _messages(
    text: str,
    conversation: list[dict[str, str]] | None,
    system: str | None,
    instruction: str,
) -> tuple[dict[str, str], ...]:
    turns = list(conversation or [{"role": "user", "content": text}])
    if instruction:
        last = turns[-1]
        turns[-1] = {**last, "content": f"{last['content']}\n\n{instruction}"}
    if system:
        turns.insert(0, {"role": "system", "content": system})
    return tuple(turns)


def _read_row(
    row: Mapping[str, Any], dataset: Dataset
) -> tuple[str, Gold, dict[str, Any], list[dict[str, str]] | None]:
    conversation = None
    if "messages" in row and dataset.question_column is None:
        conversation = read_conversation(row["messages"])
        text, name = conversation[-1]["content"], "messages"
    else:
        name = _column(row, dataset.question_column, QUESTION_COLUMNS, "question")
        text = row[name]
        if not isinstance(text, str) or not text.strip():
            raise UnusableRow(f"{name}: found {text!r}, expected a text.")
    answer = _column(row, dataset.answer_column, ANSWER_COLUMNS, "answer")
    gold = read_gold(row[answer], row, answer)
    used = {name, answer, *Gold.model_fields}
    source = {k: v for k, v in row.items() if k not in used and _is_small(v)}
    return text, gold, source, conversation


def _column(
    row: Mapping[str, Any], named: str | None, usual: Iterable[str], what: str
) -> str:
    if named is None:
        found = column_of(row, usual)
        if found is None:
            raise UnusableRow(
                f"no {what}: expected a field {', '.join(usual)}; found "
                f"{', '.join(row) or 'nothing'}. --{what}-column names another."
            )
        return found
    if named not in row:
        raise UnusableRow(f"--{what}-column: no '{named}'.{suggestion(named, row)}")
    return named


def read_conversation(messages: Any) -> list[dict[str, str]]:
    if isinstance(messages, list):
        messages = [_in_one_piece(message) for message in messages]
    good = isinstance(messages, list) and messages
    if not good or not all(
        isinstance(m, Mapping)
        and isinstance(m.get("role"), str)
        and isinstance(m.get("content"), str)
        for m in messages
    ):
        raise UnusableRow(
            "messages: expected a list of objects with 'role' and 'content'."
        )
    if messages[-1]["role"] != "user":
        raise UnusableRow(
            f"messages: the last turn is of '{messages[-1]['role']}', expected 'user'."
        )
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def _in_one_piece(message: Any) -> Any:
    """Return a turn whose content is one text where it was a list of texts."""
    parts = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(parts, list) or not parts:
        return message
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        return message
    return {**message, "content": "".join(map(str, texts))}


def read_gold(
    answer: Any, row: Mapping[str, Any] | None = None, name: str = "answer"
) -> Gold:
    """Return the gold answer that a field holds; `row` may say how it compares.

    Raises `UnusableRow` if it holds none.
    """
    row = row or {}
    values = answer if isinstance(answer, (list, tuple)) else [answer]
    texts = [gold_text(str(value)) for value in values if value is not None]
    if not texts or not all(texts):
        raise UnusableRow(f"{name}: found {answer!r}, expected an answer.")
    how = {k: row[k] for k in ("unit", "tolerance", "relative_tolerance") if k in row}
    choices = row.get("choices") or ()
    if choices:
        if not all(isinstance(c, str) for c in choices) or len(choices) > len(LETTERS):
            raise UnusableRow("choices: expected a list of texts.")
        letters = LETTERS[: len(choices)]
        if len(texts) != 1 or texts[0] not in letters:
            raise UnusableRow(
                f"{name}: found {answer!r}, expected one of the letters "
                f"{letters[0]} to {letters[-1]}."
            )
    try:
        return Gold(values=tuple(texts), choices=tuple(choices), **how)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UnusableRow(
            f"{place}: found {first['input']!r}. {first['msg']}"
        ) from None


def _is_small(value: Any) -> bool:
    return isinstance(value, (int, float)) or (
        isinstance(value, str) and len(value) <= 200
    )
