"""The coefficients of one decoder layer while they are solved, by granularity.

A granularity says what shares one coefficient: the layer, a module, a tensor, a row, an
element; or `low_rank`, a field of rows, columns and a product of low rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from rpam_mergekit.formats.coefficients import coefficient, in_file


class LayerCoefficients:
    """One other model's coefficients of a decoder layer, as leaves that a solver moves.

    `shapes` maps the entry of each of the layer's weights to the weight's shape;
    `module` returns the module that it belongs to. `fixed` entries keep the number the
    user set. All start at `initial`.
    """

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        *,
        granularity: str,
        rank: int = 0,
        initial: float = 0.5,
        module: Callable[[str], str] | None = None,
        fixed: Mapping[str, float] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        generator: torch.Generator | None = None,
    ) -> None:
        self.initial = initial
        self.parts: dict[str, dict[str, torch.Tensor]] = {}
        shared: dict[str, torch.Tensor] = {}
        self.leaves: list[torch.Tensor] = []

        def leaf(value: torch.Tensor) -> torch.Tensor:
            # Drawn on the CPU, so that every device starts from the same numbers.
            value = value.to(device=device, dtype=dtype).requires_grad_()
            self.leaves.append(value)
            return value

        for name, shape in shapes.items():
            if fixed is not None and name in fixed:
                number = torch.tensor(fixed[name], dtype=dtype, device=device)
                self.parts[name] = {"scalar": number}
            elif granularity in ("layer", "module", "tensor"):
                group = "" if granularity == "layer" else name
                if granularity == "module" and module is not None:
                    group = module(name)
                if group not in shared:
                    shared[group] = leaf(torch.tensor(initial))
                self.parts[name] = {"scalar": shared[group]}
            elif granularity == "element" or len(shape) < 2:
                self.parts[name] = {"element": leaf(torch.full(shape, initial))}
            elif granularity == "row":
                self.parts[name] = {"row": leaf(torch.full(shape[:-1], initial))}
            else:
                *experts, rows, columns = shape
                field = {
                    "row": leaf(torch.full((*experts, rows), initial)),
                    "column": leaf(torch.zeros(*experts, columns)),
                }
                if rank:
                    noise = torch.randn(*experts, rows, rank, generator=generator)
                    field["left"] = leaf(0.01 * noise)
                    field["right"] = leaf(torch.zeros(*experts, rank, columns))
                self.parts[name] = field

    def penalty(self) -> torch.Tensor:
        """Return the mean over weights of the mean squared departure from `initial`."""
        departures = [
            (coefficient(parts) - self.initial).square().mean()
            for parts in self.parts.values()
            if any(value.requires_grad for value in parts.values())
        ]
        return torch.stack(departures).mean()

    def solved(
        self, dtype: torch.dtype = torch.float32
    ) -> dict[str, dict[str, torch.Tensor]]:
        """Return every entry's parts, detached, rounded to the file's `dtype`.

        In float32, as they are read from it.
        """
        return {
            name: {
                part: in_file(value.detach().float(), dtype).float()
                for part, value in parts.items()
            }
            for name, parts in self.parts.items()
        }


def count_numbers(shape: torch.Size, granularity: str, rank: int) -> int:
    """Return how many numbers the file has for a weight of `shape`."""
    if granularity in ("layer", "module", "tensor"):
        return 1
    if granularity == "element" or len(shape) < 2:
        return shape.numel()
    rows = shape[:-1].numel()
    if granularity == "row":
        return rows
    experts = shape[:-2].numel()
    return (rows + experts * shape[-1]) * (1 + rank)
