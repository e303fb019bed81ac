"""What a response says: thinking opened and closed, and its final answers."""

from __future__ import annotations

import pytest

from rpam_mergekit.grading.responses import Markers, boxed, final_answers, thinking

THINK = Markers()


def answers(text: str, opened_by_prompt: bool | None = None) -> list[str]:
    return final_answers(thinking(text, THINK, opened_by_prompt), text)


@pytest.mark.parametrize(
    ("text", "opened_by_prompt", "state", "final"),
    [
        ("4", False, "none", "4"),
        ("4", None, "none", "4"),
        ("4", True, "open", None),
        ("<think>7+5=2</think>4", False, "closed", "4"),
        ("\n<think>\n7\n</think>\n\n4", None, "closed", "\n\n4"),
        ("7+5=2</think>4", True, "closed", "4"),
        ("7+5=2</think>4", None, "closed", "4"),
        ("7+5=2</think>4", False, "wrong", "4"),
        ("<think>7</think>8</think>4", False, "wrong", "4"),
        ("<think>7<think>8</think>4", False, "wrong", "4"),
        ("<think>7</think>4<think>", False, "wrong", "4<think>"),
        ("<think>7+5=2", False, "open", None),
        ("so it is 4\n<tool_call>\n**Answer:** 4", True, "wrong", "\n**Answer:** 4"),
        ("so it is 4\n<tool_call>\n4", None, "none", "so it is 4\n<tool_call>\n4"),
        ("Sure.\n<think>7</think>4", None, "closed", "4"),
        ("</think>7<think>4", None, "wrong", "7<think>4"),
        ("<think>7</think>4", True, "closed", "4"),
        ("<think>so\n</tool_call>\n4", False, "wrong", "\n4"),
        ("I call\n<tool_call>\n4", False, "none", "I call\n<tool_call>\n4"),
        ("the tag <tool_call> in a line", True, "open", None),
        ("I think</think>", True, "closed", ""),
    ],
)
def test_thinking(text, opened_by_prompt, state, final):
    found = thinking(text, THINK, opened_by_prompt)
    assert (found.state, found.final) == (state, final)
    assert found.thinks == (state != "none")


def test_markers_can_be_others():
    markers = Markers("[THINK]", "[/THINK]")
    assert thinking("[THINK]a[/THINK]b", markers).state == "closed"
    assert thinking("<think>a</think>b", markers, False).state == "none"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"\boxed{1} and \boxed{\frac{1}{2}}", ["1", r"\frac{1}{2}"]),
        (r"\fbox{7}", ["7"]),
        (r"\boxed 5", ["5"]),
        (r"\boxed{\{1,2\}}", [r"\{1,2\}"]),
        (r"\boxed{a \boxed{3}}", [r"a \boxed{3}"]),
        (r"\boxed{never closed", []),
        (r"\boxed{open \boxed{7}", ["7"]),
        ("} {", []),
        (r"\\boxed{1}", []),
    ],
)
def test_boxes(text, found):
    assert boxed(text) == found


def test_boxes_are_found_in_linear_time():
    assert boxed(r"\boxed{" * 200_000) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so \boxed{3}</think>It is \boxed{4}.", ["4"]),
        (r"\boxed{3}</think>Done.", ["Done"]),
        ("<think>1\n#### 2</think>He has\n#### 18\n", ["18"]),
        ("The answer is 12.", ["12"]),
        ("The final answer is: **12**.", ["12"]),
        ("Answer: (C)", ["(C)"]),
        ("First 3.\nThen 4 apples\n", ["Then 4 apples"]),
        ("<think>so 7", []),
        (r"<think>so \boxed{7}", ["7"]),
        ("<think>7</think>", []),
        ("<think>7</think><answer> 4 </answer>", ["4"]),
        ("<answer>\n4\n</answer>", ["4"]),
        ("", []),
    ],
)
def test_final_answers(text, found):
    assert answers(text) == found
