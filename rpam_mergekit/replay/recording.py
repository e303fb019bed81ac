"""The calibration set enters the decoder: every batch recorded, its streams begun."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from rpam_mergekit.chat.prompts import Batch
from rpam_mergekit.formats.solved_layers import Entries
from rpam_mergekit.processes import Processes
from rpam_mergekit.replay.activations import StoredCalls, TensorStore
from rpam_mergekit.replay.calls import Call
from rpam_mergekit.replay.decoder import Decoder
from rpam_mergekit.replay.experts import Experts
from rpam_mergekit.replay.layer_weights import Weights, float32
from rpam_mergekit.replay.streams import Stream
from rpam_mergekit.replay.token_weights import weigh_tokens
from rpam_mergekit.settings import RpamSettings

BLOCK = 1 << 24  # numbers of a tensor that are merged at a time


class Recorder:
    """Records the batches; every query's pattern names one of the models.

    Of several processes each records its own share of every batch's queries.
    """

    def __init__(
        self,
        decoder: Decoder,
        experts: Experts,
        batches: Sequence[Batch],
        settings: RpamSettings,
        store: TensorStore,
        processes: Processes,
    ) -> None:
        self.decoder = decoder
        self.experts = experts
        self.batches = batches
        self.weighed = weigh_tokens(batches, settings)
        self.store = store
        self.processes = processes

    def streams(self, entries: Entries) -> list[Stream]:
        """Return the streams where they enter the first layer.

        `entries` are the coefficients of the weights outside the layers. One model's
        embeddings are in memory at a time; for the merged one's, a tensor of each.
        """
        streams: list[Stream] = []
        count = len(self.experts.patterns)
        for expert in range(count):
            weights = float32(self.experts.load(expert, self.experts.embeddings))
            for number, (hidden, calls) in enumerate(self._recorded(weights)):
                if expert == 0:
                    placed = StoredCalls(calls, self.store)
                    streams.append(self._stream(number, placed, hidden, count))
                else:
                    streams[number].experts[expert] = hidden
        weights = merged_outside(self.experts, entries, embeddings=True)
        for number, (hidden, _) in enumerate(self._recorded(weights)):
            streams[number].merged = hidden
        return streams

    def _recorded(self, weights: Weights) -> Iterator[tuple[torch.Tensor, list[Call]]]:
        for batch in self.batches:
            rows = self._rows(batch)
            yield self.decoder.record(
                weights, batch.input_ids[rows], batch.attention_mask[rows]
            )

    def _rows(self, batch: Batch) -> slice:
        """Return this process's queries of a batch, or one that weighs nothing."""
        rows = self.processes.share(len(batch.patterns))
        return rows if rows.start < rows.stop else slice(0, 1)

    def _stream(
        self,
        number: int,
        calls: StoredCalls,
        hidden: torch.Tensor,
        experts: int,
    ) -> Stream:
        batch = self.batches[number]
        mine = self.processes.share(len(batch.patterns))
        rows = self._rows(batch)
        weight = float(mine.start < mine.stop)
        of_tokens, shares = (weight * w[rows] for w in self.weighed[number])
        queries = batch.queries[rows]
        ends = torch.tensor([query.prompt_tokens - 1 for query in queries])
        opens = torch.tensor([query.opening > 0 for query in queries])
        patterns = self.experts.patterns
        positive = [patterns.index(pattern) for pattern in batch.patterns[rows]]
        device = self.decoder.device
        return Stream(
            calls=calls,
            experts=[hidden] * experts,
            merged=hidden,
            is_token=batch.attention_mask[rows].bool().to(device),
            patterns=torch.tensor(positive, device=device),
            token_weights=of_tokens.to(device),
            normalized_weights=shares.to(device),
            decisions=batch.decisions[rows].to(device),
            prompt_ends=ends.to(device),
            opens=opens.to(device),
            queries=len(batch.patterns),
            store=self.store,
        )


def merged_outside(experts: Experts, entries: Entries, *, embeddings: bool) -> Weights:
    """Return the merged weights outside the layers, or of those that come before them.

    As they are written, in float32; `entries` are their coefficients, scalars. One
    tensor of the models is in memory at a time, in their dtype, and what merges it in
    float32 takes some of its rows at a time.
    """
    models = range(len(experts.patterns))
    merged: Weights = {}
    for name in experts.embeddings if embeddings else experts.outside:
        tensors = [experts.load(number, [name])[name] for number in models]
        merged[name] = torch.empty_like(
            tensors[0],
            dtype=torch.float32 if tensors[0].is_floating_point() else None,
            memory_format=torch.contiguous_format,
        )
        for rows in _blocks(tensors[0]):
            part = experts.merging([{name: tensor[rows]} for tensor in tensors])
            merged[name][rows] = part.written(entries)[name]
    return merged


def _blocks(tensor: torch.Tensor) -> Iterator[slice]:
    """Yield slices of the rows that have about `BLOCK` numbers each."""
    if tensor.dim() < 2:
        yield slice(None)
        return
    step = max(1, BLOCK // max(1, tensor[0].numel()))
    for start in range(0, len(tensor), step):
        yield slice(start, start + step)
