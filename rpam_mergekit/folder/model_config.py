"""The `config.json` of a merged model: the base's own file, changed where the merge is.

mergekit writes it anew by the installed version of transformers. Others then read
another model: what version 5 calls `rope_parameters` is `rope_theta` and `rope_scaling`
to version 4, which takes its defaults where it does not find them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference
from mergekit.io import LazyTensorLoader, ShardedTensorIndex
from transformers import PretrainedConfig

from rpam_mergekit.folder.json_text import with_value
from rpam_mergekit.models.headers import NAMES, Tensor, tensors_of

CONFIG = "config.json"
DTYPES = ("dtype", "torch_dtype")  # of transformers 5, and before
TIED = "tie_word_embeddings"
# What every loaded config says of itself, not of the model.
_OWN = {*DTYPES, "_name_or_path", "transformers_version"}


def write_config(
    folder: Path,
    base_file: Path,
    base: ModelReference,
    made: PretrainedConfig,
    weights: Sequence[WeightInfo],
    trust_remote_code: bool = False,
) -> None:
    """Write the `config.json` of the merged model in `folder`, whose weights are there.

    `base_file` is the base's; `made` the config that mergekit made of it for the
    output, `weights` the output's tensors.
    """
    text = base_file.read_bytes().decode("utf-8")
    plain = base.model_copy(update={"override_architecture": None})
    before = plain.config(trust_remote_code=trust_remote_code)
    for path, value in _changes(before.to_dict(), made.to_dict()):
        text = with_value(text, _spelled(text, path, made), value)
    index = ShardedTensorIndex.from_disk(str(folder))
    dtype = written_dtype(tensors_of(index))
    for path in _dtypes(json.loads(text)):
        text = with_value(text, path, dtype)
    tied = getattr(made.get_text_config(), TIED, False)
    if tied and _has_own_head(index, weights):
        text = with_value(text, _tied(json.loads(text)), False)
    (folder / CONFIG).write_bytes(text.encode("utf-8"))


def _changes(
    before: Mapping[str, Any], after: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield what differs in `after`, by its way there."""
    for key, value in after.items():
        earlier = before.get(key)
        if isinstance(value, Mapping) and isinstance(earlier, Mapping):
            yield from _changes(earlier, value, (*path, key))
        elif key not in _OWN and value != earlier:
            yield (*path, key), value


def _spelled(
    text: str, path: tuple[str, ...], config: PretrainedConfig
) -> tuple[str, ...]:
    """Return a way to a value as the file has it, which may use another name of it."""
    found = json.loads(text)
    for key in path[:-1]:
        found = found.get(key, {})
    *above, name = path
    aliases = [a for a, real in config.attribute_map.items() if real == name]
    there = [one for one in (name, *aliases) if one in found]
    return (*above, there[0] if there else name)


def written_dtype(tensors: Mapping[str, Tensor]) -> str:
    """Return the dtype that most numbers of a checkpoint have, by torch's name.

    Some models keep single tensors in another one.
    """
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        if tensor.dtype in NAMES:
            sizes[tensor.dtype] += torch.Size(tensor.shape).numel()
    return NAMES[sizes.most_common(1)[0][0]]


def _dtypes(content: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the ways to the dtype in a config; the first key where it has none."""
    found = [
        (*above, key)
        for above, inner in (
            ((), content),
            *(((k,), v) for k, v in content.items() if k.endswith("text_config")),
        )
        for key in DTYPES
        if isinstance(inner, Mapping) and key in inner
    ]
    return found or [("torch_dtype",)]  # which both versions read


def _tied(content: Mapping[str, Any]) -> tuple[str, ...]:
    inner = content.get("text_config")
    nested = isinstance(inner, Mapping) and TIED in inner and TIED not in content
    return ("text_config", TIED) if nested else (TIED,)


def _has_own_head(index: ShardedTensorIndex, weights: Sequence[WeightInfo]) -> bool:
    """Tell whether a tensor that may be tied to another has other values than that."""
    loader = LazyTensorLoader(index)
    pairs = [(w.name, other) for w in weights for other in w.tied_names or ()]
    return any(
        not torch.equal(loader.get_tensor(name), loader.get_tensor(other))
        for name, other in pairs
        if {name, other} <= index.tensor_paths.keys()
    )
