"""What can be known of a config before anything is downloaded or computed.

All findings are reported together. mergekit itself ignores unknown keys and finds
mismatched models only when it writes, after the pre-pass would have run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import yaml
from mergekit.common import dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from rpam_mergekit.chat.prompts import EncodedQuery
from rpam_mergekit.chat.thinking import LONG
from rpam_mergekit.checks.config_file import Document, check_keys
from rpam_mergekit.checks.inputs import (
    Inputs,
    merge_models,
    read_inputs,
    with_one_spelling,
)
from rpam_mergekit.checks.models import (
    Matched,
    Replayable,
    head_notes,
    match_models,
    range_findings,
    replayable,
)
from rpam_mergekit.checks.request import MergeRequest, belongs
from rpam_mergekit.checks.templates import TemplateInUse, template_findings
from rpam_mergekit.errors import RpamError, collect, first_line, refuse
from rpam_mergekit.formats.calibration import CalibrationSet, read_calibration
from rpam_mergekit.formats.coefficients import CoefficientsFile
from rpam_mergekit.formats.hub_path import local_path
from rpam_mergekit.models.configs import dtype_notes, taken_notes
from rpam_mergekit.models.layout import MergeModels
from rpam_mergekit.models.references import notes
from rpam_mergekit.models.tokenizers import row_notes, tokenizer_findings
from rpam_mergekit.parameters import parse_settings
from rpam_mergekit.processes import local_device
from rpam_mergekit.settings import BEFORE_THINKING, RpamSettings


@dataclass
class Examination:
    """What was found out about one config. A finding stops a merge, a note does not.

    request: what the config asks for, None where findings keep it from being
    understood. matched: what was read of the models. replayable: the tensors of the
    merge and the decoder that runs them, queries: the encoded calibration queries, as
    far as those have been looked at. document: the file that the config stands in.
    """

    request: MergeRequest | None = None
    findings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    matched: Matched = field(default_factory=Matched)
    replayable: Replayable | None = None
    queries: Sequence[EncodedQuery] = ()
    document: Document | None = None


def examine_merge(
    config: MergeConfiguration, options: MergeOptions, source: str | None = None
) -> Examination:
    """Examine a config that is about to be merged; raise `RpamError` on any finding.

    `source` is the YAML text, in which keys are still visible that mergekit drops.
    Models that lie on the Hub are examined as far as that goes without their weights.
    """
    config = with_one_spelling(config)
    examination = examine(config, options)
    if source:
        examination.findings[:0] = check_keys(yaml.safe_load(source))
    headers = examination.matched.headers.values()
    if any(header.to_download for header in headers) and not examination.findings:
        notes = list(examination.notes)
        look_at_layers(config, examination, options)
        examination.notes = notes  # what could not be looked at will be when merged
    refuse(examination.findings)
    return examination


def look_at_layers(
    config: MergeConfiguration, examination: Examination, options: MergeOptions
) -> None:
    """Find out whether the layers can be merged and replayed, by names and shapes."""
    request, matched = examination.request, examination.matched
    if request is None:
        return
    models = request.models
    seen = collect(
        examination.findings,
        partial(
            replayable,
            config,
            models,
            matched.configs[models.base],
            matched.headers,
            options,
        ),
    )
    if isinstance(seen, str):
        examination.notes.append(f"whether the layers fit was not looked at: {seen}")
    else:
        examination.replayable = seen


def examine(
    config: MergeConfiguration,
    options: MergeOptions,
    later: Collection[str] = (),
) -> Examination:
    """Return what can be said of a config; everything but its keys is looked at.

    `later` are names that are no models yet, but other merges of the same file.
    """
    found = Examination()
    config = with_one_spelling(config)
    inputs = read_inputs(config)
    found.findings += inputs.findings
    models = collect(found.findings, partial(merge_models, config, inputs))
    settings, calibration = examine_parameters(
        config.parameters or {}, models.patterns if models else None, found.findings
    )
    found.findings += _dtypes(config) + _device(options)
    if models is not None:
        _examine_models(config, models, inputs, options, later, found)
    found.findings += template_findings(config, found.matched.tokenizers)
    found.findings += tokenizer_findings(
        config, found.matched.tokenizers, found.matched.configs
    )
    found.notes += row_notes(config, found.matched.tokenizers, found.matched.configs)
    if settings is None or models is None:
        return found
    if settings.reasoning and models.patterns[0] != LONG:
        found.findings.append(
            f"parameters.reasoning: found {settings.reasoning}, but it moves the merge "
            f"between its operating point and a base that thinks, and base_model has "
            f"the pattern '{models.patterns[0]}'. Make the Long-CoT model the base."
        )
    own = {i.model: i.parameters for i in inputs.named}
    weight_settings = tuple((own[m], config.parameters) for m in models.others)
    template = _examine_template(config, models, settings, calibration, found)
    found.request = MergeRequest(
        settings, models, calibration, weight_settings, template
    )
    if settings.outside_weight or _sets_weights(found.request):
        found.notes += head_notes(models, found.matched)
    return found


def examine_parameters(
    parameters: Mapping[str, Any],
    patterns: tuple[str, ...] | None,
    findings: list[str],
) -> tuple[RpamSettings | None, CalibrationSet | None]:
    """Return the settings and the calibration set; what is wrong goes to `findings`."""
    hints = {
        name: belongs(name, "parameters")
        for name in parameters
        if name not in (*RpamSettings.model_fields, "weight")
    }
    findings += [
        f"parameters.{name}: unknown parameter.{hint}"
        for name, hint in hints.items()
        if hint
    ]
    parameters = {n: v for n, v in parameters.items() if not hints.get(n)}
    settings = collect(findings, partial(parse_settings, parameters))
    path = parameters.get("calibration")
    if isinstance(path, str):
        read = partial(read_calibration, path, patterns)
        return settings, collect(findings, read)
    if settings is not None and settings.coefficients is None:
        findings.append(
            "parameters.calibration: missing. Name the pattern-labelled calibration "
            "file (JSONL), or the coefficients file of an earlier run in "
            "parameters.coefficients."
        )
    return settings, None


def _examine_models(
    config: MergeConfiguration,
    models: MergeModels,
    inputs: Inputs,
    options: MergeOptions,
    later: Collection[str],
    found: Examination,
) -> None:
    names = [model for model in models.every if model.model.path in later]
    found.notes += [
        f"{model} is the output of another merge of this file: it cannot be compared "
        "with the other models yet"
        for model in names
    ]
    if models.base in names or set(models.others) <= set(names):
        return
    there = tuple(model for model in models.others if model not in names)
    models = MergeModels(models.base, there, models.patterns)
    encodes = "calibration" in (config.parameters or {})
    matched = found.matched = match_models(models, options, encodes)
    found.findings += matched.findings
    found.notes += matched.notes
    if not matched.findings:  # quantised weights have no dtype that holds both
        found.notes += dtype_notes(config, matched.headers)
    if models.base in matched.configs:
        base = matched.configs[models.base]
        found.findings += range_findings(inputs.layer_ranges, base)


def _examine_template(
    config: MergeConfiguration,
    models: MergeModels,
    settings: RpamSettings,
    calibration: CalibrationSet | None,
    found: Examination,
) -> TemplateInUse:
    tokenizers = found.matched.tokenizers
    queries = calibration.queries if calibration else ()
    solved = _as_solved(settings)
    template = TemplateInUse.of(config, tokenizers, models.base, queries, solved)
    found.findings += template.findings(queries, solved)
    others = {m: t for m, t in tokenizers.items() if m != models.base}
    found.notes += template.notes(queries, solved, others)
    return template


def _as_solved(settings: RpamSettings) -> RpamSettings:
    """Return the settings, with those on thinking as coefficients were solved by.

    A file that is used as it is knows by which prompts that was.
    """
    if settings.calibration is not None or settings.coefficients is None:
        return settings
    try:
        path = local_path(settings.coefficients, "parameters.coefficients")
        made_from = CoefficientsFile(path).metadata["fingerprint"]["settings"]
    except (RpamError, OSError, KeyError):  # which is said elsewhere
        return settings
    known = {**BEFORE_THINKING, **made_from}
    return settings.model_copy(update={name: known[name] for name in BEFORE_THINKING})


def _sets_weights(request: MergeRequest) -> bool:
    return any(
        settings and "weight" in settings
        for of_model in request.weight_settings
        for settings in of_model
    )


def _dtypes(config: MergeConfiguration) -> list[str]:
    findings = []
    for key in ("dtype", "out_dtype"):
        try:
            dtype_from_name(getattr(config, key))
        except RuntimeError as error:
            findings.append(f"{key}: {error}. Known: bfloat16, float16, float32.")
    return findings


def _device(options: MergeOptions) -> list[str]:
    findings = []
    try:
        torch.empty(1, device=local_device(options.device or "cpu"))
    except Exception as error:  # of many kinds, by device
        findings.append(
            f"--device: found '{options.device}', which cannot be used: "
            f"{first_line(error)}"
        )
    if options.multi_gpu and not torch.accelerator.is_available():
        findings.append(
            "--multi-gpu: torch finds no GPU on this machine. Leave the option out "
            "(--gpu-rich has it too), or install a torch for your GPUs."
        )
    return findings


def config_notes(models: MergeModels, options: MergeOptions) -> list[str]:
    """Return what is worth a look though it may be merged, once models are loaded."""
    trusted = options.trust_remote_code
    configs = {model: model.config(trust_remote_code=trusted) for model in models.every}
    found = [note for model in models.every for note in notes(model, options)]
    return found + taken_notes(models, configs)
