"""A merge by scalar coefficients as the text of a stock recipe, with its provenance.

Only what gives the same bytes is exported; what does not is refused with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from safetensors import safe_open

from rpam_mergekit.checks.request import MergeRequest
from rpam_mergekit.errors import RpamError
from rpam_mergekit.folder.contents import STOCK_RECIPE
from rpam_mergekit.formats.coefficients import CoefficientsFile
from rpam_mergekit.formats.files import digest_of_file
from rpam_mergekit.models.layout import Layout, MergeModels
from rpam_mergekit.outputs.card import PAPER
from rpam_mergekit.outputs.filters import (
    MOST_OTHERS,
    TITLE,
    Filter,
    as_written,
    recipe_config,
    recipe_yaml,
    weight_filters,
)
from rpam_mergekit.outputs.rounding import out_dtype_of
from rpam_mergekit.prepass.memory import readable

NOT_CARRIED = ("slices", "modules", "tokenizer", "tokenizer_source")
SAME_BYTES = (
    "Its shards are those of the merge by rpam, byte for byte:",
    f"  mergekit-yaml {STOCK_RECIPE} OUT",
)
Numbers = dict[str, float]  # coefficients by entry


def recipe_text(
    config: MergeConfiguration,
    request: MergeRequest,
    layout: Layout,
    file: CoefficientsFile,
) -> str:
    """Return the stock recipe of a merge by `file`, whose shards are the same bytes.

    `config` is the user's, before mergekit plans (which rewrites it), `request` what
    `check_config` made of it; `file` belongs to these models (`changed_since`).
    mergekit's loaders are set up. Raises `RpamError` where there is no such recipe.
    """
    numbers, models = scalars(request, layout, file), request.models
    refuse_unsayable(config, models)
    out_dtype = out_dtype_of(config, models, layout)
    filters = {
        model: _filters(models, number, layout, numbers)
        for number, model in enumerate(models.others)
    }
    listed = [(_named(m.model), filters.get(m.model, ())) for m in config.models or []]
    recipe = recipe_config(_named(models.base), listed, out_dtype, config.chat_template)
    return recipe_yaml(recipe, SAME_BYTES, provenance(file))


def refuse_unsayable(config: MergeConfiguration, models: MergeModels) -> None:
    """Raise `RpamError` if the merge has what no recipe of one method has."""
    for key in NOT_CARRIED:
        if getattr(config, key):
            raise RpamError(
                f"{key}: a stock recipe is exported for whole models, listed in "
                "models:, with the base's tokenizer. Publish the config and the "
                "coefficients file instead."
            )
    if len(models.others) > MOST_OTHERS:
        raise RpamError(
            f"models: {len(models.others)} besides base_model. mergekit adds up more "
            f"than {MOST_OTHERS} task vectors in an order that depends on a tensor's "
            "size, which is not that of rpam."
        )


def _filters(
    models: MergeModels, number: int, layout: Layout, numbers: Numbers
) -> list[Filter]:
    def of(infos: Sequence[WeightInfo]) -> Numbers:
        return {i.name: numbers[models.entry(number, i.name)] for i in infos}

    return weight_filters([of(layer) for layer in layout.layers], of(layout.outside))


def _named(model: ModelReference) -> Any:
    """Return a model as a config names it."""
    if model.override_architecture is None:
        return str(model)
    named = {"model": str(model.model), "lora": model.lora and str(model.lora)}
    return {**named, "override_architecture": model.override_architecture}


def entries_of(models: MergeModels, layout: Layout) -> list[str]:
    """Return the names of all coefficients that a merge needs."""
    infos = [*layout.outside, *(info for layer in layout.layers for info in layer)]
    return [
        models.entry(number, info.name)
        for number in range(len(models.others))
        for info in infos
    ]


def scalars(request: MergeRequest, layout: Layout, file: CoefficientsFile) -> Numbers:
    """Return every entry's coefficient, as the merge takes it.

    A `weight` that the config sets wins over the file. Raises `RpamError` if a
    coefficient is not one number.
    """
    fixed = request.fixed_weights(layout)
    entries = entries_of(request.models, layout)
    finer = sorted(finer_entries(file).intersection(entries) - fixed.keys())
    if finer:
        raise RpamError(_finer(file, request.models.base, finer, len(entries)))
    return {
        entry: as_written(
            fixed[entry] if entry in fixed else file.parts(entry)["scalar"], entry
        )
        for entry in entries
    }


def finer_entries(file: CoefficientsFile) -> set[str]:
    """Return the entries of a file that are not one number; reads its header only."""
    with safe_open(file.path, framework="pt") as opened:
        keys = [key.rpartition("/") for key in opened.keys()]
    return {entry for entry, _, part in keys if part != "scalar"}


def _finer(
    file: CoefficientsFile, base: ModelReference, finer: Sequence[str], count: int
) -> str:
    size, whole = os.path.getsize(file.path), weight_bytes(base)
    granularity = file.metadata["fingerprint"]["settings"]["granularity"]
    return (
        f"{file.path}: no stock recipe gives the same model. {len(finer)} of "
        f"{count} coefficients are finer than one number per tensor "
        f"(granularity {granularity}; {finer[0]}), and mergekit's parameters are "
        "numbers. Publish the config and this file instead: it is "
        f"{readable(size)}, {100 * size / whole:.1f} % of {base}'s weights "
        f"({readable(whole)}), and a config with parameters.coefficients and without "
        "parameters.calibration repeats the merge."
    )


def weight_bytes(model: ModelReference) -> int:
    """Return the size of a model's weights on disk."""
    index = LoaderCache().get(model).index
    shards = set(index.tensor_paths.values())
    return sum(os.path.getsize(Path(index.base_path) / shard) for shard in shards)


def provenance(file: CoefficientsFile) -> dict[str, Any]:
    """Return what coefficients were made from and by, for a recipe's comments.

    `content` of models and `calibration` are digests, as `checkpoint` and
    `calibration` make them.
    """
    metadata, made_from = file.metadata, file.metadata["fingerprint"]
    roles = [role for role in ("base", "other") if role in made_from]
    roles += [p for p in made_from["patterns"][1:] if p in made_from]
    return {
        "method": "RPAM (Reasoning Pattern Alignment Merging)",
        "paper": PAPER,
        "versions": {
            "rpam-mergekit": metadata["version"],
            "mergekit": version("mergekit"),
        },
        "models": {
            role: {
                "name": metadata["models"][role],
                "pattern": pattern,
                "content": made_from[role],
            }
            for role, pattern in zip(roles, made_from["patterns"], strict=True)
        },
        "calibration": made_from["calibration"],
        "scale": file.scale,
        "coefficients": digest_of_file(Path(file.path)),
        "settings": made_from["settings"],
        "layers": [_rounded(layer) for layer in metadata["layers"]],
    }


def _rounded(report: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: round(value, 6) if isinstance(value, float) else value
        for key, value in sorted(report.items(), key=lambda item: item[0] != "layer")
    }


def write_recipe(path: Path, text: str) -> None:
    """Write a recipe; raise `RpamError` if another file is there, or it cannot be."""
    try:
        if path.exists() and not path.read_text(encoding="utf-8").startswith(TITLE):
            raise RpamError(
                f"{path} exists and is no exported recipe. Name another file, or "
                "delete it."
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RpamError(f"{path} cannot be written: {error}. Name another.") from error
