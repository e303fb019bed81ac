"""The pre-pass: merging coefficients, decoder layer by decoder layer (paper section 3).

1. Record, once, how the model's own code calls every layer on every batch.
2. Run three streams of hidden states side by side: each expert on its own outputs,
   and the merged model on its own.
3. For each layer: load its weights from both checkpoints, compute both experts'
   outputs once, minimise the objective over the coefficients, and send the merged
   stream through the merged weights exactly as they will be written.

Knows nothing of mergekit's planner. Two decoder layers' weights are in memory at a
time, besides the activations of the calibration set.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from rpam_mergekit import solver
from rpam_mergekit.checkpoint import Layout, MergeModels
from rpam_mergekit.coefficients import (
    LayerCoefficients,
    add_task_vector,
    coefficient,
    task_vector,
)
from rpam_mergekit.decoder import Call, Decoder
from rpam_mergekit.errors import RpamError
from rpam_mergekit.experts import ExpertWeights, Weights, float32
from rpam_mergekit.prompts import Batch
from rpam_mergekit.settings import RpamSettings
from rpam_mergekit.solved import OUTSIDE, LayerReport, LayerSolution, Solution
from rpam_mergekit.streams import (
    Stream,
    divergence,
    expert_distance,
    gap,
    objective,
    weigh_tokens,
)


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
        quiet: bool = False,
    ) -> None:
        """`dtype` and `out_dtype` are the config's; `fixed` maps tensors to weights."""
        self.models = models
        self.layout = layout
        self.decoder = decoder
        self.experts = ExpertWeights(models, layout, decoder, dtype, out_dtype)
        self.batches = batches
        self.settings = settings
        self.fixed = dict(fixed or {})
        self.quiet = quiet
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.streams: list[Stream] = []

    def run(self, solved: MutableMapping[int, LayerSolution] | None = None) -> Solution:
        """Return the solved coefficients of every tensor of the layout.

        Every layer is put into `solved` before the next begins; those that are in it
        already, of a run on the same inputs, are not solved again. Raises `RpamError`
        if a layer's objective stops being a finite number.
        """
        solution = Solution({} if solved is None else solved, len(self.layout.layers))
        outside = self._enter()
        solution.solved[OUTSIDE] = LayerSolution(outside, None, self._state)
        chosen = self._most_divergent()
        solves = self.settings.epochs * len(self.batches)
        with tqdm(
            total=solution.count * solves,
            desc="rpam pre-pass",
            unit="step",
            disable=self.quiet,
        ) as progress:
            for index in range(solution.count):
                progress.set_postfix(layer=f"{index + 1}/{solution.count}")
                if index in solution.solved:
                    self._repeat(index, solution.solved[index])
                    progress.initial += solves  # so that the rate is that of this run
                else:
                    entries, report = self._solve_layer(
                        index, index in chosen, progress
                    )
                    solution.solved[index] = LayerSolution(entries, report, self._state)
                progress.n = (index + 1) * solves  # L-BFGS may need fewer
                progress.refresh()
        return solution

    @property
    def _state(self) -> bytes:
        """The state of the random generator."""
        return self.generator.get_state().numpy().tobytes()

    def _enter(self) -> dict[str, dict[str, torch.Tensor]]:
        """Record all batches; return the coefficients of what is outside the layers."""
        names = [w.name for w in self.layout.outside]
        entries = {
            name: {
                "scalar": torch.tensor(
                    self.fixed.get(name, self.settings.outside_weight)
                )
            }
            for name in names
        }
        base, other = self.experts.outside()
        merged = {
            name: self.experts.written(name, base[name], other[name], entries[name])
            for name in names
        }
        base, other = float32(base), float32(other)
        device = self.decoder.device
        weighed = weigh_tokens(self.batches, self.settings)
        for batch, (of_tokens, shares) in zip(self.batches, weighed, strict=True):
            states: dict[str, torch.Tensor] = {}
            calls: list[Call] = []
            for expert, weights in {
                "base": base,
                "other": other,
                "merged": merged,
            }.items():
                states[expert], calls = self.decoder.record(
                    weights, batch.input_ids, batch.attention_mask
                )
            positive = [p == self.models.other_pattern for p in batch.patterns]
            self.streams.append(
                Stream(
                    calls=calls,
                    **states,
                    counted=batch.attention_mask.bool().to(device),
                    other_is_positive=torch.tensor(positive, device=device),
                    token_weights=of_tokens.to(device),
                    shares=shares.to(device),
                )
            )
        return entries

    def _most_divergent(self) -> set[int]:
        """Return the layers to optimise: the share in which the experts differ most.

        Sends both experts through all layers once, unless all are to be optimised.
        """
        count = len(self.layout.layers)
        most = max(1, round(self.settings.layers * count))
        if most == count:
            return set(range(count))
        entered = [(stream.base, stream.other) for stream in self.streams]
        divergences = []
        layers = tqdm(range(count), desc="divergence", disable=self.quiet)
        for index in layers:
            _, base, other = self.experts.layer(index)
            self._run_experts(index, float32(base), float32(other))
            divergences.append(divergence(self.streams))
        for stream, (base_states, other_states) in zip(
            self.streams, entered, strict=True
        ):
            stream.base, stream.other = base_states, other_states
        order = sorted(range(count), key=lambda index: -divergences[index])
        return set(order[:most])

    def _repeat(self, index: int, solution: LayerSolution) -> None:
        """Send the streams through a layer that has been solved before."""
        relative, base, other = self.experts.layer(index)
        self._run_experts(index, float32(base), float32(other))
        solved = {relative[name]: parts for name, parts in solution.entries.items()}
        merged = self._advanced(index, base, other, solved)
        for stream, hidden in zip(self.streams, merged, strict=True):
            stream.merged = hidden
        state = torch.frombuffer(bytearray(solution.generator), dtype=torch.uint8)
        self.generator.set_state(state)

    def _solve_layer(
        self, index: int, optimised: bool, progress: tqdm
    ) -> tuple[dict[str, dict[str, torch.Tensor]], LayerReport]:
        relative, base, other = self.experts.layer(index)
        self._run_experts(index, float32(base), float32(other))
        coefficients = LayerCoefficients(
            {n: value.shape for n, value in base.items() if value.is_floating_point()},
            granularity=self.settings.granularity,
            rank=self.settings.rank,
            initial=self.settings.initial_weight,
            fixed={relative[n]: c for n, c in self.fixed.items() if n in relative},
            dtype=self._solving_dtype,
            device=self.decoder.device,
            generator=self.generator,
        )
        before = self._advanced(index, base, other, coefficients.solved())
        gap_before = gap(self.streams, before)
        del before
        if coefficients.leaves and optimised:
            self._minimise(index, base, other, coefficients, progress)
        solved = coefficients.solved()
        merged = self._advanced(index, base, other, solved)
        gap_after = gap(self.streams, merged)
        for stream, hidden in zip(self.streams, merged, strict=True):
            stream.merged = hidden
        mean = torch.stack([coefficient(parts).mean() for parts in solved.values()])
        report = LayerReport(
            index,
            gap_before,
            gap_after,
            float(mean.mean()),
            divergence(self.streams),
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
        return torch.float64 if lbfgs else torch.float32

    @torch.no_grad()
    def _run_experts(self, index: int, base: Weights, other: Weights) -> None:
        for stream in self.streams:
            call = stream.calls[index]
            stream.base = self.decoder.replay(index, base, stream.base, call)
            stream.other = self.decoder.replay(index, other, stream.other, call)
            stream.choose_experts()

    @torch.no_grad()
    def _advanced(
        self, index: int, base: Weights, other: Weights, solved: Mapping[str, Weights]
    ) -> list[torch.Tensor]:
        """Return the merged stream after this layer, with the weights as written."""
        weights = {
            name: self.experts.written(
                name, base[name], other[name], solved.get(name, {})
            )
            for name in base
        }
        return [
            self.decoder.replay(index, weights, s.merged, s.calls[index])
            for s in self.streams
        ]

    def _minimise(
        self,
        index: int,
        base: Weights,
        other: Weights,
        coefficients: LayerCoefficients,
        progress: tqdm,
    ) -> None:
        dtype = self._solving_dtype
        scale = expert_distance(self.streams)
        buffers = {n: value for n, value in base.items() if n not in coefficients.parts}
        origin = {name: base[name].to(dtype) for name in coefficients.parts}
        vectors = {
            name: task_vector(base[name], other[name]).to(dtype) for name in origin
        }

        def batch_loss(number: int) -> torch.Tensor:
            stream = self.streams[number]
            weights = buffers | {
                name: add_task_vector(
                    origin[name], vectors[name], coefficients.coefficient(name)
                )
                for name in origin
            }
            call = stream.calls[index]
            if dtype != torch.float32:
                call = call.to(dtype)
            hidden = self.decoder.replay(index, weights, stream.merged.to(dtype), call)
            loss = objective(stream, hidden, scale, len(self.streams), self.settings)
            if self.settings.regularization:
                loss = loss + self.settings.regularization * coefficients.penalty()
            return loss

        arguments: dict[str, Any] = {
            "epochs": self.settings.epochs,
            "step": progress.update,
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
                    **arguments,
                )
        except solver.Diverged as error:
            raise RpamError(
                f"layer {index}: {error}. Lower parameters.learning_rate (now "
                f"{self.settings.learning_rate})."
            ) from None
