"""The operating point of a merge: how its coefficients are scaled, how it routes there.

Part of the coefficients file and of `rpam.json`, as JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class PatternRouting:
    """Means over the queries of one pattern; `expert` is of its positive expert.

    routed: the share of queries that are routed right. first, closing, end, body: see
    `QueryFigures`.
    """

    queries: int
    routed: float
    first: float
    closing: float | None
    end: float | None
    body: float
    expert: Mapping[str, float | None]


@dataclass(frozen=True)
class Routing:
    """What the merged model does on one set of queries.

    area: how well the log odds of opening order the queries that are to be thought
    about before the others, 0.5 by chance; None where no pattern opens thinking.
    """

    patterns: Mapping[str, PatternRouting]
    area: float | None

    @property
    def routed(self) -> float:
        """The share of all queries that are routed right."""
        count = sum(p.queries for p in self.patterns.values())
        return sum(p.routed * p.queries for p in self.patterns.values()) / count

    @property
    def queries(self) -> int:
        """How many queries there are."""
        return sum(p.queries for p in self.patterns.values())

    def record(self) -> dict[str, Any]:
        """Return it as JSON."""
        return asdict(self)


@dataclass(frozen=True)
class OperatingPoint:
    """How the solved coefficients are scaled, and what was measured of it.

    scale: by which the coefficients of the decoder layers are multiplied. scores: per
    scale tried, the mean score of the held-out queries. held_out, solved: the routing
    there and on as many queries that were solved on; None where nothing was held out.
    """

    scale: float = 1.0
    scores: Mapping[str, float] | None = None
    held_out: Routing | None = None
    solved: Routing | None = None

    def record(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {
            "scale": self.scale,
            "scores": dict(self.scores) if self.scores else None,
            "held_out": self.held_out.record() if self.held_out else None,
            "solved": self.solved.record() if self.solved else None,
        }


def scale_of(point: Mapping[str, Any] | None, reasoning: float) -> float:
    """Return by what the solved coefficients are multiplied in the merge.

    point: the record of an `OperatingPoint`, None in files that have none. reasoning:
    the setting; it goes from the operating point to the base, the model that thinks, at
    1, and as far to the other side at -1.
    """
    return float((point or {}).get("scale", 1.0)) * (1 - reasoning)
