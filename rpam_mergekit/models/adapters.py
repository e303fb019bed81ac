"""LoRA adapters: `model+adapter` is the model with the adapter merged into it.

mergekit merges it into a folder of `--lora-merge-cache` and later takes what it finds
there, by the names of both, whatever has changed in them since. Here the result
carries a note of what it was made from, and is refused when that has changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock
from huggingface_hub import snapshot_download
from mergekit.common import ModelPath, ModelReference
from mergekit.io import ShardedTensorIndex
from mergekit.options import MergeOptions
from transformers import PretrainedConfig

from rpam_mergekit.errors import RpamError, first_line
from rpam_mergekit.formats.files import digest
from rpam_mergekit.models.headers import unreadable
from rpam_mergekit.models.patches import merged_name
from rpam_mergekit.models.quantised import plain_name

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # peft's order
# Says what an adapter was merged from; written last, beside the result.
MERGED_FROM = "rpam_merged_from.json"


def adapter_findings(
    model: ModelReference, config: PretrainedConfig | None, options: MergeOptions
) -> list[str]:
    """Return what keeps a reference's LoRA adapter from being merged as it is now.

    `config` is the model's; without it, an earlier result is not looked at.
    """
    if model.lora is None:
        return []
    findings = []
    if options.lora_merge_cache is None:
        findings.append(
            f"{model}: an adapter needs mergekit's option --lora-merge-cache FOLDER, "
            "where the model with the adapter merged into it is kept."
        )
    try:
        files = adapter_files(model.lora)
    except RpamError as error:
        return [*findings, *(f"{model}: {finding}" for finding in error.findings)]
    folder = merged_folder(model, options)
    if config is not None and folder is not None and folder.exists():
        made_from = _made_from(model, config, files, options)
        reason = _not_usable(folder, made_from, files)
        if reason:
            findings.append(
                f"{model}: the merged model in {folder} cannot be used: {reason} "
                "Unless another run is making it now, delete that folder, and it is "
                "made anew."
            )
    return findings


def adapter_notes(model: ModelReference) -> list[str]:
    """Return a note if an adapter was trained on a model of another name."""
    if model.lora is None:
        return []
    config = json.loads(adapter_files(model.lora)[0].read_text(encoding="utf-8"))
    trained_on = config.get("base_model_name_or_path")
    if not trained_on or Path(trained_on).name == Path(model.model.path).name:
        return []
    plain, its = (
        (plain_name(name) or name).rpartition("/")[2].lower()
        for name in (trained_on, model.model.path)
    )
    same = ", that is on this model, quantised" if plain == its else ""
    return [f"{model}: the adapter says it was trained on {trained_on}{same}"]


def adapter_files(adapter: ModelPath) -> list[Path]:
    """Return an adapter's config and weights, downloaded if it lies on the Hub.

    Raises `RpamError` if one of them is not there.
    """
    folder = Path(adapter.path)
    if not folder.is_dir():
        try:
            patterns = [ADAPTER_CONFIG, *ADAPTER_WEIGHTS]
            folder = Path(
                snapshot_download(
                    adapter.path, revision=adapter.revision, allow_patterns=patterns
                )
            )
        except Exception as error:
            raise RpamError(
                f"the adapter {adapter} is no folder, nor can it be had from the Hub: "
                f"{first_line(error)}"
            ) from error
    config = folder / ADAPTER_CONFIG
    if not config.exists():
        raise RpamError(
            f"no {ADAPTER_CONFIG} in {folder}. Name the folder of an adapter as peft "
            "saves it."
        )
    weights = [folder / name for name in ADAPTER_WEIGHTS if (folder / name).exists()]
    if not weights:
        raise RpamError(f"no {' or '.join(ADAPTER_WEIGHTS)} in {folder}.")
    return [config, weights[0]]


def merge_adapters(models: Iterable[ModelReference], options: MergeOptions) -> None:
    """Let mergekit merge adapters where it will look for them, whole or not at all.

    Raises `RpamError` if an adapter does not fit its model.
    """
    for model in models:
        folder = merged_folder(model, options)
        if folder is None:
            continue
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not folder.exists():
                _merge_adapter(model, folder, options)


def merged_from(model: ModelReference, options: MergeOptions) -> dict[str, Any]:
    """Return what a model with an adapter is made of now: digests, no weights.

    Raises `RpamError` if the adapter is not there.
    """
    assert model.lora is not None
    config = model.config(trust_remote_code=options.trust_remote_code)
    return _made_from(model, config, adapter_files(model.lora), options)


def _merge_adapter(model: ModelReference, folder: Path, options: MergeOptions) -> None:
    assert model.lora is not None
    with TemporaryDirectory(prefix=".rpam-", dir=folder.parent) as unfinished:
        try:
            merged = model.merged(
                unfinished, options.trust_remote_code, options.lora_merge_dtype
            )
            made_from = merged_from(model, options)
        except Exception as error:
            raise RpamError(
                f"{model}: the adapter cannot be merged into the model: "
                f"{first_line(error)}"
            ) from error
        path = Path(merged.model.path)
        (path / MERGED_FROM).write_text(json.dumps(made_from), encoding="utf-8")
        path.rename(folder)


def merged_folder(model: ModelReference, options: MergeOptions) -> Path | None:
    """Return where mergekit keeps a merged adapter."""
    if model.lora is None or options.lora_merge_cache is None:
        return None
    return Path(options.lora_merge_cache) / merged_name(model)


def _not_usable(
    merged: Path, made_from: dict[str, Any], files: list[Path]
) -> str | None:
    """Return why a merged adapter is not what merging it now would give, or None.

    Where another method of mergekit has merged it, the files' times must do.
    """
    reason = unreadable(merged)
    if reason:
        return f"it is incomplete ({reason})"
    if (merged / MERGED_FROM).exists():
        found = json.loads((merged / MERGED_FROM).read_text(encoding="utf-8"))
        changed = [name for name in made_from if made_from[name] != found.get(name)]
        return f"changed since: {', '.join(changed)}." if changed else None
    written = [path.stat().st_mtime for path in merged.glob("*.safetensors")]
    if any(path.stat().st_mtime > min(written, default=0.0) for path in files):
        return "the adapter is newer."
    return None


def _made_from(
    model: ModelReference,
    config: PretrainedConfig,
    files: list[Path],
    options: MergeOptions,
) -> dict[str, Any]:
    """Return what decides about the result: adapter, model and `--lora-merge-dtype`."""
    base = getattr(config, "_commit_hash", None)  # of a Hub model
    folder = Path(model.model.path)
    if folder.is_dir():
        index = ShardedTensorIndex.from_disk(str(folder))
        base = digest(folder / s for s in set(index.tensor_paths.values()))
    return {
        "adapter": digest(files),
        "model": base,
        "--lora-merge-dtype": options.lora_merge_dtype,
    }
