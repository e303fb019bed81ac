"""Tables as text and as Markdown."""

from __future__ import annotations

from rpam_mergekit.text import aligned, markdown_table


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
