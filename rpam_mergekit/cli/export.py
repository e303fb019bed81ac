"""The command `mergekit-rpam export`: a merge as a recipe for stock mergekit."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rpam_mergekit.cli.mergekit_options import MergekitCommand, mergekit_options

if TYPE_CHECKING:
    from mergekit.options import MergeOptions

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
    from rpam_mergekit.api import export

    path = export(config_file, coefficients, out, **merge_options.model_dump())
    if not merge_options.quiet:
        command = ["mergekit-yaml", str(path), "OUT", *_passed_on(merge_options)]
        click.echo(
            f"rpam: the recipe merges without this package: {shlex.join(command)}",
            err=True,
        )
    click.echo(str(path))


def _passed_on(options: MergeOptions) -> list[str]:
    """Return the options of this export that a merge by the recipe needs too."""
    found = []
    for name in PASSED_ON:
        value = getattr(options, name)
        if value:
            found.append("--" + name.replace("_", "-"))
            found += [] if value is True else [str(value)]
    return found
