"""Is a merged model better than what its experts can be mixed to? Figures, intervals.

Models are compared on the queries that all of them answered. A model's figures are
means over queries (of means over responses), then over data sets, each counting the
same. Intervals are 95 % percentile intervals of a bootstrap over queries, drawn within
each data set and alike for all models: differences are paired.

The yardsticks, all at the merged model's mean tokens:

* the sweep: the curve of plain interpolations, in the order of their weights;
* its upper hull: what random mixing of its models reaches;
* the perfect router of the two experts: queries go to Long where that gains most per
  token. It routes groups of queries if a field says what is hard (then it knows only
  that field), else single queries by their sampled accuracies, which flatters it where
  there are few responses per query.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from rpam_mergekit.errors import RpamError
from rpam_mergekit.evaluate.yardsticks import Point, Yardsticks, upper_hull
from rpam_mergekit.formats.samples import SampledQuery
from rpam_mergekit.grading.responses import CLOSED, THINKING

DRAWS = 2000
METRICS = ("accuracy", "tokens", "saved", "thinking", "closed", "cut_off")
Key = tuple[str, str]  # data set, question
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class QueryFigures:
    """What one model did on one query; shares and means are over its responses.

    thinking, closed: shares of responses that think, and that close it properly.
    """

    accuracy: float
    tokens: float | None
    thinking: float
    closed: float
    cut_off: float
    counts: tuple[int, ...]
    source: dict[str, Any]

    @classmethod
    def of(cls, query: SampledQuery) -> QueryFigures:
        responses = query.responses
        states = [r.thinking for r in responses]
        return cls(
            accuracy=query.accuracy,
            tokens=query.tokens,
            thinking=sum(state in THINKING for state in states) / len(states),
            closed=states.count(CLOSED) / len(states),
            cut_off=sum(r.finish == "length" for r in responses) / len(responses),
            counts=tuple(r.tokens for r in responses if r.tokens is not None),
            source=query.source,
        )


@dataclass
class Model:
    """A model's figures by query; role: ``long``, ``short``, ``merged``, ``sweep``."""

    name: str
    role: str
    queries: dict[Key, QueryFigures] = field(default_factory=dict)


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval; None where it is not defined."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass
class Comparison:
    """All figures.

    rows: per data set (and ``all`` of them, if there are several), then per model name,
    then per metric. medians: median tokens of all responses, in the same order.
    against: of the merged model per yardstick: its accuracy there, and the difference.
    strata: per group of queries (label) and model: accuracy, tokens, share of thinking.
    """

    models: list[Model]
    queries: dict[str, int]
    dropped: int
    rows: dict[str, dict[str, dict[str, Estimate]]]
    medians: dict[str, dict[str, float | None]]
    against: dict[str, tuple[Estimate, Estimate]]
    strata: dict[str, dict[str, tuple[float, float | None, float]]]
    strata_by: str
    curve: list[Point]
    hull: list[Point]
    router: list[Point]


def compare_models(
    models: Sequence[Model], *, by: str | None = None, draws: int = DRAWS, seed: int = 0
) -> Comparison:
    """Compare `models` on the queries they share.

    Sweep models come in the order of their weights, see `by_weight`. by: the field of
    the data set's rows that says how hard a query is; without it queries are grouped by
    the first model's tokens. Raises `RpamError` if there is no common query
    or no such field.
    """
    common = set.intersection(*(set(model.queries) for model in models))
    every = set.union(*(set(model.queries) for model in models))
    if not common:
        raise RpamError("the sample files share no query: are they of one data set?")
    keys: dict[str, list[Key]] = {}
    for key in sorted(common):
        keys.setdefault(key[0], []).append(key)
    table = Table(models, keys, draws, seed)
    datasets = [*keys, *(["all"] if len(keys) > 1 else [])]
    labels = _strata(models, keys, by)
    yard = Yardsticks(table, models, labels if by else None)
    merged = [n for n, model in enumerate(models) if model.role == "merged"]
    against = {
        name: (estimate(level), estimate(yard.accuracy[:, merged[0]] - level))
        for name, level in yard.levels().items()
    }
    return Comparison(
        models=list(models),
        queries={name: len(of) for name, of in keys.items()},
        dropped=len(every - common),
        rows={name: table.rows(name) for name in datasets},
        medians={name: table.medians(name) for name in datasets},
        against=against,
        strata=_by_stratum(models, labels),
        strata_by=by or f"tokens of {models[0].name}",
        curve=yard.curve(0) if yard.sweep else [],
        hull=upper_hull(yard.curve(0)) if yard.sweep else [],
        router=yard.router(0),
    )


def by_weight(sweep: Sequence[Model]) -> list[Model]:
    """Return sweep models by the numbers that their names end with, such as w0.35.

    A shell lists w0.05 before w0. Models without such a number stay as they are given.
    """
    found = [re.search(r"-?\d+(?:\.\d+)?$", model.name) for model in sweep]
    weights = {m.name: float(f.group()) for m, f in zip(sweep, found, strict=True) if f}
    if len(weights) < len(sweep):
        return list(sweep)
    return sorted(sweep, key=lambda model: weights[model.name])


