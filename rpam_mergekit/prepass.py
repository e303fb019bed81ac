"""The pre-pass: merging coefficients, decoder layer by decoder layer (paper section 3).

1. Record, once, how the model's own code calls every layer on every batch.
2. Run three streams of hidden states side by side: each expert on its own outputs,
   and the merged model on its own.
3. For each layer: load its weights from both checkpoints, compute both experts'
   outputs once, minimise the objective over the coefficients, and send the merged
   stream through the merged weights exactly as they will be written.

Knows nothing of mergekit's planner. One decoder layer's weights are in memory at a
time, of both models; the calibration set's activations lie where the shelf is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from rpam_mergekit import solver
from rpam_mergekit.activations import Shelf
from rpam_mergekit.checkpoint import Layout, MergeModels
from rpam_mergekit.coefficients import (
    LayerCoefficients,
    add_task_vector,
    coefficient,
)
from rpam_mergekit.decoder import Decoder
from rpam_mergekit.errors import RpamError
from rpam_mergekit.experts import ExpertWeights, Merging, Weights, float32
from rpam_mergekit.memory import knobs
from rpam_mergekit.parallel import Processes
from rpam_mergekit.prompts import Batch
from rpam_mergekit.recording import Recorder
from rpam_mergekit.settings import RpamSettings
from rpam_mergekit.solved import (
    OUTSIDE,
    Entries,
    LayerReport,
    LayerSolution,
    Solution,
)
from rpam_mergekit.streams import Stream, divergence, expert_distance, gap, objective


class PrePass:
    """One run of the pre-pass; `streams` holds the hidden states when it has ended."""

    def __init__(
        self,
        models: MergeModels,
        layout: Layout,
        decoder: Decoder,
        batches: Sequence[Batch],
        settings: RpamSettings,
        *,
        dtype: str | None = None,
        out_dtype: str | None = None,
        fixed: Mapping[str, float] | None = None,
        shelf: Shelf | None = None,
        processes: Processes | None = None,
        quiet: bool = False,
    ) -> None:
        """`dtype` and `out_dtype` are the config's; `fixed` maps tensors to weights.

        `shelf` is where activations lie, by default the device.
        """
        self.models = models
        self.layout = layout
        self.decoder = decoder
        self.experts = ExpertWeights(models, layout, decoder, dtype, out_dtype)
        self.batches = batches
        self.settings = settings
        self.fixed = dict(fixed or {})
        self.shelf = shelf or Shelf(device=decoder.device)
        self.processes = processes or Processes()
        self.quiet = quiet or self.processes.rank > 0
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.streams: list[Stream] = []

    def run(self, solved: MutableMapping[int, LayerSolution] | None = None) -> Solution:
        """Return the solved coefficients of every tensor of the layout.

        Every layer is put into `solved` before the next begins; those that are in it
        already, of a run on the same inputs, are not solved again. Raises `RpamError`
        if a layer's objective stops being a finite number, and where memory ends.
        """
        solution = Solution({} if solved is None else solved, len(self.layout.layers))
        with knobs(self.settings, self.shelf):
            self._run(solution)
        return solution

    def _run(self, solution: Solution) -> None:
        done = self.processes.tell(set(solution.solved))
        recorder = Recorder(
            self.decoder,
            self.experts,
            self.batches,
            self.settings,
            self.shelf,
            self.processes,
        )
        chosen = self._most_divergent(recorder)
        self.streams = self._entered(recorder)
        solution.solved[OUTSIDE] = LayerSolution(self._outside(), None, self._state)
        solves = self.settings.epochs * len(self.batches)
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

    def _outside(self) -> Entries:
        """Return the coefficients of what is outside the layers."""
        weight = self.settings.outside_weight
        return {
            w.name: {"scalar": torch.tensor(self.fixed.get(w.name, weight))}
            for w in self.layout.outside
        }

    def _entered(self, recorder: Recorder) -> list[Stream]:
        return recorder.streams(self._outside(), self.models.other_pattern)

    def _most_divergent(self, recorder: Recorder) -> set[int]:
        """Return the layers to optimise: the share in which the experts differ most.

        Sends both experts through all layers once, unless all are to be optimised.
        """
        count = len(self.layout.layers)
        most = max(1, round(self.settings.layers * count))
        if most == count:
            return set(range(count))
        self.streams = self._entered(recorder)
        divergences = []
        for index in tqdm(range(count), desc="divergence", disable=self.quiet):
            _, base, other = self.experts.layer(index)
            self._run_experts(index, base, other)
            divergences.append(divergence(self.streams, self.processes))
        order = sorted(range(count), key=lambda index: -divergences[index])
        return set(order[:most])

    def _repeat(self, index: int, solution: LayerSolution) -> None:
        """Send the streams through a layer that has been solved before."""
        relative, base, other = self.experts.layer(index)
        self._run_experts(index, base, other)
        weights = self.experts.merging(base, other)
        solved = {relative[name]: parts for name, parts in solution.entries.items()}
        for stream, hidden in self._advanced(index, weights, solved):
            stream.merged = hidden
        state = torch.frombuffer(bytearray(solution.generator), dtype=torch.uint8)
        self.generator.set_state(state)

    def _solve_layer(
        self, index: int, optimised: bool, progress: tqdm
    ) -> tuple[Entries, LayerReport]:
        relative, base, other = self.experts.layer(index)
        self._run_experts(index, base, other)
        weights = self.experts.merging(base, other)
        coefficients = LayerCoefficients(
            {name: vector.shape for name, vector in weights.vector.items()},
            granularity=self.settings.granularity,
            rank=self.settings.rank,
            initial=self.settings.initial_weight,
            fixed={relative[n]: c for n, c in self.fixed.items() if n in relative},
            dtype=self._solving_dtype,
            device=self.decoder.device,
            generator=self.generator,
        )
        gap_before = self._gap(index, weights, coefficients.solved())
        if coefficients.leaves and optimised:
            self._minimise(index, weights, coefficients, progress)
        solved = coefficients.solved()
        gap_after = self._gap(index, weights, solved, advance=True)
        mean = torch.stack([coefficient(parts).mean() for parts in solved.values()])
        report = LayerReport(
            index,
            gap_before,
            gap_after,
            float(mean.mean()),
            divergence(self.streams, self.processes),
            optimised,
        )
        entries = {
            name: solved[within]
            for name, within in relative.items()
            if within in solved
        }
        return entries, report

    @property
    def _solving_dtype(self) -> torch.dtype:
        lbfgs = self.settings.solver == "lbfgs"
        has_float64 = self.decoder.device.type != "mps"
        return torch.float64 if lbfgs and has_float64 else torch.float32

    @torch.no_grad()
    def _run_experts(self, index: int, base: Weights, other: Weights) -> None:
        """Send both experts' streams through a layer, one expert after the other."""
        for expert, weights in (("base", base), ("other", other)):
            weights = float32(weights)
            for stream in self.streams:
                hidden = getattr(stream, expert)
                hidden = self.decoder.replay(
                    index, weights, hidden, stream.calls[index]
                )
                setattr(stream, expert, hidden)

    @torch.no_grad()
    def _advanced(
        self, index: int, weights: Merging, solved: Mapping[str, Weights]
    ) -> Iterator[tuple[Stream, torch.Tensor]]:
        """Yield the merged streams after this layer, with the weights as written."""
        written = weights.written(solved)
        for stream in self.streams:
            call = stream.calls[index]
            yield stream, self.decoder.replay(index, written, stream.merged, call)

    def _gap(
        self,
        index: int,
        weights: Merging,
        solved: Mapping[str, Weights],
        advance: bool = False,
    ) -> float:
        """Return the gap that a layer's coefficients leave; `advance` the streams."""

        def merged() -> Iterator[torch.Tensor]:
            for stream, hidden in self._advanced(index, weights, solved):
                if advance:
                    stream.merged = hidden
                yield hidden

        return gap(self.streams, merged(), self.processes)

    def _minimise(
        self,
        index: int,
        weights: Merging,
        coefficients: LayerCoefficients,
        progress: tqdm,
    ) -> None:
        dtype = self._solving_dtype
        scale = expert_distance(self.streams, self.processes)
        origin = {n: self._cast(value) for n, value in weights.base.items()}
        vectors = {n: self._cast(value) for n, value in weights.vector.items()}

        def batch_loss(number: int) -> torch.Tensor:
            stream = self.streams[number]
            merged = origin | {
                name: add_task_vector(
                    origin[name], vector, coefficients.coefficient(name)
                )
                for name, vector in vectors.items()
            }
            call = stream.calls[index]
            if dtype != torch.float32:
                call = call.to(dtype)
            hidden = self.decoder.replay(index, merged, stream.merged.to(dtype), call)
            loss = objective(
                stream, hidden, scale, len(self.streams), self.settings, self.processes
            )
            if self.settings.regularization:
                penalty = coefficients.penalty() / self.processes.count
                loss = loss + self.settings.regularization * penalty
            return loss

        arguments: dict[str, Any] = {
            "epochs": self.settings.epochs,
            "step": progress.update,
            "total": self.processes.sum,
        }
        count, leaves = len(self.streams), coefficients.leaves
        try:
            if self.settings.solver == "lbfgs":
                solver.lbfgs(batch_loss, count, leaves, **arguments)
            else:
                solver.adam(
                    batch_loss,
                    count,
                    leaves,
                    learning_rate=self.settings.learning_rate,
                    generator=self.generator,
                    tolerance=self.settings.tolerance,
                    **arguments,
                )
        except solver.Diverged as error:
            raise RpamError(
                f"layer {index}: {error}. Lower parameters.learning_rate (now "
                f"{self.settings.learning_rate})."
            ) from None

    def _cast(self, value: torch.Tensor) -> torch.Tensor:
        """Return a weight in the dtype of the solver; whole numbers as they are."""
        return value.to(self._solving_dtype) if value.is_floating_point() else value
