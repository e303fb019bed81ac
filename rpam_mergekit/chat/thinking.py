"""Who opens the thinking of a merged model: the model itself, or its chat template.

By default the model: prompts of the calibration set end where a template's opening
would stand, responses that think begin with it, and the output's template is without.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rpam_mergekit.chat.template_rewriting import Template, generation_prompt
from rpam_mergekit.formats.calibration import CalibrationQuery
from rpam_mergekit.grading.brackets import KNOWN, opening_of, usual_opening, whole_turn
from rpam_mergekit.grading.responses import END_TOKENS, Markers
from rpam_mergekit.settings import NO_BRACKETS, RpamSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONG = "long"


@dataclass(frozen=True)
class ThinkingMode:
    """How the thinking is opened in a merge, and how its calibration texts become so.

    mode: `model` or `template`, the setting. markers: the brackets; None where Long
    thinks without. opening: the text by which the chat template in use ends its
    generation prompts, '' where it opens nothing. begins: the text that a turn which
    thinks begins with.
    """

    mode: str = "model"
    markers: Markers | None = KNOWN[0]
    opening: str = ""
    begins: str = ""

    @property
    def takes_out(self) -> bool:
        """Whether the opening is taken out of prompts and of the output's template."""
        return self.mode == "model" and bool(self.opening)

    @property
    def keeps(self) -> bool:
        """Whether every prompt has opened the thinking."""
        return self.mode == "template" and bool(self.opening)

    def prompt(self, rendered: str) -> str:
        """Return a rendered prompt up to where the merged model's turn begins."""
        if not self.takes_out or self.markers is None:
            return rendered
        return rendered.removesuffix(opening_of(rendered, self.markers))

    def response(self, text: str, pattern: str) -> str:
        """Return a response of the calibration file as it follows such a prompt.

        Thinking that is closed but not opened gets the opening it lacks. What only
        closes the block that its prompt had opened, and answers, is the answer;
        unless `pattern` is long.
        """
        if self.markers is None:
            return text
        opened, closed = self.markers.open, self.markers.close
        bare = text.lstrip()
        if self.keeps:
            if not bare.startswith(opened):
                return text
            return bare.removeprefix(self.opening).removeprefix(opened)
        if bare.startswith(closed) and pattern != LONG:
            return bare.removeprefix(closed).lstrip()
        if self.opening or closed not in END_TOKENS:  # else it may close any turn
            text = whole_turn(text, self.begins, self.markers)
        bare = text.lstrip()
        if self.opening and bare.startswith(opened):
            if not bare.startswith(self.opening):  # with other white space
                return self.begins + bare.removeprefix(opened).lstrip()
            return bare
        return text

    def thinks(self, text: str) -> bool:
        """Whether a response has thinking in it, by its brackets."""
        return self.markers is not None and _has(text, self.markers)


def thinking_of(
    tokenizer: PreTrainedTokenizerBase | None,
    template: Template | None,
    queries: Sequence[CalibrationQuery],
    settings: RpamSettings,
    own: Sequence[Template | None] = (),
) -> ThinkingMode:
    """Return how thinking is opened in a merge.

    `template` is the chat template in use, `own` are those that the models have, behind
    which their responses may have been written; `tokenizer` is None where it is not
    known. The brackets are the settings', or those at the end of a prompt, or those
    most responses have.
    """
    if settings.think_open == NO_BRACKETS:
        return ThinkingMode(settings.thinking, None)
    prompts = [
        generation_prompt(tokenizer, one) or "" if tokenizer and one else ""
        for one in (template, *own)
    ]
    responses = [query.response for query in queries if query.response]
    markers = settings.markers() or _recognised(prompts, responses)
    openings = [opening_of(prompt, markers) for prompt in prompts]
    begins = next(filter(None, openings), "") or _usual(responses, markers)
    return ThinkingMode(settings.thinking, markers, openings[0], begins)


def opens(tokenizer: PreTrainedTokenizerBase | None, template: Template | None) -> str:
    """Return the text by which a template opens thinking in any known brackets."""
    prompt = None
    if tokenizer is not None and template:
        prompt = generation_prompt(tokenizer, template)
    return next(filter(None, (opening_of(prompt or "", one) for one in KNOWN)), "")


def _recognised(prompts: Collection[str], responses: Collection[str]) -> Markers:
    for prompt in prompts:
        for markers in KNOWN:
            if opening_of(prompt, markers):
                return markers
    counts = {m: sum(_has(text, m) for text in responses) for m in KNOWN}
    return max(counts, key=lambda markers: counts[markers])  # of several the first


def _has(text: str, markers: Markers) -> bool:
    closes = markers.close in text and markers.close not in END_TOKENS
    return closes or markers.open in text


def _usual(responses: Collection[str], markers: Markers) -> str:
    """Return what most responses open with; the marker and a new line if none does."""
    opening = re.compile(rf"\s*({re.escape(markers.open)}\s*)")
    found = Counter(m[1] for text in responses if (m := opening.match(text)))
    return found.most_common(1)[0][0] if found else usual_opening(markers)
