r"""The leak guard: keeps queries of evaluation sets out of the calibration set.

Texts are compared without what does not change a question: case, white space, Unicode
forms of letters and quotation marks, ``$`` and LaTeX spacing. A query leaks if it is a
question of an evaluation set, or holds one of at least 60 such characters, as it does
when an instruction or an example stands around it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rpam_mergekit.errors import RpamError
from rpam_mergekit.questions.benchmarks import PRESETS
from rpam_mergekit.questions.load import QUESTION_COLUMNS, load_questions
from rpam_mergekit.questions.rows import Dataset, read_lines

_ANCHOR = 60
_NOISE = re.compile(
    r"\\(?:left|right|displaystyle|quad|qquad)(?![a-z])|\\[,;:! ]|\*\*|[\s$~]"
)
_SAME = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "`": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2212": "-",
    }
)
_ENDING = re.compile(r"[.?!:]+$")


def normalized(text: str) -> str:
    """Return `text` without what does not change a question."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    return _ENDING.sub("", _NOISE.sub("", text.translate(_SAME)))


class LeakGuard:
    """Knows the questions of evaluation sets.

    counts: questions per set; found: how many queries leaked, per set.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.found: dict[str, int] = {}
        self._whole: dict[str, str] = {}
        self._anchored: dict[str, list[tuple[str, str]]] = {}

    def add(self, name: str, questions: Iterable[str]) -> None:
        """Take in the questions of one evaluation set."""
        for question in questions:
            text = normalized(question)
            if not text:
                continue
            self.counts[name] = self.counts.get(name, 0) + 1
            self._whole.setdefault(text, name)
            if len(text) >= _ANCHOR:
                self._anchored.setdefault(text[:_ANCHOR], []).append((text, name))

    def leak(self, *texts: str) -> str | None:
        """Return the set in which one of a query's `texts` stands, and count it."""
        for text in map(normalized, texts):
            name = self._whole.get(text) or self._held(text)
            if name is not None:
                self.found[name] = self.found.get(name, 0) + 1
                return name
        return None

    def _held(self, text: str) -> str | None:
        for start in range(len(text) - _ANCHOR + 1):
            for question, name in self._anchored.get(text[start : start + _ANCHOR], ()):
                if text.startswith(question, start):
                    return name
        return None


def read_guard(sources: Iterable[str]) -> LeakGuard:
    """Return a guard that knows JSONL files and presets (their evaluation splits).

    Raises `RpamError` for a source that cannot be read or holds no question.
    """
    guard = LeakGuard()
    for source in dict.fromkeys(sources):
        if source in PRESETS and not Path(source).exists():
            split = PRESETS[source].evaluation
            loaded = load_questions(Dataset(source, split=split))
            guard.add(source, (q.question for q in loaded.questions))
            continue
        rows, lines = read_lines(Path(source), "--exclude")
        texts = [_question(row) for row in rows]
        bad = [n for n, text in zip(lines, texts, strict=True) if text is None]
        if bad:
            raise RpamError(
                f"{source}:{bad[0]}: no question: expected one of the fields "
                f"{', '.join(QUESTION_COLUMNS)} or 'messages'."
            )
        guard.add(source, (text for text in texts if text is not None))
        if source not in guard.counts:
            raise RpamError(f"--exclude: {source} holds no question.")
    return guard


def _question(row: Mapping[str, Any]) -> str | None:
    for name in QUESTION_COLUMNS:
        text = row.get(name)
        if isinstance(text, str) and text.strip():
            return text
    messages = row.get("messages")
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
        content = messages[-1].get("content")
        return content if isinstance(content, str) else None
    return None
