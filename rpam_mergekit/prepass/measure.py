"""How far given coefficients leave the merged model from the right expert, by layer.

The pre-pass without solving: all streams go once through every layer, the merged one
through the weights as they would be written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from tqdm import tqdm

from rpam_mergekit.formats.solved_layers import Entries
from rpam_mergekit.prepass.memory import knobs
from rpam_mergekit.prepass.run import PrePass
from rpam_mergekit.replay.recording import Recorder
from rpam_mergekit.text import aligned


def layer_gaps(prepass: PrePass, entries: Entries) -> list[float]:
    """Return the gap that coefficients leave behind every layer (see `measures.gap`).

    `entries` are all coefficients of the merge, by entry. The pre-pass has a shelf; its
    streams are begun anew, and its settings' coefficients are not looked at.
    """
    with knobs(prepass.settings, prepass.shelf):
        recorder = Recorder(
            prepass.decoder,
            prepass.experts,
            prepass.batches,
            prepass.settings,
            prepass.shelf,
            prepass.processes,
        )
        prepass.streams = recorder.streams(entries)
        layers = range(len(prepass.layout.layers))
        return [
            _layer_gap(prepass, index, entries)
            for index in tqdm(layers, desc="rpam gaps", disable=prepass.quiet)
        ]


def _layer_gap(prepass: PrePass, index: int, entries: Entries) -> float:
    relative, experts = prepass.experts.layer(index)
    prepass.run_experts(index, experts)
    weights = prepass.experts.merging(experts)
    solved = prepass.by_model(entries, relative)
    return prepass.layer_gap(index, weights, solved, advance=True)


def as_entries(numbers: Mapping[str, float]) -> Entries:
    """Return scalar coefficients as entries of a coefficients file."""
    return {
        entry: {"scalar": torch.tensor(number, dtype=torch.float32)}
        for entry, number in numbers.items()
    }


def gap_table(before: Sequence[float], after: Sequence[float], granularity: str) -> str:
    """Return one line per layer: the gap of the file's coefficients and of numbers."""
    head = ["layer", "gap", f"gap, by {granularity}"]
    rows = [
        [str(index), f"{gap:.4f}", f"{nearest:.4f}"]
        for index, (gap, nearest) in enumerate(zip(before, after, strict=True))
    ]
    return "\n".join(aligned([head, *rows]))
