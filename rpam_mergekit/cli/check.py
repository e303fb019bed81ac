"""The command `mergekit-rpam check`: all that is wrong with a config."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from rpam_mergekit.cli.mergekit_options import MergekitCommand, mergekit_options
from rpam_mergekit.errors import RpamError, refuse

if TYPE_CHECKING:
    from mergekit.options import MergeOptions

    from rpam_mergekit.checks.config_file import Document
    from rpam_mergekit.checks.examine import Examination


@click.command(
    "check",
    cls=MergekitCommand,
    short_help="Say all that is wrong with a config; download nothing.",
)
@click.argument("config_file", type=click.Path())
@click.option("--no-estimate", is_flag=True, help="Measure no time, memory or disk.")
@mergekit_options
def check_command(
    merge_options: MergeOptions, config_file: str, no_estimate: bool
) -> None:
    """Say all that is wrong with CONFIG_FILE, before a download or a merge.

    Keys and values, calibration and coefficients file, and whether the models fit:
    from configs, tokenizers and the headers of the weights, which are read from the
    Hub without the weights. Then what the merge will take. Of a file of several
    configs, as mergekit-multi has, every one of rpam is looked at.

    Exit status 1 where the merge would fail.

    \b
      mergekit-rpam check rpam.yml
      mergekit-rpam check rpam.yml --device cuda
    """
    from rpam_mergekit.models.patches import hub_cache

    merge_options.apply_global_options()
    with hub_cache(merge_options):
        examinations = _examine_all(config_file, merge_options)
        for examination in examinations:
            _tell(examination, merge_options, not no_estimate)
    refuse(
        [
            finding
            for one in examinations
            for finding in _named(one, _document(one).located(one.findings))
        ]
    )
    click.echo("no problems found")


def _examine_all(config_file: str, options: MergeOptions) -> list[Examination]:
    from rpam_mergekit.checks.config_file import read_documents
    from rpam_mergekit.checks.examine_document import examine_document
    from rpam_mergekit.settings import NAME

    documents = read_documents(config_file)
    names = [document.name for document in documents]
    several = len(documents) > 1
    findings = [
        f"name: {'no name' if name is None else repr(name)} is had by "
        f"{names.count(name)} configs of this file. mergekit-multi needs another for "
        "each; one may have none."
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    ours = documents
    if several:
        ours = [d for d in documents if d.content.get("merge_method") == NAME]
        for document in documents:
            if document not in ours:
                click.echo(f"note: {_which(document.name)}: not of {NAME}, not checked")
    if not ours:
        raise RpamError(f"{config_file}: none of its configs is of {NAME}.")
    others = {name for name in names if name is not None} if several else set()
    found = [examine_document(document, options, others) for document in ours]
    found[0].findings[:0] = findings
    return found


def _document(examination: Examination) -> Document:
    assert examination.document is not None  # `examine_document` puts it there
    return examination.document


def _which(name: str | None) -> str:
    return "the config without a name" if name is None else f"config '{name}'"


def _named(examination: Examination, lines: Sequence[str]) -> Iterator[str]:
    """Yield lines with the name of the config that they are about, if it has one."""
    name = _document(examination).name
    for line in lines:
        yield line if name is None else f"{name}: {line}"


def _tell(examination: Examination, options: MergeOptions, estimates: bool) -> None:
    """Print the notes on a config, and what it asks for if nothing is wrong."""
    from rpam_mergekit.cli.summary import estimate_lines, summary_lines

    measured: list[str] = []
    if estimates and not examination.findings:
        try:
            measured = list(estimate_lines(examination, options))
        except RpamError as error:  # such as a disk that is too small
            examination.findings += error.findings
    for note in _named(examination, examination.notes):
        click.echo(f"note: {note}")
    if not examination.findings:
        for line in (*summary_lines(examination), *measured):
            click.echo(line)
