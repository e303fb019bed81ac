"""Both solvers reach a known minimum, reproducibly, and say when they diverge."""

from __future__ import annotations

import pytest
import torch

from rpam_mergekit.prepass import solver

TARGETS = torch.tensor([[0.2, -1.0], [0.4, 3.0]], dtype=torch.float64)


def loss_of(leaf: torch.Tensor):
    """The mean over both batches is least at the mean of the targets."""
    return lambda index: (leaf - TARGETS[index]).square().sum()


def leaf() -> torch.Tensor:
    return torch.zeros(2, dtype=torch.float64, requires_grad=True)


def test_lbfgs_reaches_the_minimum_of_the_whole_set():
    point = leaf()
    evaluations = []
    solver.lbfgs(
        loss_of(point), 2, [point], steps=20, step=lambda: evaluations.append(1)
    )
    torch.testing.assert_close(point.detach(), TARGETS.mean(dim=0), atol=1e-8, rtol=0)
    assert 0 < len(evaluations) < 20


def run_adam(seed: int) -> torch.Tensor:
    point = leaf()
    solver.adam(
        loss_of(point),
        2,
        [point],
        learning_rate=0.1,
        steps=600,
        generator=torch.Generator().manual_seed(seed),
    )
    return point.detach()


def test_adam_reaches_the_minimum_of_the_whole_set():
    torch.testing.assert_close(run_adam(0), TARGETS.mean(dim=0), atol=0.02, rtol=0)


def test_adam_is_reproducible_and_seeded():
    assert torch.equal(run_adam(0), run_adam(0))
    assert not torch.equal(run_adam(0), run_adam(1))


def test_adam_makes_as_many_steps_as_asked_for():
    point, steps = leaf(), []
    solver.adam(
        loss_of(point),
        2,
        [point],
        learning_rate=0.1,
        steps=3,
        generator=torch.Generator(),
        step=lambda: steps.append(1),
    )
    assert len(steps) == 3


@pytest.mark.parametrize("name", ["adam", "lbfgs"])
def test_an_objective_that_is_not_finite_stops_the_solver(name):
    point = leaf()
    arguments = {"steps": 3}
    if name == "adam":
        arguments |= {"learning_rate": 0.1, "generator": torch.Generator()}
    with pytest.raises(solver.Diverged, match="nan"):
        getattr(solver, name)(
            lambda _: point.sum() * float("nan"), 1, [point], **arguments
        )


def steps_of(tolerance: float) -> int:
    point, steps = leaf(), []
    solver.adam(
        loss_of(point),
        2,
        [point],
        learning_rate=0.1,
        steps=600,
        generator=torch.Generator(),
        tolerance=tolerance,
        step=lambda: steps.append(1),
    )
    return len(steps)


def test_a_converged_layer_is_left_early():
    assert steps_of(0.0) == 2 * 300
    assert 2 * 3 <= steps_of(0.5) < steps_of(0.01) < 2 * 300


def test_two_passes_must_be_flat():
    """Losses by pass 8, 4, 4, 2, 2, 2, ...: only the last three are two flat ones."""
    losses = iter([8.0, 4.0, 4.0, 2.0, 2.0, 2.0, 1.0])
    point = torch.zeros(1, requires_grad=True)
    solver.adam(
        lambda _: point.sum() * 0 + next(losses),
        1,
        [point],
        learning_rate=0.1,
        steps=7,
        generator=torch.Generator(),
        tolerance=0.1,
    )
    assert list(losses) == [1.0]


def test_every_pass_takes_all_batches_in_another_order():
    taken: list[int] = []
    point = torch.zeros(1, requires_grad=True)

    def loss(index: int) -> torch.Tensor:
        taken.append(index)
        return point.square().sum()

    solver.adam(
        loss,
        8,
        [point],
        learning_rate=0.1,
        steps=20,
        generator=torch.Generator().manual_seed(0),
    )
    assert sorted(taken[:8]) == sorted(taken[8:16]) == list(range(8))
    assert taken[:8] != taken[8:16]
    assert len(taken) == 20


def test_what_processes_found_is_summed_before_a_step():
    """Two halves of every batch, the other one's gradient the same as this one's."""
    whole, half = leaf(), leaf()
    common = {"learning_rate": 0.1, "steps": 10}
    solver.adam(loss_of(whole), 2, [whole], generator=torch.Generator(), **common)
    solver.adam(
        lambda index: loss_of(half)(index) / 2,
        2,
        [half],
        generator=torch.Generator(),
        total=lambda found: found.mul_(2),
        **common,
    )
    assert torch.equal(whole.detach(), half.detach())
