"""Figures with their intervals as text, and Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from figures import interval

from rpam_mergekit.text import markdown_table


def percent(values: Sequence[float], sign: str = "", places: int = 1) -> str:
    """Return mean and half interval of shares over the seeds of one pair."""
    return spread({"": values}, sign, places)


def spread(
    by_pair: Mapping[str, Sequence[float]], sign: str = "", places: int = 1
) -> str:
    mean, half = interval(by_pair)
    shown = f"{100 * mean:{sign}.{places}f}"
    return shown if math.isnan(half) else f"{shown} ± {100 * half:.{places}f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [*markdown_table(head, rows), ""]
