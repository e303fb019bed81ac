"""The calibration set enters the decoder: every batch recorded, three streams begun."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rpam_mergekit.activations import PlacedCalls, Shelf
from rpam_mergekit.decoder import Decoder
from rpam_mergekit.experts import ExpertWeights, Weights, float32
from rpam_mergekit.parallel import Processes
from rpam_mergekit.prompts import Batch
from rpam_mergekit.settings import RpamSettings
from rpam_mergekit.solved import Entries
from rpam_mergekit.streams import Stream, weigh_tokens


class Recorder:
    """Records the batches; `other_pattern` is what the model beside the base is for.

    Of several processes each records its own share of every batch's queries.
    """

    def __init__(
        self,
        decoder: Decoder,
        experts: ExpertWeights,
        batches: Sequence[Batch],
        settings: RpamSettings,
        shelf: Shelf,
        processes: Processes,
    ) -> None:
        self.decoder = decoder
        self.experts = experts
        self.batches = batches
        self.weighed = weigh_tokens(batches, settings)
        self.shelf = shelf
        self.processes = processes

    def streams(self, entries: Entries, other_pattern: str) -> list[Stream]:
        """Return the streams where they enter the first layer.

        `entries` are the coefficients of the weights outside the layers. One model's
        embeddings are in memory at a time.
        """
        streams: list[Stream] = []
        for expert in ("base", "other", "merged"):
            weights = self._weights(expert, entries)
            for number, batch in enumerate(self.batches):
                rows = self._rows(batch)
                hidden, calls = self.decoder.record(
                    weights, batch.input_ids[rows], batch.attention_mask[rows]
                )
                if expert == "base":
                    placed = PlacedCalls(calls, self.shelf)
                    streams.append(self._stream(number, placed, hidden, other_pattern))
                else:
                    setattr(streams[number], expert, hidden)
        return streams

    def _weights(self, expert: str, entries: Entries) -> Weights:
        base, other = self.experts.entering()
        if expert == "merged":
            return self.experts.merging(base, other).written(entries)
        return float32(base if expert == "base" else other)

    def _rows(self, batch: Batch) -> slice:
        """Return this process's queries of a batch, or one that weighs nothing."""
        rows = self.processes.share(len(batch.patterns))
        return rows if rows.start < rows.stop else slice(0, 1)

    def _stream(
        self,
        number: int,
        calls: PlacedCalls,
        hidden: torch.Tensor,
        other_pattern: str,
    ) -> Stream:
        batch = self.batches[number]
        mine = self.processes.share(len(batch.patterns))
        rows = self._rows(batch)
        weight = float(mine.start < mine.stop)
        of_tokens, shares = (weight * w[rows] for w in self.weighed[number])
        positive = [pattern == other_pattern for pattern in batch.patterns[rows]]
        device = self.decoder.device
        return Stream(
            calls=calls,
            base=hidden,
            other=hidden,
            merged=hidden,
            counted=batch.attention_mask[rows].bool().to(device),
            other_is_positive=torch.tensor(positive, device=device),
            token_weights=of_tokens.to(device),
            shares=shares.to(device),
            queries=len(batch.patterns),
            shelf=self.shelf,
        )
