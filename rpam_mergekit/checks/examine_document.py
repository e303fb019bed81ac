"""All that `mergekit-rpam check` looks at in one config, and what it finds out."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit import merge_methods
from mergekit.config import ConditionalParameter, MergeConfiguration
from mergekit.options import MergeOptions

from rpam_mergekit.chat.prompts import encode_calibration
from rpam_mergekit.checks.config_file import Document
from rpam_mergekit.checks.examine import (
    Examination,
    examine,
    examine_parameters,
    look_at_layers,
)
from rpam_mergekit.checks.inputs import not_passed_on, with_one_spelling
from rpam_mergekit.checks.named_coefficients import earlier_file
from rpam_mergekit.checks.request import MergeRequest
from rpam_mergekit.errors import RpamError, suggestion
from rpam_mergekit.formats.calibration import CalibrationSet
from rpam_mergekit.models.adapters import adapter_notes
from rpam_mergekit.models.configs import taken_notes
from rpam_mergekit.models.layout import Layout
from rpam_mergekit.models.patches import set_chat_template
from rpam_mergekit.settings import NAME


def examine_document(
    document: Document, options: MergeOptions, others: Collection[str] = ()
) -> Examination:
    """Examine everything in a config. `others` are the names of merges beside it."""
    findings = list(document.findings)
    wrong = method_finding(document.content.get("merge_method"))
    if wrong:
        findings = [f for f in findings if not f.startswith("merge_method:")]
        findings.insert(0, wrong)
    if document.config is None:
        findings += _of_parameters(document.content, findings)
        return Examination(findings=findings, document=document)
    if others or document.name is not None:
        findings += not_passed_on(document.config)
    config = with_one_spelling(document.config)
    examination = examine(config, options, others)
    examination.findings[:0] = findings
    examination.document = document
    if examination.request is not None:
        _look_inside(examination, config, examination.request, options)
    return examination


def method_finding(found: Any) -> str | None:
    """Return what is wrong with a config's `merge_method`, None where it is rpam."""
    if found == NAME:
        return None
    if found is None:
        return f"merge_method: missing. Write merge_method: {NAME}."
    known = {method.spec.name for method in merge_methods.registered_methods()}
    text = str(found)
    if text in known:
        return (
            f"merge_method: found '{text}'. 'mergekit-rpam check' knows '{NAME}' only; "
            "mergekit-yaml runs the other methods."
        )
    if difflib.get_close_matches(text.lower(), [NAME], n=1):
        return f"merge_method: found '{text}'. Did you mean '{NAME}'?"
    return f"merge_method: found '{text}'.{suggestion(text, {*known, NAME})}"


def _of_parameters(content: Mapping[str, Any], told: Sequence[str]) -> list[str]:
    """Return what else is wrong in a config that mergekit cannot read."""
    parameters = content.get("parameters")
    findings: list[str] = []
    if isinstance(parameters, Mapping):
        examine_parameters(parameters, None, findings)
    keys = {finding.partition(": ")[0] for finding in told}
    return [f for f in findings if f.partition(": ")[0] not in keys]


def _look_inside(
    result: Examination,
    config: MergeConfiguration,
    request: MergeRequest,
    options: MergeOptions,
) -> None:
    """Look at what needs models that fit each other."""
    matched, models, findings = result.matched, request.models, result.findings
    read = set(models.every) == set(matched.headers)
    if read and not matched.findings:
        result.notes += taken_notes(models, matched.configs)
        for model in models.every:
            result.notes += adapter_notes(model)
        look_at_layers(config, result, options)
        if result.replayable is not None:
            result.notes += _weights(request, result.replayable.layout, findings)
    layout = result.replayable.layout if result.replayable is not None else None
    wrong, notes = earlier_file(request, layout)
    findings += wrong
    result.notes += notes
    if models.base in matched.tokenizers and request.calibration is not None:
        _encode(result, config, request, request.calibration)


def _weights(request: MergeRequest, layout: Layout, findings: list[str]) -> list[str]:
    """Return notes on what `weight` fixes, and on filters that match nothing."""
    notes: list[str] = []
    try:
        nothing = request.nothing_to_solve(layout)
        findings += nothing
        notes += [] if nothing else request.fixed_notes(layout)
    except Exception as error:  # of pydantic or mergekit
        lines = str(error).strip().splitlines()
        findings.append(f"weight: {lines[-2].strip() if len(lines) > 2 else lines[0]}")
    names = [info.name for info in layout.weights]
    filters = {
        one.filter
        for of_model in request.weight_settings
        for settings in of_model
        for one in _conditions((settings or {}).get("weight"))
    }
    parts = {part for name in names for part in name.split(".") if not part.isdigit()}
    return notes + [
        f"weight: no tensor has '{one}' in its name, so that this filter does nothing."
        f"{suggestion(one, parts)}"
        for one in sorted(filters - {None, "*"})
        if not any(one in name for name in names)
    ]


def _conditions(setting: Any) -> list[ConditionalParameter]:
    several = setting if isinstance(setting, list) else [setting]
    return [one for one in several if isinstance(one, ConditionalParameter)]


def _encode(
    result: Examination,
    config: MergeConfiguration,
    request: MergeRequest,
    calibration: CalibrationSet,
) -> None:
    """Encode the calibration queries as the pre-pass will."""
    tokenizer = result.matched.tokenizers[request.models.base]
    base = result.matched.configs[request.models.base].get_text_config()
    try:
        set_chat_template(tokenizer, config)
    except RuntimeError:  # the finding is there, of `template_findings`
        return
    try:
        result.queries, notes = encode_calibration(
            calibration,
            tokenizer,
            base.vocab_size,
            request.settings,
            request.template.thinking,
        )
    except RpamError as error:
        result.findings += error.findings
        return
    result.notes += notes


def writes_to(request: MergeRequest) -> Path:
    """Return a folder on the disk that the coefficients are written to."""
    path = Path(request.settings.coefficients or "here").absolute()
    return next(folder for folder in path.parents if folder.is_dir())