class Table:
    """Per-query values as arrays, and their means under every bootstrap draw.

    Draw 0 is the data themselves.
    """

    def __init__(
        self,
        models: Sequence[Model],
        keys: dict[str, list[Key]],
        draws: int,
        seed: int,
    ) -> None:
        self.models = models
        self.keys = keys
        generator = np.random.default_rng(seed)
        self.weights: dict[str, Floats] = {}
        for name, of in keys.items():
            drawn = generator.multinomial(len(of), [1 / len(of)] * len(of), size=draws)
            self.weights[name] = np.vstack([np.ones((1, len(of))), drawn]) / len(of)
        self._values: dict[tuple[str, str], Floats] = {}
        self._means: dict[tuple[str, str], Floats] = {}

    def values(self, metric: str, dataset: str) -> Floats:
        """Return (models, queries); nan where a figure is unknown."""
        if (metric, dataset) not in self._values:
            rows = [
                [getattr(model.queries[key], metric) for key in self.keys[dataset]]
                for model in self.models
            ]
            self._values[metric, dataset] = np.array(rows, dtype=float)
        return self._values[metric, dataset]

    def means(self, metric: str, dataset: str) -> Floats:
        """Return (draws + 1, models) means over queries, or over data sets."""
        if (metric, dataset) not in self._means:
            if dataset == "all":
                each = [self.means(metric, name) for name in self.keys]
                found: Floats = np.mean(each, axis=0)
            else:
                values = self.values(metric, dataset)
                found = self.weights[dataset] @ values.T
            self._means[metric, dataset] = found
        return self._means[metric, dataset]

    def metric(self, metric: str, dataset: str) -> Floats:
        with np.errstate(invalid="ignore", divide="ignore"):
            if metric == "saved":
                tokens = self.means("tokens", dataset)
                long = [n for n, m in enumerate(self.models) if m.role == "long"]
                if not long:
                    return np.full_like(tokens, np.nan)
                saved: np.ndarray = 1 - tokens / tokens[:, long]
                return saved
            if metric == "closed":
                closed = self.means("closed", dataset)
                share: np.ndarray = closed / self.means("thinking", dataset)
                return share
            return self.means(metric, dataset)

    def rows(self, dataset: str) -> dict[str, dict[str, Estimate]]:
        found: dict[str, dict[str, Estimate]] = {m.name: {} for m in self.models}
        for metric in METRICS:
            values = self.metric(metric, dataset)
            for n, model in enumerate(self.models):
                found[model.name][metric] = estimate(values[:, n])
        return found

    def medians(self, dataset: str) -> dict[str, float | None]:
        names = list(self.keys) if dataset == "all" else [dataset]
        found: dict[str, float | None] = {}
        for model in self.models:
            figures = [model.queries[key] for name in names for key in self.keys[name]]
            counts = [count for f in figures for count in f.counts]
            known = all(f.tokens is not None for f in figures)
            found[model.name] = float(np.median(counts)) if known and counts else None
        return found


def estimate(values: Floats) -> Estimate:
    """Return the first value with the 95 % interval of the others."""
    if not np.isfinite(values[0]):
        return Estimate(None)
    drawn = values[1:][np.isfinite(values[1:])]
    if not len(drawn):
        return Estimate(float(values[0]))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(float(values[0]), float(low), float(high))


def _strata(
    models: Sequence[Model], keys: dict[str, list[Key]], by: str | None
) -> dict[Key, str]:
    """Return the group of every query: a field's value, or a quarter by tokens."""
    first = models[0]
    flat = [key for of in keys.values() for key in of]
    if by is not None:
        found = {key: first.queries[key].source.get(by) for key in flat}
        if set(found.values()) == {None}:
            known = sorted({name for key in flat for name in first.queries[key].source})
            raise RpamError(
                f"--by: no query has a field '{by}'. Known: {', '.join(known)}."
            )
        return {key: str(value) for key, value in found.items()}
    tokens = [first.queries[key].tokens for key in flat]
    if any(count is None for count in tokens):
        return {}
    counts = np.array(tokens, dtype=float)
    edges = np.quantile(counts, [0, 0.25, 0.5, 0.75, 1])
    places = np.clip(np.searchsorted(edges, counts, side="left"), 1, 4)
    return {
        key: f"{edges[place - 1]:.0f} to {edges[place]:.0f}"
        for key, place in zip(flat, places, strict=True)
    }


def _by_stratum(
    models: Sequence[Model], labels: dict[Key, str]
) -> dict[str, dict[str, tuple[float, float | None, float]]]:
    groups: dict[str, list[Key]] = {}
    for key, label in labels.items():
        groups.setdefault(label, []).append(key)
    found: dict[str, dict[str, tuple[float, float | None, float]]] = {}
    for label in sorted(groups, key=_natural):
        found[label] = {}
        for model in models:
            if model.role == "sweep":
                continue
            figures = [model.queries[key] for key in groups[label]]
            tokens = [f.tokens for f in figures]
            known = [count for count in tokens if count is not None]
            found[label][model.name] = (
                float(np.mean([f.accuracy for f in figures])),
                float(np.mean(known)) if len(known) == len(tokens) else None,
                float(np.mean([f.thinking for f in figures])),
            )
    return found


def _natural(label: str) -> tuple[float, str]:
    try:
        return float(label.split()[0]), label
    except (ValueError, IndexError):
        return float("inf"), label
