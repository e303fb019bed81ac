"""The one error that users see: what was found, what was expected, what to do next."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")
# In a URL; in a header that somebody echoes; keys by their usual look.
_SECRETS = (
    (re.compile(r"(?<=://)[^/@\s'\"]+@"), "***@"),
    (re.compile(r"\b(Bearer|Basic)(\s+|%20)[\w.~+/=-]+", re.IGNORECASE), r"\1\2***"),
    (re.compile(r"\b(?:sk|hf|gsk|xai)[-_][\w-]{8,}"), "***"),
)


class RpamError(Exception):
    """A refusal that lists all of its findings at once.

    findings: one text for each thing that is wrong. Its text is all of them as the
    commands print them, with `rpam: ` in front.
    """

    def __init__(self, *findings: str) -> None:
        self.findings = findings
        lines = [line.rstrip() for line in findings]
        if len(lines) > 1:
            lines = [f"{n}. {line}" for n, line in enumerate(lines, 1)]
            lines.insert(0, f"{len(findings)} problems:")
        super().__init__("rpam: " + "\n".join(lines))

    def __reduce__(self) -> tuple[type[RpamError], tuple[str, ...]]:
        """Keep the findings where the error goes from one process to another."""
        return type(self), self.findings


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?", or the known names when none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f" Did you mean '{near[0]}'?"
    return f" Known: {', '.join(known)}."


def refuse(findings: Sequence[str]) -> None:
    """Raise `RpamError` if there is any finding."""
    if findings:
        raise RpamError(*findings)


def collect(findings: list[str], read: Callable[[], T]) -> T | None:
    """Return what `read` returns; add its findings and return None if it refuses."""
    try:
        return read()
    except RpamError as error:
        findings += error.findings
        return None


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the error's name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def masked(text: str, secrets: Iterable[str] = ()) -> str:
    """Return a text without passwords and keys, which stand as ``***``.

    `secrets` are those that are known; others are found by what stands around them.
    """
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        plain = re.escape(secret)  # a short one may be a part of any word
        text = re.sub(plain if len(secret) > 3 else rf"\b{plain}\b", "***", text)
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text
