"""Chat templates lose the opening of the thinking, and nothing else."""

from __future__ import annotations

import chains
import pytest

from helpers import chat_templates
from rpam_mergekit.chat.template_rewriting import (
    Case,
    _battery,
    generation_prompt,
    render,
    without_opening,
)
from rpam_mergekit.grading.responses import Markers

TAGS, BRACKETS = Markers(), Markers("[THINK]", "[/THINK]")
CHANNEL = Markers("<|channel|>analysis<|message|>", "<|end|>")
# What is to be gone from the source, letter by letter.
OPENS = {
    "R1": (TAGS, "<think>\\n"),
    "QWEN3_THINKING": (TAGS, "<think>\\n"),
    "QWEN3_LATER": (TAGS, "<think>\\n"),
    "QWQ": (TAGS, "<think>\n"),
    "MAGISTRAL_OPENS": (BRACKETS, "[THINK]"),
    "CHANNELS_OPEN": (CHANNEL, CHANNEL.open),
}
DOES_NOT = {"QWEN3_HYBRID": TAGS, "MAGISTRAL": BRACKETS, "CHANNELS": CHANNEL}


@pytest.fixture(scope="module")
def renderer():
    tokenizer = chains.build_tokenizer()
    tokenizer.bos_token = "<|pad|>"
    return tokenizer


@pytest.mark.parametrize("name", OPENS)
def test_the_opening_alone_is_taken_out_of_the_source(renderer, name):
    markers, opening = OPENS[name]
    old = getattr(chat_templates, name)
    new = without_opening(renderer, old, markers)
    head, _, tail = old.rpartition(opening)
    assert new == head + tail


@pytest.mark.parametrize("name", [*OPENS, "SHARED"])
def test_everything_renders_as_before_but_the_opening_at_the_end(renderer, name):
    markers, _ = OPENS.get(name, (TAGS, ""))
    old = getattr(chat_templates, name)
    new = without_opening(renderer, old, markers)
    endings = 0
    for case in _battery(markers):
        before, after = render(renderer, old, case), render(renderer, new, case)
        if before == after:
            continue
        assert case.generates
        assert before.text.startswith(after.text)
        assert before.text.removeprefix(after.text).strip() == markers.open
        endings += 1
    assert endings > 10


def test_the_battery_has_what_templates_tell_apart():
    cases = _battery(TAGS)
    texts = [str(case) for case in cases]
    for what in ("system", "tool_calls", "reasoning_content", "'tool'", "</think>"):
        assert any(what in text for text in texts), what
    for given in ("enable_thinking", "thinking"):
        values = [c.given[given] for c in cases if c.given and given in c.given]
        assert {*values} == {True, False}
    assert any(case.tools for case in cases)
    assert any(not case.generates for case in cases)


@pytest.mark.parametrize("name", DOES_NOT)
def test_a_template_that_does_not_open_stays_as_it_is(renderer, name):
    template = getattr(chat_templates, name)
    assert without_opening(renderer, template, DOES_NOT[name]) is template


@pytest.mark.parametrize("name", ["QWEN3_HYBRID", "QWEN3_LATER"])
def test_an_empty_block_is_no_opening_and_stays(renderer, name):
    template = without_opening(renderer, getattr(chat_templates, name), TAGS)
    case = Case([{"role": "user", "content": "?"}], given={"enable_thinking": False})
    assert render(renderer, template, case).text.endswith("<think>\n\n</think>\n\n")
    assert generation_prompt(renderer, template).endswith("<|im_start|>assistant\n")


def test_a_bracket_that_the_history_needs_too_is_cut_from_outside(renderer):
    new = without_opening(renderer, chat_templates.SHARED, TAGS)
    assert chat_templates.SHARED in new  # as a whole, in a template that cuts
    assert generation_prompt(renderer, new) == "user: ?\nassistant: "


def test_a_template_whose_masks_would_move_is_not_rewritten(renderer):
    assert without_opening(renderer, chat_templates.MARKED, TAGS) is None


def test_an_opening_in_pieces_is_cut_from_outside(renderer):
    pieces = (
        "{{ messages[-1].content }}"
        "{% if add_generation_prompt %}{{ '<th' }}{{ 'ink>' }}{{ '\\n' }}{% endif %}"
    )
    new = without_opening(renderer, pieces, TAGS)
    assert generation_prompt(renderer, pieces) == "?<think>\n"
    assert generation_prompt(renderer, new) == "?"


def test_every_one_of_several_templates_is_rewritten(renderer):
    several = {"default": chat_templates.QWQ, "tool_use": chat_templates.QWEN3_THINKING}
    found = without_opening(renderer, several, TAGS)
    assert found == {
        name: without_opening(renderer, one, TAGS) for name, one in several.items()
    }
    assert found["tool_use"] != several["tool_use"]
    one_cannot = {**several, "tool_use": chat_templates.MARKED}
    assert without_opening(renderer, one_cannot, TAGS) is None
    none_opens = {"default": chat_templates.QWEN3_HYBRID}
    assert without_opening(renderer, none_opens, TAGS) is none_opens
