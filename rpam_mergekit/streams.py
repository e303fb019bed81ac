"""The calibration set on its way through the layers: three streams of hidden states.

Each expert's stream runs on its own outputs, the merged one on the merged model's. Per
query one expert is positive, the one that the query's pattern names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from rpam_mergekit.activations import OnShelf, Shelf
from rpam_mergekit.calls import Call
from rpam_mergekit.objective import (
    contrastive,
    distance,
    per_query,
    token_weights,
)
from rpam_mergekit.parallel import Processes
from rpam_mergekit.prompts import Batch
from rpam_mergekit.settings import RpamSettings

ALONE = Processes()


class Stream:
    """This process's queries of one batch.

    Hidden states are float32 (queries, tokens, width) and lie on the shelf.

    calls: every layer's call, as recorded.
    counted: bool (queries, tokens), false on padding.
    other_is_positive: bool (queries,).
    token_weights: (queries, tokens), of single tokens; zero on padding.
    shares: (queries, tokens), the same scaled so that a query weighs the same whatever
        its length and all batches' sum to 1.
    queries: of the whole batch, all processes' together.
    """

    base = OnShelf()
    other = OnShelf()
    merged = OnShelf()

    def __init__(
        self,
        *,
        calls: Sequence[Call],
        base: torch.Tensor,
        other: torch.Tensor,
        merged: torch.Tensor,
        counted: torch.Tensor,
        other_is_positive: torch.Tensor,
        token_weights: torch.Tensor,
        shares: torch.Tensor,
        queries: int | None = None,
        shelf: Shelf | None = None,
    ) -> None:
        self.shelf = shelf or Shelf()
        self.calls = calls
        self.base, self.other, self.merged = base, other, merged
        self.counted = counted
        self.other_is_positive = other_is_positive
        self.token_weights = token_weights
        self.shares = shares
        self.queries = len(counted) if queries is None else queries

    @property
    def positive(self) -> torch.Tensor:
        """Hidden states of the expert that each query's pattern names."""
        chosen = self.other_is_positive[:, None, None]
        return torch.where(chosen, self.other, self.base)

    @property
    def negative(self) -> torch.Tensor:
        """Hidden states of the other expert."""
        chosen = self.other_is_positive[:, None, None]
        return torch.where(chosen, self.base, self.other)


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


def expert_distance(streams: Sequence[Stream], processes: Processes = ALONE) -> float:
    """Return the experts' squared distance, weighed by the streams' `shares`."""
    apart = (distance(s.base, s.other, s.shares) for s in streams)
    return max(_total(apart, processes), 1e-30)


def divergence(streams: Sequence[Stream], processes: Processes = ALONE) -> float:
    """Return the experts' squared distance relative to their mean squared length.

    0 where both have the same hidden states; weighed by the streams' `shares`.
    """
    lengths = (
        distance(expert, torch.zeros_like(expert), stream.shares) / 2
        for stream in streams
        for expert in (stream.base, stream.other)
    )
    return expert_distance(streams, processes) / max(_total(lengths, processes), 1e-30)


def gap(
    streams: Sequence[Stream],
    merged: Iterable[torch.Tensor],
    processes: Processes = ALONE,
) -> float:
    """Return how far `merged` is from the positive experts, 1 being the negative ones.

    `merged` are hidden states like the streams' own.
    """
    apart = (
        distance(hidden, stream.positive, stream.shares)
        for hidden, stream in zip(merged, streams, strict=True)
    )
    return _total(apart, processes) / expert_distance(streams, processes)


def _total(distances: Iterable[torch.Tensor], processes: Processes) -> float:
    """Return the sum over streams and processes, in double precision."""
    found = list(distances)
    device = found[0].device
    on = "cpu" if device.type == "mps" else device  # which has no float64
    return float(processes.sum(torch.stack(found).to(on, torch.float64).sum()))


def objective(
    stream: Stream,
    hidden: torch.Tensor,
    scale: float,
    batches: int,
    settings: RpamSettings,
    processes: Processes = ALONE,
) -> torch.Tensor:
    """Return a batch's objective (eq. 5): alignment of `hidden`, and contrast.

    `scale` is the experts' distance over all `batches` batches, whose objectives have
    the whole set's as their mean. Differentiable in `hidden`. Of several processes
    each returns its queries' part of the sum.
    """
    positive = stream.positive
    if settings.alignment == "sum":
        loss = distance(hidden, positive, stream.token_weights)
    else:
        loss = distance(hidden, positive, stream.shares) / scale * batches
    if settings.contrastive_weight:
        # A process without queries of its own works on one that weighs nothing.
        mine = stream.shares.sum(dim=1) > 0
        patterns = processes.gather(stream.other_is_positive, stream.queries)
        terms = contrastive(
            hidden,
            positive.to(hidden.dtype),
            processes.gather(stream.negative, stream.queries).to(hidden.dtype),
            stream.counted,
            processes.gather(stream.counted, stream.queries),
            stream.other_is_positive[:, None] == patterns[None, :],
            settings.temperature,
        )
        loss = loss + settings.contrastive_weight * (
            terms.masked_fill(~mine, 0).sum() / stream.queries
        )
    return loss
