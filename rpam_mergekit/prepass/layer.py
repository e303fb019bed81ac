"""One layer's problem: the objective as a function of its coefficients; its minimum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rpam_mergekit.errors import RpamError
from rpam_mergekit.formats.coefficients import add_task_vectors, coefficient
from rpam_mergekit.prepass import solver
from rpam_mergekit.prepass.fields import LayerCoefficients
from rpam_mergekit.prepass.measures import expert_distance, objective
from rpam_mergekit.prepass.objective import opening_loss
from rpam_mergekit.processes import Processes
from rpam_mergekit.replay.decoder import Decoder
from rpam_mergekit.replay.layer_weights import LayerMerge, Weights
from rpam_mergekit.replay.precision import tf32
from rpam_mergekit.replay.streams import Stream
from rpam_mergekit.settings import RpamSettings


def solving_dtype(settings: RpamSettings, device: torch.device) -> torch.dtype:
    """Return the dtype in which coefficients are solved: float64 for L-BFGS."""
    has_float64 = device.type != "mps"
    double = settings.solver == "lbfgs" and has_float64
    return torch.float64 if double else torch.float32


@dataclass(frozen=True)
class Opening:
    """What the term of the opening needs, in the last layer.

    token: the one that opens thinking. head: the merged weights behind the layers.
    """

    token: int
    head: Weights


class LayerProblem:
    """The objective of decoder layer `index` over all streams, by its coefficients.

    weights: what is merged. coefficients: those of every other model's weights; their
    leaves are what is optimised. opening: in the last layer, if the setting asks.
    """

    def __init__(
        self,
        decoder: Decoder,
        index: int,
        streams: Sequence[Stream],
        weights: LayerMerge,
        coefficients: Sequence[LayerCoefficients],
        settings: RpamSettings,
        processes: Processes,
        opening: Opening | None = None,
    ) -> None:
        self.decoder = decoder
        self.index = index
        self.streams = streams
        self.coefficients = coefficients
        self.settings = settings
        self.processes = processes
        self.opening = opening
        self.dtype = solving_dtype(settings, decoder.device)
        self.scale = expert_distance(streams, processes)
        self.base = {n: self._cast(value) for n, value in weights.base.items()}
        self.vectors = {
            name: {entry: self._cast(vector) for entry, vector in vectors.items()}
            for name, vectors in weights.vectors.items()
        }

    def merged(self) -> Weights:
        """Return the merged weights, differentiable in the coefficients."""
        parts = {n: p for of in self.coefficients for n, p in of.parts.items()}
        return self.base | {
            name: add_task_vectors(
                self.base[name],
                ((coefficient(parts[entry]), v) for entry, v in vectors.items()),
            )
            for name, vectors in self.vectors.items()
        }

    def loss(self, number: int) -> torch.Tensor:
        """Return one batch's objective; their mean is that of the calibration set."""
        stream = self.streams[number]
        merged = self.merged()
        call = stream.calls[self.index]
        if self.dtype != torch.float32:
            call = call.to(self.dtype)
        entering = stream.merged.to(self.dtype)
        hidden = self.decoder.replay(self.index, merged, entering, call)
        count = len(self.streams)
        loss = objective(
            stream, hidden, self.scale, count, self.settings, self.processes
        )
        if self.opening is not None:
            loss = loss + self._opening_term(stream, hidden, self.opening)
        if self.settings.regularization:
            penalties = torch.stack([c.penalty() for c in self.coefficients])
            penalty = penalties.mean() / self.processes.count
            loss = loss + self.settings.regularization * penalty
        return loss

    def minimise(self, generator: torch.Generator, step: Callable[[], Any]) -> None:
        """Optimise the coefficients; calls `step` after every step.

        Raises `RpamError` if the objective stops being a finite number.
        """
        settings, count = self.settings, len(self.streams)
        leaves = [leaf for c in self.coefficients for leaf in c.leaves]
        arguments: dict[str, Any] = {
            "steps": settings.steps_of(count),
            "step": step,
            "total": self.processes.sum,
        }
        try:
            with tf32(self.decoder.device):  # of the backward passes too
                if settings.solver == "lbfgs":
                    solver.lbfgs(self.loss, count, leaves, **arguments)
                else:
                    solver.adam(
                        self.loss,
                        count,
                        leaves,
                        learning_rate=settings.learning_rate,
                        generator=generator,
                        tolerance=settings.tolerance,
                        **arguments,
                    )
        except solver.Diverged as error:
            raise RpamError(
                f"layer {self.index}: {error}. Lower parameters.learning_rate (now "
                f"{settings.learning_rate})."
            ) from None

    def _opening_term(
        self, stream: Stream, hidden: torch.Tensor, opening: Opening
    ) -> torch.Tensor:
        rows = torch.arange(len(hidden), device=hidden.device)
        states = hidden[rows, stream.prompt_ends].float()
        logits = self.decoder.logits(opening.head, states)
        of_query = opening_loss(logits, opening.token, stream.opens)
        weighed = (of_query * stream.normalized_weights.sum(dim=1)).sum() * len(
            self.streams
        )
        return self.settings.opening_weight * weighed

    def _cast(self, value: torch.Tensor) -> torch.Tensor:
        """Return a weight in the dtype of the solver; whole numbers as they are."""
        return value.to(self.dtype) if value.is_floating_point() else value
