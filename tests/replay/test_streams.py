"""How the calibration set is weighed, and the gap of known hidden states."""

from __future__ import annotations

import math

import torch

from rpam_mergekit.chat.prompts import EncodedQuery, make_batches
from rpam_mergekit.prepass.measures import expert_distance, gap
from rpam_mergekit.replay.streams import Stream
from rpam_mergekit.replay.token_weights import weigh_tokens
from rpam_mergekit.settings import RpamSettings

QUERIES = [
    EncodedQuery((5,) * 4, 3, "long"),
    EncodedQuery((5,) * 9, 3, "long"),
    EncodedQuery((5,) * 6, 3, "long"),
    EncodedQuery((5,) * 3, 2, "short"),
]


def weighed(**settings):
    parsed = RpamSettings(batch_size=3, **settings)
    batches = make_batches(QUERIES, parsed)
    return batches, weigh_tokens(batches, parsed)


def test_shares_sum_to_1_and_are_equal_within_a_pattern():
    batches, weights = weighed(long_share=0.5)
    by_query = [
        (pattern, float(share.sum()))
        for batch, (_, shares) in zip(batches, weights, strict=True)
        for pattern, share in zip(batch.patterns, shares, strict=True)
    ]
    assert math.isclose(sum(share for _, share in by_query), 1, rel_tol=1e-6)
    for pattern, share in by_query:
        expected = 0.5 / 3 if pattern == "long" else 0.5
        assert math.isclose(share, expected, rel_tol=1e-6)


def test_long_share_is_the_share_of_long_queries_however_many_there_are():
    batches, weights = weighed(long_share=0.8)
    long = sum(
        float(share.sum())
        for batch, (_, shares) in zip(batches, weights, strict=True)
        for pattern, share in zip(batch.patterns, shares, strict=True)
        if pattern == "long"
    )
    assert math.isclose(long, 0.8, rel_tol=1e-6)


def test_padding_has_no_share():
    batches, weights = weighed()
    for batch, (tokens, shares) in zip(batches, weights, strict=True):
        padding = batch.attention_mask == 0
        assert not tokens[padding].any()
        assert not shares[padding].any()


def stream() -> Stream:
    torch.manual_seed(0)
    base, other = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    counted = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    return Stream(
        calls=[],
        experts=[base, other],
        merged=base,
        is_token=counted,
        patterns=torch.tensor([1, 0]),
        token_weights=counted.float(),
        normalized_weights=counted / counted.sum(),
    )


def test_the_positive_expert_is_the_one_the_pattern_names():
    one = stream()
    base, other = one.experts
    (negative,) = one.negatives
    assert torch.equal(one.positive[0], other[0])
    assert torch.equal(one.positive[1], base[1])
    assert torch.equal(negative[0], base[0])
    assert torch.equal(negative[1], other[1])


def test_the_gap_is_0_at_the_positive_expert_and_1_at_the_negative():
    one = stream()
    assert gap([one], [one.positive]) == 0
    (negative,) = one.negatives
    assert math.isclose(gap([one], [negative]), 1, rel_tol=1e-6)
    half = (one.positive + negative) / 2
    assert math.isclose(gap([one], [half]), 0.25, rel_tol=1e-6)


def test_identical_experts_have_a_gap_of_0_and_not_a_nan():
    one = stream()
    one.experts[1] = one.experts[0]
    assert expert_distance([one]) > 0
    assert gap([one], [one.experts[0]]) == 0
