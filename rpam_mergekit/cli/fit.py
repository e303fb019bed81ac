"""The command `mergekit-rpam fit`: the pre-pass alone, by one process or many."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from rpam_mergekit.cli.mergekit_options import MergekitCommand, mergekit_options

if TYPE_CHECKING:
    from mergekit.options import MergeOptions


@click.command(
    "fit",
    cls=MergekitCommand,
    short_help="Run the pre-pass only, by one process or many.",
)
@click.argument("config_file", type=click.Path())
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The coefficients file to write. [default: the config's "
    "parameters.coefficients]",
)
@mergekit_options
def fit_command(
    merge_options: MergeOptions, config_file: str, out: Path | None
) -> None:
    """Run the pre-pass of the merge that CONFIG_FILE describes; write no model.

    A config that names the file in parameters.coefficients merges by it, without a
    pre-pass. Started by torchrun or accelerate launch, all processes share the
    calibration set: on the GPUs of one or more machines (--device cuda) that see the
    same folders, or on CPUs.

    \b
      mergekit-rpam fit rpam.yml --out coefficients.safetensors --device cuda
      torchrun --nproc-per-node 4 -m rpam_mergekit.cli fit rpam.yml \\
        --out coefficients.safetensors --device cuda
    """
    from rpam_mergekit.api import fit
    from rpam_mergekit.processes import is_first

    path = fit(config_file, out, **merge_options.model_dump())
    if is_first():
        click.echo(str(path))
