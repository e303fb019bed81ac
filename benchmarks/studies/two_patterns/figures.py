"""Figures of the study from the sums that `study.py` records. Nothing of torch here.

A cell is one pair and one seed: its own calibration draw, fields and test queries.
Accuracy and tokens are means over difficulties in a mix. Intervals are 95 % t intervals
over seeds within pairs (the pairs are these pairs, not a sample of pairs): the variance
of the mean over pairs is that of the pairs' own means, pooled over pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from rpam_mergekit.evaluate.yardsticks import at_tokens, upper_hull

Mix = Mapping[int, float]


@dataclass(frozen=True)
class Point:
    """One model in one cell: shares, and mean tokens of a response.

    closed: share of the responses that think which close their thinking well.
    """

    accuracy: float
    tokens: float
    thinks: float
    closed: float
    cut_off: float

    @property
    def place(self) -> tuple[float, float]:
        return self.tokens, self.accuracy


def point(record: Mapping[str, Any], seed: int, mix: Mix) -> Point:
    """Return a model's figures in a mix of difficulties."""
    strata = record["sums"][str(seed)]
    total = sum(mix.values())
    means = np.zeros(5)
    for difficulty, weight in mix.items():
        queries, *sums = strata[str(difficulty)]
        means += weight / total * np.array(sums) / queries
    correct, tokens, thinks, closed, cut_off = means.tolist()
    return Point(
        correct, tokens, thinks, closed / thinks if thinks else math.nan, cut_off
    )


def router(long: Mapping, short: Mapping, seed: int, mix: Mix) -> list[tuple]:
    """Return (tokens, accuracy) of the router that knows the difficulty.

    Whole difficulties go to Long in the order of what they gain per token.
    """
    start = point(short, seed, mix)
    tokens, accuracy = start.tokens, start.accuracy
    gains = []
    for difficulty, weight in mix.items():
        a, b = (point(model, seed, {difficulty: 1}) for model in (long, short))
        share = weight / sum(mix.values())
        gain, cost = share * (a.accuracy - b.accuracy), share * (a.tokens - b.tokens)
        if gain > 0:
            gains.append((gain / max(cost, 1e-9), cost, gain))
    reached = [(tokens, accuracy)]
    for _, cost, gain in sorted(gains, reverse=True):
        tokens, accuracy = tokens + cost, accuracy + gain
        reached.append((tokens, accuracy))
    return [*reached, (math.inf, accuracy)]


@dataclass(frozen=True)
class Cell:
    """What an RPAM merge is measured by in one cell; yardsticks at its own tokens.

    best_other: the best of the sweep and the other methods at the same or fewer tokens.
    hull_of_all: random mixing of any models of the sweep and the other methods.
    """

    long: Point
    short: Point
    merged: Point
    sweep: float
    hull: float
    best_other: float
    hull_of_all: float
    router: float

    @property
    def kept(self) -> float:
        return self.merged.accuracy / self.long.accuracy

    @property
    def saved(self) -> float:
        return 1 - self.merged.tokens / self.long.tokens


def cell(
    merged: Mapping,
    long: Mapping,
    short: Mapping,
    sweep: Sequence[Mapping],
    others: Sequence[Mapping],
    seed: int,
    mix: Mix,
) -> Cell:
    """Return the figures of `merged`; `sweep` in the order of its weights."""
    at = point(merged, seed, mix)
    ends = [point(model, seed, mix) for model in (long, short)]
    between = [point(model, seed, mix) for model in sweep]
    curve = [ends[0].place, *(p.place for p in between), ends[1].place]
    rest = [point(model, seed, mix) for model in others]
    every = [*curve, *(p.place for p in rest)]
    return Cell(
        long=ends[0],
        short=ends[1],
        merged=at,
        sweep=at_tokens(curve, at.tokens),
        hull=mixed(curve, at.tokens),
        best_other=max((a for t, a in every if t <= at.tokens), default=0.0),
        hull_of_all=mixed(every, at.tokens),
        router=at_tokens(router(long, short, seed, mix), at.tokens),
    )


def mixed(points: Sequence[tuple[float, float]], tokens: float) -> float:
    """Return the best accuracy of randomly mixing models at so many tokens or fewer."""
    hull = upper_hull(points)
    within = [accuracy for cost, accuracy in hull if cost <= tokens]
    between = at_tokens(hull, tokens)
    return max([*within, *([] if math.isnan(between) else [between])], default=0.0)


def over_chance(merged: Mapping, long: Mapping, short: Mapping, seed, mix) -> float:
    """Return accuracy less that of sending as many queries to Long at random.

    As many as cost the same mean tokens; outside the experts' tokens the line goes on.
    """
    m, a, b = (point(model, seed, mix) for model in (merged, long, short))
    share = (m.tokens - b.tokens) / (a.tokens - b.tokens)
    return m.accuracy - b.accuracy - share * (a.accuracy - b.accuracy)


def interval(by_pair: Mapping[str, Sequence[float]]) -> tuple[float, float]:
    """Return the mean over pairs and half of its 95 % interval (nan for one seed)."""
    values = [np.array(of) for of in by_pair.values()]
    mean = float(np.mean([of.mean() for of in values]))
    freedom = sum(len(of) - 1 for of in values)
    if not freedom:
        return mean, math.nan
    pooled = sum(((of - of.mean()) ** 2).sum() for of in values) / freedom
    error = math.sqrt(sum(pooled / len(of) for of in values)) / len(values)
    return mean, float(stats.t.ppf(0.975, freedom)) * error
