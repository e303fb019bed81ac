"""Which queries are held out of the solving."""

from __future__ import annotations

import pytest

from rpam_mergekit.chat.prompts import EncodedQuery
from rpam_mergekit.routing.holdout import as_many, split_queries


def queries(long: int, short: int, responds: bool = True) -> list[EncodedQuery]:
    return [
        EncodedQuery((n, *(1,) * responds), 1, pattern)
        for pattern, count in (("long", long), ("short", short))
        for n in range(count)
    ]


def counts(of) -> tuple[int, int]:
    return tuple(sum(q.pattern == p for q in of) for p in ("long", "short"))


@pytest.mark.parametrize(
    ("long", "short", "held"),
    [(512, 512, (51, 51)), (64, 100, (16, 16)), (400, 64, (40, 16)), (63, 512, (0, 0))],
)
def test_a_tenth_is_held_out_but_16_at_least_and_none_below_64(long, short, held):
    every = queries(long, short)
    solving, out = split_queries(every, 0.1, seed=0)
    assert counts(out) == held
    assert sorted(solving + out, key=str) == sorted(every, key=str)


def test_nothing_is_held_out_where_it_is_not_asked_for():
    assert split_queries(queries(100, 100), 0.0, seed=0)[1] == []


def test_queries_without_a_response_are_solved_on():
    """Nothing could be measured on them."""
    assert split_queries(queries(100, 100, responds=False), 0.1, seed=0)[1] == []


def test_the_draw_is_seeded():
    every = queries(100, 100)
    assert split_queries(every, 0.1, 0) == split_queries(every, 0.1, 0)
    assert split_queries(every, 0.1, 0) != split_queries(every, 0.1, 1)


def test_as_many_are_drawn_from_those_solved_on():
    solving, out = split_queries(queries(100, 200), 0.1, seed=0)
    drawn = as_many(solving, out, seed=0)
    assert counts(drawn) == counts(out)
    assert all(query in solving for query in drawn)
    assert len(set(drawn)) == len(drawn)
