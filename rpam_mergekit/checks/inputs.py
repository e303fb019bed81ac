"""The models of a merge config, as `models:`, `slices:` or a module of either.

The pre-pass optimises whole models. So slices are clear where each takes the same
layers of all models: a layer of the output then has the coefficients of its input
layer, as if the whole merged model had been cut into slices.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import (
    InputModelDefinition,
    MergeConfiguration,
    OutputSliceDefinition,
    ParameterSetting,
)
from pydantic import BaseModel

from rpam_mergekit.checks.request import belongs
from rpam_mergekit.errors import RpamError, refuse, suggestion
from rpam_mergekit.formats.calibration import PATTERNS
from rpam_mergekit.models.layout import MergeModels
from rpam_mergekit.models.references import same_model
from rpam_mergekit.settings import MODEL_PARAMETERS, RpamSettings

PATTERN_NAME = re.compile(r"[a-z][a-z0-9_-]*")
OPPOSITE = {"long": "short", "short": "long"}


@dataclass(frozen=True)
class Input:
    """A model where a config names it, with its parameters."""

    where: str
    model: ModelReference
    parameters: Mapping[str, ParameterSetting]


@dataclass(frozen=True)
class Inputs:
    """The models of a config in its order, and the layers that its slices take."""

    named: Sequence[Input]
    layer_ranges: Sequence[tuple[str, tuple[int, int]]] = ()
    findings: list[str] = field(default_factory=list)

    @property
    def layers(self) -> list[int]:
        """The input layer of every output layer; empty where there are no slices."""
        return [n for _, (start, end) in self.layer_ranges for n in range(start, end)]


def read_inputs(config: MergeConfiguration) -> Inputs:
    """Return the models that a config names; what is unclear is in `findings`."""
    if config.models:
        return Inputs(_of_models("models", config.models))
    if config.slices:
        return _of_slices("slices", config.slices, config)
    modules = config.modules or {}
    if len(modules) > 1:
        return Inputs(
            [],
            findings=[
                f"modules: found {', '.join(modules)}. rpam merges the decoder of a "
                "text-only causal language model, which is one module."
            ],
        )
    for name, module in modules.items():
        where = f"modules.{name}"
        findings = _misplaced(f"{where}.parameters", module.parameters)
        if module.models:
            named = _of_models(f"{where}.models", module.models)
            return Inputs(named, findings=findings)
        inputs = _of_slices(f"{where}.slices", module.slices or [], config)
        return Inputs(inputs.named, inputs.layer_ranges, findings + inputs.findings)
    return Inputs([])


def _of_models(where: str, models: Sequence[InputModelDefinition]) -> list[Input]:
    return [
        Input(f"{where}[{number}]", entry.model, entry.parameters or {})
        for number, entry in enumerate(models)
    ]


def _of_slices(
    where: str, slices: Sequence[OutputSliceDefinition], config: MergeConfiguration
) -> Inputs:
    findings: list[str] = []
    ranges: list[tuple[str, tuple[int, int]]] = []
    first = [
        Input(f"{where}[0].sources[{n}]", source.model, source.parameters or {})
        for n, source in enumerate(slices[0].sources)
    ]
    for number, one in enumerate(slices):
        here = f"{where}[{number}]"
        findings += _misplaced(f"{here}.parameters", one.parameters)
        if one.base_model not in (None, config.base_model):
            findings.append(
                f"{here}.base_model: found {one.base_model}. rpam has one base model, "
                "the config's."
            )
        if one.residual_weight is not None:
            findings.append(f"{here}.residual_weight: rpam has no such weight.")
        found = [(s.model, s.parameters or {}) for s in one.sources]
        if found != [(i.model, i.parameters) for i in first]:
            findings.append(
                f"{here}.sources: the models, their order or their parameters are not "
                f"those of {where}[0]. The pre-pass optimises whole models, so every "
                "slice takes its layers from all of them."
            )
        for at, source in enumerate(one.sources):
            if "weight" in (source.parameters or {}):
                findings.append(
                    f"{here}.sources[{at}].parameters.weight: with slices, set weight "
                    "in the top-level parameters, by filters on the models' own "
                    "tensor names."
                )
        layers = sorted({source.layer_range for source in one.sources})
        if len(layers) > 1:
            found_ranges = " and ".join(str(list(r)) for r in layers)
            findings.append(
                f"{here}.sources: layer_range differs: {found_ranges}. The pre-pass "
                "aligns layers of the same number: give all sources one range."
            )
        else:
            ranges += [(f"{here}.sources", r) for r in layers]
    return Inputs(first, ranges, findings + _gradients(config))


def _misplaced(
    where: str, parameters: Mapping[str, ParameterSetting] | None
) -> list[str]:
    known = (*MODEL_PARAMETERS, *RpamSettings.model_fields)
    hints = {n: None if n in known else belongs(n, where) for n in parameters or {}}
    whole = " rpam's parameters are the whole merge's. Put it into the top-level "
    return [f"{where}.{n}:{hint or f'{whole}parameters.'}" for n, hint in hints.items()]


def _gradients(config: MergeConfiguration) -> list[str]:
    """Return a finding if `weight` is a gradient, which would run along each slice."""
    setting = (config.parameters or {}).get("weight")
    several = setting if isinstance(setting, list) else [setting]
    values = [setting, *(getattr(one, "value", None) for one in several)]
    if any(isinstance(v, list) and isinstance(v[0], (int, float)) for v in values if v):
        return [
            "parameters.weight: a gradient runs along every slice, so that one layer "
            "would have several values. Use filters and single values."
        ]
    return []


def with_one_spelling(config: MergeConfiguration) -> MergeConfiguration:
    """Return a config in which every model is written as where it is named first.

    The base first of all. mergekit takes `long/` for another model than `long`, and so
    would merge the base with itself.
    """
    known = [] if config.base_model is None else [config.base_model]

    def spelt(model: ModelReference) -> ModelReference:
        same = next((one for one in known if same_model(one, model)), None)
        if same is None:
            known.append(model)
        return same or model

    written: MergeConfiguration = with_references(config, spelt)
    return written


def with_references(
    value: Any, change: Callable[[ModelReference], ModelReference]
) -> Any:
    """Return a config, or a part of one, with other models in the places of models."""
    if isinstance(value, ModelReference):
        return change(value)
    if isinstance(value, BaseModel):
        fields = {name: with_references(inner, change) for name, inner in value}
        return value.model_copy(update=fields)
    if isinstance(value, dict):
        return {key: with_references(inner, change) for key, inner in value.items()}
    if isinstance(value, list):
        return [with_references(inner, change) for inner in value]
    return value


def merge_models(config: MergeConfiguration, inputs: Inputs) -> MergeModels | None:
    """Return the models of a merge with their patterns, or raise all that is wrong.

    None where `inputs` are not clear.
    """
    base, named = config.base_model, inputs.named
    others = [i for i in named if i.model != base]
    findings = []
    if base is None:
        findings.append(
            "base_model: missing. Name the Long-CoT reasoning model: coefficients are "
            "shares of the other model, and its chat template is used."
        )
    elif named and not others:
        findings.append(
            "models: found 0 besides base_model, expected one: the Short-CoT model."
        )
    findings += _repeated(named)
    if inputs.layer_ranges and base is not None and len(others) == len(named):
        findings.append(
            f"{named[0].where.rpartition('[')[0]}: base_model ({base}) is not among "
            "them. With slices, mergekit takes it only where it is named."
        )
    findings += _model_parameters(named, base)
    patterns = {
        i.model: str(i.parameters["pattern"])
        for i in named
        if "pattern" in i.parameters
    }
    if len(others) > 1:
        findings += _unnamed(others)
    else:
        findings += _neither_long_nor_short(named)
    refuse(findings)
    if not others or base is None:
        return None
    found = _patterns(base, [i.model for i in others], patterns)
    return MergeModels(base, tuple(i.model for i in others), found)


def _repeated(named: Sequence[Input]) -> list[str]:
    models = [i.model for i in named]
    return [
        f"{i.where}: {i.model} is listed twice."
        for number, i in enumerate(named)
        if i.model in models[:number]
    ]


def _model_parameters(named: Sequence[Input], base: ModelReference | None) -> list[str]:
    findings = []
    for one in named:
        for name in one.parameters:
            where = f"{one.where}.parameters.{name}"
            if name not in MODEL_PARAMETERS:
                hint = belongs(name, f"{one.where}.parameters") or (
                    f"{suggestion(name, MODEL_PARAMETERS)} The method's settings "
                    "belong to the top-level parameters."
                )
                findings.append(f"{where}: unknown parameter.{hint}")
            elif name == "weight" and one.model == base:
                findings.append(
                    f"{where}: the base model has no weight. Set it on the other "
                    "model, whose share it is."
                )
    return findings


def _neither_long_nor_short(named: Sequence[Input]) -> list[str]:
    return [
        f"{one.where}.parameters.pattern: found {one.parameters['pattern']!r}."
        f"{suggestion(str(one.parameters['pattern']), PATTERNS)}"
        for one in named
        if "pattern" in one.parameters and one.parameters["pattern"] not in PATTERNS
    ]


def _unnamed(others: Sequence[Input]) -> list[str]:
    """Return findings on the patterns of more than two models."""
    findings = []
    for one in others:
        where, found = f"{one.where}.parameters.pattern", one.parameters.get("pattern")
        if found is None:
            findings.append(
                f"{where}: missing. Of more than two models each needs the pattern "
                "of the calibration queries that it is for, such as 'short' or 'code'."
            )
        elif not PATTERN_NAME.fullmatch(str(found)) or found in ("base", "other"):
            findings.append(
                f"{where}: found {found!r}, expected a name of lower-case letters, "
                "digits, - and _ other than 'base' and 'other'."
            )
    return findings


def _patterns(
    base: ModelReference,
    others: Sequence[ModelReference],
    named: Mapping[ModelReference, str],
) -> tuple[str, ...]:
    """Return the models' patterns, the base's first; raise if two have the same."""
    found: tuple[str, ...]
    if len(others) == 1:
        at_base = named.get(base) or OPPOSITE[named.get(others[0], "short")]
        found = (at_base, named.get(others[0]) or OPPOSITE[at_base])
    else:
        found = (named.get(base, "long"), *(named[model] for model in others))
    repeated = sorted({pattern for pattern in found if found.count(pattern) > 1})
    if repeated:
        both = "both" if len(others) == 1 else "several"
        raise RpamError(
            f"models: {both} models have the pattern '{repeated[0]}'. "
            + (
                "One is 'long', the other 'short'."
                if len(others) == 1
                else "Each has its own; base_model has 'long' unless it says otherwise."
            )
        )
    return found


def not_passed_on(config: MergeConfiguration) -> Iterator[str]:
    """Yield a finding for every model whose name mergekit-multi cannot pass on.

    It writes configs as text and reads them again.
    """
    for model in config.referenced_models():
        if model.override_architecture is not None:
            continue
        text = str(model)
        try:
            same = ModelReference.parse(text) == model
        except (RuntimeError, ValueError):
            same = False
        if not same or '"' in text or " " in text:
            yield (
                f"{text}: mergekit-multi cannot pass on this name of a model. Use "
                "folders without spaces and quotes in their paths, and without + and "
                "@, which stand before an adapter and a revision."
            )
