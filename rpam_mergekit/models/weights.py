"""The weights of all experts, a decoder layer at a time, loaded as mergekit does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mergekit.architecture import WeightInfo
from mergekit.common import dtype_from_name

from rpam_mergekit.models.checkpoint import Layout, MergeModels, load
from rpam_mergekit.replay.decoder import Decoder
from rpam_mergekit.replay.layer_weights import Merging, Weights


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
        self.out_dtypes = {w.name: _dtype(w, out_dtype) for w in layout.outside}
        decoder.check_outside(set(self.out_dtypes))
        for index, weights in enumerate(layout.layers):
            names = {decoder.relative_name(index, w.name): w for w in weights}
            decoder.check_names(index, set(names))
            self.out_dtypes |= {n: _dtype(w, out_dtype) for n, w in names.items()}

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


def _dtype(weight: WeightInfo, out_dtype: str | None) -> torch.dtype | None:
    """Return what a merged weight is written in; None: as the models have it."""
    dtype: torch.dtype | None = dtype_from_name(weight.force_dtype or out_dtype)
    return dtype
