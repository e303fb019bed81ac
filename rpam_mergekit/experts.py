"""The weights of both experts, a decoder layer at a time, and merged as written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from mergekit.common import dtype_from_name

from rpam_mergekit.checkpoint import Layout, MergeModels, load
from rpam_mergekit.coefficients import add_task_vector, coefficient, task_vector
from rpam_mergekit.decoder import Decoder

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Merging:
    """Weights to be merged: base and task vector in float32, and what is written.

    Weights of whole numbers are in `base` only, as they are.
    """

    base: Weights
    vector: Weights
    dtypes: Mapping[str, torch.dtype]

    @classmethod
    def of(
        cls, base: Weights, other: Weights, out_dtypes: Mapping[str, str | None]
    ) -> Merging:
        """Return the experts' difference; they are emptied on the way."""
        origin, vector, dtypes = {}, {}, {}
        for name in list(base):
            first, second = base.pop(name), other.pop(name)
            origin[name] = first.float() if first.is_floating_point() else first
            if first.is_floating_point():
                vector[name] = task_vector(first, second)
                dtypes[name] = dtype_from_name(out_dtypes[name]) or torch.promote_types(
                    first.dtype, second.dtype
                )
        return cls(origin, vector, dtypes)

    def written(self, solved: Mapping[str, Weights]) -> Weights:
        """Return the merged weights as the writer will round them, in float32.

        `solved`: coefficient parts by name.
        """
        merged = {}
        for name, base in self.base.items():
            if name in self.vector:
                parts = {p: value.to(base.device) for p, value in solved[name].items()}
                value = add_task_vector(base, self.vector[name], coefficient(parts))
                merged[name] = value.to(self.dtypes[name]).float()
            else:
                merged[name] = base
        return merged


class ExpertWeights:
    """Loads both models' weights onto the decoder's device.

    `dtype` and `out_dtype` are the config's. Names are those of the checkpoint outside
    the layers, and those within the layer inside. Raises `RpamError` if a layer of the
    model's code lacks weights that the layout has, or has others.
    """

    def __init__(
        self,
        models: MergeModels,
        layout: Layout,
        decoder: Decoder,
        dtype: str | None,
        out_dtype: str | None,
    ) -> None:
        self.models = models
        self.layout = layout
        self.decoder = decoder
        self.dtype = dtype
        self.out_dtypes = {w.name: w.force_dtype or out_dtype for w in layout.outside}
        decoder.check_outside(set(self.out_dtypes))
        for index, weights in enumerate(layout.layers):
            names = {decoder.relative_name(index, w.name): w for w in weights}
            decoder.check_names(index, set(names))
            self.out_dtypes |= {
                name: w.force_dtype or out_dtype for name, w in names.items()
            }

    def entering(self) -> tuple[Weights, Weights]:
        """Return base and other of what comes before the layers."""
        return self._load(self.layout.entering)

    def layer(self, index: int) -> tuple[dict[str, str], Weights, Weights]:
        """Return a layer's names within itself by full name, and base and other."""
        infos = self.layout.layers[index]
        within = {w.name: self.decoder.relative_name(index, w.name) for w in infos}
        base, other = (
            {within[name]: value for name, value in weights.items()}
            for weights in self._load(infos)
        )
        return within, base, other

    def merging(self, base: Weights, other: Weights) -> Merging:
        """Return what the merge needs of the experts, which are emptied."""
        return Merging.of(base, other, self.out_dtypes)

    def _load(self, infos) -> tuple[Weights, Weights]:
        device = str(self.decoder.device)
        return (
            load(self.models.base, infos, self.dtype, device),
            load(self.models.other, infos, self.dtype, device),
        )


def float32(weights: Weights) -> Weights:
    """Return the weights in float32; buffers of whole numbers stay as they are."""
    return {
        name: value.float() if value.is_floating_point() else value
        for name, value in weights.items()
    }
