"""The weights of one model, a decoder layer at a time, through mergekit's own loader.

mergekit's architecture definitions say which tensors a layer has and its loader finds
them: shards, pickles, LoRA references, tied heads, and checkpoints of mixtures of
experts whose tensors transformers fuses. What is read here is what is merged later.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from mergekit.architecture import (
    ConfiguredModuleArchitecture,
    ModelArchitecture,
    WeightInfo,
)
from mergekit.architecture.conversion import can_convert_checkpoint_keys
from mergekit.common import ModelReference
from mergekit.io import ShardedTensorIndex
from mergekit.io.tasks import LoaderCache, LoadTensor
from transformers import PretrainedConfig

from rpam_mergekit.errors import RpamError, first_line, refuse
from rpam_mergekit.formats.coefficients import entry_name

SHAPE_FINDINGS = 5


@dataclass(frozen=True)
class MergeModels:
    """The models of a merge, and the pattern each of them stands for, the base's first.

    Plainly two: the Long-CoT and the Short-CoT model.
    """

    base: ModelReference
    others: tuple[ModelReference, ...]
    patterns: tuple[str, ...] = ("long", "short")

    @property
    def every(self) -> tuple[ModelReference, ...]:
        """The base and the others."""
        return (self.base, *self.others)

    @property
    def roles(self) -> tuple[str, ...]:
        """What the models are called in files: `base`, then `other` or patterns."""
        if len(self.others) == 1:
            return ("base", "other")
        return ("base", *self.patterns[1:])

    def entry(self, number: int, tensor: str) -> str:
        """Return the name of a tensor's coefficient for `others[number]`.

        The tensor's own where there is but one other model.
        """
        return entry_name(self.patterns[1 + number], tensor, len(self.others))


@dataclass(frozen=True)
class Layout:
    """The tensors of a merge: one tuple per decoder layer, and those outside them.

    `embeddings` are those outside that come before the layers.
    """

    layers: tuple[tuple[WeightInfo, ...], ...]
    outside: tuple[WeightInfo, ...]
    embeddings: tuple[WeightInfo, ...]

    @property
    def weights(self) -> list[WeightInfo]:
        """All tensors, those outside the layers first."""
        return [*self.outside, *(info for layer in self.layers for info in layer)]

    def entries(self, models: MergeModels) -> list[str]:
        """Return the names of all coefficients that a merge of `models` needs."""
        return [
            models.entry(number, info.name)
            for number in range(len(models.others))
            for info in self.weights
        ]


def plan_layout(
    architecture: ModelArchitecture,
    config: PretrainedConfig,
    models: Sequence[ModelReference],
) -> Layout:
    """Return the tensors that mergekit will merge, optional absent ones left out.

    Raises `RpamError` for architectures of several modules, and for a tensor that one
    model has and the other lacks.
    """
    if len(architecture.modules) != 1:
        raise RpamError(
            "models of several modules are not supported (found: "
            f"{', '.join(sorted(architecture.modules))}). rpam merges the decoder of a "
            "text-only causal language model."
        )
    (module,) = architecture.modules.values()
    weights = ConfiguredModuleArchitecture(
        info=module.architecture, config=config, weight_prefix=module.weight_prefix
    )
    findings: list[str] = []
    nowhere: list[str] = []

    def present(of: Sequence[WeightInfo]) -> tuple[WeightInfo, ...]:
        return tuple(w for w in of if _present(w, models, findings, nowhere))

    layers = tuple(
        present(weights.layer_weights(i)) for i in range(weights.num_layers())
    )
    embeddings = present(weights.pre_weights())
    outside = (*embeddings, *present(weights.post_weights()))
    if nowhere:
        more = f" and {len(nowhere) - 1} more" if len(nowhere) > 1 else ""
        raise RpamError(
            f"no model has the tensor {nowhere[0]}{more}, which mergekit's definition "
            f"of '{config.model_type}' requires. Such models cannot be merged by this "
            "version of mergekit."
        )
    refuse(findings[:SHAPE_FINDINGS])
    return Layout(layers, outside, embeddings)


def _present(
    weight: WeightInfo,
    models: Sequence[ModelReference],
    findings: list[str],
    nowhere: list[str],
) -> bool:
    """Tell whether mergekit will merge `weight`: planned and held by all models.

    One that some lack is put into `findings`, one that all lack into `nowhere`.
    """
    names = {weight.name, *(weight.aliases or ())}
    held = [set(LoaderCache().get(model).index.tensor_paths) for model in models]
    tied = set(weight.tied_names or ())
    has = [bool((names | tied) & keys) for keys in held]
    if weight.optional and not any(names & keys for keys in held):
        return False  # mergekit's planner skips it
    for position, (model, keys) in enumerate(zip(models, held, strict=True)):
        if not has[position]:
            trusted = LoaderCache().trust_remote_code
            model_type = model.config(trust_remote_code=trusted).model_type
            has[position] = can_convert_checkpoint_keys(model_type, keys, weight.name)
    if not any(has):
        nowhere.append(weight.name)
    elif not all(has):
        lacking = models[has.index(False)]
        findings.append(f"{lacking}: tensor {weight.name} is missing.")
    return all(has)


def load(
    model: ModelReference,
    weights: Sequence[WeightInfo],
    dtype: str | None,
    device: str,
) -> dict[str, torch.Tensor]:
    """Return `weights` of `model` by mergekit's names, cast as the merge casts them.

    `dtype` is the config's `dtype:`; without one the checkpoint's own stays. mergekit
    keeps the last shard of a .bin checkpoint where it was read to, whole: in memory,
    not on the device.
    """
    safetensors = LoaderCache().get(model).index.is_safetensors
    return {
        weight.name: LoadTensor(
            model=model,
            tensor=weight.name,
            dtype=weight.force_dtype or dtype,
            device=device if safetensors else "cpu",
            aliases=weight.aliases,
            tied_names=weight.tied_names,
        )
        .execute()
        .to(device)
        for weight in weights
    }


def content_digest(model: ModelReference) -> str:
    """Return what identifies a model's weights, see `digest`.

    Of a model with an adapter, these are the files it was merged into.
    """
    return content_digests([model])[0]


def content_digests(models: Sequence[ModelReference]) -> list[str]:
    """Return every model's `content_digest`; they are read side by side."""
    indices = [LoaderCache().get(model).index for model in models]  # by thread
    files = [
        [Path(index.base_path) / shard for shard in set(index.tensor_paths.values())]
        for index in indices
    ]
    with ThreadPoolExecutor() as pool:
        return list(pool.map(digest, files))


def digest(files: Iterable[Path]) -> str:
    """Return the SHA-256 of the SHA-256s of files, in hex and one a line, by name."""
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(digest_of_file, sorted(files)))
    return hashlib.sha256("".join(f"{one}\n" for one in found).encode()).hexdigest()


def digest_of_file(path: Path) -> str:
    """Return a file's SHA-256 in hex; what the Hub's cache knows is not read."""
    stored = path.resolve()
    if stored.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", stored.name):
        return stored.name  # the Hub's cache names large files by their SHA-256
    content = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            content.update(block)
    return content.hexdigest()


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
