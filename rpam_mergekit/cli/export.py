"""The command `mergekit-rpam export`: a merge as a recipe for stock mergekit."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rpam_mergekit.cli.mergekit_options import MergekitCommand, mergekit_options
from rpam_mergekit.errors import RpamError

if TYPE_CHECKING:
    from mergekit.options import MergeOptions

    from rpam_mergekit.checks.config_file import Document
    from rpam_mergekit.merging.planned import Planned

# mergekit's options that a merge by the recipe needs as the export did.
PASSED_ON = (
    "transformers_cache",
    "lora_merge_cache",
    "lora_merge_dtype",
    "trust_remote_code",
)


@click.command(
    "export",
    cls=MergekitCommand,
    short_help="Write a merge as a recipe that needs no plugin.",
)
@click.argument("config_file", type=click.Path())
@click.argument("coefficients")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The recipe to write. [default: rpam_recipe.yml beside the coefficients file; "
    "here, if that is of the Hub]",
)
@mergekit_options
def export_command(
    merge_options: MergeOptions,
    config_file: str,
    coefficients: str,
    out: Path | None,
) -> None:
    """Write the merge by CONFIG_FILE and COEFFICIENTS as a stock mergekit recipe.

    COEFFICIENTS is the merge's coefficients file, or its output folder. The recipe
    merges without this package, to the same bytes, where there is one coefficient
    per tensor: with the granularities layer, module and tensor.

    \b
      mergekit-rpam export rpam.yml out/rpam/coefficients.safetensors
      mergekit-yaml out/rpam/rpam_recipe.yml merged/
    """
    from rpam_mergekit.checks.config_file import read_config
    from rpam_mergekit.checks.examine import NAME
    from rpam_mergekit.outputs.folder import IN_OUTPUT

    merge_options.apply_global_options()
    document = read_config(config_file)
    config = document.config
    assert config is not None
    if config.merge_method != NAME:
        raise RpamError(
            f"merge_method: found '{config.merge_method}'. 'export' writes merges by "
            f"'{NAME}' as recipes; others are recipes already."
        )
    if Path(coefficients).is_dir():
        coefficients = str(Path(coefficients) / IN_OUTPUT)
    parameters = {**(config.parameters or {}), "coefficients": coefficients}
    parameters.pop("calibration", None)  # not needed, and perhaps not here
    config.parameters = parameters
    _export(document, merge_options, coefficients, out)


def _export(
    document: Document, options: MergeOptions, coefficients: str, out: Path | None
) -> None:
    from rpam_mergekit.checks.examine import check_merge
    from rpam_mergekit.formats.hub_path import local_path
    from rpam_mergekit.merging.planned import plan
    from rpam_mergekit.models.references import reachable
    from rpam_mergekit.outputs.stock_recipe import (
        RECIPE,
        refuse_unsayable,
        write_recipe,
    )

    config = document.config
    assert config is not None
    with reachable(options):
        examined = check_merge(config, options, document.text)
        assert examined.request is not None
        refuse_unsayable(config, examined.request.models)
        config = examined.request.template.named_in(config)
        path = local_path(coefficients, "COEFFICIENTS")
        if out is None:
            out = Path(RECIPE) if _in_cache(path) else path.with_name(RECIPE)
        planned = plan(config, options, examined)
        write_recipe(out, _recipe(planned, path))
    command = ["mergekit-yaml", str(out), "OUT", *_passed_on(options)]
    planned.say(f"rpam: the recipe merges without this package: {shlex.join(command)}")
    click.echo(str(out))


def _in_cache(path: Path) -> bool:
    """Tell whether a file lies in a cache of huggingface_hub: nothing is written there.

    `mergekit-rpam` gives `export` files of the Hub by their places in the cache.
    """
    of_cache = (p for p in path.absolute().parents if p.name == "snapshots")
    return any(p.parent.name.startswith(("models--", "datasets--")) for p in of_cache)


def _recipe(planned: Planned, path: Path) -> str:
    """Return the recipe that gives the same bytes as a merge by the file `path`.

    Raises `RpamError` where there is none, or the file is of another merge.
    """
    from rpam_mergekit.checks.reuse import fingerprint_of, reusable
    from rpam_mergekit.formats.coefficients import CoefficientsFile
    from rpam_mergekit.outputs.stock_recipe import recipe_text

    request, config, layout = planned.request, planned.config, planned.layout
    file = CoefficientsFile(path, request.settings.reasoning)
    asked = dataclasses.replace(request, calibration=None)
    reusable(path, fingerprint_of(asked, planned.fixed, config, []), asked, layout)
    return recipe_text(config, request, layout, file)


def _passed_on(options: MergeOptions) -> list[str]:
    """Return the options of this export that a merge by the recipe needs too."""
    found = []
    for name in PASSED_ON:
        value = getattr(options, name)
        if value:
            found.append("--" + name.replace("_", "-"))
            found += [] if value is True else [str(value)]
    return found
