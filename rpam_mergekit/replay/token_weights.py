"""What every token of the calibration set weighs in the objective, layers aside."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from rpam_mergekit.chat.prompts import Batch
from rpam_mergekit.settings import RpamSettings


def weigh_tokens(
    batches: Sequence[Batch], settings: RpamSettings
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return `token_weights` and `shares` of every batch, in float32.

    Queries of the pattern `long` have `settings.long_share` of the whole, however many
    there are of each; the other patterns have equal shares of the rest.
    """
    patterns = [pattern for batch in batches for pattern in batch.patterns]
    factors = {
        pattern: share * len(patterns) / patterns.count(pattern)
        for pattern, share in pattern_shares(patterns, settings.long_share).items()
    }
    weighed = []
    for batch in batches:
        factor = torch.tensor([factors[p] for p in batch.patterns]).unsqueeze(1)
        tokens = token_weights(
            batch.attention_mask.bool(), batch.predicts_response, settings.prompt_weight
        )
        shares = with_decisions(
            per_query(tokens), batch.decisions, settings.decision_weight
        )
        weighed.append((tokens * factor, shares * factor / len(patterns)))
    return weighed


def pattern_shares(patterns: Iterable[str], long_share: float) -> dict[str, float]:
    """Return what share of the objective lies on the queries of each pattern."""
    found = sorted(set(patterns))
    if "long" not in found or len(found) == 1:
        return {pattern: 1 / len(found) for pattern in found}
    rest = (1 - long_share) / (len(found) - 1)
    return {pattern: long_share if pattern == "long" else rest for pattern in found}


def token_weights(
    is_token: torch.Tensor, predicts_response: torch.Tensor, prompt_weight: float
) -> torch.Tensor:
    """Return float32 weights: 1 where the response is predicted, else `prompt_weight`.

    Tokens that are not `is_token` (padding) weigh nothing.
    """
    weights = torch.where(predicts_response, 1.0, prompt_weight)
    return weights * is_token


def per_query(weights: torch.Tensor) -> torch.Tensor:
    """Return token weights scaled to sum to 1 over each query."""
    return weights / weights.sum(dim=1, keepdim=True)


def with_decisions(
    weights: torch.Tensor, decisions: torch.Tensor, share: float
) -> torch.Tensor:
    """Return weights of which `share` lies on a query's `decisions`, in equal parts.

    weights: (queries, tokens), of sum 1 over each query. decisions: bool, of the same
    shape; a query without any keeps its weights.
    """
    if not share:
        return weights
    each = decisions / decisions.sum(dim=1, keepdim=True).clamp(min=1)
    has = decisions.any(dim=1, keepdim=True)
    return torch.where(has, (1 - share) * weights + share * each, weights)
