"""What is measured of all streams in a layer: objective, scale, gap, divergence.

The sums run over every process's queries, in double precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from rpam_mergekit.prepass.objective import contrastive, distance, token_factors
from rpam_mergekit.processes import Processes
from rpam_mergekit.replay.streams import Stream
from rpam_mergekit.settings import RpamSettings

ALONE = Processes()


def weigh_layer(
    streams: Sequence[Stream], form: str, processes: Processes = ALONE
) -> None:
    """Set the streams' `weights` by the lengths of the experts' hidden states.

    `form` is the setting `token_scale`. The usual squared length of a layer is the
    geometric mean over its tokens, which a few huge ones hardly move.
    """
    if form == "none":
        for stream in streams:
            stream.weights = stream.normalized_weights
        return
    lengths = [_squared_lengths(stream) for stream in streams]
    logs = [
        (length.clamp(min=1e-30).log() * stream.normalized_weights).sum()
        for stream, length in zip(streams, lengths, strict=True)
    ]
    mean = _total(logs, processes) / _total(
        [s.normalized_weights.sum() for s in streams], processes
    )
    for stream, length in zip(streams, lengths, strict=True):
        stream.weights = stream.normalized_weights * token_factors(
            length, math.exp(mean), form
        )


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
        found.append((share * (stream.normalized_weights.sum(dim=1) > 0)).sum())
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
        mine = stream.normalized_weights.sum(dim=1) > 0
        patterns = processes.gather(stream.patterns, stream.queries)
        counted = processes.gather(stream.is_token, stream.queries)
        negatives = [
            processes.gather(negative, stream.queries) for negative in stream.negatives
        ]
        terms = contrastive(
            hidden,
            positive.to(hidden.dtype),
            torch.cat(negatives).to(hidden.dtype),
            stream.is_token,
            counted.repeat(len(negatives), 1),
            (stream.patterns[:, None] == patterns[None, :]).repeat(1, len(negatives)),
            settings.temperature,
        )
        loss = loss + settings.contrastive_weight * (
            terms.masked_fill(~mine, 0).sum() / stream.queries
        )
    return loss
