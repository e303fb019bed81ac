"""The models of a merge and their tensors, by mergekit's architecture definitions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mergekit.architecture import (
    ConfiguredModuleArchitecture,
    ModelArchitecture,
    WeightInfo,
)
from mergekit.architecture.conversion import can_convert_checkpoint_keys
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from transformers import PretrainedConfig

from rpam_mergekit.errors import RpamError, refuse
from rpam_mergekit.formats.coefficients import entry_name
from rpam_mergekit.text import listed

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
        raise RpamError(
            f"no model has the tensor {listed(nowhere, 1)}, which mergekit's "
            f"definition of '{config.model_type}' requires. Such models cannot be "
            "merged by this version of mergekit."
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
