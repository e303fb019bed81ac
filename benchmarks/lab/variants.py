"""Variants of the pre-pass that only the study has, to see what they would bring."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.func import functional_call
from tqdm import tqdm

import rpam_mergekit.fit
from rpam_mergekit.coefficients import LayerCoefficients
from rpam_mergekit.experts import Weights, float32
from rpam_mergekit.prepass import PrePass
from rpam_mergekit.solved import OUTSIDE, Solution
from rpam_mergekit.streams import Stream, gap


class LearnedOutside(PrePass):
    """Learns coefficients for embeddings, final norm and head too.

    By the layers' own objective: on the embeddings, and on the logits. For untied
    models of the names that the lab's have; all logits are in memory at once.
    """

    EMBEDDINGS = ("model.embed_tokens.weight",)
    LEAVING = ("model.norm.weight", "lm_head.weight")

    def run(self, solved: Any = None) -> Solution:
        solution = super().run(solved)
        model = self.decoder.model
        norm, head = model.get_submodule("model.norm"), model.get_submodule("lm_head")

        def leave(weights: Weights, hidden: torch.Tensor) -> torch.Tensor:
            scale, rows = (weights[name] for name in self.LEAVING)
            normed = functional_call(norm, {"weight": scale}, (hidden,))
            return functional_call(head, {"weight": rows}, (normed,))

        outside = solution.solved[OUTSIDE]
        leaving = self._learn(self.LEAVING, leave, self.streams)
        solution.solved[OUTSIDE] = replace(
            outside, entries={**outside.entries, **leaving}
        )
        return solution

    def _enter(self) -> dict[str, Weights]:
        entries = super()._enter()
        (name,) = self.EMBEDDINGS

        def embed(weights: Weights, ids: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.embedding(ids.long(), weights[name])

        streams = []
        for batch, stream in zip(self.batches, self.streams, strict=True):
            ids = batch.input_ids
            streams.append(replace(stream, base=ids, other=ids, merged=ids))
        entries.update(self._learn(self.EMBEDDINGS, embed, streams))
        for stream, embedded in zip(self.streams, streams, strict=True):
            stream.merged = embedded.merged
        return entries

    def _learn(
        self,
        names: tuple[str, ...],
        function: Callable[[Weights, torch.Tensor], torch.Tensor],
        streams: list[Stream],
    ) -> dict[str, Weights]:
        """Solve one stage as if it were a decoder layer; advance its streams."""

        class Stage:
            device = self.decoder.device

            def replay(self, _index: int, weights: Weights, hidden: Any, _call: Any):
                return function(weights, hidden)

        base, other = (
            {name: weights[name] for name in names}
            for weights in self.experts.outside()
        )
        layers = self.decoder, self.streams
        self.decoder = Stage()  # type: ignore[assignment]
        self.streams = [replace(s, calls=[None]) for s in streams]  # type: ignore[list-item]
        try:
            self._run_experts(0, float32(base), float32(other))
            coefficients = LayerCoefficients(
                {name: value.shape for name, value in base.items()},
                granularity=self.settings.granularity,
                rank=self.settings.rank,
                initial=self.settings.initial_weight,
                generator=self.generator,
            )
            self._minimise(0, base, other, coefficients, tqdm(disable=True))
            solved = coefficients.solved()
            merged = self._advanced(0, base, other, solved)
        finally:
            self.decoder, self.streams = layers
        for stream, hidden in zip(streams, merged, strict=True):
            stream.merged = hidden
        return solved


class EarlyStop(PrePass):
    """Keeps the epoch that is best on batches held out, and stops when none is better.

    Every fifth batch is held out; `PATIENCE` epochs without a better one end a layer.
    """

    PATIENCE = 3

    def _minimise(
        self,
        index: int,
        base: Weights,
        other: Weights,
        coefficients: LayerCoefficients,
        progress: tqdm,
    ) -> None:
        everything = self.streams
        held_out = everything[::5]
        self.streams = [s for n, s in enumerate(everything) if n % 5]
        watch = _Watch(len(self.streams), self.PATIENCE, coefficients.leaves)

        def held_out_gap() -> float:
            training, self.streams = self.streams, held_out
            try:
                return gap(
                    held_out, self._advanced(index, base, other, coefficients.solved())
                )
            finally:
                self.streams = training

        watch.figure = held_out_gap
        try:
            super()._minimise(index, base, other, coefficients, watch)  # type: ignore[arg-type]
        except _Enough:
            pass
        finally:
            self.streams = everything
        watch.restore()


class _Enough(Exception):
    """No epoch was better for too long."""


class _Watch:
    """Stands in for the progress bar: looks at the figure after every epoch."""

    figure: Callable[[], float]

    def __init__(self, steps: int, patience: int, leaves: list[torch.Tensor]) -> None:
        self.steps, self.patience, self.leaves = steps, patience, leaves
        self.taken, self.since = 0, 0
        self.best, self.kept = float("inf"), [x.detach().clone() for x in self.leaves]

    def update(self) -> None:
        self.taken += 1
        if self.taken % self.steps:
            return
        found = self.figure()
        self.since += 1
        if found < self.best:
            self.best, self.since = found, 0
            self.kept = [leaf.detach().clone() for leaf in self.leaves]
        if self.since == self.patience:
            raise _Enough

    @torch.no_grad()
    def restore(self) -> None:
        for leaf, kept in zip(self.leaves, self.kept, strict=True):
            leaf.copy_(kept)


VARIANTS = {"learned outside": LearnedOutside, "early stop": EarlyStop}


@contextmanager
def prepass_of(variant: str | None) -> Iterator[None]:
    """Make merges of this process use a variant of the pre-pass; None: the real one."""
    if variant is not None:
        rpam_mergekit.fit.PrePass = VARIANTS[variant]
    try:
        yield
    finally:
        rpam_mergekit.fit.PrePass = PrePass
