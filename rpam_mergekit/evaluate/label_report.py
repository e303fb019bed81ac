"""What `label` shows: a table of the patterns, shares by a field, a picture."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rpam_mergekit.errors import RpamError, suggestion
from rpam_mergekit.evaluate.plots import new_figure, save
from rpam_mergekit.formats.calibration import PATTERNS
from rpam_mergekit.questions.leaks import LeakGuard
from rpam_mergekit.sampling.labels import Labels
from rpam_mergekit.text import aligned

SCATTER = 0.012  # in the picture, so that equal accuracies do not hide each other


def table(labels: Labels, guard: LeakGuard) -> str:
    """Return the summary: patterns, accuracies, tokens, and what was left out."""
    head = [
        "pattern",
        "queries",
        "accuracy: Long",
        "Short",
        "mean tokens: Long",
        "Short",
    ]
    rows = [head]
    for pattern in PATTERNS:
        of = labels.of(pattern)
        accuracy = [_mean([getattr(r, s).accuracy for r in of]) for s in PATTERNS]
        tokens = [_mean([getattr(r, s).tokens for r in of]) for s in PATTERNS]
        cells = [_shown(a, ".1%") for a in accuracy] + [
            _shown(t, ".1f") for t in tokens
        ]
        rows.append([pattern, str(len(of)), *cells])
    lines = aligned(rows)
    if labels.dropped:
        lines.append("left out:")
        lines += [f"{n:9}  {reason}" for reason, n in labels.dropped.most_common()]
    if guard.counts:
        checked = ", ".join(f"{name} ({n})" for name, n in guard.counts.items())
        lines.append(
            f"leak guard: {sum(guard.found.values())} queries stand in {checked}"
        )
    lines += [f"note: {note}" for note in labels.notes]
    return "\n".join(lines)


def table_by(labels: Labels, name: str) -> str:
    """Return the share of ``short`` per value of a field of the data set's rows."""
    groups: dict[Any, Counter[str]] = {}
    for row in labels.labelled:
        value = row.query.source.get(name)
        groups.setdefault(value, Counter())[row.pattern] += 1
    if not groups:
        return f"{name}: no query is labelled"
    if set(groups) == {None}:
        known = sorted({key for row in labels.labelled for key in row.query.source})
        raise RpamError(
            f"--by: no query has a field '{name}'.{suggestion(name, known)}"
        )
    numbers = all(isinstance(value, (int, float)) for value in groups)
    ordered = sorted(groups, key=None if numbers else str)
    rows = [[name, "queries", "short"]]
    for value in ordered:
        count = groups[value].total()
        rows.append([str(value), str(count), f"{groups[value]['short'] / count:.0%}"])
    return "\n".join(aligned(rows))


def _mean(values: Sequence[float | None]) -> float | None:
    if not values or any(value is None for value in values):
        return None
    return sum(v for v in values if v is not None) / len(values)


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def plot(path: Path, labels: Labels) -> None:
    """Draw every labelled query: accuracy gained by reasoning against its tokens."""
    scatter = random.Random(0)
    figure, axes = new_figure((7, 4.4), dpi=130)
    for pattern, marker, colour in (
        ("long", "^", "#D55E00"),
        ("short", "o", "#0072B2"),
    ):
        rows = [r for r in labels.of(pattern, chosen=False) if r.long.tokens]
        axes.plot(
            [r.long.tokens or 0 for r in rows],
            [r.gain + scatter.uniform(-SCATTER, SCATTER) for r in rows],
            marker,
            color=colour,
            markersize=5,
            markerfacecolor="none",
            label=f"{pattern} ({len(labels.of(pattern, chosen=False))})",
        )
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("mean tokens of Long's responses")
    axes.set_ylabel("accuracy of Long less accuracy of Short")
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    figure.tight_layout()
    try:
        save(figure, path)
    except OSError as error:
        raise RpamError(f"--plot: cannot write {path}: {error.strerror}") from None
