"""The calibration set on its way through the layers: three streams of hidden states.

Each expert's stream runs on its own outputs, the merged one on the merged model's. Per
query one expert is positive, the one that the query's pattern names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from rpam_mergekit.decoder import Call
from rpam_mergekit.objective import (
    contrastive,
    distance,
    per_query,
    token_weights,
)
from rpam_mergekit.prompts import Batch
from rpam_mergekit.settings import RpamSettings


@dataclass
class Stream:
    """One batch. Hidden states are float32 (queries, tokens, width).

    calls: every layer's call, as recorded.
    counted: bool (queries, tokens), false on padding.
    other_is_positive: bool (queries,).
    token_weights: (queries, tokens), of single tokens; zero on padding.
    shares: (queries, tokens), the same scaled so that a query weighs the same whatever
        its length and all batches' sum to 1.
    """

    calls: list[Call]
    base: torch.Tensor
    other: torch.Tensor
    merged: torch.Tensor
    counted: torch.Tensor
    other_is_positive: torch.Tensor
    token_weights: torch.Tensor
    shares: torch.Tensor
    positive: torch.Tensor = field(init=False)
    negative: torch.Tensor = field(init=False)

    def choose_experts(self) -> None:
        """Set `positive` and `negative`, the experts' hidden states by pattern."""
        chosen = self.other_is_positive[:, None, None]
        self.positive = torch.where(chosen, self.other, self.base)
        self.negative = torch.where(chosen, self.base, self.other)

    @property
    def same_pattern(self) -> torch.Tensor:
        """Bool (queries, queries): do two queries have the same pattern."""
        return self.other_is_positive[:, None] == self.other_is_positive[None, :]


def weigh_tokens(
    batches: Sequence[Batch], settings: RpamSettings
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return `token_weights` and `shares` of every batch, in float32.

    Queries of the pattern `long` have `settings.long_share` of the whole, however many
    there are of either.
    """
    patterns = [pattern for batch in batches for pattern in batch.patterns]
    factors = {
        pattern: share * len(patterns) / max(patterns.count(pattern), 1)
        for pattern, share in (
            ("long", settings.long_share),
            ("short", 1 - settings.long_share),
        )
    }
    weighed = []
    for batch in batches:
        factor = torch.tensor([factors[p] for p in batch.patterns]).unsqueeze(1)
        tokens = token_weights(
            batch.attention_mask.bool(), batch.deciding, settings.prompt_weight
        )
        weighed.append((tokens * factor, per_query(tokens) * factor / len(patterns)))
    return weighed


def expert_distance(streams: Sequence[Stream]) -> float:
    """Return the experts' squared distance, weighed by the streams' `shares`."""
    total = sum(float(distance(s.positive, s.negative, s.shares)) for s in streams)
    return max(total, 1e-30)


def divergence(streams: Sequence[Stream]) -> float:
    """Return the experts' squared distance relative to their mean squared length.

    0 where both have the same hidden states; weighed by the streams' `shares`.
    """
    apart = length = 0.0
    for stream in streams:
        apart += float(distance(stream.base, stream.other, stream.shares))
        for expert in (stream.base, stream.other):
            zero = torch.zeros_like(expert)
            length += float(distance(expert, zero, stream.shares)) / 2
    return apart / max(length, 1e-30)


def gap(streams: Sequence[Stream], merged: Sequence[torch.Tensor]) -> float:
    """Return how far `merged` is from the positive experts, 1 being the negative ones.

    `merged` are hidden states like the streams' own.
    """
    total = sum(
        float(distance(hidden, stream.positive, stream.shares))
        for hidden, stream in zip(merged, streams, strict=True)
    )
    return total / expert_distance(streams)


def objective(
    stream: Stream,
    hidden: torch.Tensor,
    scale: float,
    batches: int,
    settings: RpamSettings,
) -> torch.Tensor:
    """Return a batch's objective (eq. 5): alignment of `hidden`, and contrast.

    `scale` is the experts' distance over all `batches` batches, whose objectives have
    the whole set's as their mean. Differentiable in `hidden`.
    """
    if settings.alignment == "sum":
        loss = distance(hidden, stream.positive, stream.token_weights)
    else:
        loss = distance(hidden, stream.positive, stream.shares) / scale * batches
    if settings.contrastive_weight:
        loss = loss + settings.contrastive_weight * contrastive(
            hidden,
            stream.positive.to(hidden.dtype),
            stream.negative.to(hidden.dtype),
            stream.counted,
            stream.same_pattern,
            settings.temperature,
        )
    return loss
