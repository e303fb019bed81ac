"""Do the models of a merge fit each other, and can their layers be run one by one.

Read from small files and from the headers of the weights, before any download. Of the
layers the model's own code is run without weights, its layers replaced by recorders, as
the pre-pass begins; embeddings are one zero, repeated.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from mergekit.architecture import arch_info_for_config, get_architecture_info
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from rpam_mergekit.errors import RpamError, collect, first_line
from rpam_mergekit.models.configs import generation_notes, spelling_notes, value_of
from rpam_mergekit.models.headers import (
    Header,
    compare_shapes,
    read_header,
    unknown_notes,
)
from rpam_mergekit.models.layout import Layout, MergeModels, plan_layout
from rpam_mergekit.models.patches import loaders_from_headers
from rpam_mergekit.models.quantised import claim_note, quantised_finding
from rpam_mergekit.models.references import read_config
from rpam_mergekit.models.tokenizers import (
    compare_tokenizers,
    end_notes,
    load_tokenizer,
)
from rpam_mergekit.models.weights import ExpertWeights
from rpam_mergekit.replay.decoder import Decoder

# What must agree for weights to be merged one by one (names of transformers configs).
SAME_CONFIG = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


@dataclass
class Matched:
    """What was read of a merge's models, the base's first, and what does not fit."""

    configs: dict[ModelReference, PretrainedConfig] = field(default_factory=dict)
    headers: dict[ModelReference, Header] = field(default_factory=dict)
    tokenizers: dict[ModelReference, PreTrainedTokenizerBase] = field(
        default_factory=dict
    )
    findings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def match_models(
    models: MergeModels, options: MergeOptions, encodes: bool = True
) -> Matched:
    """Compare every other model with the base; nothing large is read.

    `encodes`: whether the base's tokenizer is needed for calibration queries.
    """
    found = Matched()
    for model in models.every:
        config = collect(found.findings, partial(read_config, model, options))
        if config is not None:
            found.configs[model] = config
            _read_header(model, config, found)
    if models.base not in found.configs:
        return found
    for model in models.others:
        if model in found.configs:
            found.findings += _compare_configs(
                models.base, found.configs[models.base], model, found.configs[model]
            )
    if found.findings:
        return found
    _match_shapes(models, found)
    _match_tokenizers(models, options, found, encodes)
    found.notes += generation_notes(models)
    base = models.base
    found.notes += spelling_notes(base, found.configs[base])
    return found


def _read_header(
    model: ModelReference, config: PretrainedConfig, found: Matched
) -> None:
    """Read what the weights are; of quantised ones nothing else is said."""
    unreadable: list[str] = []
    header = collect(unreadable, partial(read_header, model))
    if header is not None:
        found.headers[model] = header
    quantised = quantised_finding(model, config, header)
    found.findings += [quantised] if quantised else unreadable
    if quantised is None and header is not None and (note := claim_note(model, config)):
        found.notes.append(note)


def late_findings(matched: Matched) -> list[str]:
    """Return findings on models of whose tensors nothing was known, now loaded."""
    findings = []
    for model, header in matched.headers.items():
        if header.unknown:
            config = matched.configs[model]
            findings.append(quantised_finding(model, config, read_header(model)))
    return [finding for finding in findings if finding]


def _match_shapes(models: MergeModels, found: Matched) -> None:
    found.notes += unknown_notes(found.headers)
    base = found.headers.get(models.base)
    for model in models.others:
        header = found.headers.get(model)
        if base is not None and header is not None:
            found.findings += compare_shapes(models.base, base, model, header)


def _match_tokenizers(
    models: MergeModels, options: MergeOptions, found: Matched, encodes: bool
) -> None:
    missing: list[str] = []
    for model in models.every:
        tokenizer = collect(missing, partial(load_tokenizer, model, options))
        if tokenizer is not None:
            found.tokenizers[model] = tokenizer
    if encodes and models.base not in found.tokenizers:
        found.findings.append(f"{missing[0]} The calibration queries need it.")
        return
    found.notes += [f"{one} Vocabularies were not compared" for one in missing]
    if models.base not in found.tokenizers:
        return
    mine = found.tokenizers[models.base]
    for model in models.others:
        if model in found.tokenizers:
            its = found.tokenizers[model]
            findings, notes = compare_tokenizers(models.base, mine, model, its)
            found.findings += findings
            found.notes += notes
    found.notes += end_notes(models.every, found.configs, found.tokenizers, options)


def _compare_configs(
    base: ModelReference,
    mine: PretrainedConfig,
    other: ModelReference,
    its: PretrainedConfig,
) -> list[str]:
    if mine.architectures != its.architectures:
        return [
            f"the architectures differ: {base} is {_name(mine)}, {other} is "
            f"{_name(its)}. RPAM merges fine-tunings of one model."
        ]
    findings = []
    for key in SAME_CONFIG:
        first, second = (value_of(c.get_text_config(), key) for c in (mine, its))
        if first != second:
            advice = ""
            if key == "vocab_size":
                advice = " Vocabularies are merged by token id and must have one size."
            findings.append(
                f"{key} differs: {first} in {base}, {second} in {other}.{advice}"
            )
    return findings


def range_findings(
    ranges: Sequence[tuple[str, tuple[int, int]]], config: PretrainedConfig
) -> list[str]:
    """Return a finding for every `layer_range` beyond the models' layers."""
    layers = value_of(config.get_text_config(), "num_hidden_layers")
    return [
        f"{where}: layer_range: found {[start, end]}, but the models have "
        f"{layers} layers, 0 to {layers - 1}."
        for where, (start, end) in ranges
        if layers is not None and not 0 <= start < end <= layers
    ]


def head_notes(models: MergeModels, found: Matched) -> list[str]:
    """Return a note where the merged head would not be the base's tied embedding.

    The merged one is a tensor of its own then, and the output's config.json says so.
    """
    tied = {
        model: bool(value_of(config.get_text_config(), "tie_word_embeddings"))
        for model, config in found.configs.items()
    }
    untied = [str(model) for model in models.others if not tied.get(model, True)]
    if not tied.get(models.base) or not untied:
        return []
    return [
        f"the head is tied to the embeddings in {models.base}, not in "
        f"{', '.join(untied)}, and embeddings or head are merged (outside_weight, "
        "weight). The merged head is a tensor of its own, and config.json of the "
        "output says that it is not tied (tie_word_embeddings: false)"
    ]


def _name(config: PretrainedConfig) -> str:
    return ", ".join(config.architectures or [config.model_type])


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
    with loaders_from_headers(headers), _quiet():
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
        for info in layout.embeddings
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
