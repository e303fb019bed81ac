"""One coefficients file: what it is made from, when it is reused, who may write it.

The fingerprint in the file says what its coefficients were made from: the content of
both models, the encoded calibration queries, and every setting that matters.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from mergekit.common import ModelReference
from transformers import PretrainedConfig

from rpam_mergekit import __version__
from rpam_mergekit.chat.prompts import EncodedQuery
from rpam_mergekit.checks.request import MergeRequest
from rpam_mergekit.errors import RpamError
from rpam_mergekit.formats.coefficients import CoefficientsFile, write_coefficients
from rpam_mergekit.formats.solved_layers import Solution, folder_of
from rpam_mergekit.models.configs import changed_values, computed_with
from rpam_mergekit.models.layout import Layout, MergeModels
from rpam_mergekit.models.references import public_name
from rpam_mergekit.models.weights import content_digests
from rpam_mergekit.replay.precision import AUTO

# Raised whenever the same inputs would give other coefficients than before.
ALGORITHM = 2
Say = Callable[[str], None]
# Parts of a fingerprint, in words.
PARTS = {
    "algorithm": "the method (another version of rpam-mergekit)",
    "calibration": "the calibration file",
    "fixed": "weight",
    "queries": "the encoded queries",
}


def unfinished(path: Path, fingerprint: Mapping[str, Any]) -> Path:
    """Return the folder of what a run that did not end has solved for `path`.

    It is that of runs on these inputs and no others.
    """
    return path.with_name(path.name + ".unfinished") / folder_of(fingerprint)


def write_solution(
    path: Path,
    solution: Solution,
    models: MergeModels,
    layout: Layout,
    fingerprint: Mapping[str, Any],
) -> None:
    """Write the coefficients file of a run that has ended. Raises `RpamError`."""
    solved = unfinished(path, fingerprint)
    metadata = {
        "version": __version__,
        "models": {
            role: public_name(model)
            for role, model in zip(models.roles, models.every, strict=True)
        },
        "fingerprint": fingerprint,
        "layers": [dataclasses.asdict(report) for report in solution.layers],
        "operating_point": solution.operating_point.record(),
        "opens": solution.opens,
        "unscaled": sorted(
            {
                *fingerprint["fixed"],
                *(
                    models.entry(number, info.name)
                    for number in range(len(models.others))
                    for info in layout.outside
                ),
            }
        ),
    }
    try:
        dtype = getattr(torch, fingerprint["settings"]["coefficient_dtype"])
        write_coefficients(path, solution.entries, metadata, dtype, solved)
    except OSError as error:
        raise RpamError(
            f"{path} cannot be written: {error}. All layers are solved and safe in "
            f"{solved}. Make room, and run the same command again."
        ) from error


@contextmanager
def exclusive(path: Path, say: Say) -> Iterator[None]:
    """Let one run at a time make the coefficients file at `path`; others wait."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(f".{path.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"rpam: waiting for another run that makes {path}")
            lock.acquire()
    except OSError as error:
        raise RpamError(
            f"parameters.coefficients: {path} cannot be written: {error}. Name "
            "another file."
        ) from error
    try:
        yield
    finally:
        lock.release()


def fingerprint_of(
    request: MergeRequest,
    fixed: Mapping[str, float],
    config: Any,
    queries: Sequence[EncodedQuery],
    configs: Mapping[ModelReference, PretrainedConfig],
    compute_dtype: str,
) -> dict[str, Any]:
    """Return what the coefficients are made from, as JSON; reads all models.

    `config` is the merge's, `configs` are those of the models. compute_dtype: that of
    the matrix products, by the device where the setting is `auto`.
    """
    calibration, models = request.calibration, request.models
    digests = content_digests(models.every)
    encoded = json.dumps([_content(query) for query in queries]).encode()
    return {
        "algorithm": ALGORITHM,
        **dict(zip(models.roles, digests, strict=True)),
        "configs": {
            role: computed_with(configs[model])
            for role, model in zip(models.roles, models.every, strict=True)
        },
        "patterns": list(models.patterns),
        "calibration": calibration.digest if calibration else None,
        "queries": hashlib.sha256(encoded).hexdigest(),
        "settings": {
            **request.settings.cache_key(),
            "compute_dtype": compute_dtype,
        },
        "fixed": dict(fixed),
        "dtype": config.dtype,
        "out_dtype": config.out_dtype,
    }


def _content(query: EncodedQuery) -> tuple[Any, ...]:
    """Return what a query is, as it was known before there were `jumps` in any."""
    *found, jumps = dataclasses.astuple(query)
    return (*found, jumps) if jumps else tuple(found)


def changed_since(
    path: Path,
    fingerprint: Mapping[str, Any],
    request: MergeRequest,
    layout: Layout,
) -> list[str]:
    """Return what a file was not made from, of these inputs; refuse other models'.

    Of a file that is to be used as it is only what differs in the models' configs.
    """
    file = CoefficientsFile(path)
    made_from = file.metadata["fingerprint"]
    models = request.models
    if not set(models.roles) <= made_from.keys():
        raise RpamError(
            f"parameters.coefficients: {file.path} was made for the patterns "
            f"{', '.join(made_from['patterns'])}, the config has "
            f"{', '.join(models.patterns)} (base model first). Delete the file to make "
            "it anew, or name another one."
        )
    for role, model in zip(models.roles, models.every, strict=True):
        if made_from[role] != fingerprint[role]:
            raise RpamError(
                f"parameters.coefficients: {file.path} belongs to other models: its "
                f"{role} model was {file.metadata['models'][role]}, whose content "
                f"differs from {model}. Delete the file to make it anew, or name "
                "another one."
            )
    if request.calibration is None:
        lacking = sorted(set(layout.entries(models)) - set(file.names))
        if lacking:
            raise RpamError(f"{file.path}: no coefficients for {lacking[0]}.")
        return list(_changed_configs(made_from, fingerprint))
    free = {"compute_dtype"} if request.settings.compute_dtype == AUTO else set()
    return list(_changed(made_from, fingerprint, free))


def _changed(
    made_from: Mapping[str, Any],
    fingerprint: Mapping[str, Any],
    free: Collection[str],
) -> Iterator[str]:
    """Yield the parts of a fingerprint that differ, in words.

    `free`: settings that may differ, as the config leaves them to the device.
    """
    for key in sorted({*made_from, *fingerprint} - {"settings", "configs"}):
        if made_from.get(key) != fingerprint.get(key):
            yield PARTS.get(key, key)
    before, now = made_from.get("settings", {}), fingerprint["settings"]
    for name in sorted({*before, *now} - {*free}):
        if before.get(name) != now.get(name):
            yield f"{name} ({before.get(name)}, now {now.get(name)})"
    yield from _changed_configs(made_from, fingerprint)


def _changed_configs(
    made_from: Mapping[str, Any], fingerprint: Mapping[str, Any]
) -> Iterator[str]:
    """Yield what differs in the models' configs; earlier files do not know them."""
    for role, before in made_from.get("configs", {}).items():
        now = fingerprint["configs"].get(role, {})
        for key, (value, other) in changed_values(before, now).items():
            yield f"{key} of the {role} model ({value}, now {other})"
