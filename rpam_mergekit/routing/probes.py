"""Queries that are measured, not solved on: through the merged layers at every scale.

A probe has the experts' streams as any batch has, and one merged stream per scale of
the solved coefficients (`figures.SCALES`). When all layers are behind them, final norm
and head give the log-probabilities of the positive expert's response.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass

import torch

from rpam_mergekit.chat.prompts import Batch, EncodedQuery
from rpam_mergekit.formats.coefficients import scaled
from rpam_mergekit.formats.operating_point import OperatingPoint
from rpam_mergekit.processes import Processes
from rpam_mergekit.replay.activations import StoredList
from rpam_mergekit.replay.decoder import Decoder
from rpam_mergekit.replay.layer_weights import LayerMerge, Weights
from rpam_mergekit.replay.streams import Stream
from rpam_mergekit.routing.figures import (
    SCALES,
    QueryFigures,
    choose_scale,
    routing_of,
    weighted_mean,
)

CHUNK = 256  # tokens whose logits are in memory at a time


class Probes:
    """The streams of the probes; `streams[i].merged` is not used, but `merged[i]`."""

    def __init__(self, streams: Sequence[Stream], batches: Sequence[Batch]) -> None:
        self.streams = streams
        self.batches = batches
        self.merged = [
            StoredList([stream.merged] * len(SCALES), stream.store)
            for stream in streams
        ]

    @torch.no_grad()
    def advance(
        self,
        decoder: Decoder,
        index: int,
        weights: LayerMerge,
        entries: Mapping[str, Weights],
        fixed: Container[str],
    ) -> None:
        """Send the merged streams through layer `index`, at every scale.

        entries: the layer's coefficient parts; fixed: the entries that the user has
        set, which are not scaled.
        """
        for number, scale in enumerate(SCALES):
            written = weights.written(
                {
                    name: parts if name in fixed else scaled(parts, scale)
                    for name, parts in entries.items()
                }
            )
            for stream, merged in zip(self.streams, self.merged, strict=True):
                merged[number] = decoder.replay(
                    index, written, merged[number], stream.calls[index]
                )


def opening_token(queries: Sequence[EncodedQuery]) -> int | None:
    """Return the token with which thinking is opened; None where none tells it.

    The most common one, where there are several. Of gpt-oss, whose answers begin with
    the same token as its thoughts, the first token says nothing.
    """
    responding = [query for query in queries if query.responds]
    tokens = Counter(q.ids[q.prompt_tokens] for q in responding if q.opening)
    if not tokens:
        return None
    token = tokens.most_common(1)[0][0]
    at_once = [q.ids[q.prompt_tokens] for q in responding if not q.opening]
    return None if token in at_once else token


def told_tokens(query: EncodedQuery, values: Sequence[float]) -> Sequence[float]:
    """Return the values of a response's tokens that what stands before them tells.

    Behind a jump it does not.
    """
    behind = {jump - query.prompt_tokens for jump in query.jumps}
    return [value for n, value in enumerate(values) if n not in behind]


@dataclass(frozen=True)
class Head:
    """What makes logits of hidden states: a decoder, and weights outside its layers."""

    decoder: Decoder
    outside: Weights

    @torch.no_grad()
    def figures(
        self,
        hidden: torch.Tensor,
        queries: Sequence[EncodedQuery],
        end: int | None,
        opening: int | None,
        experts: Sequence[int] | None,
    ) -> tuple[list[QueryFigures], list[int]]:
        """Return the figures of a batch's queries, and the likeliest first tokens.

        hidden: (queries, tokens, width), what the last layer returned. end: the end
        token. opening: the token that opens thinking. experts: the likeliest first
        tokens of the positive experts, None where these are the experts.
        """
        positions, targets, counts = [], [], []
        for row, query in enumerate(queries):
            following = [*query.ids[query.prompt_tokens :]]
            if query.ended and end is not None:
                following.append(end)
            first = query.prompt_tokens - 1
            positions += [(row, first + n) for n in range(len(following))]
            targets += following
            counts.append(len(following))
        rows, columns = torch.tensor(positions, device=hidden.device).T
        found = self._log_probabilities(hidden[rows, columns], targets, opening)
        figures: list[QueryFigures] = []
        likeliest: list[int] = []
        for query, part in zip(queries, found.split(counts), strict=True):
            values, tokens, odds = part[:, 0].tolist(), part[:, 1], part[:, 2]
            token = int(tokens[0])
            place = len(likeliest)
            likeliest.append(token)
            expert = token if experts is None else experts[place]
            told = told_tokens(query, values)
            figures.append(
                QueryFigures(
                    pattern=query.pattern,
                    first=values[0],
                    closing=values[query.closing - query.prompt_tokens]
                    if query.closing is not None
                    else None,
                    end=values[-1] if query.ended and end is not None else None,
                    body=sum(told) / len(told),
                    opening=float(odds[0]) if opening is not None else None,
                    routed=token == expert
                    if opening is None
                    else (token == opening) == bool(query.opening),
                )
            )
        return figures, likeliest

    def _log_probabilities(
        self, hidden: torch.Tensor, targets: Sequence[int], opening: int | None
    ) -> torch.Tensor:
        """Return (tokens, 3): of the target, the likeliest token, odds of opening."""
        parts = []
        wanted = torch.tensor(targets, device=hidden.device)
        for states, ids in zip(hidden.split(CHUNK), wanted.split(CHUNK), strict=True):
            logits = self.decoder.logits(self.outside, states)
            if logits.device.type == "mps":  # which has no float64
                logits, ids = logits.cpu(), ids.cpu()
            logs = logits.double().log_softmax(-1)
            of_targets = logs.gather(1, ids[:, None])[:, 0]
            odds = torch.zeros_like(of_targets)
            if opening is not None:
                opens = logs[:, opening]
                odds = opens - torch.log1p(-opens.exp().clamp(max=1 - 1e-15))
            parts.append(torch.stack([of_targets, logs.argmax(-1).double(), odds], 1))
        return torch.cat(parts).cpu()


class Measurement:
    """Measures probes that are behind all layers.

    outside: returns the weights outside the layers of an expert by its number, or those
    of the merge (None).
    """

    def __init__(
        self,
        decoder: Decoder,
        probes: Probes,
        outside: Callable[[int | None], Weights],
        end: int | None,
        processes: Processes,
    ) -> None:
        self.decoder = decoder
        self.probes = probes
        self.outside = outside
        self.end = end
        self.processes = processes
        self.opening = opening_token([q for b in probes.batches for q in b.queries])

    def operating_point(self, held_out: int) -> OperatingPoint:
        """Return the scale that the first `held_out` batches choose, and its routing.

        The other batches are of queries that were solved on.
        """
        experts, likeliest = self._experts()
        head = Head(self.decoder, self.outside(None))
        merged = [
            [
                self._figures(head, number, states[scale], likeliest[number])[0]
                for number, states in enumerate(self.probes.merged)
            ]
            for scale in range(len(SCALES))
        ]
        chosen = [_flat(of_scale[:held_out]) for of_scale in merged]
        patterns = [figures.pattern for figures in chosen[0]]
        scores = [[figures.score for figures in of_scale] for of_scale in chosen]
        best = choose_scale(scores, patterns)
        return OperatingPoint(
            scale=SCALES[best],
            scores={
                str(scale): weighted_mean(of_scale, patterns)
                for scale, of_scale in zip(SCALES, scores, strict=True)
            },
            held_out=routing_of(chosen[best], _flat(experts[:held_out])),
            solved=routing_of(
                _flat(merged[best][held_out:]), _flat(experts[held_out:])
            ),
        )

    def _experts(self) -> tuple[list[list[QueryFigures]], list[list[int]]]:
        """Return the positive experts' figures by batch, and their first tokens."""
        figures: list[dict[int, QueryFigures]] = [{} for _ in self.probes.batches]
        tokens: list[dict[int, int]] = [{} for _ in self.probes.batches]
        for expert in range(len(self.probes.streams[0].experts)):
            head = Head(self.decoder, self.outside(expert))
            for number, stream in enumerate(self.probes.streams):
                found, first = self._figures(head, number, stream.experts[expert], None)
                patterns = self.processes.gather(stream.patterns, stream.queries)
                for row in (patterns == expert).nonzero().flatten().tolist():
                    figures[number][row], tokens[number][row] = found[row], first[row]
        in_order = [[of[row] for row in sorted(of)] for of in figures]
        return in_order, [[of[row] for row in sorted(of)] for of in tokens]

    def _figures(
        self,
        head: Head,
        number: int,
        hidden: torch.Tensor,
        likeliest: Sequence[int] | None,
    ) -> tuple[list[QueryFigures], list[int]]:
        """Return one batch's figures, of all processes' queries."""
        queries = self.probes.batches[number].queries
        mine = self.processes.share(len(queries))
        found: tuple[list[QueryFigures], list[int]] = ([], [])
        if mine.start < mine.stop:
            found = head.figures(
                hidden,
                queries[mine],
                self.end,
                self.opening,
                None if likeliest is None else likeliest[mine],
            )
        return self.processes.collect(found[0]), self.processes.collect(found[1])


def _flat(figures: Sequence[Sequence[QueryFigures]]) -> list[QueryFigures]:
    return [one for of_batch in figures for one in of_batch]
