"""Which calibration queries are held out of the solving."""

from __future__ import annotations

import random
from collections.abc import Sequence

from rpam_mergekit.chat.prompts import EncodedQuery

FEWEST = 16  # of a pattern, where any are held out
NEEDED = 64  # of every pattern; with fewer, all are needed for the solving


def split_queries(
    queries: Sequence[EncodedQuery], share: float, seed: int
) -> tuple[list[EncodedQuery], list[EncodedQuery]]:
    """Return the queries to solve on, and those held out, in their order.

    Of every pattern `share` is held out, `FEWEST` at least, drawn with a generator of
    its own seeded by `seed`; none where a pattern has fewer than `NEEDED` queries with
    a response, which is what is measured.
    """
    patterns: dict[str, list[int]] = {}
    for number, query in enumerate(queries):
        patterns.setdefault(query.pattern, [])
        if query.responds:
            patterns[query.pattern].append(number)
    if not share or min(map(len, patterns.values()), default=0) < NEEDED:
        return list(queries), []
    held: set[int] = set()
    for pattern, numbers in patterns.items():
        count = max(FEWEST, round(share * len(numbers)))
        held.update(random.Random(f"held out/{seed}/{pattern}").sample(numbers, count))
    return (
        [query for number, query in enumerate(queries) if number not in held],
        [query for number, query in enumerate(queries) if number in held],
    )


def as_many(
    queries: Sequence[EncodedQuery], like: Sequence[EncodedQuery], seed: int
) -> list[EncodedQuery]:
    """Return queries with a response, as many of each pattern as `like` has, drawn."""
    chosen: list[EncodedQuery] = []
    for pattern in dict.fromkeys(query.pattern for query in like):
        count = sum(query.pattern == pattern for query in like)
        of_pattern = [q for q in queries if q.pattern == pattern and q.responds]
        drawn = random.Random(f"solved on/{seed}/{pattern}")
        chosen += drawn.sample(of_pattern, min(count, len(of_pattern)))
    return chosen
