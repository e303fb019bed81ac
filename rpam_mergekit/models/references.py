"""Models by reference: what is wrong with one, and Hub models in one cache.

What mergekit leaves open when it looks for a Hub model is closed here, for merges by
`rpam` only: it looks for configs and tokenizers in the default cache although
`--transformers-cache` names another, does not download chat templates, and cannot use
a cached model without a network.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import get_session
from mergekit.architecture import arch_info_for_config
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from transformers import PretrainedConfig

from rpam_mergekit.errors import RpamError, first_line, refuse
from rpam_mergekit.models.adapters import adapter_findings, adapter_notes
from rpam_mergekit.models.checkpoint import unreadable


@contextmanager
def reachable(options: MergeOptions) -> Iterator[None]:
    """Let mergekit find all files of Hub models in one cache, with or without network.

    With `--transformers-cache`, that cache holds configs, tokenizers and adapters too.
    Where the Hub cannot be reached, it is as if HF_HUB_OFFLINE were set:
    huggingface_hub would ask again for half a minute, many times for each model.
    """
    cache, resolve = constants.HF_HUB_CACHE, ModelReference.local_path
    offline, read = constants.HF_HUB_OFFLINE, ModelReference.config
    asked = False

    @functools.wraps(read)
    def config(self: ModelReference, *args: Any, **kwargs: Any) -> PretrainedConfig:
        nonlocal asked
        if not asked and not Path(self.model.path).exists():
            asked = True
            constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE or unreachable()
        found: PretrainedConfig = read(self, *args, **kwargs)
        return found

    @functools.wraps(resolve)
    def local_path(self: ModelReference, *args: Any, **kwargs: Any) -> str:
        folder: str
        if self.lora is not None or Path(self.model.path).exists():
            folder = resolve(self, *args, **kwargs)
            return folder
        try:
            folder = resolve(self, *args, **kwargs)
        except Exception as error:  # of huggingface_hub, or of its HTTP client
            return _cached(self, error)
        with suppress(EntryNotFoundError):  # mergekit copies it if it is there
            name, revision = self.model.path, self.model.revision
            hf_hub_download(name, "chat_template.jinja", revision=revision)
        return folder

    if options.transformers_cache:
        constants.HF_HUB_CACHE = options.transformers_cache
    ModelReference.local_path, ModelReference.config = local_path, config
    try:
        yield
    finally:
        constants.HF_HUB_CACHE = cache
        constants.HF_HUB_OFFLINE = offline
        ModelReference.local_path, ModelReference.config = resolve, read


def unreachable() -> bool:
    """Tell whether no server answers at the Hub's address; any answer is one."""
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # of huggingface_hub's HTTP client
        click.echo(
            f"rpam: {constants.ENDPOINT} cannot be reached ({first_line(error)}): only "
            "models in the cache can be used",
            err=True,
        )
        return True
    return False


def _cached(model: ModelReference, reason: Exception) -> str:
    """Return the folder of a Hub model in the cache; refuse if it is not whole."""
    config = try_to_load_from_cache(
        model.model.path, "config.json", revision=model.model.revision
    )
    if isinstance(config, str) and not unreadable(Path(config).parent):
        return str(Path(config).parent)
    raise RpamError(
        f"{model}: its weights are not in the cache {constants.HF_HUB_CACHE}, and the "
        f"Hub cannot be asked: {first_line(reason)}"
    ) from reason


def read_config(model: ModelReference, options: MergeOptions) -> PretrainedConfig:
    """Return a model's config, the rest of the reference being sound too.

    Raises `RpamError` with all that is wrong with it and can be known before weights
    are downloaded.
    """
    findings: list[str] = []
    config: PretrainedConfig | None = None
    try:
        config = model.config(trust_remote_code=options.trust_remote_code)
    except Exception as error:
        advice = ""
        if "trust_remote_code" in str(error):
            advice = " Read that code, then allow it with --trust-remote-code."
        findings.append(
            f"{model}: its config cannot be loaded: {first_line(error)}{advice}"
        )
    folder = Path(model.model.path)
    reason = unreadable(folder) if config and folder.is_dir() else None
    if reason:
        findings.append(f"{model}: its weights cannot be read: {reason}")
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
