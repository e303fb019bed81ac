"""What a merged model is measured against: sweep, upper hull, perfect router.

All take points (mean tokens, accuracy). The sweep is a curve in the order of its
weights; its upper hull is what randomly mixing its models reaches; the router sends
queries to Long in the order of what they gain per token.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from rpam_mergekit.evaluate.compare import Key, Model, Table

Point = tuple[float, float]


class Yardsticks:
    """Sweep, hull and router over all data sets, under every bootstrap draw."""

    def __init__(
        self,
        table: Table,
        models: Sequence[Model],
        labels: dict[Key, str] | None,
    ) -> None:
        self.table = table
        self.models = models
        flat = [key for of in table.keys.values() for key in of]
        self._groups: npt.NDArray[np.intp] | None = None
        if labels:  # the number of every query's group
            self._groups = np.unique([labels[k] for k in flat], return_inverse=True)[1]
        self.dataset = "all" if len(table.keys) > 1 else next(iter(table.keys))
        self.tokens = table.means("tokens", self.dataset)
        self.accuracy = table.means("accuracy", self.dataset)
        self.role = {m.role: n for n, m in enumerate(models) if m.role != "sweep"}
        self.sweep = [n for n, m in enumerate(models) if m.role == "sweep"]

    def curve(self, draw: int) -> list[Point]:
        """Return (tokens, accuracy) from Long through the sweep to Short."""
        ends = [self.role[role] for role in ("long", "short") if role in self.role]
        order = [*ends[:1], *self.sweep, *ends[1:]]
        points = [(self.tokens[draw, n], self.accuracy[draw, n]) for n in order]
        return [(float(t), float(a)) for t, a in points if np.isfinite(t)]

    def router(self, draw: int) -> list[Point]:
        """Return the router's (tokens, accuracy) as more and more goes to Long.

        What gains at no cost is there from the start, then what gains most per token.
        """
        if "long" not in self.role or "short" not in self.role:
            return []
        short = self.role["short"]
        start = np.array([self.tokens[draw, short], self.accuracy[draw, short]])
        parts = self._parts(draw)
        if not (np.isfinite(parts).all() and np.isfinite(start).all()):
            return []
        cost, gain = parts[:, parts[1] > 0]
        free = cost <= 0
        start += (cost[free].sum(), gain[free].sum())
        cost, gain = cost[~free], gain[~free]
        order = np.argsort(cost / gain, kind="stable")
        tokens = start[0] + np.concatenate([[0], np.cumsum(cost[order])])
        accuracy = start[1] + np.concatenate([[0], np.cumsum(gain[order])])
        return list(zip(tokens.tolist(), accuracy.tolist(), strict=True))

    def _parts(self, draw: int) -> npt.NDArray[np.float64]:
        """Return (2, groups): what sending each group to Long costs and gains."""
        long, short = self.role["long"], self.role["short"]
        columns = []
        for name in self.table.keys:
            weights = self.table.weights[name][draw] / len(self.table.keys)
            pair = [
                self.table.values(metric, name) for metric in ("tokens", "accuracy")
            ]
            columns.append([weights * (v[long] - v[short]) for v in pair])
        single = np.concatenate(columns, axis=1)
        if self._groups is None:
            return single
        return np.array([np.bincount(self._groups, weights=row) for row in single])

    def levels(self) -> dict[str, npt.NDArray[np.float64]]:
        """Return per yardstick its accuracy at the merged model's tokens, per draw.

        The experts themselves count as yardsticks, at their own tokens. Empty without
        a merged model.
        """
        if "merged" not in self.role:
            return {}
        found: dict[str, list[float]] = {}
        for draw, tokens in enumerate(self.tokens[:, self.role["merged"]].tolist()):
            if self.sweep:
                curve = self.curve(draw)
                found.setdefault("sweep", []).append(at_tokens(curve, tokens))
                hull = upper_hull(curve)
                found.setdefault("hull", []).append(at_tokens(hull, tokens))
            if router := self.router(draw):
                last = (float("inf"), router[-1][1])  # more tokens buy no more
                reached = at_tokens([*router, last], tokens)
                found.setdefault("router", []).append(reached)
        levels = {name: np.array(values) for name, values in found.items()}
        for role in ("long", "short"):
            if role in self.role:
                levels[role] = self.accuracy[:, self.role[role]]
        return levels


def at_tokens(points: Sequence[Point], tokens: float) -> float:
    """Return the best accuracy of a curve of (tokens, accuracy) at `tokens`.

    nan where the curve does not reach that far.
    """
    levels = []
    for a, b in itertools.pairwise(points):
        low, high = sorted((a, b))
        if low[0] <= tokens <= high[0]:
            span = high[0] - low[0]
            share = (tokens - low[0]) / span if span else 1.0  # 0 if span is infinite
            levels.append(low[1] + share * (high[1] - low[1]))
    return max(levels, default=float("nan"))


def upper_hull(points: Sequence[Point]) -> list[Point]:
    """Return the upper hull of (tokens, accuracy) points, by tokens."""
    hull: list[Point] = []
    for point in sorted(points):
        while len(hull) >= 2 and _is_below(hull[-2], hull[-1], point):
            hull.pop()
        if hull and hull[-1][0] == point[0]:
            hull.pop()
        hull.append(point)
    return hull


def _is_below(a: Point, b: Point, c: Point) -> bool:
    return (b[0] - a[0]) * (c[1] - a[1]) >= (c[0] - a[0]) * (b[1] - a[1])
