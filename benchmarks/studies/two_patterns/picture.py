"""The picture of the study: accuracy against tokens, a panel for every pair."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from figures import point, router

from rpam_mergekit.evaluate.plots import new_figure, save
from rpam_mergekit.evaluate.yardsticks import upper_hull


def draw(path: Path, pairs: Sequence) -> None:
    """Draw `PairResults`; models differ by marker and lines by dashes, not by colour.

    Experts, sweep and other methods are means over the seeds' test queries; of the
    merged model every seed is shown.
    """
    columns = min(3, len(pairs))
    rows = -(-len(pairs) // columns)
    size = (4.2 * columns, 3.5 * rows)
    figure, axes = new_figure(size, rows, columns, dpi=110)
    axes = np.reshape(axes, (rows, columns))
    for spare in axes.flat[len(pairs) :]:
        spare.axis("off")
    for at, pair in zip(axes.flat, pairs, strict=False):
        _panel(at, pair)
    for row in axes:
        row[0].set_ylabel("accuracy, %")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    spare = axes.flat[-1] if len(pairs) < axes.size else None
    if spare is not None:
        spare.legend(handles, labels, loc="center", frameon=False)
    else:
        figure.legend(handles, labels, loc="lower center", ncol=4, frameon=False)
    figure.tight_layout(rect=(0, 0 if spare is not None else 0.16, 1, 1))
    save(figure, path)


def _panel(at, pair) -> None:
    def place(record) -> tuple[float, float]:
        points = [point(record, seed, pair.mix).place for seed in pair.seeds]
        tokens, accuracy = np.mean(points, axis=0)
        return float(tokens), 100 * float(accuracy)

    long, short = place(pair.long), place(pair.short)
    curve = [long, *map(place, pair.sweep), short]
    routed = [router(pair.long, pair.short, seed, pair.mix) for seed in pair.seeds]
    steps = np.mean([r[:-1] for r in routed if len(r) == len(routed[0])], axis=0)
    others = [place(record) for record in pair.others.values()]
    _line(at, curve, "o-", "0.6", "interpolation sweep", markersize=3)
    _line(at, upper_hull(curve), "--", "0.35", "its upper hull", linewidth=1)
    _line(at, steps * (1, 100), ":", "black", "router that knows the difficulty")
    if others:
        _line(at, others, "x", "0.45", "other mergekit methods", markersize=4)
    _line(at, [long], "s", "#0072B2", "Long", markersize=9, markeredgecolor="black")
    _line(at, [short], "^", "#009E73", "Short", markersize=9, markeredgecolor="black")
    merged = [
        point(record, seed, pair.mix).place
        for seed, record in pair.by_seed["main", "defaults"].items()
    ]
    merged = [(tokens, 100 * accuracy) for tokens, accuracy in merged]
    look = {"markersize": 13, "markeredgecolor": "black", "markeredgewidth": 0.6}
    _line(at, merged, "*", "#D55E00", "rpam, every seed", **look)
    at.set_title(f"{pair.pair}: {pair.task.unit}", fontsize=10)
    at.set_xlabel("mean tokens of a response")
    at.grid(alpha=0.3)


def _line(at, points, style: str, colour: str, label: str, **look) -> None:
    tokens, accuracy = zip(*points, strict=True)
    at.plot(tokens, accuracy, style, color=colour, label=label, **look)
