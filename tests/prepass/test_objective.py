"""The losses against hand-computed cases, differences, and padding."""

from __future__ import annotations

import math

import torch

from rpam_mergekit.prepass.objective import contrastive, distance
from rpam_mergekit.replay.token_weights import per_query, token_weights

DOUBLE = torch.float64


def test_every_query_weighs_the_same_whatever_its_length():
    is_token = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]], dtype=torch.bool)
    merged = torch.tensor([[[2.0]] * 4, [[2.0]] * 4])
    positive = torch.zeros_like(merged)
    assert distance(merged, positive, per_query(is_token.float())) == 4 + 4
    assert distance(merged, positive, is_token.float()) == 4 * 4 + 4


def test_prompt_tokens_weigh_what_they_are_given_and_padding_nothing():
    is_token = torch.tensor([[1, 1, 1, 1, 0]]).bool()
    predicts_response = torch.tensor([[0, 0, 1, 1, 0]]).bool()
    weights = token_weights(is_token, predicts_response, prompt_weight=0.25)
    assert torch.equal(weights, torch.tensor([[0.25, 0.25, 1.0, 1.0, 0.0]]))
    assert torch.equal(per_query(weights), weights / 2.5)
    only = token_weights(is_token, predicts_response, prompt_weight=0.0)
    assert torch.equal(only, torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.0]]))


def test_contrastive_of_a_hand_computed_case():
    # One query of two tokens; angles to positive and negative of 60 and 90 degrees.
    merged = torch.tensor([[[2.0, 0.0], [0.0, 0.0]]], dtype=DOUBLE)
    positive = torch.tensor([[[1.0, 0.0], [math.sqrt(3), 0.0]]], dtype=DOUBLE)
    negative = torch.tensor([[[0.0, 5.0], [0.0, 0.0]]], dtype=DOUBLE)
    is_token = torch.ones(1, 2, dtype=torch.bool)
    same = torch.ones(1, 1, dtype=torch.bool)
    value = contrastive(
        merged, positive, negative, is_token, is_token, same, temperature=0.5
    )
    expected = -math.log(math.exp(0.5 / 0.5) / (math.exp(0.5 / 0.5) + math.exp(0.0)))
    assert math.isclose(value.item(), expected, rel_tol=1e-12)


def test_negatives_are_those_of_the_batch_and_the_same_pattern():
    merged = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]], dtype=DOUBLE)
    negative = torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]]], dtype=DOUBLE)
    is_token = torch.ones(2, 1, dtype=torch.bool)
    alone = contrastive(
        merged,
        merged,
        negative,
        is_token,
        is_token,
        torch.eye(2, dtype=torch.bool),
        1.0,
    )
    both = contrastive(
        merged,
        merged,
        negative,
        is_token,
        is_token,
        torch.ones(2, 2, dtype=torch.bool),
        1.0,
    )
    e = math.e
    assert math.isclose(alone.mean().item(), -math.log(e / (e + 1)), rel_tol=1e-12)
    assert math.isclose(both.mean().item(), -math.log(e / (e + 1 + e)), rel_tol=1e-12)


def example(tokens: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(3, tokens, 4, generator=generator, dtype=DOUBLE) for _ in range(3)
    )


def test_gradients_equal_finite_differences():
    merged, positive, negative = example(5)
    is_token = torch.tensor([[1] * 5, [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]).bool()
    same = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1]]).bool()
    weights = per_query(is_token.to(DOUBLE))

    def objective(hidden: torch.Tensor) -> torch.Tensor:
        terms = contrastive(hidden, positive, negative, is_token, is_token, same, 0.1)
        return distance(hidden, positive, weights) + terms.mean()

    assert torch.autograd.gradcheck(objective, merged.clone().requires_grad_())


def test_padding_changes_nothing():
    merged, positive, negative = example(5)
    is_token = torch.ones(3, 5, dtype=torch.bool)
    same = torch.ones(3, 3, dtype=torch.bool)
    noise = torch.full((3, 7, 4), 1e3, dtype=DOUBLE)
    padded = [torch.cat([x, noise], dim=1) for x in (merged, positive, negative)]
    padded[0] = padded[0] * 1.5 - 0.5 * torch.cat([merged, noise * 0], dim=1)
    mask = torch.cat([is_token, torch.zeros(3, 7, dtype=torch.bool)], dim=1)
    plain = contrastive(merged, positive, negative, is_token, is_token, same, 0.1)
    torch.testing.assert_close(plain, contrastive(*padded, mask, mask, same, 0.1))
    torch.testing.assert_close(
        distance(merged, positive, per_query(is_token.float())),
        distance(padded[0], padded[1], per_query(mask.float())),
    )


def test_an_all_zero_hidden_state_is_not_a_nan():
    zero = torch.zeros(1, 2, 3, requires_grad=True)
    one = torch.ones(1, 2, 3)
    same = torch.ones(1, 1, dtype=torch.bool)
    is_token = torch.ones(1, 2).bool()
    value = contrastive(zero, one, one, is_token, is_token, same, 0.1)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(zero.grad).all()


def test_the_terms_of_a_part_of_the_queries_are_those_of_the_whole_batch():
    merged, positive, negative = example(5)
    is_token = torch.tensor([[1] * 5, [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]).bool()
    same = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1]]).bool()
    whole = contrastive(merged, positive, negative, is_token, is_token, same, 0.1)
    part = contrastive(
        merged[1:], positive[1:], negative, is_token[1:], is_token, same[1:], 0.1
    )
    torch.testing.assert_close(part, whole[1:])
