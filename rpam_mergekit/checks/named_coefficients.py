"""An earlier coefficients file that a config names: does it belong to this merge.

Only names are compared: what the file was made from is known by digests, for which all
weights would have to be read. A merge compares those too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rpam_mergekit.checks.request import MergeRequest
from rpam_mergekit.errors import RpamError
from rpam_mergekit.formats.coefficients import CoefficientsFile
from rpam_mergekit.formats.hub_path import local_path
from rpam_mergekit.models.layout import Layout
from rpam_mergekit.models.references import public_name
from rpam_mergekit.settings import BEFORE_THINKING, UNSAID
from rpam_mergekit.text import listed

KEY = "parameters.coefficients"


def earlier_file(
    request: MergeRequest, layout: Layout | None
) -> tuple[list[str], list[str]]:
    """Return findings and notes on the coefficients file that a config names."""
    named = request.settings.coefficients
    if named is None:
        return [], []
    try:
        path = local_path(named, KEY)
    except RpamError as error:
        return list(error.findings), []
    if not path.exists():
        return _absent(path, request), []
    try:
        file = CoefficientsFile(path)
    except RpamError as error:
        return [f"{KEY}: {finding}" for finding in error.findings], []
    return _compared(file, request, layout)


def _absent(path: Path, request: MergeRequest) -> list[str]:
    if request.calibration is None:
        return [
            f"{KEY}: no file {path.absolute()}, and no parameters.calibration to make "
            "it from."
        ]
    folder = next(p for p in path.absolute().parents if p.exists())
    if not folder.is_dir():
        return [f"{KEY}: {path} cannot be written: {folder} is a file."]
    return []


def _compared(
    file: CoefficientsFile, request: MergeRequest, layout: Layout | None
) -> tuple[list[str], list[str]]:
    made, models = file.metadata.get("fingerprint", {}), request.models
    patterns = tuple(made.get("patterns", models.patterns))
    if not set(models.roles) <= made.keys() or patterns != models.patterns:
        return [
            f"{KEY}: {file.path} was made for the patterns {', '.join(patterns)}, the "
            f"config has {', '.join(models.patterns)} (base model first). Delete the "
            "file to make it anew, or name another one."
        ], []
    notes = _other_names(file, request)
    changed = _changed(made, request)
    if request.calibration is None:
        if changed:
            notes.append(
                f"{file.path} is used as it is: it was made with {'; '.join(changed)}"
            )
        return _lacking(file, request, layout), notes
    if made.get("calibration") != request.calibration.digest:
        changed.append("another calibration file")
    if changed:
        notes.append(f"{file.path} will be made anew: it has {'; '.join(changed)}")
    return [], notes


def _other_names(file: CoefficientsFile, request: MergeRequest) -> list[str]:
    found: dict[str, Any] = file.metadata.get("models", {})
    return [
        f"{file.path}: its {role} model was {found[role]}, the config has "
        f"{public_name(model)}; it is refused when the weights are not the same"
        for role, model in zip(request.models.roles, request.models.every, strict=True)
        if found.get(role, public_name(model)) != public_name(model)
    ]


def _changed(made: dict[str, Any], request: MergeRequest) -> list[str]:
    now = {**UNSAID, **request.settings.cache_key()}
    known = dict(made.get("settings", {}))
    for name, value in {**BEFORE_THINKING, **UNSAID}.items():
        known.setdefault(name, value)
    if now["compute_dtype"] == "auto":  # files say which it was
        del now["compute_dtype"]
    return [
        f"{name} {value} (the config: {now[name]})"
        for name, value in known.items()
        if name in now and now[name] != value
    ]


def _lacking(
    file: CoefficientsFile, request: MergeRequest, layout: Layout | None
) -> list[str]:
    if layout is None:
        return []
    lacking = sorted(set(layout.entries(request.models)) - set(file.names))
    if not lacking:
        return []
    return [
        f"{KEY}: {file.path} has no coefficients for {listed(lacking, 1)}: it was made "
        "for other models. Name another file, or parameters.calibration to make one."
    ]
