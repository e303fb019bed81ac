"""The calibration set on its way through the layers: streams of hidden states.

Each expert's stream runs on its own outputs, the merged one on the merged model's. Per
query one expert is positive, the one that the query's pattern names; the others are
negative.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch

from rpam_mergekit.activations import OnShelf, Shelf, ShelvedList
from rpam_mergekit.calls import Call
from rpam_mergekit.objective import (
    contrastive,
    distance,
    per_query,
    token_factors,
    token_weights,
    with_decisions,
)
from rpam_mergekit.parallel import Processes
from rpam_mergekit.prompts import Batch
from rpam_mergekit.settings import RpamSettings

ALONE = Processes()


class Stream:
    """This process's queries of one batch.

    Hidden states are float32 (queries, tokens, width) and lie on the shelf.

    experts: hidden states of the base model, then of the others.
    merged: those of the merged model.
    calls: every layer's call, as recorded.
    counted: bool (queries, tokens), false on padding.
    patterns: int64 (queries,), which of the experts is the positive one.
    token_weights: (queries, tokens), of single tokens; zero on padding.
    shares: (queries, tokens), the same scaled so that a query weighs the same whatever
        its length and all batches' sum to 1.
    weights: `shares`, by what a token's distance counts in this layer (`weigh_layer`).
    decisions: bool (queries, tokens), see `prompts.EncodedQuery.decisions`.
    prompt_ends: int64 (queries,), the prompts' last tokens. opens: bool (queries,),
        whether the response begins by opening its thinking.
    queries: of the whole batch, all processes' together.
    """

    merged = OnShelf()

    def __init__(
        self,
        *,
        calls: Sequence[Call],
        experts: Sequence[torch.Tensor],
        merged: torch.Tensor,
        counted: torch.Tensor,
        patterns: torch.Tensor,
        token_weights: torch.Tensor,
        shares: torch.Tensor,
        decisions: torch.Tensor | None = None,
        prompt_ends: torch.Tensor | None = None,
        opens: torch.Tensor | None = None,
        queries: int | None = None,
        shelf: Shelf | None = None,
    ) -> None:
        self.shelf = shelf or Shelf()
        self.calls = calls
        self.experts = ShelvedList(experts, self.shelf)
        self.merged = merged
        self.counted = counted
        self.patterns = patterns
        self.token_weights = token_weights
        self.shares = self.weights = shares
        self.decisions = torch.zeros_like(counted) if decisions is None else decisions
        none = torch.zeros_like(patterns)
        self.prompt_ends = none if prompt_ends is None else prompt_ends
        self.opens = none.bool() if opens is None else opens
        self.queries = len(counted) if queries is None else queries

    @property
    def positive(self) -> torch.Tensor:
        """Hidden states of the expert that each query's pattern names."""
        return self._of(self.patterns)

    @property
    def negatives(self) -> Iterator[torch.Tensor]:
        """Hidden states of the other experts, one of them for each query at a time."""
        for number in range(len(self.experts) - 1):
            yield self._of(number + (self.patterns <= number).long())

    def _of(self, expert: torch.Tensor) -> torch.Tensor:
        """Return for each query the hidden states of the expert of that number."""
        states = self.experts[0]
        for number in range(1, len(self.experts)):
            chosen = (expert == number)[:, None, None]
            states = torch.where(chosen, self.experts[number], states)
        return states


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
            batch.attention_mask.bool(), batch.deciding, settings.prompt_weight
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


def weigh_layer(
    streams: Sequence[Stream], form: str, processes: Processes = ALONE
) -> None:
    """Set the streams' `weights` by the lengths of the experts' hidden states.

    `form` is the setting `token_scale`. The usual squared length of a layer is the
    geometric mean over its tokens, which a few huge ones hardly move.
    """
    if form == "none":
        for stream in streams:
            stream.weights = stream.shares
        return
    lengths = [_squared_lengths(stream) for stream in streams]
    logs = [
        (length.clamp(min=1e-30).log() * stream.shares).sum()
        for stream, length in zip(streams, lengths, strict=True)
    ]
    mean = _total(logs, processes) / _total(
        [s.shares.sum() for s in streams], processes
    )
    for stream, length in zip(streams, lengths, strict=True):
        stream.weights = stream.shares * token_factors(length, math.exp(mean), form)


def _squared_lengths(stream: Stream) -> torch.Tensor:
    """Return the mean squared length of the experts' hidden states, by token."""
    lengths = [expert.square().sum(dim=-1) for expert in stream.experts]
    return torch.stack(lengths).mean(dim=0)


def heaviest_token(streams: Sequence[Stream], processes: Processes = ALONE) -> float:
    """Return what share of a query's objective lies on its heaviest token, on average.

    By the experts' distance, weighed as in the objective; the response's decisions,
    which are to be heavy, are left out.
    """
    found, count = [], 0
    for stream in streams:
        apart = torch.stack(
            [
                (stream.positive - negative).square().sum(dim=-1) * stream.weights
                for negative in stream.negatives
            ]
        ).sum(dim=0)
        heaviest = apart.masked_fill(stream.decisions, 0).amax(dim=1)
        share = heaviest / apart.sum(dim=1).clamp(min=1e-30)
        found.append((share * (stream.shares.sum(dim=1) > 0)).sum())
        count += stream.queries
    return _total(found, processes) / count


def expert_distance(streams: Sequence[Stream], processes: Processes = ALONE) -> float:
    """Return the experts' squared distance, weighed by the streams' `weights`.

    That of the positive from the negative expert, or its mean over several.
    """
    apart = (
        distance(stream.positive, negative, stream.weights) / (len(stream.experts) - 1)
        for stream in streams
        for negative in stream.negatives
    )
    return max(_total(apart, processes), 1e-30)


def divergence(streams: Sequence[Stream], processes: Processes = ALONE) -> float:
    """Return the experts' squared distance relative to their mean squared length.

    0 where both have the same hidden states; weighed by the streams' `weights`.
    """
    lengths = (
        distance(expert, torch.zeros_like(expert), stream.weights) / len(stream.experts)
        for stream in streams
        for expert in stream.experts
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
        distance(hidden, stream.positive, stream.weights)
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
        loss = distance(hidden, positive, stream.weights) / scale * batches
    if settings.contrastive_weight:
        # A process without queries of its own works on one that weighs nothing.
        mine = stream.shares.sum(dim=1) > 0
        patterns = processes.gather(stream.patterns, stream.queries)
        counted = processes.gather(stream.counted, stream.queries)
        negatives = [
            processes.gather(negative, stream.queries) for negative in stream.negatives
        ]
        terms = contrastive(
            hidden,
            positive.to(hidden.dtype),
            torch.cat(negatives).to(hidden.dtype),
            stream.counted,
            counted.repeat(len(negatives), 1),
            (stream.patterns[:, None] == patterns[None, :]).repeat(1, len(negatives)),
            settings.temperature,
        )
        loss = loss + settings.contrastive_weight * (
            terms.masked_fill(~mine, 0).sum() / stream.queries
        )
    return loss
