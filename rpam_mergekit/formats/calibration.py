"""The calibration file: queries labelled with the pattern that suits them.

JSON Lines, one query a line::

    {"prompt": "7+5*3=", "pattern": "short", "response": "6"}
    {"messages": [{"role": "user", "content": "..."}], "pattern": "long"}

`prompt` (one user turn) or `messages`; `pattern` names the reasoning pattern whose
model is the positive one (paper section 3, step 1); `response` is a correct response
of that model, optional. The other fields record where a label comes from.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rpam_mergekit.errors import RpamError, suggestion
from rpam_mergekit.formats.hub_path import local_path

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

PATTERNS = ("long", "short")
MOST_FINDINGS = 20


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(frozen=True, extra="allow")

    role: str
    content: str


class CalibrationQuery(BaseModel):
    """One line of the calibration file; further fields are kept and ignored."""

    model_config = ConfigDict(frozen=True, extra="allow")

    prompt: str | None = Field(None, min_length=1)
    messages: tuple[Message, ...] | None = Field(None, min_length=1)
    pattern: str
    response: str | None = Field(None, min_length=1)
    answer: str | None = None
    long_accuracy: float | None = Field(None, ge=0, le=1)
    short_accuracy: float | None = Field(None, ge=0, le=1)
    long_tokens: float | None = Field(None, ge=0)
    short_tokens: float | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _prompt_or_messages(self) -> CalibrationQuery:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give exactly one of 'prompt' and 'messages'")
        return self

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """The turns before the response, as chat templates take them."""
        if self.messages is not None:
            return [message.model_dump() for message in self.messages]
        return [{"role": "user", "content": self.prompt}]


class CalibrationSet(BaseModel):
    """A calibration file that has been read: its queries in file order, its digest."""

    model_config = ConfigDict(frozen=True)

    path: str
    digest: str
    queries: tuple[CalibrationQuery, ...]
    lines: tuple[int, ...]


def read_calibration(
    path: str | Path, patterns: Sequence[str] | None = PATTERNS
) -> CalibrationSet:
    """Return the queries of a calibration file and the SHA-256 digest of its bytes.

    `path` may be a file of the Hub, see `hub`; findings show it as it was given.
    Raises `RpamError`, with a finding for every bad line as ``path:line: field:
    problem`` (at most 20), if the file is missing, not UTF-8, empty, malformed, or
    does not hold every one of `patterns`, or others; None takes any.
    """
    try:
        content = local_path(str(path), "parameters.calibration").read_bytes()
    except FileNotFoundError:
        raise RpamError(
            f"parameters.calibration: no file {path} (looked for "
            f"{Path(path).absolute()}). Paths are relative to the folder the command "
            "runs in."
        ) from None
    except OSError as error:
        raise RpamError(
            f"parameters.calibration: cannot read {path}: {error}"
        ) from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content[: error.start].count(b"\n") + 1
        raise RpamError(f"{path}:{number}: not UTF-8 text: {error.reason}") from None
    queries, lines, findings = [], [], []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            queries.append(_parse_line(line, patterns))
            lines.append(number)
        except _BadLine as bad:
            findings += [f"{path}:{number}: {problem}" for problem in bad.problems]
    if len(findings) > MOST_FINDINGS:
        more = len(findings) - MOST_FINDINGS
        findings = [*findings[:MOST_FINDINGS], f"{path}: {more} more problems."]
    if not findings and not queries:
        findings = [
            f"{path}: the calibration file is empty. It needs queries of the patterns "
            f"{' and '.join(patterns or PATTERNS)}, one JSON object a line."
        ]
    elif not findings and patterns is not None:
        findings = _missing_patterns(path, queries, patterns)
    if findings:
        raise RpamError(*findings)
    return CalibrationSet(
        path=str(path),
        digest=hashlib.sha256(content).hexdigest(),
        queries=tuple(queries),
        lines=tuple(lines),
    )


def draw_queries(
    calibration: CalibrationSet, usable: Sequence[bool], per_pattern: int, seed: int
) -> list[int]:
    """Return the indices of the queries to calibrate on, in file order.

    Of every pattern's usable queries, `per_pattern` are drawn with a generator of
    their own seeded by `seed`; all of them where there are no more than that.
    """
    chosen: list[int] = []
    for pattern in dict.fromkeys(q.pattern for q in calibration.queries):
        of_pattern = [
            i
            for i, query in enumerate(calibration.queries)
            if query.pattern == pattern and usable[i]
        ]
        if len(of_pattern) > per_pattern:
            generator = random.Random(f"{seed}/{pattern}")
            of_pattern = generator.sample(of_pattern, per_pattern)
        chosen += of_pattern
    return sorted(chosen)


class _BadLine(Exception):
    def __init__(self, *problems: str) -> None:
        self.problems = problems


def _parse_line(line: str, patterns: Sequence[str] | None) -> CalibrationQuery:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise _BadLine(f"not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(record, dict):
        raise _BadLine(f"found a JSON {type(record).__name__}, expected an object")
    try:
        query = CalibrationQuery.model_validate(record)
    except ValidationError as error:
        raise _BadLine(*(_problem(e, record) for e in error.errors())) from None
    misspelt = [
        f"{key}: unknown key. Did you mean '{near[0]}'?"
        for key, value in record.items()
        if key not in CalibrationQuery.model_fields and isinstance(value, str)
        for near in [difflib.get_close_matches(key, _lacking(record), cutoff=0.85)]
        if near
    ]
    if misspelt:
        raise _BadLine(*misspelt)
    if patterns is not None and query.pattern not in patterns:
        hint = suggestion(query.pattern, patterns)
        raise _BadLine(f"pattern: found {query.pattern!r}.{hint}")
    return query


def _problem(error: ErrorDetails, record: dict[str, Any]) -> str:
    field = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        near = suggestion(field, set(record) - set(CalibrationQuery.model_fields))
        return f"{field}: missing.{near if 'Did' in near else ''}"
    message = error["msg"].removeprefix("Value error, ")
    if not field:
        return message + _near(record)
    return f"{field}: found {error['input']!r}. {message}"


def _lacking(record: dict[str, Any]) -> list[str]:
    """Return the fields of a query that a line has not."""
    return [name for name in CalibrationQuery.model_fields if name not in record]


def _near(record: dict[str, Any]) -> str:
    """Return a hint if a line has a key that may be meant for prompt or messages."""
    for key in record:
        if key not in CalibrationQuery.model_fields:
            near = difflib.get_close_matches(key, ("prompt", "messages"), n=1)
            if near:
                return f". Did you mean '{near[0]}' by '{key}'?"
    return ""


def _missing_patterns(
    path: str | Path, queries: Sequence[CalibrationQuery], patterns: Sequence[str]
) -> list[str]:
    counts = {p: sum(q.pattern == p for q in queries) for p in patterns}
    found = ", ".join(f"{count} {pattern}" for pattern, count in counts.items())
    return [
        f"{path}: no query has the pattern '{pattern}' (found: {found}). The merge "
        "learns where to reason from queries of every pattern."
        for pattern, count in counts.items()
        if not count
    ]
