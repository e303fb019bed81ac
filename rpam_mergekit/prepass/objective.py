"""A decoder layer's objective on hidden states: alignment and contrast (eqs. 5 and 6).

Shapes: hidden states (queries, tokens, width), weights and masks (queries, tokens).
Everything is computed in the dtype of the hidden states, float32 or float64.
"""

from __future__ import annotations

import torch


def opening_loss(logits: torch.Tensor, token: int, opens: torch.Tensor) -> torch.Tensor:
    """Return every query's cross-entropy of whether its thinking is opened.

    logits: (queries, vocabulary), where the response begins. token: that opens
    thinking. opens: bool (queries,), whether the response is to begin with it.
    """
    others = logits.clone()
    others[:, token] = float("-inf")
    odds = logits[:, token] - others.logsumexp(dim=1)
    return torch.nn.functional.softplus(torch.where(opens, -odds, odds))


CAP = 4.0  # times the usual squared length: twice as long


def token_factors(
    squared_lengths: torch.Tensor, usual: float, form: str
) -> torch.Tensor:
    """Return by what factor each token's squared distance counts.

    squared_lengths: (queries, tokens), of the experts' hidden states, their mean.
    usual: the usual squared length of the calibration set in this layer. form: the
    setting `token_scale`. Trained language models have tokens (the first one, some
    delimiters) whose hidden states are a hundred times as long as the others'; they
    would have most of a plain squared distance, though nothing is decided there.
    """
    if form == "none":
        return torch.ones_like(squared_lengths)
    relative = squared_lengths / usual
    if form == "length":
        return 1 / relative.clamp(min=1e-6)
    return CAP / relative.clamp(min=CAP)


def distance(
    first: torch.Tensor, second: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Return the squared distance of hidden states, summed with token `weights`."""
    return ((first - second).square().sum(dim=-1) * weights).sum()


def contrastive(
    merged: torch.Tensor,
    positive: torch.Tensor,
    negatives: torch.Tensor,
    is_token: torch.Tensor,
    counted_negatives: torch.Tensor,
    same_pattern: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """Return the InfoNCE term of every query; the batch's is their mean.

    For a query i it is ``-log(e(m_i, p_i) / (e(m_i, p_i) + sum_j e(m_i, n_j)))`` with
    ``e(a, b) = exp(cos(a, b) / temperature)``. The vectors are a query's hidden states
    over all its is_token tokens, end to end; `j` runs over the batch's queries of the
    same pattern (`same_pattern`, bool (queries, negatives)), whose negatives come from
    the same model. `negatives` and `counted_negatives` are of the whole batch, the
    others may be of a part of its queries.
    """
    m, p = (_unit(_end_to_end(states, is_token)) for states in (merged, positive))
    n = _unit(_end_to_end(negatives, counted_negatives))
    to_positive = (m * p).sum(dim=1) / temperature
    to_negatives = (m @ n.T) / temperature
    to_negatives = to_negatives.masked_fill(~same_pattern, float("-inf"))
    everything = torch.cat([to_positive.unsqueeze(1), to_negatives], dim=1)
    return everything.logsumexp(dim=1) - to_positive


def _end_to_end(states: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
    """Return each query's hidden states end to end, zero where not is_token."""
    return (states * is_token.unsqueeze(-1).to(states.dtype)).flatten(1)


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    lengths: torch.Tensor = vectors.norm(dim=1, keepdim=True)
    return vectors / lengths.clamp(min=1e-12)
