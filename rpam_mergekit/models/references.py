"""Models by reference: what is wrong with one, what to know of it, its public name."""

from __future__ import annotations

from pathlib import Path

from mergekit.architecture import arch_info_for_config
from mergekit.common import ModelPath, ModelReference
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from transformers import PretrainedConfig

from rpam_mergekit.errors import first_line, refuse
from rpam_mergekit.models.adapters import adapter_findings, adapter_notes
from rpam_mergekit.models.headers import unreadable
from rpam_mergekit.models.quantised import gguf_finding, quantised_finding


def read_config(model: ModelReference, options: MergeOptions) -> PretrainedConfig:
    """Return a model's config, the rest of the reference being sound too.

    Raises `RpamError` with all that is wrong with it and can be known before weights
    are downloaded.
    """
    refuse([finding for finding in [gguf_finding(model)] if finding])
    findings: list[str] = []
    config: PretrainedConfig | None = None
    try:
        config = model.config(trust_remote_code=options.trust_remote_code)
    except Exception as error:
        advice = ""
        if "trust_remote_code" in str(error):
            advice = " Read that code, then allow it with --trust-remote-code."
        elif not Path(model.model.path).exists():
            advice = (
                f" There is no folder {Path(model.model.path).absolute()} either: "
                "relative paths begin where the command is run."
            )
        findings.append(
            f"{model}: its config cannot be loaded: {first_line(error)}{advice}"
        )
    folder = Path(model.model.path)
    reason = unreadable(folder) if config and folder.is_dir() else None
    if reason and config:
        findings.append(
            quantised_finding(model, config, None)
            or f"{model}: its weights cannot be read: {reason}"
        )
    findings += adapter_findings(model, None if reason else config, options)
    architectures = (config.architectures if config else None) or []
    if config and len(architectures) != 1:
        findings.append(
            f"{model}: architectures in its config.json: found "
            f"{config.architectures}, expected one, such as ['Qwen2ForCausalLM']."
        )
    elif config and model.lora is not None and arch_info_for_config(config) is None:
        findings.append(
            f"{model}: mergekit merges adapters only for architectures that it "
            f"defines, not for {architectures[0]}. Merge the adapter "
            "into a model folder first (peft's merge_and_unload), and name that folder."
        )
    refuse(findings)
    assert config is not None
    return config


def notes(model: ModelReference, options: MergeOptions) -> list[str]:
    """Return what a user should know about a model that can be merged."""
    found = adapter_notes(model)
    if not options.lazy_unpickle and not LoaderCache().get(model).index.is_safetensors:
        found.append(
            f"{model}: its .bin shards are read into memory whole, one at a time; "
            "--lazy-unpickle reads single tensors"
        )
    return found


def public_name(model: ModelReference) -> str:
    """Return a model's name without the folders of this machine."""
    parts = [part for part in (model.model, model.lora) if part is not None]
    return "+".join(
        Path(part.path).absolute().name if Path(part.path).exists() else str(part)
        for part in parts
    )


def same_model(one: ModelReference, other: ModelReference) -> bool:
    """Tell whether two references name one model, however their paths are written."""
    if one.override_architecture != other.override_architecture:
        return False
    return _same(one.model, other.model) and _same(one.lora, other.lora)


def same_text(one: object, other: object) -> bool:
    """Tell whether two texts of a config name one model."""
    try:
        return same_model(*(ModelReference.parse(str(text)) for text in (one, other)))
    except (RuntimeError, ValueError):  # of what is no reference
        return bool(one == other)


def _same(one: ModelPath | None, other: ModelPath | None) -> bool:
    """Tell whether two paths lead to one folder, or are one name of the Hub.

    The Hub takes names in any case.
    """
    if one is None or other is None:
        return one is other
    if (one.revision or "main") != (other.revision or "main"):
        return False
    first, second = Path(one.path), Path(other.path)
    if first.exists() or second.exists():
        return first.resolve() == second.resolve()
    names = {path.path.rstrip("/").casefold() for path in (one, other)}
    return len(names) == 1
