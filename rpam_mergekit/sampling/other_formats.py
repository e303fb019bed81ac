"""Sample files that other programs write: lm-eval's, and the minimal format.

lm-eval writes one with `--log_samples`. The minimal format is a JSONL with `question`,
`answer` and `responses`, texts or objects with a text and what is known of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rpam_mergekit.errors import RpamError
from rpam_mergekit.grading.answers import Gold
from rpam_mergekit.grading.messages import turn_of
from rpam_mergekit.grading.responses import Markers, finish_of
from rpam_mergekit.questions.load import (
    ANSWER_COLUMNS,
    QUESTION_COLUMNS,
    read_conversation,
    read_gold,
)
from rpam_mergekit.questions.rows import UnusableRow, column_of, read_lines


@dataclass(frozen=True)
class ForeignQuery:
    """A query of another tool's file; `gold` is None where `correct` is given."""

    index: int
    question: str
    messages: tuple[dict[str, str], ...]
    gold: Gold | None
    source: dict[str, Any]
    texts: tuple[str, ...]
    tokens: tuple[int | None, ...]
    finishes: tuple[str | None, ...]
    correct: tuple[bool | None, ...]


def read_foreign(path: str | Path) -> Iterator[ForeignQuery]:
    """Yield the queries of a sample file that is not ours.

    Raises `RpamError` with file, line and field for what cannot be read.
    """
    rows, lines = read_lines(Path(path), str(path))
    if not rows:
        raise RpamError(f"{path}: the file is empty.")
    seen: set[Any] = set()
    for index, (row, line) in enumerate(zip(rows, lines, strict=True)):
        try:
            if "resps" in row and "doc" in row:
                # lm-eval writes a line per filter of its task: one is enough.
                if row.get("doc_id", index) in seen:
                    continue
                seen.add(row.get("doc_id", index))
                yield _lm_eval(row, index, Path(path).name)
            elif "responses" in row:
                yield _minimal(row, index, Path(path).name)
            else:
                raise UnusableRow(
                    "neither a sample of mergekit-rpam, nor of lm-eval ('doc', "
                    "'resps'), nor of the minimal format ('question', 'answer', "
                    "'responses')."
                )
        except UnusableRow as unusable:
            raise RpamError(f"{path}:{line}: {unusable}") from None


def _minimal(row: Mapping[str, Any], index: int, name: str) -> ForeignQuery:
    question, messages = _query(row)
    texts, tokens, finishes, correct = [], [], [], []
    responses = row["responses"]
    if not isinstance(responses, list) or not responses:
        raise UnusableRow(f"responses: found {responses!r}, expected a list of texts.")
    verdicts = _per_response(row, "correct", len(responses))
    counts = _per_response(row, "tokens", len(responses))
    for n, response in enumerate(responses):
        if isinstance(response, str):
            response = {"text": response}
        shared = {"tokens": counts[n], "finish": None, "correct": verdicts[n]}
        response = {**shared, **_mapping(response)}
        _take_message(response)
        if not isinstance(response.get("text"), str):
            raise UnusableRow(f"responses.{n}: expected a text, or an object with one.")
        _check_response(response, n)
        texts.append(response["text"])
        tokens.append(response["tokens"])
        finish = response["finish"]
        finishes.append(None if finish is None else finish_of(finish))
        correct.append(response["correct"])
    known = {key: value for key, value in row.items() if value is not None}
    column = column_of(known, ANSWER_COLUMNS)
    gold = None if column is None else read_gold(row[column], row, column)
    if gold is None and None in correct:
        raise UnusableRow(
            "no 'answer' to grade the responses by, and not every response says "
            "whether it is 'correct'."
        )
    return ForeignQuery(
        index,
        question,
        messages,
        gold,
        {"file": name, **_mapping(row.get("source"))},
        tuple(texts),
        tuple(tokens),
        tuple(finishes),
        tuple(correct),
    )


def _take_message(response: dict[str, Any]) -> None:
    """Give a response that is a server's message its text, as a whole turn."""
    finish = response.get("finish")
    if "text" not in response and "content" in response:
        reason = finish_of(finish) if isinstance(finish, str) else "stop"
        response["text"], _ = turn_of(response, Markers(), None, reason)


def _check_response(response: Mapping[str, Any], n: int) -> None:
    """Raise `UnusableRow` for a field of the wrong type."""
    kinds = {"tokens": int, "finish": str, "correct": bool}
    for name, kind in kinds.items():
        value = response.get(name)
        if value is not None and not isinstance(value, kind):
            raise UnusableRow(
                f"responses.{n}.{name}: found {value!r}, expected {kind.__name__}."
            )


def _per_response(row: Mapping[str, Any], name: str, count: int) -> Sequence[Any]:
    values = row.get(name)
    if values is None:
        return [None] * count
    if not isinstance(values, list) or len(values) != count:
        raise UnusableRow(f"{name}: expected a list of {count}, one per response.")
    return values


def _lm_eval(row: Mapping[str, Any], index: int, name: str) -> ForeignQuery:
    """Read a sample of lm-eval.

    ``resps`` holds a list per request, with a text per repeat; a generation task has
    one request. The gold is the task's ``target``.
    """
    doc = _mapping(row["doc"])
    texts: list[str] = []
    for resps in row["resps"]:
        texts += [resps] if isinstance(resps, str) else list(resps)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UnusableRow(
            "resps: expected texts; samples of tasks that compare log-likelihoods "
            "hold no responses."
        )
    question, messages = _query({**doc, **_prompt_of(row)})
    gold = read_gold(row.get("target"), name="target")
    many = (None,) * len(texts)
    source = {"file": name, "doc_id": row.get("doc_id", index)}
    return ForeignQuery(
        index, question, messages, gold, source, tuple(texts), many, many, many
    )


def _prompt_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the conversation that lm-eval sent, where it is one, else nothing.

    ``arguments`` is a list of lists, or an object of objects in newer versions; a chat
    prompt is a list of turns written as JSON. A prompt to which a chat template was
    applied already is of no use: the pre-pass applies one itself.
    """
    arguments = row.get("arguments")
    if isinstance(arguments, Mapping):
        arguments = [list(_mapping(a).values()) for a in arguments.values()]
    try:
        prompt = arguments[0][0]  # type: ignore[index]
        prompt = prompt[0] if isinstance(prompt, list) else prompt
        turns = json.loads(prompt)
        read_conversation(turns)
    except (LookupError, TypeError, ValueError, UnusableRow):
        return {}
    return {"messages": turns}


def _query(row: Mapping[str, Any]) -> tuple[str, tuple[dict[str, str], ...]]:
    texts = {key: value for key, value in row.items() if isinstance(value, str)}
    text = texts.get(column_of(texts, QUESTION_COLUMNS) or "")
    if "messages" in row:
        conversation = read_conversation(row["messages"])
        return text or conversation[-1]["content"], tuple(conversation)
    if not text or not text.strip():
        raise UnusableRow(
            f"no question: expected one of the fields {', '.join(QUESTION_COLUMNS)} "
            "(in letters of any case) or 'messages'."
        )
    return text, ({"role": "user", "content": text},)


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}
