"""The weights of both experts, a decoder layer at a time, and merged as written."""

from __future__ import annotations

import torch
from mergekit.common import dtype_from_name

from rpam_mergekit.checkpoint import Layout, MergeModels, load
from rpam_mergekit.coefficients import coefficient, written
from rpam_mergekit.decoder import Decoder

Weights = dict[str, torch.Tensor]


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
        self._out_dtypes = {w.name: w.force_dtype or out_dtype for w in layout.outside}
        for index, weights in enumerate(layout.layers):
            names = {decoder.relative_name(index, w.name): w for w in weights}
            decoder.check_names(index, set(names))
            self._out_dtypes |= {
                name: w.force_dtype or out_dtype for name, w in names.items()
            }

    def outside(self) -> tuple[Weights, Weights]:
        """Return base and other of what is outside the layers."""
        return self._load(self.layout.outside)

    def layer(self, index: int) -> tuple[dict[str, str], Weights, Weights]:
        """Return a layer's names within itself by full name, and base and other."""
        infos = self.layout.layers[index]
        within = {w.name: self.decoder.relative_name(index, w.name) for w in infos}
        base, other = (
            {within[name]: value for name, value in weights.items()}
            for weights in self._load(infos)
        )
        return within, base, other

    def written(
        self, name: str, base: torch.Tensor, other: torch.Tensor, parts: Weights
    ) -> torch.Tensor:
        """Return a merged weight as the writer will round it, back in float32."""
        if not base.is_floating_point():
            return base
        parts = {part: value.to(base.device) for part, value in parts.items()}
        dtype = dtype_from_name(self._out_dtypes[name])
        return written(base, other, coefficient(parts), dtype).float()

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
