"""How thinking is opened: by the chat template, or by the model in its own turn.

A response is the whole assistant turn, from right after the role header. Some chat
templates end the generation prompt in an opened thinking block; the turn of a model
that was prompted so begins with that text, the *opening*, though it did not write it.
"""

from __future__ import annotations

from rpam_mergekit.responses import Markers

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
    before, closed, _ = response.partition(markers.close)
    if not closed or markers.open in before:
        return response
    return (opening or f"{markers.open}\n") + response
