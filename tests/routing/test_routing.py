"""Figures of routing from log-probabilities, the scale they choose, what is said."""

from __future__ import annotations

import pytest

from rpam_mergekit.evaluate.routing_report import closing_text, summary, warnings
from rpam_mergekit.formats.operating_point import OperatingPoint, scale_of
from rpam_mergekit.routing.figures import (
    AS_SOLVED,
    LEAST,
    SCALES,
    QueryFigures,
    area_under_curve,
    choose_scale,
    routing_of,
)

PATTERNS = ["long"] * 8 + ["short"] * 8


def figures(pattern="long", **changes) -> QueryFigures:
    values = {
        "pattern": pattern,
        "first": -0.1,
        "closing": -0.2 if pattern == "long" else None,
        "end": -0.05,
        "body": -0.3,
        "opening": 2.0 if pattern == "long" else -2.0,
        "routed": True,
    }
    return QueryFigures(**{**values, **changes})


def scores(best: int, by: float = 1.0) -> list[list[float]]:
    """Of all scales the same, but for one that is better on every query."""
    return [[by if n == best else 0.0] * len(PATTERNS) for n in range(len(SCALES))]


def test_the_score_is_the_decisions_and_the_mean_of_the_tokens():
    assert figures().score == pytest.approx(-0.1 - 0.2 - 0.05 - 0.3)
    assert figures("short").score == pytest.approx(-0.1 - 0.05 - 0.3)


def test_one_decision_that_is_all_wrong_does_not_outweigh_everything():
    assert figures(first=-40.0).score == pytest.approx(LEAST - 0.2 - 0.05 - 0.3)


def test_the_scale_that_predicts_best_is_chosen():
    for best in range(len(SCALES)):
        assert choose_scale(scores(best), PATTERNS) == best


def test_the_scale_as_solved_is_kept_where_another_is_better_by_chance_only():
    noisy = scores(2, 0.0)
    noisy[2] = [5.0, -4.8] * 8
    assert choose_scale(noisy, PATTERNS) == AS_SOLVED


def test_patterns_count_alike_however_many_queries_they_have():
    """One 'short' query loses 3, nine 'long' ones gain 1 each."""
    patterns = ["long"] * 9 + ["short"]
    found = [[0.0] * 10 for _ in SCALES]
    found[0] = [1.0] * 9 + [-3.0]
    assert choose_scale(found, patterns) == AS_SOLVED
    found[0] = [1.0] * 9 + [-0.1]
    assert choose_scale(found, patterns) == 0


def test_the_area_under_the_curve_is_the_share_of_pairs_in_order():
    assert area_under_curve([3, 4], [1, 2]) == 1
    assert area_under_curve([1, 2], [3, 4]) == 0
    assert area_under_curve([1, 3], [2, 2]) == 0.5
    assert area_under_curve([1], [1]) == 0.5


def test_routing_has_means_by_pattern_beside_the_experts():
    merged = [figures(), figures(routed=False, first=-1.1), figures("short")]
    experts = [figures(first=0.0), figures(first=0.0), figures("short", first=0.0)]
    found = routing_of(merged, experts)
    assert found.queries == 3
    assert found.routed == pytest.approx(2 / 3)
    assert found.area == 1
    long = found.patterns["long"]
    assert (long.queries, long.routed) == (2, 0.5)
    assert long.first == pytest.approx(-0.6)
    assert long.expert["first"] == 0
    assert found.patterns["short"].closing is None


def test_reasoning_goes_from_the_operating_point_to_the_model_that_thinks():
    point = OperatingPoint(scale=0.8).record()
    assert scale_of(point, 0) == 0.8
    assert scale_of(point, 1) == 0
    assert scale_of(point, 0.5) == pytest.approx(0.4)
    assert scale_of(point, -0.5) == pytest.approx(1.2)
    assert scale_of(None, 0) == 1  # files of before have no operating point


def point(routed=True, long=True, opening=2.0) -> dict:
    merged = [figures(routed=routed or not long, opening=opening)] * 4
    merged += [figures("short", routed=routed or long)] * 4
    experts = [figures(), figures("short")]
    return OperatingPoint(held_out=routing_of(merged, experts)).record()


def test_a_merge_that_routes_is_said_to_in_one_sentence():
    said = summary(point())
    assert said == (
        "routes 100% of 8 held-out queries, closes its thinking as Long does"
    )
    assert not warnings(point(), [])


@pytest.mark.parametrize(("long", "way"), [(True, "raise"), (False, "lower")])
def test_a_wrong_threshold_is_told_from_not_knowing(long, way):
    (said,) = warnings(point(routed=False, long=long), [])
    assert said.startswith("THE MERGE DOES NOT ROUTE")
    assert "tells the patterns apart (area under the curve 1.00)" in said
    assert f"{way} parameters.reasoning" in said


@pytest.mark.parametrize(("right", "said"), [(11, False), (10, True)])
def test_what_the_few_queries_cannot_tell_is_not_said(right, said):
    """11 of 16 may well be three in four; 10 of 16 are fewer."""
    merged = [figures()] * 16
    merged += [figures("short", routed=n < right) for n in range(16)]
    found = routing_of(merged, [figures(), figures("short")])
    assert bool(warnings(OperatingPoint(held_out=found).record(), [])) == said


def test_a_merge_that_cannot_tell_the_patterns_apart_says_so():
    (said,) = warnings(point(routed=False, opening=-2.0), [])
    assert "cannot tell the patterns apart (area under the curve 0.50)" in said
    assert "raise parameters.steps" in said
    assert "use granularity low_rank or element" in said


@pytest.mark.parametrize("granularity", ["low_rank", "element", "row", "layer"])
def test_a_granularity_that_is_there_already_is_not_advised(granularity):
    (said,) = warnings(point(routed=False, opening=-2.0), [], granularity)
    assert "more calibration queries" in said
    assert ("low_rank" in said) == (granularity in ("row", "layer"))
    record = point(routed=False, opening=-2.0)
    assert said in closing_text(record, [], granularity)


def test_nothing_is_said_where_no_token_tells_what_is_opened():
    """As of gpt-oss, whose answers begin with the same token as its thoughts."""
    merged = [figures(routed=False, opening=None)] * 4
    experts = [figures(opening=None)] * 4
    found = OperatingPoint(held_out=routing_of(merged, experts)).record()
    assert not warnings(found, [])
    assert summary(found).startswith("begins 0% of 4 held-out queries as the right")


def test_layers_whose_objective_lies_on_one_token_are_said():
    layers = [{"layer": n, "heaviest_token": 0.9 * (n > 1)} for n in range(4)]
    (said,) = warnings(OperatingPoint().record(), layers)
    assert said.startswith("in 2 of 4 layers more than half of the objective")
    assert "parameters.token_scale" in said


def test_what_was_not_measured_is_said():
    text = closing_text(OperatingPoint().record(), [])
    assert "not measured" in text
    assert "parameters.held_out" in text


def test_the_closing_text_has_both_sets_and_the_experts_beside():
    found = routing_of([figures(), figures("short")], [figures(), figures("short")])
    text = closing_text(OperatingPoint(held_out=found, solved=found).record(), [])
    assert text.count("held out") == 2
    assert text.count("solved on") == 2
    assert "-0.20 (-0.20)" in text
    assert "coefficients times 1; area under the curve 1.00" in text
