"""The weights of all experts, a decoder layer at a time, through mergekit's own loader.

The loader finds shards, pickles, LoRA references, tied heads, and checkpoints of
mixtures of experts whose tensors transformers fuses. What is read here is what is
merged later.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference, dtype_from_name
from mergekit.io.tasks import LoaderCache, LoadTensor

from rpam_mergekit.formats.files import digest
from rpam_mergekit.models.layout import Layout, MergeModels
from rpam_mergekit.replay.decoder import Decoder
from rpam_mergekit.replay.layer_weights import LayerMerge, Weights


def load(
    model: ModelReference,
    weights: Sequence[WeightInfo],
    dtype: str | None,
    device: str,
) -> dict[str, torch.Tensor]:
    """Return `weights` of `model` by mergekit's names, cast as the merge casts them.

    `dtype` is the config's `dtype:`; without one the checkpoint's own stays. mergekit
    keeps the last shard of a .bin checkpoint where it was read to, whole: in memory,
    not on the device.
    """
    safetensors = LoaderCache().get(model).index.is_safetensors
    return {
        weight.name: LoadTensor(
            model=model,
            tensor=weight.name,
            dtype=weight.force_dtype or dtype,
            device=device if safetensors else "cpu",
            aliases=weight.aliases,
            tied_names=weight.tied_names,
        )
        .execute()
        .to(device)
        for weight in weights
    }


class ExpertWeights:
    """The `Experts` of a merge: all models' weights, loaded onto the decoder's device.

    `dtype` and `out_dtype` are the config's. Raises `RpamError` if a layer of the
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
        self._outside = {info.name: info for info in layout.outside}
        self.out_dtypes = {w.name: _dtype(w, out_dtype) for w in layout.weights}
        decoder.check_outside(set(self._outside))
        for index, weights in enumerate(layout.layers):
            decoder.check_names(index, [weight.name for weight in weights])

    @property
    def patterns(self) -> tuple[str, ...]:
        """The models' patterns, the base's first."""
        return self.models.patterns

    @property
    def layers(self) -> int:
        """The number of decoder layers."""
        return len(self.layout.layers)

    @property
    def outside(self) -> Sequence[str]:
        """The tensors outside the layers, by name."""
        return tuple(self._outside)

    @property
    def embeddings(self) -> Sequence[str]:
        """Those of `outside` that come before the layers."""
        return [info.name for info in self.layout.embeddings]

    def entry(self, number: int, tensor: str) -> str:
        """Return the name of a tensor's coefficient for the `number`th other model."""
        return self.models.entry(number, tensor)

    def load(self, expert: int, names: Sequence[str]) -> Weights:
        """Return tensors outside the layers of one model; 0 is the base."""
        return self._load(expert, [self._outside[name] for name in names])

    def layer(self, index: int) -> list[Weights]:
        """Return all models' weights of a layer."""
        models = range(len(self.models.every))
        return [self.layer_of(index, number) for number in models]

    def layer_of(self, index: int, expert: int) -> Weights:
        """Return one model's weights of a layer."""
        return self._load(expert, self.layout.layers[index])

    def _load(self, expert: int, infos: Sequence[WeightInfo]) -> Weights:
        model = self.models.every[expert]
        return load(model, infos, self.dtype, str(self.decoder.device))

    def merging(self, experts: Sequence[Weights]) -> LayerMerge:
        """Return what a merge needs of all models' weights, which are emptied."""
        return LayerMerge.of(experts, self.out_dtypes, self.entry)


def _dtype(weight: WeightInfo, out_dtype: str | None) -> torch.dtype | None:
    """Return what a merged weight is written in; None: as the models have it."""
    dtype: torch.dtype | None = dtype_from_name(weight.force_dtype or out_dtype)
    return dtype


def content_digest(model: ModelReference) -> str:
    """Return what identifies a model's weights, see `digest`.

    Of a model with an adapter, these are the files it was merged into.
    """
    return content_digests([model])[0]


def content_digests(models: Sequence[ModelReference]) -> list[str]:
    """Return every model's `content_digest`; they are read side by side."""
    indices = [LoaderCache().get(model).index for model in models]  # by thread
    files = [
        [Path(index.base_path) / shard for shard in set(index.tensor_paths.values())]
        for index in indices
    ]
    with ThreadPoolExecutor() as pool:
        return list(pool.map(digest, files))
