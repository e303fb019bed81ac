"""What replaying and solving need of the models to be merged, wherever they come from.

`models/weights.py` loads them by mergekit; `prepass/state_dicts.py` takes them from
memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rpam_mergekit.replay.decoder import Decoder
from rpam_mergekit.replay.layer_weights import LayerMerge, Weights


class Experts(Protocol):
    """The models of a merge, the base first, with their weights on demand.

    patterns: the pattern that each model stands for. outside: the names of the tensors
    outside the decoder layers; embeddings: of those that come before the layers.
    Weights are tensors by the names they have in the checkpoint, in their own dtype, on
    the device of the decoder.
    """

    decoder: Decoder

    @property
    def patterns(self) -> tuple[str, ...]:
        """The models' patterns, the base's first."""

    @property
    def layers(self) -> int:
        """The number of decoder layers."""

    @property
    def outside(self) -> Sequence[str]:
        """The tensors outside the layers, by name."""

    @property
    def embeddings(self) -> Sequence[str]:
        """Those of `outside` that come before the layers."""

    def entry(self, number: int, tensor: str) -> str:
        """Return the name of a tensor's coefficient for the `number`th other model."""

    def load(self, expert: int, names: Sequence[str]) -> Weights:
        """Return tensors outside the layers of one model; 0 is the base."""

    def layer(self, index: int) -> list[Weights]:
        """Return all models' weights of a layer."""

    def layer_of(self, index: int, expert: int) -> Weights:
        """Return one model's weights of a layer."""

    def merging(self, experts: Sequence[Weights]) -> LayerMerge:
        """Return what a merge needs of all models' weights, which are emptied."""
