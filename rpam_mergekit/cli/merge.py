"""The command `mergekit-rpam merge`: mergekit-yaml with the method registered."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from rpam_mergekit.cli.mergekit_options import MergekitCommand, mergekit_options

if TYPE_CHECKING:
    from mergekit.options import MergeOptions


@click.command(
    "merge",
    cls=MergekitCommand,
    short_help="Run a merge config, as mergekit-yaml does.",
)
@click.argument("config_file")
@click.argument("out_path")
@mergekit_options
def merge_command(merge_options: MergeOptions, config_file: str, out_path: str) -> None:
    """Run the merge that CONFIG_FILE describes into OUT_PATH.

    This is mergekit-yaml with all its options, with the method 'rpam' registered: the
    route that needs no start-up file.

    \b
      mergekit-rpam merge rpam.yml out/ --device cuda
    """
    # It takes the name `run_merge` at its import: after the method is active.
    from mergekit.scripts.run_yaml import main as mergekit_yaml

    from rpam_mergekit.models.patches import folders_are_local

    _read_ours(config_file)
    with folders_are_local():  # merges by any method work offline
        assert mergekit_yaml.callback is not None
        mergekit_yaml.callback(
            config_file=config_file, out_path=out_path, **merge_options.model_dump()
        )


def _read_ours(config: str) -> None:
    """Refuse a config that cannot be read, or of `rpam` and wrong.

    Of other methods, mergekit says itself what is wrong.
    """
    from rpam_mergekit.checks.config_file import read_config, read_documents
    from rpam_mergekit.settings import NAME

    document = read_documents(config)[0]
    if document.content.get("merge_method", NAME) == NAME:
        read_config(config)
