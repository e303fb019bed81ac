"""Variants of the pre-pass that only the study has, to see what they would bring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from mergekit.options import MergeOptions
from torch.func import functional_call

from rpam_mergekit.checks.config_file import document_of
from rpam_mergekit.errors import RpamError
from rpam_mergekit.formats.solved_layers import OUTSIDE, Entries, Solution
from rpam_mergekit.merging.fit import fit_document
from rpam_mergekit.merging.hooks import activate
from rpam_mergekit.prepass.fields import LayerCoefficients
from rpam_mergekit.prepass.run import PrePass
from rpam_mergekit.replay.calls import Call
from rpam_mergekit.replay.layer_weights import LayerMerge, Weights
from rpam_mergekit.replay.recording import Recorder
from rpam_mergekit.replay.streams import Stream


class LearnedOutside(PrePass):
    """Learns coefficients for embeddings, final norm and head too.

    By the layers' own objective: on the embeddings, and on the logits. For untied
    models of the names that the study's have; all logits are in memory at once.
    """

    EMBEDDINGS = ("model.embed_tokens.weight",)
    LEAVING = ("model.norm.weight", "lm_head.weight")

    def run(self, solved: Any = None) -> Solution:
        self._embedding: Entries = {}
        solution = super().run(solved)
        model = self.decoder.model
        norm, head = model.get_submodule("model.norm"), model.get_submodule("lm_head")

        def leave(weights: Weights, hidden: torch.Tensor) -> torch.Tensor:
            scale, rows = (weights[name] for name in self.LEAVING)
            normed = functional_call(norm, {"weight": scale}, (hidden,))
            return functional_call(head, {"weight": rows}, (normed,))

        streams = [_stage(s, *s.experts, s.merged) for s in self.streams]
        leaving = self.learn(self.LEAVING, leave, streams)
        outside = solution.solved[OUTSIDE]
        solution.solved[OUTSIDE] = replace(
            outside, entries={**outside.entries, **leaving}
        )
        return solution

    def outside(self) -> Entries:
        return super().outside() | self._embedding

    def entered(self, recorder: Recorder) -> list[Stream]:
        entered = super().entered(recorder)
        (name,) = self.EMBEDDINGS

        def embed(weights: Weights, ids: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.embedding(ids.long(), weights[name])

        streams = [
            _stage(stream, *[batch.input_ids] * 3)
            for batch, stream in zip(self.batches, entered, strict=True)
        ]
        self._embedding = self.learn(self.EMBEDDINGS, embed, streams)
        for stream, embedded in zip(entered, streams, strict=True):
            stream.merged = embedded.merged
        return entered

    def learn(
        self,
        names: tuple[str, ...],
        function: Callable[[Weights, torch.Tensor], torch.Tensor],
        streams: list[Stream],
    ) -> Entries:
        """Solve one stage as if it were a decoder layer; advance its streams."""

        class Stage:
            device = self.decoder.device

            def replay(self, _index: int, weights: Weights, hidden: Any, _call: Any):
                return function(weights, hidden)

        experts = [self.experts.load(number, names) for number in (0, 1)]
        layers = self.decoder, self.streams
        self.decoder, self.streams = Stage(), streams  # type: ignore[assignment]
        try:
            self.run_experts(0, experts)
            weights = self.experts.merging(experts)
            coefficients = LayerCoefficients(
                {name: base.shape for name, base in weights.base.items()},
                granularity=self.settings.granularity,
                rank=self.settings.rank,
                initial=self.settings.initial_weight,
                generator=self.generator,
            )
            self.minimise(0, weights, [coefficients], lambda: None)
            solved = coefficients.solved()
            self.layer_gap(0, weights, solved, advance=True)
        finally:
            self.decoder, self.streams = layers
        return solved


def _stage(stream: Stream, *entering: torch.Tensor) -> Stream:
    """Return a stream that enters a stage beside the decoder layers."""
    *experts, merged = entering
    return Stream(
        calls=[Call((), {})],
        experts=experts,
        merged=merged,
        is_token=stream.is_token,
        patterns=stream.patterns,
        token_weights=stream.token_weights,
        normalized_weights=stream.normalized_weights,
    )


class EarlyStop(PrePass):
    """Keeps the epoch that is best on batches held out, and stops when none is better.

    Every fifth batch is held out; `PATIENCE` epochs without a better one end a layer.
    """

    PATIENCE = 3

    def minimise(
        self,
        index: int,
        weights: LayerMerge,
        coefficients: Sequence[LayerCoefficients],
        step: Callable[[], Any],
    ) -> None:
        everything = self.streams
        held_out = everything[::5]
        self.streams = [s for n, s in enumerate(everything) if n % 5]
        leaves = [leaf for c in coefficients for leaf in c.leaves]
        watch = Watch(len(self.streams), self.PATIENCE, leaves)

        def held_out_gap() -> float:
            training, self.streams = self.streams, held_out
            try:
                solved = [c.solved() for c in coefficients]
                entries = {name: of[name] for of in solved for name in of}
                return self.layer_gap(index, weights, entries)
            finally:
                self.streams = training

        watch.figure = held_out_gap
        try:
            super().minimise(index, weights, coefficients, watch.update)
        except Enough:
            pass
        finally:
            self.streams = everything
        watch.restore()


class Enough(Exception):
    """No epoch was better for too long."""


class Watch:
    """Looks at a figure after every epoch; ends the training when it stops falling."""

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
            raise Enough

    @torch.no_grad()
    def restore(self) -> None:
        for leaf, kept in zip(self.leaves, self.kept, strict=True):
            leaf.copy_(kept)


VARIANTS = {"learned outside": LearnedOutside, "early stop": EarlyStop}


def fit_variant(variant: str, config: dict[str, Any], coefficients: Path) -> None:
    """Solve a merge's coefficients by a variant of the pre-pass.

    A merge that finds them in its output folder takes them, as they were made from the
    same models, queries and settings.
    """
    activate()
    document = document_of(config)
    if document.findings:
        raise RpamError(*document.findings)
    options = MergeOptions(quiet=True)
    fit_document(document, options, coefficients, VARIANTS[variant])
