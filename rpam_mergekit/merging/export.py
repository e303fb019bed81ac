"""A merge by one coefficient per tensor, written as a recipe for stock mergekit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mergekit.options import MergeOptions

from rpam_mergekit.checks.config_file import Document
from rpam_mergekit.checks.examine import examine_merge
from rpam_mergekit.checks.fingerprint import changed_since
from rpam_mergekit.folder.contents import IN_OUTPUT, STOCK_RECIPE
from rpam_mergekit.formats.coefficients import CoefficientsFile
from rpam_mergekit.formats.hub_path import local_path
from rpam_mergekit.merging.merge import Merge
from rpam_mergekit.models.patches import fresh_loaders, hub_cache
from rpam_mergekit.outputs.stock_recipe import (
    recipe_text,
    refuse_unsayable,
    write_recipe,
)


def export_recipe(
    document: Document,
    coefficients: str,
    out: str | Path | None,
    options: MergeOptions,
) -> Path:
    """Write the merge of a config by a coefficients file as a recipe; return its path.

    coefficients: that file, or the merge's output folder. out: the recipe to write,
    by default beside the file. Raises `RpamError` where no recipe gives the same bytes,
    or the file is of another merge.
    """
    if Path(coefficients).is_dir():
        coefficients = str(Path(coefficients) / IN_OUTPUT)
    assert document.config is not None
    parameters = {**(document.config.parameters or {}), "coefficients": coefficients}
    parameters.pop("calibration", None)  # not needed, and perhaps not here
    config = document.config.model_copy(update={"parameters": parameters})
    with hub_cache(options), fresh_loaders():
        examination = examine_merge(config, options, document.text)
        assert examination.request is not None
        refuse_unsayable(config, examination.request.models)
        config = examination.request.template.named_in(config)
        path = local_path(coefficients, "COEFFICIENTS")
        if out is None:
            out = STOCK_RECIPE if _in_cache(path) else path.with_name(STOCK_RECIPE)
        merge = Merge(config, options, examination)
        merge.load()
        write_recipe(Path(out), _recipe(merge, path))
    return Path(out)


def _in_cache(path: Path) -> bool:
    """Tell whether a file lies in a cache of huggingface_hub: nothing is written there.

    `mergekit-rpam` gives `export` files of the Hub by their places in the cache.
    """
    of_cache = (p for p in path.absolute().parents if p.name == "snapshots")
    return any(p.parent.name.startswith(("models--", "datasets--")) for p in of_cache)


def _recipe(merge: Merge, path: Path) -> str:
    """Return the recipe that gives the same bytes as a merge by the file `path`."""
    request, layout = merge.request, merge.layout
    file = CoefficientsFile(path, request.settings.reasoning)
    asked = dataclasses.replace(request, calibration=None)
    changed_since(path, merge.fingerprint(), asked, layout)
    return recipe_text(merge.config, request, layout, file)
