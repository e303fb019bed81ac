"""Tables as text and as Markdown."""

from __future__ import annotations

from rpam_mergekit.text import aligned, listed, markdown_table


def test_columns_are_aligned_the_first_ones_left():
    rows = [["a", "bb", "1"], ["ccc", "d", "22"]]
    assert aligned(rows) == ["a    bb   1", "ccc   d  22"]
    assert aligned(rows, left=2) == ["a    bb   1", "ccc  d   22"]
    assert aligned(rows, left=3) == ["a    bb  1", "ccc  d   22"]
    assert aligned([]) == []


def test_a_bar_stays_in_its_cell():
    assert markdown_table(["x", ""], [["a|b", 1]]) == [
        "| x |  |",
        "| --- | --- |",
        r"| a\|b | 1 |",
    ]


def test_of_many_names_the_first_are_listed():
    names = ["a", "b", "c"]
    assert listed([]) == ""
    assert listed(names) == listed(names, most=3) == "a, b, c"
    assert listed(names, most=2) == "a, b and 1 more"
    assert listed(names, most=1) == "a and 2 more"
