"""The weights of one model, a decoder layer at a time, through mergekit's own loader.

mergekit's architecture definitions say which tensors a layer has and its loader finds
them: shards, pickles, LoRA references, tied heads, and checkpoints of mixtures of
experts whose tensors transformers fuses. What is read here is what is merged later.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
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
from mergekit.io.tasks import LoaderCache, LoadTensor
from safetensors import safe_open
from transformers import PretrainedConfig

from rpam_mergekit.errors import RpamError, refuse

SHAPE_FINDINGS = 5


@dataclass(frozen=True)
class MergeModels:
    """The two models of a merge, and the pattern each of them stands for."""

    base: ModelReference
    other: ModelReference
    base_pattern: str = "long"
    other_pattern: str = "short"


@dataclass(frozen=True)
class Layout:
    """The tensors of a merge: one tuple per decoder layer, and those outside them."""

    layers: tuple[tuple[WeightInfo, ...], ...]
    outside: tuple[WeightInfo, ...]


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
            f"{', '.join(architecture.modules)}). rpam merges the decoder of a "
            "text-only causal language model."
        )
    (module,) = architecture.modules.values()
    weights = ConfiguredModuleArchitecture(
        info=module.architecture, config=config, weight_prefix=module.weight_prefix
    )
    findings: list[str] = []

    def present(of: Sequence[WeightInfo]) -> tuple[WeightInfo, ...]:
        return tuple(w for w in of if _present(w, models, findings))

    layers = tuple(
        present(weights.layer_weights(i)) for i in range(weights.num_layers())
    )
    outside = present([*weights.pre_weights(), *weights.post_weights()])
    refuse(findings[:SHAPE_FINDINGS])
    return Layout(layers, outside)


def _present(
    weight: WeightInfo, models: Sequence[ModelReference], findings: list[str]
) -> bool:
    """Tell whether mergekit will merge `weight`: planned and held by all models."""
    names = {weight.name, *(weight.aliases or ())}
    held = [set(LoaderCache().get(model).index.tensor_paths) for model in models]
    tied = set(weight.tied_names or ())
    has = [bool((names | tied) & keys) for keys in held]
    if weight.optional and not any(names & keys for keys in held):
        return False  # mergekit's planner skips it
    for position, (model, keys) in enumerate(zip(models, held, strict=True)):
        if not has[position]:
            model_type = model.config().model_type
            has[position] = can_convert_checkpoint_keys(model_type, keys, weight.name)
    if not all(has):
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

    `dtype` is the config's `dtype:`; without one the checkpoint's own stays.
    """
    return {
        weight.name: LoadTensor(
            model=model,
            tensor=weight.name,
            dtype=weight.force_dtype or dtype,
            device=device,
            aliases=weight.aliases,
            tied_names=weight.tied_names,
        ).execute()
        for weight in weights
    }


def compare_shapes(
    first: ModelReference,
    second: ModelReference,
    embeddings: Sequence[str] = ("embed", "wte", "lm_head", "output"),
) -> list[str]:
    """Return findings on tensors whose shapes differ, read from safetensors headers.

    Models that are not local folders of safetensors are not compared.
    """
    one, two = _shapes(first), _shapes(second)
    if one is None or two is None:
        return []
    findings = []
    for name in sorted(one.keys() & two.keys()):
        if one[name] != two[name]:
            advice = ""
            if any(word in name for word in embeddings):
                advice = " The vocabularies differ; rpam merges them by token id."
            findings.append(
                f"{name}: shape {one[name]} in {first}, {two[name]} in {second}."
                f"{advice}"
            )
    if len(findings) > SHAPE_FINDINGS:
        more = len(findings) - SHAPE_FINDINGS
        findings = [*findings[:SHAPE_FINDINGS], f"{more} more shapes differ."]
    return findings


def _shapes(model: ModelReference) -> Mapping[str, tuple[int, ...]] | None:
    folder = Path(model.model.path)
    if model.lora is not None or not folder.is_dir():
        return None
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in sorted(_shard_names(folder)):
        with safe_open(folder / shard, framework="pt") as file:
            for name in file.keys():
                shapes[name] = tuple(file.get_slice(name).get_shape())
    return shapes or None


def _shard_names(folder: Path) -> set[str]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return {"model.safetensors"} if (folder / "model.safetensors").exists() else set()


def content_digest(model: ModelReference) -> str:
    """Return the SHA-256 of a model's weight files, shard after shard by name."""
    index = LoaderCache().get(model).index
    digest = hashlib.sha256()
    for shard in sorted(set(index.tensor_paths.values())):
        with open(Path(index.base_path) / shard, "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()
