"""Do the models of a merge fit each other: configs, shapes, tokenizers.

Read from small files and from the headers of the weights, before any download.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from rpam_mergekit.errors import collect
from rpam_mergekit.models.checkpoint import MergeModels
from rpam_mergekit.models.headers import (
    Header,
    compare_shapes,
    read_header,
    unknown_notes,
)
from rpam_mergekit.models.references import read_config
from rpam_mergekit.models.tokenizers import (
    compare_tokenizers,
    end_notes,
    load_tokenizer,
)

# What must agree for weights to be merged one by one (names of transformers configs).
SAME_CONFIG = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
# What the merged model takes from the base; the other expert is run with it too.
TAKEN_FROM_BASE = (
    "rope_parameters",
    "rms_norm_eps",
    "layer_norm_eps",
    "hidden_act",
    "head_dim",
    "sliding_window",
    "tie_word_embeddings",
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
    return found


def _match_shapes(models: MergeModels, found: Matched) -> None:
    for model in models.every:
        header = collect(found.findings, partial(read_header, model))
        if header is not None:
            found.headers[model] = header
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


def taken_notes(
    models: MergeModels, configs: dict[ModelReference, PretrainedConfig]
) -> list[str]:
    """Return notes on what differs between configs and is taken from the base."""
    base = configs[models.base].get_text_config()
    return [
        f"{key} differs: {value_of(base, key)} in {models.base}, "
        f"{value_of(other, key)} in {model}; the merged model has the "
        "base's, and all are run with it"
        for model in models.others
        for other in (configs[model].get_text_config(),)
        for key in TAKEN_FROM_BASE
        if value_of(base, key) != value_of(other, key)
    ]


def head_notes(models: MergeModels, found: Matched) -> list[str]:
    """Return a note where the merged head would not be the base's tied embedding.

    mergekit writes a right `lm_head.weight`, but config.json keeps the base's
    `tie_word_embeddings`, by which some servers do without it.
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
        "weight). The merged head is a tensor of its own, but config.json says that it "
        "is tied: transformers loads it right, vLLM ignores it. Set "
        "tie_word_embeddings to false in the output's config.json"
    ]


def value_of(config: PretrainedConfig, key: str) -> Any:
    """Return a config's value, None where it has none or one for each layer."""
    try:
        return getattr(config, key, None)
    except RuntimeError:  # by which transformers refuses one for all layers
        return None


def _name(config: PretrainedConfig) -> str:
    return ", ".join(config.architectures or [config.model_type])
