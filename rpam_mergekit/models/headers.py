"""The tensors of a checkpoint without their data: names, shapes, dtypes, sizes.

Of models on this disk they are read from the files' headers, of models on the Hub from
the first kilobytes of their files: no weights are downloaded.
"""

from __future__ import annotations

import functools
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import NotASafetensorsRepoError
from mergekit.common import ModelReference
from mergekit.io import ShardedTensorIndex
from mergekit.io.tasks import LoaderCache
from safetensors import safe_open

from rpam_mergekit.errors import RpamError, first_line
from rpam_mergekit.models.layout import SHAPE_FINDINGS

VOCABULARY = ("embed", "wte", "lm_head", "output")
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# As configs name them.
NAMES = {short: str(dtype).removeprefix("torch.") for dtype, short in DTYPES.items()}
BITS = {"F64": 64, "I64": 64, "F32": 32, "I32": 32, "F16": 16, "BF16": 16, "I16": 16}


@dataclass(frozen=True)
class Tensor:
    """A tensor's shape, and its dtype as safetensors names it."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """What its data take."""
        return torch.Size(self.shape).numel() * BITS.get(self.dtype, 8) // 8


@dataclass(frozen=True)
class Header:
    """The tensors of one checkpoint by name.

    to_download: whether they are not on this disk. unknown: why nothing is known of
    them, None where it is.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    safetensors: bool = True
    to_download: bool = False
    unknown: str | None = None

    @property
    def bytes(self) -> int:
        """What all data take."""
        return sum(tensor.bytes for tensor in self.tensors.values())


def promoted(dtypes: Iterable[str]) -> str:
    """Return the dtype to which all are promoted, in which mixed inputs are merged."""
    known = {short: dtype for dtype, short in DTYPES.items()}
    several = set(dtypes)
    if not several <= known.keys():
        return next(iter(sorted(several)))
    return DTYPES[functools.reduce(torch.promote_types, (known[d] for d in several))]


def read_header(model: ModelReference) -> Header:
    """Return what is known of a model's tensors without its weights.

    Of a model with an adapter, those of the model. Raises `RpamError` if a file on
    this disk cannot be read.
    """
    index = _index(model)
    if index is None:
        return _on_hub(model)
    return Header(tensors_of(index), index.tensor_paths, index.is_safetensors)


def tensors_of(index: ShardedTensorIndex) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint on this disk.

    Raises `RpamError` if a file cannot be read.
    """
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(index.tensor_paths.values())):
        path = Path(index.base_path) / shard
        try:
            tensors |= _in_file(path)
        except Exception as error:
            raise RpamError(f"{path} cannot be read: {first_line(error)}") from error
    return tensors


def compare_shapes(
    base: ModelReference, mine: Header, other: ModelReference, its: Header
) -> list[str]:
    """Return findings on tensors whose shapes differ."""
    findings = []
    for name in sorted(mine.tensors.keys() & its.tensors.keys()):
        first, second = mine.tensors[name].shape, its.tensors[name].shape
        if first != second:
            advice = ""
            if any(word in name for word in VOCABULARY):
                advice = " The vocabularies differ; rpam merges them by token id."
            findings.append(
                f"{name}: shape {first} in {base}, {second} in {other}.{advice}"
            )
    if len(findings) > SHAPE_FINDINGS:
        more = len(findings) - SHAPE_FINDINGS
        findings = [*findings[:SHAPE_FINDINGS], f"{more} more shapes differ."]
    return findings


def cached_folder(model: ModelReference) -> Path | None:
    """Return the folder of a Hub model whose weights are in the cache, or None."""
    config = try_to_load_from_cache(
        model.model.path,
        "config.json",
        cache_dir=constants.HF_HUB_CACHE,  # as it is now
        revision=model.model.revision,
    )
    if not isinstance(config, str) or unreadable(Path(config).parent):
        return None
    return Path(config).parent


def _index(model: ModelReference) -> ShardedTensorIndex | None:
    """Return the index of a model whose weights are on this disk."""
    if model in LoaderCache().loaders:
        return LoaderCache().get(model).index
    folder: Path | None = Path(model.model.path)
    if folder is not None and not folder.is_dir():
        folder = cached_folder(model)
    return None if folder is None else ShardedTensorIndex.from_disk(str(folder))


def _in_file(path: Path) -> dict[str, Tensor]:
    if path.suffix.lower() == ".safetensors":
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {
                name: Tensor(tuple(part.get_shape()), part.get_dtype())
                for name, part in slices.items()
            }
    tensors = torch.load(
        path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path)
    )
    return {
        name: Tensor(tuple(tensor.shape), DTYPES.get(tensor.dtype, str(tensor.dtype)))
        for name, tensor in tensors.items()
    }


def _on_hub(model: ModelReference) -> Header:
    name, revision = model.model.path, model.model.revision
    try:
        found = HfApi().get_safetensors_metadata(name, revision=revision)
    except NotASafetensorsRepoError:
        return Header(
            safetensors=False, to_download=True, unknown="it has no safetensors files"
        )
    except Exception as error:  # of huggingface_hub, or of its HTTP client
        return Header(to_download=True, unknown=first_line(error))
    tensors = {
        tensor: Tensor(tuple(info.shape), info.dtype)
        for file in found.files_metadata.values()
        for tensor, info in file.tensors.items()
    }
    return Header(tensors, found.weight_map, to_download=True)


def unknown_notes(headers: Mapping[ModelReference, Header]) -> Sequence[str]:
    """Return notes on models of whose tensors nothing is known."""
    return [
        f"{model}: the shapes of its tensors were not compared: {header.unknown}"
        for model, header in headers.items()
        if header.unknown
    ]


def unreadable(folder: Path) -> str | None:
    """Return what keeps mergekit from reading a model folder's weights, or None."""
    try:
        index = ShardedTensorIndex.from_disk(str(folder))
    except Exception as error:
        return f"{first_line(error)}."
    for shard in sorted(set(index.tensor_paths.values())):
        if not (folder / shard).exists():
            return f"{shard} is missing, which the index in {folder} names."
    return None
