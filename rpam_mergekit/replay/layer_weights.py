"""A layer's weights: of one model, or of all to be merged, as the merge writes them.

Weights are called by the names they have in the checkpoint, everywhere: in a layer's
weights, in its coefficients and in the file of these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from rpam_mergekit.formats.coefficients import (
    add_task_vectors,
    coefficient,
    common_dtype,
    task_vector,
)

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class LayerMerge:
    """Weights to be merged: base and task vectors in float32, and what is written.

    `vectors` has one task vector per other model, by the name of its coefficient.
    Weights of whole numbers are in `base` only, as they are.
    """

    base: Weights
    vectors: Mapping[str, Weights]
    dtypes: Mapping[str, torch.dtype]

    @classmethod
    def of(
        cls,
        experts: Sequence[Weights],
        out_dtypes: Mapping[str, torch.dtype | None],
        entry: Callable[[int, str], str],
    ) -> LayerMerge:
        """Return the experts' differences, base first; they are emptied on the way.

        out_dtypes: what each merged weight is written in; None: as the experts have it.
        entry: returns the name of a weight's coefficient for an other model's number.
        """
        origin, vectors, dtypes = {}, {}, {}
        for name in list(experts[0]):
            base, *others = (expert.pop(name) for expert in experts)
            origin[name] = base.float() if base.is_floating_point() else base
            if base.is_floating_point():
                dtypes[name] = out_dtypes[name] or common_dtype(base, *others)
                vectors[name] = {
                    entry(number, name): task_vector(base, other)
                    for number, other in enumerate(others)
                }
        return cls(origin, vectors, dtypes)

    def written(self, entries: Mapping[str, Weights]) -> Weights:
        """Return the merged weights as the writer will round them, in float32.

        `entries`: coefficient parts by entry.
        """
        merged = {}
        for name, base in self.base.items():
            if name in self.vectors:
                terms = (
                    (
                        coefficient(
                            {p: v.to(base.device) for p, v in entries[entry].items()}
                        ),
                        vector,
                    )
                    for entry, vector in self.vectors[name].items()
                )
                value = add_task_vectors(base, terms)
                merged[name] = value.to(self.dtypes[name]).float()
            else:
                merged[name] = base
        return merged


def float32(weights: Weights) -> Weights:
    """Return the weights in float32; buffers of whole numbers stay as they are."""
    return {
        name: value.float() if value.is_floating_point() else value
        for name, value in weights.items()
    }
