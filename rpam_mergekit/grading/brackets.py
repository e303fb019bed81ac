"""How thinking is opened: by the chat template, or by the model in its own turn.

A response is the whole assistant turn, from right after the role header. Some chat
templates end the generation prompt in an opened thinking block; the turn of a model
that was prompted so begins with that text, the *opening*, though it did not write it.
"""

from __future__ import annotations

from collections.abc import Iterable

from rpam_mergekit.grading.responses import END_TOKENS, Markers, Thinking, thinking

# Brackets that published models write their thinking in, the most common first.
KNOWN = (
    Markers("<think>", "</think>"),
    Markers("[THINK]", "[/THINK]"),
    Markers("<thinking>", "</thinking>"),
    Markers("<seed:think>", "</seed:think>"),
    Markers("<|START_THINKING|>", "<|END_THINKING|>"),
    Markers("<|channel|>analysis<|message|>", "<|end|>"),
)


def opening_of(prompt: str, markers: Markers) -> str:
    """Return the text by which `prompt` opens the thinking at its end; often ''.

    It begins with the opening marker and has the white space after it.
    """
    start = prompt.rfind(markers.open)
    if start < 0 or prompt[start + len(markers.open) :].strip():
        return ""
    return prompt[start:]


def whole_turn(response: str, opening: str, markers: Markers) -> str:
    """Return a response as the whole turn: with the opening that it lacks, if any.

    A response lacks its opening if it closes thinking that it has not opened. The
    opening is `opening`, or the opening marker and a new line.
    """
    if not closes_unopened(response, markers):
        return response
    return (opening or usual_opening(markers)) + response


def closes_unopened(response: str, markers: Markers) -> bool:
    """Tell whether a response closes thinking that it has not opened."""
    before, closed, _ = response.partition(markers.close)
    return bool(closed) and markers.open not in before


def usual_opening(markers: Markers) -> str:
    """Return the opening of a prompt whose text is not known."""
    return f"{markers.open}\n"


def begun_turn(written: str, opening: str | None, markers: Markers) -> str:
    """Return what a model wrote after a prompt with this opening as the whole turn.

    Unlike a `whole_turn` it begins with the opening also where it never closes it: the
    text stood in the prompt. One that opens its thinking itself, or that a server has
    given back as a whole, stays as it is. Of an unknown opening (None), the closing
    tells.
    """
    if opening is None:
        return whole_turn(written, "", markers)
    if written.lstrip().startswith(markers.open):
        return written
    return opening + written


def read_turn(
    turn: str, opening: str | None, markers: Markers, ended: bool = False
) -> Thinking:
    """Return how a whole turn thinks that was begun with `opening`; see `thinking`."""
    if not opening:
        return thinking(turn, markers, None if opening is None else False)
    return thinking(turn.removeprefix(opening), markers, True, ended)


def markers_in(texts: Iterable[str]) -> Markers | None:
    """Return the first of the known brackets that any of `texts` has, or None."""
    texts = list(texts)
    for markers in KNOWN:
        # A tag that closes tells too, but a token that ends turns as well does not.
        ends = markers.close in END_TOKENS
        signs = (markers.open,) if ends else (markers.open, markers.close)
        if any(sign in text for sign in signs for text in texts):
            return markers
    return None
