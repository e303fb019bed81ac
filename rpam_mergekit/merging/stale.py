"""mergekit-multi takes a finished output as it is: only if it is still what would come.

Its `--lazy` looks at the folder only. Here the record of the merge is compared with
the config, the calibration file, the coefficients and the models of now.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io import ShardedTensorIndex
from mergekit.options import MergeOptions

from rpam_mergekit.checks.fingerprint import ALGORITHM
from rpam_mergekit.checks.inputs import merge_models, read_inputs
from rpam_mergekit.errors import RpamError
from rpam_mergekit.folder.base_files import base_folder, file_digests
from rpam_mergekit.folder.contents import IN_OUTPUT, RECORD, read_record
from rpam_mergekit.formats.calibration import read_calibration
from rpam_mergekit.formats.coefficients import CoefficientsFile
from rpam_mergekit.formats.files import digest, digest_of_file
from rpam_mergekit.formats.hub_path import local_path
from rpam_mergekit.models.adapters import merged_folder, merged_from
from rpam_mergekit.models.headers import unreadable
from rpam_mergekit.outputs.record import output_settings
from rpam_mergekit.parameters import parse_settings
from rpam_mergekit.replay.precision import AUTO
from rpam_mergekit.settings import RpamSettings

NEXT = "Delete the folder, or give --no-lazy, to merge it anew."
# Of `output_settings`, as a config calls them.
KEYS = {
    "reasoning": "parameters.reasoning",
    "weight": "parameters.weight or a model's weight",
    "layer_ranges": "slices",
}


def check_up_to_date(
    config: MergeConfiguration, folder: Path, options: MergeOptions
) -> None:
    """Raise `RpamError` if a finished output of `rpam` is not of these inputs.

    Weights that lie on this disk are read; models of the Hub are compared as they are
    in its cache.
    """
    try:
        record = read_record(folder)
    except RpamError as error:
        raise RpamError(
            f"{folder} holds a model, but no {RECORD}, which a merge by rpam writes "
            f"last: it did not end, or is of another method. {NEXT}"
        ) from error
    changed = list(_changed(config, record, options))
    if changed:
        raise RpamError(
            f"{folder} was merged from other inputs; changed since: "
            f"{', '.join(changed)}. mergekit-multi would skip it. {NEXT}"
        )


def _changed(
    config: MergeConfiguration, record: Mapping[str, Any], options: MergeOptions
) -> Iterator[str]:
    settings = parse_settings(config.parameters or {})
    models = merge_models(config, read_inputs(config))
    patterns = models.patterns if models else None
    yield from _changed_data(settings, patterns, record)
    found = {
        "dtype": config.dtype,
        "out_dtype": config.out_dtype,
        **output_settings(config),
    }
    for name, value in found.items():
        if value != record.get(name, 0.0 if name == "reasoning" else None):
            yield KEYS.get(name, name)
    recorded = record["models"]
    if models is None or [m["pattern"] for m in recorded] != list(models.patterns):
        yield "the models' patterns"
        return
    for model, known in zip(models.every, recorded, strict=True):
        if _differs(model, known, options):
            yield f"the model {model}"
    before = record.get("base_files")  # which records of before have not
    if before is not None:
        now = file_digests(base_folder(models.base))
        for name in sorted({*before, *now}):
            if before.get(name) != now.get(name):
                yield f"{name} of the model {models.base}"


def _changed_data(
    settings: RpamSettings,
    patterns: tuple[str, ...] | None,
    record: Mapping[str, Any],
) -> Iterator[str]:
    """Yield what the coefficients are made from, or that they are others."""
    if settings.calibration is not None:
        calibration = read_calibration(settings.calibration, patterns)
        if calibration.digest != (record["calibration"] or {}).get("digest"):
            yield f"the calibration file {settings.calibration}"
        if record.get("algorithm") != ALGORITHM:
            yield "the method (by another version of rpam-mergekit)"
        problem, known = settings.cache_key(), record["settings"]
        if settings.compute_dtype == AUTO:  # that of the device it was merged on
            problem["compute_dtype"] = known["compute_dtype"]
        for name in sorted(problem.keys() | known.keys()):
            if problem.get(name) != known.get(name):
                yield f"parameters.{name}"
    elif settings.coefficients is not None:
        path = local_path(settings.coefficients, "parameters.coefficients")
        known = record["coefficients"]["sha256"]
        if not path.exists() or digest_of_file(path) != known:
            yield f"the coefficients file {settings.coefficients}"


def _differs(
    model: ModelReference, known: Mapping[str, Any], options: MergeOptions
) -> bool:
    """Tell whether a model that can be read here has other weights than recorded."""
    if model.lora is not None:
        return merged_from(model, options) != known.get("merged_from")
    return "merged_from" in known or _content(model, options) not in (
        None,
        known["content"],
    )


def _content(model: ModelReference, options: MergeOptions) -> str | None:
    """Return the digest of a model's weights, None where they are not on this disk."""
    name, revision = model.model.path, model.model.revision
    folder = Path(name) if model.lora is None else merged_folder(model, options)
    if model.lora is None and not Path(name).is_dir():
        config = try_to_load_from_cache(name, "config.json", revision=revision)
        folder = Path(config).parent if isinstance(config, str) else None
    if folder is None or unreadable(folder):
        return None
    index = ShardedTensorIndex.from_disk(str(folder))
    return digest({folder / shard for shard in index.tensor_paths.values()})


def forget_other_models(
    config: MergeConfiguration, folder: Path, options: MergeOptions
) -> None:
    """Delete the coefficients in an output folder if they are of other models.

    They are an earlier merge's, which `--no-lazy` has made void. A file that the
    config names is the user's.
    """
    path = folder / IN_OUTPUT
    models = merge_models(config, read_inputs(config))
    named = parse_settings(config.parameters or {}).coefficients
    if models is None or named is not None or not path.exists():
        return
    made_from = CoefficientsFile(path).metadata["fingerprint"]
    for role, model in zip(models.roles, models.every, strict=True):
        content = _content(model, options)
        unknown = content is None and model.lora is None  # it is compared when merged
        if content != made_from.get(role) and not unknown:
            path.unlink()
            return
