"""The nearest numbers to finer coefficients, one per layer, module or tensor.

Nearest in the weights: of a group of tensors with task vectors d_k and coefficients
C_k, elementwise, the numbers c_k minimise ``||sum_k (c_k - C_k) * d_k||^2``. For one
other model that is ``sum(C * d^2) / sum(d^2)``. It says nothing of hidden states;
`measure` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from mergekit.architecture import WeightInfo

from rpam_mergekit.formats.coefficients import CoefficientsFile, task_vector
from rpam_mergekit.models.checkpoint import Layout, MergeModels, load
from rpam_mergekit.outputs.filters import as_written, layer_prefix, modules_of
from rpam_mergekit.outputs.stock_recipe import Numbers, finer_entries

BLOCK = 1 << 22  # elements that are multiplied at a time, in float64


@dataclass(frozen=True)
class Nearest:
    """Every entry's number, and what is lost.

    lost: squared length of what the numbers change in the merged layers' weights,
    relative to that of the merge's own change of the base's.
    same: whether the file had these very numbers already.
    """

    numbers: Numbers
    lost: float
    same: bool


class _Group:
    """Tensors that share a number per other model: the sums of the least squares."""

    def __init__(self, others: int) -> None:
        self.gram = torch.zeros(others, others, dtype=torch.float64)
        self.right = torch.zeros(others, dtype=torch.float64)
        self.length = 0.0
        self.means: list[list[float]] = [[] for _ in range(others)]

    def add(self, vectors: torch.Tensor, changes: torch.Tensor) -> None:
        """Add (others, elements) task vectors and changes ``C * d``, both float64."""
        change = changes.sum(dim=0)
        self.gram += vectors @ vectors.T
        self.right += vectors @ change
        self.length += float(change @ change)

    def solve(self) -> tuple[torch.Tensor, float]:
        """Return the numbers, and the squared length that they leave.

        Where a task vector is zero, any number would do: the coefficients' mean.
        """
        found = torch.linalg.lstsq(
            self.gram, self.right[:, None], driver="gelsd"
        ).solution[:, 0]
        means = [sum(of) / len(of) if of else 0.0 for of in self.means]
        nothing = self.gram.diagonal() == 0
        found = torch.where(nothing, torch.tensor(means, dtype=torch.float64), found)
        left = self.length - 2 * found @ self.right + found @ self.gram @ found
        return found, max(float(left), 0.0)


def nearest(
    models: MergeModels,
    layout: Layout,
    file: CoefficientsFile,
    granularity: str,
    *,
    dtype: str | None = None,
    fixed: Mapping[str, float] | None = None,
) -> Nearest:
    """Return the numbers per `granularity` that are nearest to the file's coefficients.

    Tensors outside the layers keep a number each, and `fixed` entries theirs. `dtype`
    is the config's. One tensor of every model is in memory at a time.
    """
    fixed, finer = fixed or {}, finer_entries(file)
    numbers: Numbers = {}
    left = length = 0.0
    same = True
    for infos in groups(layout, granularity):
        shared = _shared(models, infos, file, fixed, finer)
        if shared is None or infos[0] not in layout.outside:
            group = _Group(len(models.others))
            for info in infos:
                _add(group, models, info, file, dtype, fixed)
            found, lost = group.solve()
            length += group.length
        if shared is None:
            left, same = left + lost, False
        else:
            found = shared
        numbers |= _numbers(models, infos, found, fixed)
    return Nearest(numbers, left / length if length else 0.0, same)


def groups(layout: Layout, granularity: str) -> Iterator[list[WeightInfo]]:
    """Yield the tensors that share a number; each one outside the layers is alone."""
    for info in layout.outside:
        yield [info]
    for index, layer in enumerate(layout.layers):
        if granularity == "layer":
            yield list(layer)
        elif granularity == "tensor":
            yield from ([info] for info in layer)
        else:
            by_name = {info.name: info for info in layer}
            prefix = layer_prefix(by_name, index)
            for names in modules_of(dict.fromkeys(by_name, 0.0), prefix).values():
                yield [by_name[name] for name in names]


def _shared(
    models: MergeModels,
    infos: Sequence[WeightInfo],
    file: CoefficientsFile,
    fixed: Mapping[str, float],
    finer: set[str],
) -> torch.Tensor | None:
    """Return the numbers that a group's tensors all have already, None without such."""
    found = []
    for number in range(len(models.others)):
        entries = {models.entry(number, info.name) for info in infos} - fixed.keys()
        if entries & finer:
            return None
        values = {float(file.parts(entry)["scalar"]) for entry in entries}
        if len(values) > 1:
            return None
        found.append(values.pop() if values else 0.0)
    return torch.tensor(found, dtype=torch.float64)


def _add(
    group: _Group,
    models: MergeModels,
    info: WeightInfo,
    file: CoefficientsFile,
    dtype: str | None,
    fixed: Mapping[str, float],
) -> None:
    base, *others = (
        load(model, [info], dtype, "cpu")[info.name] for model in models.every
    )
    vectors, coefficients = [], []
    for number, other in enumerate(others):
        entry = models.entry(number, info.name)
        vector = task_vector(base, other).flatten()
        if entry in fixed:
            vector, field = torch.zeros_like(vector), torch.zeros(())
        else:
            field = file.coefficient(entry, "cpu")
            group.means[number].append(float(field.mean()))
        vectors.append(vector)
        coefficients.append(field.expand(base.shape).reshape(-1))
    for start in range(0, base.numel(), BLOCK):
        block = slice(start, start + BLOCK)
        d = torch.stack([vector[block].double() for vector in vectors])
        c = torch.stack([field[block].double() for field in coefficients])
        group.add(d, c * d)


def _numbers(
    models: MergeModels,
    infos: Sequence[WeightInfo],
    found: torch.Tensor,
    fixed: Mapping[str, float],
) -> Numbers:
    return {
        entry: as_written(fixed.get(entry, float(found[number])), entry)
        for number in range(len(models.others))
        for entry in (models.entry(number, info.name) for info in infos)
    }
