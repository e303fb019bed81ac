"""Minimises a layer's objective over its coefficients; knows only tensors.

Adam takes one step a batch, its learning rate falling to zero along a half cosine.
L-BFGS (strong Wolfe) minimises the whole calibration set's objective at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

BatchLoss = Callable[[int], torch.Tensor]


class Diverged(ArithmeticError):
    """The objective is not a finite number."""


def adam(
    batch_loss: BatchLoss,
    batches: int,
    leaves: Sequence[torch.Tensor],
    *,
    learning_rate: float,
    epochs: int,
    generator: torch.Generator,
    step: Callable[[], object] = lambda: None,
) -> None:
    """Move `leaves` in place by Adam on ``batch_loss(index)``.

    Batches come in a new random order every epoch; `step` is called after each.
    Raises `Diverged`.
    """
    optimiser = torch.optim.Adam(leaves, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * batches)
    for _ in range(epochs):
        for index in torch.randperm(batches, generator=generator).tolist():
            optimiser.zero_grad()
            loss = batch_loss(index)
            loss.backward()
            _check(loss)
            optimiser.step()
            schedule.step()
            step()


def lbfgs(
    batch_loss: BatchLoss,
    batches: int,
    leaves: Sequence[torch.Tensor],
    *,
    epochs: int,
    step: Callable[[], object] = lambda: None,
) -> None:
    """Move float64 `leaves` in place by L-BFGS on the mean of all batches' losses.

    At most `epochs` iterations; `step` is called after each evaluation. Raises
    `Diverged`.
    """
    optimiser = torch.optim.LBFGS(
        leaves, max_iter=epochs, line_search_fn="strong_wolfe", tolerance_change=1e-10
    )

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for index in range(batches):
            loss = batch_loss(index) / batches
            loss.backward()
            total += loss.detach().cpu().double()
        _check(total)
        step()
        return total

    optimiser.step(closure)


def _check(loss: torch.Tensor) -> None:
    if not torch.isfinite(loss):
        raise Diverged(f"the objective is {loss.item()}")
