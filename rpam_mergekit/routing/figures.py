"""Does the merged model route? Figures from log-probabilities, without generation.

The pre-pass holds some calibration queries out, sends them through the merged layers at
several scales of the solved coefficients, and through final norm and head. What is
measured is pure arithmetic on what that gives (`QueryFigures`); nothing here knows
models. The scale that predicts the right experts' responses best is the merge's
operating point.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rpam_mergekit.formats.operating_point import PatternRouting, Routing

# Scales of the solved coefficients among which the operating point is chosen.
SCALES = (0.5, 0.65, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5)
AS_SOLVED = SCALES.index(1.0)
# A decision that is wrong counts as if it had one chance in a thousand: a single
# mislabelled query must not outweigh all others.
LEAST = math.log(1e-3)
LEAST_GAIN = 0.02  # nats by which a scale must be better to be worth leaving 1 for
ROUTES = 0.75  # of a pattern's queries, where it is said that a merge routes
TELLS_APART = 0.8  # area under the curve, above which a wrong threshold is to blame


@dataclass(frozen=True)
class QueryFigures:
    """What a model makes of the positive expert's response to one query.

    Natural logarithms of probabilities. first: of the response's first token; closing:
    of the closing tag's first token, None without thinking; end: of the end token, None
    where the response was cut; body: the mean over all tokens of the response. opening:
    log odds of the token that opens thinking against all others where the response
    begins, None where no pattern opens thinking; routed: whether the model's most
    likely first token opens thinking just where the expert does (without an opening: is
    that of the expert).
    """

    pattern: str
    first: float
    closing: float | None
    end: float | None
    body: float
    opening: float | None
    routed: bool

    @property
    def score(self) -> float:
        """How well the response is predicted: its decisions, and its tokens' mean."""
        decisions = [self.first, self.closing, self.end]
        return self.body + sum(max(d, LEAST) for d in decisions if d is not None)


def weighted_mean(values: Sequence[float], patterns: Sequence[str]) -> float:
    """Return the mean over queries in which every pattern counts alike."""
    counts = Counter(patterns)
    weighed = (v / counts[p] for v, p in zip(values, patterns, strict=True))
    return sum(weighed) / len(counts)


def choose_scale(scores: Sequence[Sequence[float]], patterns: Sequence[str]) -> int:
    """Return the number of the scale that predicts best, every pattern counting alike.

    scores: per scale, of every query. The scale as solved is left only for one that is
    better by more than `LEAST_GAIN`, and by more than the difference's standard error.
    """

    def gain(number: int) -> tuple[float, float]:
        differences = [
            new - old
            for new, old in zip(scores[number], scores[AS_SOLVED], strict=True)
        ]
        mean = weighted_mean(differences, patterns)
        counts = Counter(patterns)
        variance = sum(
            ((d - mean) / counts[p] / len(counts)) ** 2
            for d, p in zip(differences, patterns, strict=True)
        )
        return mean, math.sqrt(variance)

    best = max(range(len(scores)), key=lambda number: gain(number)[0])
    mean, error = gain(best)
    return best if mean > max(error, LEAST_GAIN) else AS_SOLVED


def area_under_curve(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Return how often a positive query has the higher value; ties count half."""
    wins = sum((p > n) + (p == n) / 2 for p in positive for n in negative)
    return wins / (len(positive) * len(negative))


def routing_of(
    merged: Sequence[QueryFigures], experts: Sequence[QueryFigures]
) -> Routing:
    """Return the routing of the merged model beside that of the positive experts."""
    patterns = {}
    for pattern in dict.fromkeys(figures.pattern for figures in merged):
        mine = [f for f in merged if f.pattern == pattern]
        expert = [f for f in experts if f.pattern == pattern]
        patterns[pattern] = PatternRouting(
            queries=len(mine),
            routed=sum(f.routed for f in mine) / len(mine),
            expert={
                name: _mean([getattr(f, name) for f in expert])
                for name in ("first", "closing", "end", "body")
            },
            first=_mean([f.first for f in mine]) or 0.0,
            closing=_mean([f.closing for f in mine]),
            end=_mean([f.end for f in mine]),
            body=_mean([f.body for f in mine]) or 0.0,
        )
    thinks = [
        f.opening for f in merged if f.pattern == "long" and f.opening is not None
    ]
    others = [
        f.opening for f in merged if f.pattern != "long" and f.opening is not None
    ]
    area = area_under_curve(thinks, others) if thinks and others else None
    return Routing(patterns, area)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
