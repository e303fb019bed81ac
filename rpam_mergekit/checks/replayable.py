"""Can a model's layers be merged and run one by one: known from configs and headers.

The model's own code is run without weights, its layers replaced by recorders, as the
pre-pass begins; embeddings are one zero, repeated.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from mergekit.architecture import arch_info_for_config, get_architecture_info
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from transformers import PretrainedConfig

from rpam_mergekit.errors import RpamError, first_line
from rpam_mergekit.models.checkpoint import Layout, MergeModels, plan_layout
from rpam_mergekit.models.headers import Header, known
from rpam_mergekit.models.weights import ExpertWeights
from rpam_mergekit.replay.decoder import Decoder


@dataclass(frozen=True)
class Replayable:
    """The tensors of a merge and the decoder without its weights."""

    layout: Layout
    decoder: Decoder


def replayable(
    config: MergeConfiguration,
    models: MergeModels,
    base_config: PretrainedConfig,
    headers: Mapping[ModelReference, Header],
    options: MergeOptions,
) -> Replayable | str:
    """Return the decoder of a merge, or why it cannot be known before the download.

    Raises `RpamError` for what the pre-pass would refuse.
    """
    unknown = [model for model in models.every if headers[model].unknown]
    if unknown:
        return f"the names of the tensors of {unknown[0]} are not known"
    downloads = any(headers[model].to_download for model in models.every)
    if downloads and arch_info_for_config(base_config) is None:
        return f"mergekit has no definition of {base_config.model_type}"
    LoaderCache().setup(options)
    with known(headers), _quiet():
        try:
            architecture = get_architecture_info(config, options)
        except RuntimeError as error:
            raise RpamError(f"mergekit: {first_line(error)}") from error
        layout = plan_layout(architecture, base_config, models.every)
        decoder = Decoder(base_config, "cpu", options.trust_remote_code)
        ExpertWeights(models, layout, decoder, None, None)  # compares the names
    _record(decoder, layout)
    return Replayable(layout, decoder)


def _record(decoder: Decoder, layout: Layout) -> None:
    """Let the decoder record a batch. Raises `RpamError` if it cannot be replayed."""
    own = dict(decoder.model.named_parameters(remove_duplicate=False))
    embeddings = {
        info.name: torch.zeros(()).expand(parameter.shape)
        for info in layout.entering
        for name, parameter in own.items()
        if name == info.name or name.endswith(f".{info.name}")
    }
    ids = torch.zeros(2, 4, dtype=torch.int64)
    decoder.record(embeddings, ids, torch.ones_like(ids))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep mergekit from warning of what it infers; it will when it merges."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
