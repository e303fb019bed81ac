"""The command `mergekit-rpam fit`: the pre-pass alone, by one process or many."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from rpam_mergekit.cli.mergekit_options import MergekitCommand, mergekit_options
from rpam_mergekit.errors import RpamError

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
    from rpam_mergekit.checks.config_file import read_config
    from rpam_mergekit.checks.examine import NAME, check_merge
    from rpam_mergekit.merging.fit import coefficients_of
    from rpam_mergekit.merging.planned import plan
    from rpam_mergekit.models.references import reachable
    from rpam_mergekit.outputs.folder import IN_OUTPUT
    from rpam_mergekit.processes import joined, local_device

    merge_options.apply_global_options()
    document = read_config(config_file)
    config = document.config
    assert config is not None
    if config.merge_method != NAME:
        raise RpamError(
            f"merge_method: found '{config.merge_method}'. 'fit' runs the pre-pass of "
            f"'{NAME}'; other methods have none."
        )
    if out is not None:
        config.parameters = {**(config.parameters or {}), "coefficients": str(out)}
    with reachable(merge_options):
        examined = check_merge(config, merge_options, document.text)
        assert examined.request is not None
        if examined.request.settings.coefficients is None:
            raise RpamError(
                "the coefficients file has no name: give --out, or name it in "
                "parameters.coefficients."
            )
        with joined(local_device(merge_options.device or "cpu")) as processes:
            planned = plan(config, merge_options, examined, processes)
            path = coefficients_of(planned, IN_OUTPUT)
    if processes.rank == 0:
        click.echo(str(path))
