"""The weights of all experts, a decoder layer at a time, and merged as written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from mergekit.architecture import WeightInfo
from mergekit.common import dtype_from_name

from rpam_mergekit.checkpoint import Layout, MergeModels, load
from rpam_mergekit.coefficients import (
    add_task_vectors,
    coefficient,
    common_dtype,
    task_vector,
)
from rpam_mergekit.decoder import Decoder

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Merging:
    """Weights to be merged: base and task vectors in float32, and what is written.

    `vectors` has one task vector per other model. Weights of whole numbers are in
    `base` only, as they are.
    """

    base: Weights
    vectors: Mapping[str, Sequence[torch.Tensor]]
    dtypes: Mapping[str, torch.dtype]

    @classmethod
    def of(
        cls, experts: Sequence[Weights], out_dtypes: Mapping[str, str | None]
    ) -> Merging:
        """Return the experts' differences, base first; they are emptied on the way."""
        origin, vectors, dtypes = {}, {}, {}
        for name in list(experts[0]):
            base, *others = (expert.pop(name) for expert in experts)
            origin[name] = base.float() if base.is_floating_point() else base
            if base.is_floating_point():
                dtype = dtype_from_name(out_dtypes[name])
                dtypes[name] = dtype or common_dtype(base, *others)
                vectors[name] = [task_vector(base, other) for other in others]
        return cls(origin, vectors, dtypes)

    def written(self, solved: Sequence[Mapping[str, Weights]]) -> Weights:
        """Return the merged weights as the writer will round them, in float32.

        `solved`: coefficient parts by name, of every other model.
        """
        merged = {}
        for name, base in self.base.items():
            if name in self.vectors:
                coefficients = [
                    coefficient({p: v.to(base.device) for p, v in of[name].items()})
                    for of in solved
                ]
                terms = zip(coefficients, self.vectors[name], strict=True)
                value = add_task_vectors(base, terms)
                merged[name] = value.to(self.dtypes[name]).float()
            else:
                merged[name] = base
        return merged


class ExpertWeights:
    """Loads all models' weights onto the decoder's device.

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

    def load(self, expert: int, infos: Sequence[WeightInfo]) -> Weights:
        """Return some of an expert's weights by their names; 0 is the base."""
        model = self.models.every[expert]
        return load(model, infos, self.dtype, str(self.decoder.device))

    def entering(self, expert: int) -> Weights:
        """Return an expert's weights of what comes before the layers; 0 is the base."""
        return self.load(expert, self.layout.entering)

    def outside(self, expert: int) -> Weights:
        """Return all of an expert's weights outside the layers; 0 is the base."""
        return self.load(expert, self.layout.outside)

    def layer(self, index: int) -> tuple[dict[str, str], list[Weights]]:
        """Return a layer's names within itself by full name, and all experts'."""
        infos = self.layout.layers[index]
        within = {w.name: self.decoder.relative_name(index, w.name) for w in infos}
        experts = []
        for number in range(len(self.models.every)):
            weights = self.load(number, infos)
            experts.append({within[name]: value for name, value in weights.items()})
        return within, experts

    def merging(self, experts: Sequence[Weights]) -> Merging:
        """Return what the merge needs of the experts, which are emptied."""
        return Merging.of(experts, self.out_dtypes)


def float32(weights: Weights) -> Weights:
    """Return the weights in float32; buffers of whole numbers stay as they are."""
    return {
        name: value.float() if value.is_floating_point() else value
        for name, value in weights.items()
    }
