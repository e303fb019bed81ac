"""The commands `sweep`, `compare` and `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rpam_mergekit.cli.options import (
    grader_options,
    interruptible,
    marker_options,
    say,
)
from rpam_mergekit.cli.sample import sampling_options


@click.command("sweep", context_settings={"ignore_unknown_options": True})
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "--weights",
    default="0:1:0.05",
    show_default=True,
    help="FIRST:LAST:STEP, or a list: shares of the model that is not the base.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the sample files.",
)
@click.option("--keep", is_flag=True, help="Keep every merged model.")
@click.argument("sampling", nargs=-1, type=click.UNPROCESSED)
def sweep_command(
    config: Path, weights: str, out: Path, keep: bool, sampling: tuple[str, ...]
) -> None:
    """Sample the plain interpolations of the two models of CONFIG.

    CONFIG is a config of rpam. Options that are not the sweep's own go to 'sample',
    which runs each model in a process of its own. What is finished is not done again.

    \b
      mergekit-rpam sweep rpam.yml --weights 0.1:0.9:0.1 --out sweep/ \\
        --dataset gsm8k --split test -k 4 --max-tokens 4096
      mergekit-rpam compare long.samples.jsonl short.samples.jsonl \\
        merged.samples.jsonl sweep/*.samples.jsonl --out report/
    """
    options = sampling_options(list(sampling))
    from rpam_mergekit.evaluate.sweep import SweepRequest, parse_weights, sweep

    request = SweepRequest(
        config=config,
        weights=parse_weights(weights),
        out=out,
        sampling=options,
        keep=keep,
    )
    with interruptible(out):
        files = sweep(request, say)
    click.echo(f"{len(files)} sample files in {out}")


@click.command(
    "compare",
    short_help="Compare models by their sample files: LONG SHORT MERGED [SWEEP...].",
)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder to write compare.txt, .csv, .md and .png to.",
)
@click.option(
    "--by",
    help="Field of the data set's rows that says how hard a query is (such as level): "
    "groups the queries, and is all that the router knows. [default: groups by Long's "
    "tokens; the router knows every query]",
)
@click.option("--partial", is_flag=True, help="Accept sample files of unfinished runs.")
@click.option(
    "--draws",
    type=click.IntRange(min=100),
    default=2000,
    show_default=True,
    help="Draws of the bootstrap.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Of the bootstrap's draws, from which the intervals are.",
)
@click.option(
    "--tokenizer", help="Counts tokens where a file has none: model or folder."
)
@marker_options
@grader_options
def compare_command(out: Path, **options: Any) -> None:
    """Compare models by their sample files: LONG SHORT MERGED [SWEEP...].

    Accuracy, tokens, thinking and its closing, with intervals; the merged model
    against the plain interpolations of the experts (SWEEP, in the order of their
    weights), random mixing of those, and a perfect router of the experts. One file
    alone is summed up, two are Long and Short. For several data sets give folders
    instead of files, with a sample file per data set in each.
    """
    from rpam_mergekit.evaluate import comparison_report
    from rpam_mergekit.evaluate.compare_files import CompareRequest, compare
    from rpam_mergekit.evaluate.plots import check_picture

    with interruptible():
        check_picture()
        comparison = compare(CompareRequest(**options))
        click.echo(comparison_report.text(comparison))
        comparison_report.write(out, comparison)
    click.echo(f"written to {out}")


@click.command(
    "report",
    short_help="Show what a merge did: COEFFICIENTS is its coefficients file or output "
    "folder.",
)
@click.argument("coefficients", type=click.Path(path_type=Path))
@click.option(
    "--out",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder to write report.txt, report.png and report.html to.",
)
def report_command(coefficients: Path, out: Path) -> None:
    """Show what a merge did: COEFFICIENTS is its coefficients file or output folder.

    Per layer the gap to the right expert before and after, the coefficients by module,
    and which layers moved. report.html opens from disk and needs no other file.
    """
    from rpam_mergekit.evaluate import coefficient_report
    from rpam_mergekit.evaluate.coefficient_figures import read_report
    from rpam_mergekit.evaluate.plots import check_picture

    with interruptible():
        check_picture()
        figures = read_report(coefficients)
        click.echo(coefficient_report.text(figures))
        coefficient_report.write(out, figures)
    click.echo(f"written to {out}")
