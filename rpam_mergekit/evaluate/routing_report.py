"""What is said of an operating point: does the merge route; if not, what to change."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rpam_mergekit.routing.figures import ROUTES, TELLS_APART
from rpam_mergekit.text import aligned

HEAVY = 0.5  # of a query's objective on one token, from which it is said
FINE = ("low_rank", "element")  # granularities with room to tell patterns apart
CLOSES = 0.1  # nats by which the closing tag may be less likely than Long's
NOTE = (
    "routed: share of queries that open thinking just where the right expert does "
    "(where none opens it, whose most likely first token is that expert's); in "
    "brackets: the log-likelihood by that expert itself"
)
NOT_MEASURED = (
    "whether the merge routes was not measured: no calibration query was held out "
    "(parameters.held_out; it takes 64 queries of every pattern with responses)"
)


def summary(point: Mapping[str, Any]) -> str:
    """Return an operating point's record in one sentence."""
    found = point.get("held_out")
    if not found:
        return NOT_MEASURED
    queries, routed = _routed(found)
    text = f"routes {routed:.0%} of {queries} held-out queries"
    if found.get("area") is None:
        text = f"begins {routed:.0%} of {queries} held-out queries as the right expert"
    closing = _closing(found)
    if closing is not None:
        text += (
            ", closes its thinking as Long does"
            if closing > -CLOSES
            else f", closes its thinking less surely than Long ({closing:+.2f} nats)"
        )
    return text


def warnings(
    point: Mapping[str, Any],
    layers: Sequence[Mapping[str, Any]],
    granularity: str | None = None,
) -> list[str]:
    """Return what is wrong with a merge, each with what to change.

    granularity: that of the merge, None if unknown; it is not advised to take it.
    """
    found: list[str] = []
    heavy = [r["layer"] for r in layers if r.get("heaviest_token", 0.0) > HEAVY]
    if heavy:
        found.append(
            f"in {len(heavy)} of {len(layers)} layers more than half of the objective "
            "lies on one token of a query (massive activations): the gap says little "
            "there. Try parameters.token_scale: length (or capped, if it was none)."
        )
    held_out = point.get("held_out")
    if not held_out or held_out.get("area") is None:
        return found
    wrong = {
        pattern: figures
        for pattern, figures in held_out["patterns"].items()
        if _falls_short(figures)
    }
    if not wrong:
        return found
    shown = ", ".join(f"{f['routed']:.0%} of '{p}'" for p, f in wrong.items())
    text = f"THE MERGE DOES NOT ROUTE: of the held-out queries it routes {shown}. "
    area = held_out["area"]
    if area >= TELLS_APART:
        way = "raise" if "long" in wrong else "lower"
        found.append(
            f"{text}It tells the patterns apart (area under the curve {area:.2f}), but "
            f"its threshold is wrong: {way} parameters.reasoning (no new pre-pass)."
        )
    else:
        finer = "" if granularity in FINE else "use granularity low_rank or element, "
        found.append(
            f"{text}It cannot tell the patterns apart (area under the curve "
            f"{area:.2f}): raise parameters.steps (or epochs, if they are given), "
            f"{finer}or take more calibration queries; if the queries' labels are "
            "noisy, no setting helps."
        )
    return found


def _falls_short(figures: Mapping[str, Any]) -> bool:
    """Return whether a pattern is routed worse than `ROUTES`, beyond its error.

    Of 16 queries a share has an error of up to 12 points.
    """
    routed: float = figures["routed"]
    queries: int = figures["queries"]
    return routed + math.sqrt(routed * (1 - routed) / queries) < ROUTES


def table(point: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return heading and rows of the routing by pattern, held out and solved on."""
    head = ["queries", "pattern", "count", "routed", "log-likelihood of: first token"]
    head += ["closing tag", "end", "a token"]
    rows: list[list[str]] = []
    for which, name in (("held_out", "held out"), ("solved", "solved on")):
        for pattern, figures in (
            (point.get(which) or {}).get("patterns") or {}
        ).items():
            rows.append(
                [
                    name,
                    pattern,
                    str(figures["queries"]),
                    f"{figures['routed']:.0%}",
                    *(
                        _beside(figures[key], figures["expert"][key])
                        for key in ("first", "closing", "end", "body")
                    ),
                ]
            )
    return head, rows


def closing_text(
    point: Mapping[str, Any],
    layers: Sequence[Mapping[str, Any]],
    granularity: str | None = None,
) -> str:
    """Return all that is said of an operating point when the pre-pass ends."""
    lines = []
    if point.get("held_out"):
        head, rows = table(point)
        lines += [*aligned([head, *rows]), NOTE, operating_point(point)]
    lines.append(summary(point))
    lines += [f"warning: {text}" for text in warnings(point, layers, granularity)]
    return "\n".join(lines)


def operating_point(point: Mapping[str, Any]) -> str:
    """Return the scale and how well the queries are told apart, in one line."""
    area = (point.get("held_out") or {}).get("area")
    order = "" if area is None else f"; area under the curve {area:.2f}"
    return f"operating point: solved coefficients times {point['scale']:g}{order}"


def _routed(found: Mapping[str, Any]) -> tuple[int, float]:
    patterns = found["patterns"].values()
    count = sum(p["queries"] for p in patterns)
    return count, sum(p["routed"] * p["queries"] for p in patterns) / count


def _closing(found: Mapping[str, Any]) -> float | None:
    """Return how much more likely the closing tag is than by Long; None if unknown."""
    figures = found["patterns"].get("long")
    if figures is None or figures["closing"] is None:
        return None
    return float(figures["closing"] - figures["expert"]["closing"])


def _beside(value: float | None, expert: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" + (f" ({expert:.2f})" if expert is not None else "")
