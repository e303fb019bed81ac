"""What can be known of a config before anything is downloaded or computed.

All findings are reported together. mergekit itself ignores unknown keys and finds
mismatched models only when it writes, after the pre-pass would have run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import yaml
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import (
    InputModelDefinition,
    MergeConfiguration,
    ParameterSetting,
)
from mergekit.options import MergeOptions

from rpam_mergekit.calibration import PATTERNS, CalibrationSet, read_calibration
from rpam_mergekit.checkpoint import Layout, MergeModels, compare_shapes
from rpam_mergekit.errors import RpamError, refuse, suggestion
from rpam_mergekit.references import notes, read_config
from rpam_mergekit.settings import MODEL_PARAMETERS, RpamSettings, parse_settings

NAME = "rpam"
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


def weight_parameter() -> Any:
    """Return the specification of `weight`, which a user may set per model.

    Imports mergekit's merge methods, which must not be imported from the top of a
    module that `method` needs: that import is what registers `method`.
    """
    from mergekit.merge_methods.base import ParameterScope, ParameterSpec

    return ParameterSpec("weight", float | None, ParameterScope.NON_BASE, default=None)


@dataclass(frozen=True)
class MergeRequest:
    """A config that has passed the checks.

    `calibration` is None where a coefficients file is to be used as it is.
    `weight_settings` are the user's own `weight:` settings, highest precedence first.
    """

    settings: RpamSettings
    models: MergeModels
    calibration: CalibrationSet | None
    weight_settings: tuple[Mapping[str, ParameterSetting] | None, ...]

    def fixed_weights(self, layout: Layout) -> dict[str, float]:
        """Return the weights the user set, by tensor, as mergekit resolves them."""
        from mergekit.parameter_resolver import resolve_parameter

        fixed, weight = {}, weight_parameter()
        last = max(len(layout.layers) - 1, 1)
        groups = [(0.0, layout.outside)]
        groups += [(i / last, layer) for i, layer in enumerate(layout.layers)]
        if len(layout.layers) == 1:
            groups[1] = (1.0, layout.layers[0])
        for t, infos in groups:
            for info in infos:
                value = resolve_parameter(
                    weight, self.weight_settings, tensor_name=info.name, t=t
                )
                if value is not None:
                    fixed[info.name] = value
        return fixed


def check_config(
    config: MergeConfiguration, options: MergeOptions, source: str | None = None
) -> MergeRequest:
    """Return what `config` asks for; raise `RpamError` with everything wrong with it.

    `source` is the YAML text, in which keys are still visible that mergekit drops.
    """
    findings = check_keys(yaml.safe_load(source)) if source else []
    settings = _collect(findings, lambda: parse_settings(config.parameters or {}))
    models = _collect(findings, lambda: _models(config))
    calibration = None
    path = (config.parameters or {}).get("calibration")
    if isinstance(path, str):
        calibration = _collect(findings, lambda: read_calibration(path))
    elif settings is not None and settings.coefficients is None:
        findings.append(
            "parameters.calibration: missing. Name the pattern-labelled calibration "
            "file (JSONL), or the coefficients file of an earlier run in "
            "parameters.coefficients."
        )
    findings += _unsupported(config)
    if models is not None:
        findings += _compare_models(models, options)
    refuse(findings)
    assert settings is not None
    assert models is not None
    others = [m for m in config.models or [] if m.model == models.other]
    weight_settings = (*(m.parameters for m in others), config.parameters)
    return MergeRequest(settings, models, calibration, weight_settings)


def check_keys(document: Any) -> list[str]:
    """Return a finding for every unknown key of a config, with a suggestion."""
    if not isinstance(document, dict):
        return []
    known = [*MergeConfiguration.model_fields, "name"]
    findings = [
        f"{key}: unknown key.{suggestion(str(key), known)}"
        for key in document
        if key not in known
    ]
    for number, model in enumerate(document.get("models") or []):
        if not isinstance(model, dict):
            continue
        findings += [
            f"models[{number}].{key}: unknown key."
            f"{suggestion(str(key), InputModelDefinition.model_fields)}"
            for key in model
            if key not in InputModelDefinition.model_fields
        ]
    return findings


def _collect(findings: list[str], read: Any) -> Any:
    """Return what `read` returns; add its findings and return None if it refuses."""
    try:
        return read()
    except RpamError as error:
        findings += error.findings
        return None


def _unsupported(config: MergeConfiguration) -> list[str]:
    findings = []
    for key in ("slices", "modules"):
        if getattr(config, key):
            findings.append(
                f"{key}: rpam optimises whole models. Use models: with the two of them."
            )
    for key in ("tokenizer", "tokenizer_source"):
        if getattr(config, key) is not None:
            findings.append(
                f"{key}: rpam merges vocabularies of one size by token id. Leave it "
                "out: the output gets the tokenizer and chat template of base_model."
            )
    for key in ("dtype", "out_dtype"):
        try:
            dtype_from_name(getattr(config, key))
        except RuntimeError as error:
            findings.append(f"{key}: {error}. Known: bfloat16, float16, float32.")
    return findings


def _models(config: MergeConfiguration) -> MergeModels | None:
    """Return base and other model with their patterns, or raise all that is wrong.

    None where the config has no `models:`, which `_unsupported` reports.
    """
    findings = []
    named = [m.model for m in config.models or []]
    others = [m for m in named if m != config.base_model]
    if config.base_model is None:
        findings.append(
            "base_model: missing. Name the Long-CoT reasoning model: coefficients are "
            "shares of the other model, and its chat template is used."
        )
    elif config.models and len(others) != 1:
        findings.append(
            f"models: found {len(others)} besides base_model"
            f"{_listed(others)}, expected one. rpam merges two models: the Long-CoT "
            "model as base_model and the Short-CoT model."
        )
    elif len(named) - len(others) > 1:
        findings.append("models: base_model is listed twice.")
    patterns: dict[ModelReference, str] = {}
    for number, model in enumerate(config.models or []):
        for name, value in (model.parameters or {}).items():
            where = f"models[{number}].parameters.{name}"
            if name not in MODEL_PARAMETERS:
                findings.append(
                    f"{where}: unknown parameter."
                    f"{suggestion(name, MODEL_PARAMETERS)} The method's settings "
                    "belong to the top-level parameters."
                )
            elif name == "weight" and model.model == config.base_model:
                findings.append(
                    f"{where}: the base model has no weight. Set it on the other "
                    "model, whose share it is."
                )
            elif name == "pattern":
                if value not in PATTERNS:
                    hint = suggestion(str(value), PATTERNS)
                    findings.append(f"{where}: found {value!r}.{hint}")
                else:
                    patterns[model.model] = str(value)
    refuse(findings)
    if not config.models or config.base_model is None:
        return None
    base, other = config.base_model, others[0]
    opposite = {"long": "short", "short": "long"}
    base_pattern = patterns.get(base) or opposite[patterns.get(other, "short")]
    other_pattern = patterns.get(other) or opposite[base_pattern]
    if base_pattern == other_pattern:
        raise RpamError(
            f"models: both models have the pattern '{base_pattern}'. One is 'long', "
            "the other 'short'."
        )
    return MergeModels(base, other, base_pattern, other_pattern)


def _listed(models: list[ModelReference]) -> str:
    return f" ({', '.join(map(str, models))})" if models else ""


def _compare_models(models: MergeModels, options: MergeOptions) -> list[str]:
    findings: list[str] = []
    base, other = (
        _collect(findings, partial(read_config, model, options))
        for model in (models.base, models.other)
    )
    if findings:
        return findings
    if base.architectures != other.architectures:
        return [
            f"the architectures differ: {models.base} is {_name(base)}, "
            f"{models.other} is {_name(other)}. RPAM merges two fine-tunings of one "
            "model."
        ]
    for key in SAME_CONFIG:
        mine, its = (_value(c.get_text_config(), key) for c in (base, other))
        if mine != its:
            advice = ""
            if key == "vocab_size":
                advice = " Vocabularies are merged by token id and must have one size."
            findings.append(
                f"{key} differs: {mine} in {models.base}, {its} in {models.other}."
                f"{advice}"
            )
    if not findings:
        shapes = partial(compare_shapes, models.base, models.other)
        findings += _collect(findings, shapes) or []
    return findings


def config_notes(models: MergeModels, options: MergeOptions) -> list[str]:
    """Return what is worth a look though it may be merged, once models are loaded."""
    base, other = (
        m.config(trust_remote_code=options.trust_remote_code).get_text_config()
        for m in (models.base, models.other)
    )
    found = notes(models.base, options) + notes(models.other, options)
    return found + [
        f"{key} differs: {_value(base, key)} in {models.base}, "
        f"{_value(other, key)} in {models.other}; the merged model has the "
        "base's, and both are run with it"
        for key in TAKEN_FROM_BASE
        if _value(base, key) != _value(other, key)
    ]


def _value(config: Any, key: str) -> Any:
    """Return a config's value, None where it has none or one for each layer."""
    try:
        return getattr(config, key, None)
    except RuntimeError:  # by which transformers refuses one for all layers
        return None


def _name(config: Any) -> str:
    return ", ".join(config.architectures or [config.model_type])
