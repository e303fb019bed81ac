"""What a response says: its thinking, and the final answer after it.

A response is the text that follows the generation prompt. Some chat templates end that
prompt with an opened thinking block; the response then starts inside it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

NONE, CLOSED, OPEN, WRONG = "none", "closed", "open", "wrong"
# Tags that models were seen to close their thinking with, alone on a line.
_OTHER_TAGS = re.compile(
    r"^[ \t]*(?:</?(?:tool_call|tool_response|think|thinking|reasoning)>"
    r"|<\|[a-z_]+\|>)[ \t]*$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Markers:
    """How a model opens and closes its thinking."""

    open: str = "<think>"
    close: str = "</think>"


@dataclass(frozen=True)
class Thinking:
    """How a response thinks, and what it says once it has thought.

    state: `none` (answers at once); `closed` (opened once, closed once by the right
        marker); `wrong` (closed by another token, or more than once); `open` (never
        closed).
    final: the text after the thinking; None where there is none.
    """

    state: str
    final: str | None

    @property
    def thinks(self) -> bool:
        return self.state != NONE


def thinking(
    text: str, markers: Markers, opened_by_prompt: bool | None = None
) -> Thinking:
    """Return how `text` thinks.

    `opened_by_prompt` says whether the prompt has already opened the thinking; None
    means that it is not known, and that a closing marker without an opening one is
    taken as a sign of it.
    """
    opens, closes = text.count(markers.open), text.count(markers.close)
    before, found, after = text.rpartition(markers.close)
    if found:
        opened = markers.open in before or (not opens and opened_by_prompt is not False)
        return Thinking(CLOSED if closes == 1 >= opens and opened else WRONG, after)
    if not opens and not opened_by_prompt:
        return Thinking(NONE, text)
    thought = text.partition(markers.open)[2] if opens else text
    wrong = _OTHER_TAGS.search(thought)
    if wrong:
        return Thinking(WRONG, thought[wrong.end() :])
    return Thinking(OPEN, None)


_BRACES = re.compile(r"\\(?:boxed|fbox)\s*(\{|[^\s{])|\\.|[{}]", re.DOTALL)


def boxed(text: str) -> list[str]:
    r"""Return the contents of every ``\boxed{...}`` and ``\fbox{...}``, in order.

    Braces are counted, escaped ones left out; a box that is never closed is dropped,
    and a box inside a box is part of the outer one. Time is linear in the text.
    """
    found: list[tuple[int, str]] = []
    opened: list[int | None] = []  # of every open brace: where its box's content starts
    for match in _BRACES.finditer(text):
        token = match.group()
        if match.group(1):
            if match.group(1) == "{":
                opened.append(match.end())
            else:  # \boxed 5
                found.append((match.start(1), match.group(1)))
        elif token == "{":
            opened.append(None)
        elif token == "}" and opened:
            start = opened.pop()
            if start is not None:
                while found and found[-1][0] >= start:
                    found.pop()
                found.append((start, text[start : match.start()]))
    return [content for _, content in found]


_ANSWER_TAG = re.compile(r"</?answer>")
_HASHES = re.compile(r"^[ \t]*####[ \t]*(\S.*?)[ \t]*$", re.MULTILINE)
_PHRASE = re.compile(
    r"(?:final\s+answer|the\s+(?:correct\s+)?answer|^\W*answer)"
    r"\s*(?:is|are|:|=)[\s:]*(?:\*\*)?[ \t]*(\S.*?)[ \t]*$",
    re.IGNORECASE | re.MULTILINE,
)


def final_answers(response: Thinking, text: str) -> list[str]:
    r"""Return what `response` gives as its answer, the last one last.

    The boxes after its thinking; else the last line ``#### ...``; else the last phrase
    "the answer is ..."; else the last line that is not empty. Thinking that was never
    closed counts only by its boxes. An empty list means that nothing was answered.
    """
    if response.final is None:
        return boxed(text)
    final = _ANSWER_TAG.sub("\n", response.final).strip()
    if boxes := boxed(final):
        return boxes
    if hashes := _HASHES.findall(final):
        return hashes[-1:]
    if phrases := _PHRASE.findall(final):
        return [_trim(phrases[-1])]
    lines = [line for line in final.splitlines() if line.strip()]
    return [_trim(lines[-1])] if lines else []


def _trim(text: str) -> str:
    return text.strip().strip("*").removesuffix(".").strip().strip("*").strip()
