"""What a response says: its thinking, and the final answer after it.

What a model writes is the text that follows the generation prompt. Some chat templates
end that prompt with an opened thinking block; what it writes then starts inside it. How
the whole turn is made of both, and read, says `openings`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

NONE, CLOSED, OPEN, WRONG = "none", "closed", "open", "wrong"
ANSWERED = "answered"  # in a block that the prompt has opened, and not closed
THINKING = frozenset((CLOSED, OPEN, WRONG))
_MOST_DIRECT = 200  # characters of a text that is plainly an answer, not a thought
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
        closed); `answered` (answers at once in the block that the prompt has opened).
    final: the text after the thinking; None where there is none.
    """

    state: str
    final: str | None

    @property
    def thinks(self) -> bool:
        return self.state in THINKING


def thinking(
    text: str,
    markers: Markers,
    opened_by_prompt: bool | None = None,
    ended: bool = False,
) -> Thinking:
    """Return how `text`, which follows the prompt, thinks.

    `opened_by_prompt` says whether the prompt has already opened the thinking; None
    means that it is not known, and that a closing marker without an opening one is
    taken as a sign of it. `ended` says that no limit has cut the text off. Then a
    short text, in a block that the prompt has opened, is all that the model has to
    say: an answer. A longer text that never closes the block is a thought.
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
    if ended and not opens and 0 < len(text.strip()) <= _MOST_DIRECT:
        return Thinking(ANSWERED, text)
    return Thinking(OPEN, None)


def thought_of(text: str, markers: Markers) -> str:
    """Return what a whole turn says between its opening and its last closing marker."""
    before, closed, _ = text.rpartition(markers.close)
    return (before if closed else text).partition(markers.open)[2].strip()


# Tokens that end the turns of published models; a server may leave them in a text.
END_TOKENS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "<|return|>",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001
    "<end_of_turn>",
    "<turn|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|END_RESPONSE|>",
    "<|endofturn|>",
    "[|endofturn|]",
    "<|role_end|>",
    "<|user|>",
    "<|observation|>",
    "<end_of_utterance>",
    "<seed:eos>",
    "<|eos|>",
    "<eos>",
    "[EOS]",
    "[e~[",
    "</s>",
)
# Finish reasons in the words of other APIs: of TGI, Anthropic and Gemini.
_FINISHES = {
    "eos": "stop",
    "eos_token": "stop",
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "max_length": "length",
    "model_length": "length",
}


def without_end(text: str, markers: Markers, ends: Collection[str] = ()) -> str:
    """Return a response without the end tokens that it still ends in.

    `ends` are the model's own, beside those that are known. A marker that closes
    thinking is none.
    """
    known = [end for end in (*ends, *END_TOKENS) if end and end != markers.close]
    while True:
        left = text.rstrip()
        end = next((end for end in known if left.endswith(end)), None)
        if end is None:
            return text
        text = left[: -len(end)]


def finish_of(reason: str) -> str:
    """Return a finish reason as OpenAI's protocol has it, where it means the same."""
    plain = reason.strip().lower()
    return _FINISHES.get(plain, plain)


def has_ended(finish: str | None) -> bool:
    """Tell whether a response ended by itself, as far as is known.

    One that was cut off (``length``), stopped by the server (``abort``, ``error``), by
    a filter or for a tool has not answered.
    """
    return finish in (None, "stop")


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


# What stands around an answer; the second opens gpt-oss's channel for it.
_ANSWER_TAG = re.compile(
    r"</?answer>|(?:<\|start\|>assistant)?<\|channel\|>final<\|message\|>"
)
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
