"""What a server's chat message says, put back into one text: the model's whole turn.

Servers that parse reasoning split a turn into thinking and answer, each in its own way:

* a field beside `content`: `reasoning_content` (SGLang, llama.cpp, DeepSeek, LM Studio,
  transformers, vLLM up to 0.11), `reasoning` (vLLM, Ollama, OpenRouter) or `thinking`;
* `content` as a list of parts, each with its type (Mistral, LiteLLM).

Many parsers take a turn without a closing marker for thinking as a whole, also where it
is an answer that was given at once (vllm-project/vllm#13125). What they leave behind,
thinking without content, is read by what is known of how it came about.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rpam_mergekit.grading.brackets import KNOWN, usual_opening
from rpam_mergekit.grading.responses import Markers

# The first that is not empty counts: some servers send the same under two names.
REASONING_FIELDS = (
    "reasoning_content",
    "reasoning",
    "thinking",
    "reasoning_text",
    "reasoning_details",
    "thinking_blocks",
)
_INNER = ("text", "thinking", "reasoning", "content", "summary", "output_text")
_SAID, _THOUGHT = "said", "thought"

# How a turn was made whole, beside "" where there was nothing to do.
JOINED = "joined"  # thinking and answer were put together
DIRECT = "direct"  # "thinking" without an answer, taken for the answer itself
UNANSWERED = "unanswered"  # thinking without an answer, left as that

ECHO = "echo"  # the prompt stood before it
REPEATS = "repeats"  # the prompt is in it, in other words or in another place
_ROLE = (
    r"(?:(?:^|[\n>|])[ \t]*(?:user|human)\b|\[INST\]|<｜User｜>)"  # noqa: RUF001
    r"[^\w\n]{0,24}\s*"
)
_SURELY_REPEATED = 16  # characters; "7+5=" may well begin an answer

Count = Callable[[str], int]


def turn_of(
    message: Mapping[str, Any],
    markers: Markers,
    opening: str | None,
    finish: str,
    tokens: int | None = None,
    count: Count | None = None,
) -> tuple[str, str]:
    """Return the text of a message as the model wrote it, and how it was made whole.

    `opening` is the text by which its prompt opened the thinking, None if that is not
    known; `finish` the finish reason; `tokens` how many the server has generated, and
    `count` counts those of a text: together they tell whether a marker was among them.
    """
    pieces = _pieces(message)
    thoughts = [text for kind, text in pieces if kind == _THOUGHT]
    content = "".join(text for kind, text in pieces if kind == _SAID)
    if not "".join(thoughts).strip():
        return _whole_content(thoughts, content, markers, opening)
    begins = opening or usual_opening(markers)
    if not content.strip():
        bare, marked = _bare(thoughts[0], markers)
        if marked:  # its own markers tell all
            return begins + bare, UNANSWERED if markers.close not in bare else JOINED
        return _alone(bare, markers, opening, finish, tokens, count)
    if markers.open in content or len(thoughts) > 1:
        return _in_turn(pieces, markers, begins), JOINED
    return _joined(thoughts[0], content, markers, begins), JOINED


def without_prompt(text: str, prompt: str | None) -> str:
    """Return a text without the rendered prompt, where it begins with just that."""
    left, begun = text.lstrip(), (prompt or "").strip()
    return left[len(begun) :] if begun and left.startswith(begun) else text


def repeats(text: str, messages: Sequence[Mapping[str, str]]) -> bool:
    """Tell whether a text has its prompt in it, as far as that can be seen.

    That is a question behind the name of the user's role, or the first message, or the
    question, at its beginning and by itself: it may also go on in the model's words.
    """
    left = text.lstrip()
    for said in (messages[0]["content"].strip(), messages[-1]["content"].strip()):
        after = left.removeprefix(said)
        alone = len(said) >= _SURELY_REPEATED or after[:1].isspace()
        if said and after != left and after.strip() and alone:
            return True
    question = re.escape(messages[-1]["content"].strip())
    return bool(question and re.search(_ROLE + question, text, re.IGNORECASE))


def _whole_content(
    thoughts: list[str], content: str, markers: Markers, opening: str | None
) -> tuple[str, str]:
    """Return content beside which there is no thinking, or an empty block of it."""
    if not thoughts or markers.open in content or markers.close in content:
        return content, ""
    begins = opening or usual_opening(markers)
    return f"{begins}\n{markers.close}\n\n{content.strip()}", JOINED


def _joined(thought: str, content: str, markers: Markers, begins: str) -> str:
    """Return a turn of one thought and the answer behind it, each marker once."""
    thought, _ = _bare(thought, markers)
    before, closed, after = thought.rpartition(markers.close)
    if closed and after.strip() in ("", content.strip()):
        thought = before  # the field held the whole turn
    content = content.strip()
    if content.startswith(markers.close):
        content = content.removeprefix(markers.close).lstrip()
    return f"{begins}{thought.strip()}\n{markers.close}\n\n{content}"


def _in_turn(pieces: list[tuple[str, str]], markers: Markers, begins: str) -> str:
    """Return the pieces one behind the other; content that is whole by itself alone."""
    content = "".join(text for kind, text in pieces if kind == _SAID)
    if markers.open in content:
        return content
    found = ""
    for kind, text in pieces:
        if kind == _SAID:
            found += f"{text.strip()}\n"
        else:
            thought, _ = _bare(text, markers)
            found += f"{begins}{thought.strip()}\n{markers.close}\n\n"
    return found.removesuffix("\n")


def _bare(thought: str, markers: Markers) -> tuple[str, bool]:
    """Return a thought without the opening that it still has; whether a marker was."""
    left = thought.strip()
    for known in (markers, *KNOWN):
        if left.startswith(known.open):
            left = left.removeprefix(known.open).strip()
            return left.replace(known.close, markers.close), True
    return left, markers.close in left


def _alone(
    thought: str,
    markers: Markers,
    opening: str | None,
    finish: str,
    tokens: int | None,
    count: Count | None,
) -> tuple[str, str]:
    """Return the turn of a message that has thinking and no content.

    It was closed with nothing behind it, or never closed, or not even opened. The
    number of generated tokens says which, where it is just that of one of these. Else
    what has ended is an answer: models hardly ever end a turn within their thinking,
    and parsers take every text without a closing marker for it.
    """
    begins = opening or usual_opening(markers)
    ended = finish == "stop"
    at_once = (begins + thought if opening else thought), DIRECT
    begun = begins + thought, UNANSWERED
    closed = f"{begins}{thought}\n{markers.close}", UNANSWERED
    openings = ("",) if opening else (markers.open, usual_opening(markers))
    written = [(thought, at_once if ended or not opening else begun)]
    written += [(f"{one}{thought}", begun) for one in openings if one]
    for one in openings:
        written += [
            (f"{one}{thought}{gap}{markers.close}", closed) for gap in ("", "\n")
        ]
    if tokens is not None and count is not None:
        for text, turn in written:
            # Most servers count the end token, where there is one.
            if tokens - count(text) in ((0, 1) if ended else (0,)):
                return turn
    return at_once if ended else begun


def _pieces(message: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what a message says, in order; neighbours of one kind are put together."""
    pieces = list(_content(message.get("content")))
    if not any(kind == _THOUGHT for kind, _ in pieces):
        for name in REASONING_FIELDS:
            text = _text(message.get(name))
            if text:
                pieces.insert(0, (_THOUGHT, text))
                break
    found: list[tuple[str, str]] = []
    for kind, text in pieces:
        if kind == _SAID and not text.strip() and not found:
            continue
        if found and found[-1][0] == kind:
            joint = "\n" if kind == _THOUGHT else ""
            found[-1] = (kind, found[-1][1] + joint + text)
        else:
            found.append((kind, text))
    return found


def _content(content: Any) -> Iterator[tuple[str, str]]:
    parts = content if isinstance(content, list) else [content]
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else "text"
        thinks = isinstance(kind, str) and ("think" in kind or "reason" in kind)
        text = _text(part)
        if text:
            yield (_THOUGHT if thinks else _SAID), text


def _text(value: Any) -> str:
    """Return the text of a field: a text, a part with one, or a list of these."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(_text(one) for one in value)
    if isinstance(value, Mapping):
        return next((text for key in _INNER if (text := _text(value.get(key)))), "")
    return ""
