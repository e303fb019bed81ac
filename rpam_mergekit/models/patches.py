"""Every place where mergekit or huggingface_hub is changed, or used privately.

Each temporary change is a context manager that says what they do, and what we need. The
lasting ones, the wrappers of `run_merge` and of mergekit-multi, are in
`merging/hooks.py`. Who raises the version of mergekit reads these two files.

`mergekit.merge` is imported when it is needed: it may be the module whose import
imports this package.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
from huggingface_hub import constants, get_session, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from mergekit.architecture import ModelArchitecture
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io import LazyTensorLoader, ShardedTensorIndex
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from transformers import PretrainedConfig

from rpam_mergekit.errors import RpamError, first_line
from rpam_mergekit.models.headers import Header, cached_folder

# Changes for a while


@contextmanager
def hub_cache(options: MergeOptions) -> Iterator[None]:
    """Let mergekit find all files of Hub models in one cache, with or without network.

    mergekit looks for configs and tokenizers in the default cache although
    `--transformers-cache` names another, does not download chat templates, and cannot
    use a cached model without a network. Here that cache holds configs, tokenizers and
    adapters too. Where the Hub cannot be reached it is as if HF_HUB_OFFLINE were set:
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
    folder = cached_folder(model)
    if folder is not None:
        return str(folder)
    raise RpamError(
        f"{model}: its weights are not in the cache {constants.HF_HUB_CACHE}, and the "
        f"Hub cannot be asked: {first_line(reason)}"
    ) from reason


@contextmanager
def fresh_loaders() -> Iterator[None]:
    """Keep no loader of a model from one merge of a process to the next.

    mergekit's `LoaderCache` lives as long as the process and knows a folder as it was
    when it was first read, by the options of then.
    """
    LoaderCache.loaders.clear()
    try:
        yield
    finally:
        LoaderCache.loaders.clear()


@contextmanager
def loaders_from_headers(headers: Mapping[ModelReference, Header]) -> Iterator[None]:
    """Let mergekit plan with the tensors' names where it would download the weights.

    Loading a tensor fails within.
    """
    loaders = LoaderCache.loaders
    known = {model: _names_only(header) for model, header in headers.items()}
    LoaderCache.loaders = {**known, **loaders}
    try:
        yield
    finally:
        LoaderCache.loaders = loaders


def _names_only(header: Header) -> LazyTensorLoader:
    index = ShardedTensorIndex(
        base_path="",
        is_safetensors=header.safetensors,
        tensor_paths=dict(header.files),
        shards=[],
    )
    return LazyTensorLoader(index)


@contextmanager
def folders_are_local() -> Iterator[None]:
    """Let mergekit's model card take a folder for a folder.

    mergekit asks the Hub about relative ones like `steps/first`: without a network a
    merge ends there, when its weights are written, and with one the card has a link.
    """
    from mergekit import card

    asked = card.is_hf
    card.is_hf = lambda path: not os.path.isdir(path) and asked(path)
    try:
        yield
    finally:
        card.is_hf = asked


@contextmanager
def cut_output_config(layers: Sequence[int]) -> Iterator[list[PretrainedConfig]]:
    """Give a sliced model's transformers config the layer types of its own layers.

    `layers`: the input layer of every output layer; empty: no slices. mergekit changes
    the number of layers alone, which transformers then refuses to write. Yields a list
    of the configs that it makes, to see what it changes in them.
    """
    from mergekit import merge

    make = merge._model_out_config
    made: list[PretrainedConfig] = []

    @functools.wraps(make)
    def cut(*args: Any, **kwargs: Any) -> PretrainedConfig:
        config: PretrainedConfig = make(*args, **kwargs)
        text = config.get_text_config()
        types = getattr(text, "layer_types", None)
        if types and layers:
            text.layer_types = [types[number] for number in layers]
        made.append(config)
        return config

    merge._model_out_config = cut
    try:
        yield made
    finally:
        merge._model_out_config = make


# Private functions of mergekit


def output_config(
    config: MergeConfiguration, architecture: ModelArchitecture, trusted: bool
) -> Any:
    """Return the transformers config that the merged model gets."""
    from mergekit import merge

    return merge._model_out_config(config, architecture, trust_remote_code=trusted)


def set_chat_template(tokenizer: Any, config: MergeConfiguration) -> None:
    """Give a tokenizer the template that a config names, as the merge will.

    `tokenizer`: whatever has an attribute `chat_template`; it stays where the config
    names none. Raises `RuntimeError` for what is no template.
    """
    from mergekit import merge

    merge._set_chat_template(tokenizer, config)


def chat_template_of(config: MergeConfiguration) -> str | None:
    """Return the chat template that a config names, None where it names none."""
    found = SimpleNamespace(chat_template=None)
    set_chat_template(found, config)
    template: str | None = found.chat_template
    return template


def merged_name(model: ModelReference) -> str:
    """Return the name of the folder that mergekit merges an adapter into."""
    return f"{model.model._unique_id()}_{model.lora._unique_id()}"
