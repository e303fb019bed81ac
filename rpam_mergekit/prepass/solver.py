"""Minimises a layer's objective over its coefficients; knows only tensors.

Adam takes one step a batch, its learning rate falling to zero along a half cosine.
L-BFGS (strong Wolfe) minimises the whole calibration set's objective at once. Where
each of several processes has a part of every batch, `total` sums what they found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

BatchLoss = Callable[[int], torch.Tensor]
Total = Callable[[torch.Tensor], torch.Tensor]


class Diverged(ArithmeticError):
    """The objective is not a finite number."""


class _Found:
    """Loss and gradients in one buffer, so that one sum over processes does it."""

    def __init__(self, leaves: Sequence[torch.Tensor], total: Total) -> None:
        self.total = total
        count = sum(leaf.numel() for leaf in leaves)
        self.buffer = torch.zeros(1 + count, dtype=leaves[0].dtype).to(leaves[0].device)
        parts = self.buffer[1:].split([leaf.numel() for leaf in leaves])
        for leaf, part in zip(leaves, parts, strict=True):
            leaf.grad = part.view_as(leaf)

    def clear(self) -> None:
        """Forget what was found; gradients add up otherwise."""
        self.buffer.zero_()

    def add(self, loss: torch.Tensor) -> None:
        """Add a loss and its gradients."""
        loss.backward()
        self.buffer[0] += loss.detach()

    def summed(self) -> torch.Tensor:
        """Return the loss, summed with its gradients over processes."""
        loss = self.total(self.buffer)[0]
        if not torch.isfinite(loss):
            raise Diverged(f"the objective is {loss.item()}")
        return loss


def adam(
    batch_loss: BatchLoss,
    batches: int,
    leaves: Sequence[torch.Tensor],
    *,
    learning_rate: float,
    steps: int,
    generator: torch.Generator,
    tolerance: float = 0.0,
    step: Callable[[], object] = lambda: None,
    total: Total = lambda found: found,
) -> None:
    """Move `leaves` in place by `steps` steps of Adam on ``batch_loss(index)``.

    All batches come in a random order, and again in another one; `step` is called after
    each. Ends early when two passes over all batches running lower the mean loss by
    less than the share `tolerance`. Raises `Diverged`.
    """
    found = _Found(leaves, total)
    optimiser = torch.optim.Adam(leaves, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    before, flat, mean = float("inf"), 0, 0.0
    for number in range(steps):
        if number % batches == 0:
            order = torch.randperm(batches, generator=generator).tolist()
            mean = 0.0
        found.clear()
        found.add(batch_loss(order[number % batches]))
        mean += found.summed().item() / batches
        optimiser.step()
        schedule.step()
        step()
        if tolerance and number % batches == batches - 1:
            flat = flat + 1 if before - mean < tolerance * before else 0
            if flat == 2:
                return
            before = mean


def lbfgs(
    batch_loss: BatchLoss,
    batches: int,
    leaves: Sequence[torch.Tensor],
    *,
    steps: int,
    step: Callable[[], object] = lambda: None,
    total: Total = lambda found: found,
) -> None:
    """Move float64 `leaves` in place by L-BFGS on the mean of all batches' losses.

    At most `steps` iterations; `step` is called after each evaluation. Raises
    `Diverged`.
    """
    found = _Found(leaves, total)
    optimiser = torch.optim.LBFGS(
        leaves, max_iter=steps, line_search_fn="strong_wolfe", tolerance_change=1e-10
    )

    def closure() -> torch.Tensor:
        found.clear()
        for index in range(batches):
            found.add(batch_loss(index) / batches)
        loss = found.summed()
        step()
        return loss.clone()

    optimiser.step(closure)
