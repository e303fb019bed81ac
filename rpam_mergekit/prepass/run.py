"""The pre-pass: merging coefficients, decoder layer by decoder layer (paper section 3).

1. Record, once, how the model's own code calls every layer on every batch.
2. Run streams of hidden states side by side: each expert on its own outputs, and the
   merged model on its own.
3. For each layer: load its weights from all checkpoints, compute the experts' outputs
   once, minimise the objective over the coefficients, and send the merged stream
   through the merged weights exactly as they will be written.

Knows nothing of mergekit. One decoder layer's weights are in memory at a
time, of all models; the calibration set's activations lie where the store is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from rpam_mergekit.chat.prompts import Batch, make_batches
from rpam_mergekit.errors import RpamError
from rpam_mergekit.formats.coefficients import (
    coefficient,
)
from rpam_mergekit.formats.operating_point import OperatingPoint
from rpam_mergekit.formats.solved_layers import (
    OUTSIDE,
    Entries,
    LayerReport,
    LayerSolution,
    Solution,
)
from rpam_mergekit.prepass.fields import LayerCoefficients
from rpam_mergekit.prepass.layer import LayerProblem, Opening, solving_dtype
from rpam_mergekit.prepass.measures import (
    divergence,
    gap,
    heaviest_token,
    weigh_layer,
)
from rpam_mergekit.prepass.memory import explain_out_of_memory
from rpam_mergekit.processes import Processes
from rpam_mergekit.replay.activations import TensorStore
from rpam_mergekit.replay.experts import Experts
from rpam_mergekit.replay.layer_weights import LayerMerge, Weights, float32
from rpam_mergekit.replay.recording import Recorder, merged_outside
from rpam_mergekit.replay.streams import Stream
from rpam_mergekit.routing.opening import opening_probability, opening_queries
from rpam_mergekit.routing.probes import Measurement, Probes, opening_token
from rpam_mergekit.settings import RpamSettings


class PrePass:
    """One run of the pre-pass; `streams` holds the hidden states when it has ended.

    A variant overrides `outside`, `entered` or `minimise`.
    """

    def __init__(
        self,
        experts: Experts,
        batches: Sequence[Batch],
        settings: RpamSettings,
        *,
        fixed: Mapping[str, float] | None = None,
        store: TensorStore | None = None,
        processes: Processes | None = None,
        quiet: bool = False,
        held_out: Sequence[Batch] = (),
        of_solved: Sequence[Batch] = (),
        end: int | None = None,
    ) -> None:
        """`fixed` maps entries to weights that the user has set.

        `store` is where activations lie, by default the device. `held_out` and
        `of_solved` are measured, the latter being some of `batches`' queries; `end` is
        the end token of their responses.
        """
        self.experts = experts
        self.others = len(experts.patterns) - 1
        self.decoder = experts.decoder
        self.batches = batches
        self.settings = settings
        self.fixed = dict(fixed or {})
        self.store = store or TensorStore(device=experts.decoder.device)
        self.processes = processes or Processes()
        self.quiet = quiet or self.processes.rank > 0
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.streams: list[Stream] = []
        self.measured = {"held_out": list(held_out), "solved": list(of_solved)}
        self.probes = Probes([], [])
        self.end = end

    def run(self, solved: MutableMapping[int, LayerSolution] | None = None) -> Solution:
        """Return the solved coefficients of every tensor of the layout.

        Every layer is put into `solved` before the next begins; those that are in it
        already, of a run on the same inputs, are not solved again. Raises `RpamError`
        if a layer's objective stops being a finite number, and where memory ends.
        """
        solution = Solution({} if solved is None else solved, self.experts.layers)
        with explain_out_of_memory(self.settings, self.store):
            self._run(solution)
            return replace(solution, operating_point=self._operating_point())

    def _run(self, solution: Solution) -> None:
        done = self.processes.broadcast(set(solution.solved))
        recorder = self._recorder(self.batches)
        chosen = self._most_divergent(recorder)
        self.streams = self.entered(recorder)
        probes = [batch for batches in self.measured.values() for batch in batches]
        if probes:
            streams = self._recorder(probes).streams(self.outside())
            self.probes = Probes(streams, probes)
        solution.solved[OUTSIDE] = LayerSolution(self.outside(), None, self._state)
        solves = self.settings.steps_of(len(self.batches))
        with tqdm(
            total=solution.count * solves,
            desc="rpam pre-pass",
            unit="step",
            disable=self.quiet,
        ) as progress:
            for index in range(solution.count):
                progress.set_postfix(layer=f"{index + 1}/{solution.count}")
                if index in done:
                    self._repeat(index, solution.solved[index])
                    if not progress.disable:  # the rate is that of this run
                        progress.initial += solves
                else:
                    entries, report = self._solve_layer(
                        index, index in chosen, progress
                    )
                    solution.solved[index] = LayerSolution(entries, report, self._state)
                progress.n = (index + 1) * solves  # L-BFGS may need fewer
                progress.refresh()

    @property
    def _state(self) -> bytes:
        """The state of the random generator."""
        return self.generator.get_state().numpy().tobytes()

    def _head(self, expert: int | None) -> Weights:
        """Return the weights outside the layers of an expert; None: of the merge."""
        if expert is None:
            return merged_outside(self.experts, self.outside(), embeddings=False)
        return float32(self.experts.load(expert, self.experts.outside))

    def outside(self) -> Entries:
        """Return the coefficients of what is outside the layers."""
        weight = self.settings.outside_weight / self.others
        names = [
            self.experts.entry(number, name)
            for number in range(self.others)
            for name in self.experts.outside
        ]
        return {n: {"scalar": torch.tensor(self.fixed.get(n, weight))} for n in names}

    def entered(self, recorder: Recorder) -> list[Stream]:
        """Return the streams where they enter the first layer."""
        return recorder.streams(self.outside())

    def _recorder(self, batches: Sequence[Batch]) -> Recorder:
        return Recorder(
            self.decoder,
            self.experts,
            batches,
            self.settings,
            self.store,
            self.processes,
        )

    def _most_divergent(self, recorder: Recorder) -> set[int]:
        """Return the layers to optimise: the share in which the experts differ most.

        Sends the experts through all layers once, unless all are to be optimised.
        """
        count = self.experts.layers
        most = max(1, round(self.settings.layers * count))
        if most == count:
            return set(range(count))
        self.streams = self.entered(recorder)
        divergences = []
        for index in tqdm(range(count), desc="divergence", disable=self.quiet):
            self.run_experts(index, self.experts.layer(index))
            divergences.append(divergence(self.streams, self.processes))
        order = sorted(range(count), key=lambda index: -divergences[index])
        return set(order[:most])

    def _repeat(self, index: int, solution: LayerSolution) -> None:
        """Send the streams through a layer that has been solved before."""
        weights = self._load_layer(index)
        for stream, hidden in self._advanced(index, weights, solution.entries):
            stream.merged = hidden
        self._advance_probes(index, weights, solution.entries)
        state = torch.frombuffer(bytearray(solution.generator), dtype=torch.uint8)
        self.generator.set_state(state)

    def _solve_layer(
        self, index: int, optimised: bool, progress: tqdm[NoReturn]
    ) -> tuple[Entries, LayerReport]:
        weights = self._load_layer(index)
        coefficients = [
            self._initial(index, number, weights) for number in range(self.others)
        ]
        gap_before = self.layer_gap(index, weights, self._solved(coefficients))
        if optimised and any(c.leaves for c in coefficients):
            self.minimise(index, weights, coefficients, progress.update)
        entries = self._solved(coefficients)
        gap_after = self.layer_gap(index, weights, entries, advance=True)
        if not math.isfinite(gap_after):
            raise RpamError(
                f"layer {index}: the merged weights give hidden states that are not "
                "finite numbers. Lower parameters.learning_rate (now "
                f"{self.settings.learning_rate}) or use coefficient_dtype: float32."
            )
        self._advance_probes(index, weights, entries)
        mean = torch.stack([coefficient(parts).mean() for parts in entries.values()])
        report = LayerReport(
            index,
            gap_before,
            gap_after,
            float(mean.mean()),
            divergence(self.streams, self.processes),
            optimised,
            heaviest_token(self.streams, self.processes),
        )
        return entries, report

    def _initial(
        self, index: int, number: int, weights: LayerMerge
    ) -> LayerCoefficients:
        """Return the coefficients of one other model's weights, not yet solved."""
        names = {self.experts.entry(number, name): name for name in weights.vectors}
        return LayerCoefficients(
            {entry: weights.base[name].shape for entry, name in names.items()},
            granularity=self.settings.granularity,
            rank=self.settings.rank,
            initial=self.settings.initial_weight / self.others,
            module=lambda entry: self.decoder.module(index, names[entry]),
            fixed=self.fixed,
            dtype=solving_dtype(self.settings, self.decoder.device),
            device=self.decoder.device,
            generator=self.generator,
        )

    def _solved(self, coefficients: Sequence[LayerCoefficients]) -> Entries:
        """Return the coefficients of all other models, rounded as the file has them."""
        dtype: torch.dtype = getattr(torch, self.settings.coefficient_dtype)
        return {n: parts for c in coefficients for n, parts in c.solved(dtype).items()}

    def _load_layer(self, index: int) -> LayerMerge:
        """Send the experts' streams through a layer; return its weights, to merge."""
        experts = self.experts.layer(index)
        self.run_experts(index, experts)
        return self.experts.merging(experts)

    @torch.no_grad()
    def run_experts(self, index: int, experts: Sequence[Weights]) -> None:
        """Send the experts' streams through a layer, one expert after the other."""
        for number, weights in enumerate(experts):
            weights = float32(weights)
            for stream in (*self.streams, *self.probes.streams):
                stream.experts[number] = self.decoder.replay(
                    index, weights, stream.experts[number], stream.calls[index]
                )
        weigh_layer(self.streams, self.settings.token_scale, self.processes)

    def _advance_probes(
        self, index: int, weights: LayerMerge, entries: Entries
    ) -> None:
        """Send the probes through a solved layer, at every scale."""
        self.probes.advance(self.decoder, index, weights, entries, self.fixed)

    def _operating_point(self) -> OperatingPoint:
        """Return the scale of the coefficients, and how the merge routes there."""
        if not self.probes.streams:
            return OperatingPoint()
        measurement = Measurement(
            self.decoder, self.probes, self._head, self.end, self.processes
        )
        return measurement.operating_point(len(self.measured["held_out"]))

    @torch.no_grad()
    def _advanced(
        self, index: int, weights: LayerMerge, entries: Entries
    ) -> Iterator[tuple[Stream, torch.Tensor]]:
        """Yield the merged streams after this layer, with the weights as written."""
        written = weights.written(entries)
        for stream in self.streams:
            call = stream.calls[index]
            yield stream, self.decoder.replay(index, written, stream.merged, call)

    def layer_gap(
        self,
        index: int,
        weights: LayerMerge,
        entries: Entries,
        advance: bool = False,
    ) -> float:
        """Return the gap that a layer's coefficients leave; `advance` the streams."""

        def merged() -> Iterator[torch.Tensor]:
            for stream, hidden in self._advanced(index, weights, entries):
                if advance:
                    stream.merged = hidden
                yield hidden

        return gap(self.streams, merged(), self.processes)

    def minimise(
        self,
        index: int,
        weights: LayerMerge,
        coefficients: Sequence[LayerCoefficients],
        step: Callable[[], Any],
    ) -> None:
        """Optimise a layer's coefficients on the streams; calls `step` after a step."""
        LayerProblem(
            self.decoder,
            index,
            self.streams,
            weights,
            coefficients,
            self.settings,
            self.processes,
            self._opening_of(index),
        ).minimise(self.generator, step)

    def _opening_of(self, index: int) -> Opening | None:
        """Return what the opening's term needs, where it belongs; else None.

        Only the last layer's output is what final norm and head are made for.
        """
        if not self.settings.opening_weight or index + 1 < self.experts.layers:
            return None
        token = opening_token([q for batch in self.batches for q in batch.queries])
        return None if token is None else Opening(token, self._head(None))

    def opening_probability(self) -> float | None:
        """Return how likely the model that thinks opens its thinking by itself.

        See `opening`; None where no response opens it, or no pattern is `long`.
        """
        queries = [query for batch in self.batches for query in batch.queries]
        thinking = opening_queries(queries, self.settings.seed)
        if not thinking or "long" not in self.experts.patterns:
            return None
        return opening_probability(
            self.experts,
            self.experts.patterns.index("long"),
            make_batches(thinking, self.settings),
            self.quiet,
        )
