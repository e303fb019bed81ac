"""All that `mergekit-rpam check` looks at in one config, and what it finds out."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mergekit import merge_methods
from mergekit.config import ConditionalParameter
from mergekit.merge import _set_chat_template
from mergekit.options import MergeOptions

from rpam_mergekit.chat.prompts import EncodedQuery, encode_calibration
from rpam_mergekit.checks.config_file import Document
from rpam_mergekit.checks.earlier import earlier_file
from rpam_mergekit.checks.examine import (
    NAME,
    Examined,
    MergeRequest,
    examine,
    examine_parameters,
)
from rpam_mergekit.checks.inputs import not_passed_on
from rpam_mergekit.checks.matching import taken_notes
from rpam_mergekit.checks.replayable import Replayable, replayable
from rpam_mergekit.errors import RpamError, collect, suggestion
from rpam_mergekit.formats.calibration import CalibrationSet
from rpam_mergekit.models.adapters import adapter_notes
from rpam_mergekit.models.checkpoint import Layout


@dataclass
class Inspection:
    """What was found out about one config.

    `found`, `models` and `queries` are there as far as the config could be understood.
    """

    document: Document
    findings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    found: Examined = field(default_factory=Examined)
    models: Replayable | None = None
    queries: Sequence[EncodedQuery] = ()


def inspect(
    document: Document, options: MergeOptions, others: Collection[str] = ()
) -> Inspection:
    """Look at everything in a config. `others` are the names of merges beside it."""
    result = Inspection(document, list(document.findings))
    content = document.content
    found = content.get("merge_method")
    wrong = method_finding(found)
    if wrong:
        missing = [f for f in result.findings if f.startswith("merge_method:")]
        result.findings = [f for f in result.findings if f not in missing]
        result.findings.insert(0, wrong)
    if document.config is None:
        _parameters_only(content, result)
        return result
    if others or document.name is not None:
        result.findings += not_passed_on(document.config)
    result.found = examine(document.config, options, others)
    result.findings += result.found.findings
    result.notes += result.found.notes
    if result.found.request is not None:
        _look_inside(result, result.found.request, options)
    return result


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


def _parameters_only(content: Mapping[str, Any], result: Inspection) -> None:
    """Look at what can be understood of a config that mergekit cannot read."""
    parameters = content.get("parameters")
    said: list[str] = []
    if isinstance(parameters, Mapping):
        examine_parameters(parameters, None, said)
    told = {finding.partition(": ")[0] for finding in result.findings}
    result.findings += [f for f in said if f.partition(": ")[0] not in told]


def _look_inside(
    result: Inspection, request: MergeRequest, options: MergeOptions
) -> None:
    """Look at what needs models that fit each other."""
    matched, models, findings = result.found.matched, request.models, result.findings
    read = set(models.every) == set(matched.headers)
    if read and not matched.findings:
        result.notes += taken_notes(models, matched.configs)
        for model in models.every:
            result.notes += adapter_notes(model)
        base = matched.configs[models.base]
        config = result.document.config
        assert config is not None
        seen = collect(
            findings,
            partial(replayable, config, models, base, matched.headers, options),
        )
        if isinstance(seen, str):
            result.notes.append(f"whether the layers fit was not looked at: {seen}")
        elif seen is not None:
            result.models = seen
            result.notes += _weights(request, seen.layout, findings)
    layout = result.models.layout if result.models is not None else None
    wrong, notes = earlier_file(request, layout)
    findings += wrong
    result.notes += notes
    if models.base in matched.tokenizers and request.calibration is not None:
        _encode(result, request, request.calibration)


def _weights(request: MergeRequest, layout: Layout, findings: list[str]) -> list[str]:
    """Return notes on filters of `weight` that match nothing."""
    try:
        request.fixed_weights(layout)
    except Exception as error:  # of pydantic or mergekit
        lines = str(error).strip().splitlines()
        findings.append(f"weight: {lines[-2].strip() if len(lines) > 2 else lines[0]}")
    infos = [*layout.outside, *(i for layer in layout.layers for i in layer)]
    names = [info.name for info in infos]
    filters = {
        one.filter
        for of_model in request.weight_settings
        for settings in of_model
        for one in _conditions((settings or {}).get("weight"))
    }
    parts = {part for name in names for part in name.split(".") if not part.isdigit()}
    return [
        f"weight: no tensor has '{one}' in its name, so that this filter does nothing."
        f"{suggestion(one, parts)}"
        for one in sorted(filters - {None, "*"})
        if not any(one in name for name in names)
    ]


def _conditions(setting: Any) -> list[ConditionalParameter]:
    several = setting if isinstance(setting, list) else [setting]
    return [one for one in several if isinstance(one, ConditionalParameter)]


def _encode(
    result: Inspection, request: MergeRequest, calibration: CalibrationSet
) -> None:
    """Encode the calibration queries as the pre-pass will."""
    matched, config = result.found.matched, result.document.config
    tokenizer = matched.tokenizers[request.models.base]
    base = matched.configs[request.models.base].get_text_config()
    assert config is not None
    try:
        _set_chat_template(tokenizer, config)
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
