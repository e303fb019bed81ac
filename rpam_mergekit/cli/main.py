"""The command `mergekit-rpam`."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import click

from rpam_mergekit import __version__
from rpam_mergekit.cli.sampling import (
    grade,
    grader_options,
    interruptible,
    label,
    marker_options,
    sample,
)
from rpam_mergekit.refusal import shown_by_click

COMMANDS = (
    "sample",
    "grade",
    "label",
    "check",
    "fit",
    "merge",
    "export",
    "push",
    "sweep",
    "compare",
    "report",
)
# Commands that need mergekit and torch: where they are, and what they do.
HEAVY = {
    "check": ("check", "Say all that is wrong with a config; download nothing."),
    "fit": ("fit", "Run the pre-pass only, by one process or many."),
    "merge": ("", "Run a merge config, as mergekit-yaml does."),
    "export": ("export", "Write a merge as a recipe that needs no plugin."),
    "push": ("push", "Publish a merge on the Hub."),
}


class _Group(click.Group):
    """Loads the commands that need mergekit and torch only when asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in HEAVY:
            return super().get_command(ctx, name)
        from rpam_mergekit.merging.hooks import activate

        activate()
        module, _ = HEAVY[name]
        if module:
            found = importlib.import_module(f"rpam_mergekit.cli.{module}")
            return getattr(found, f"{name}_command")
        # After `activate`: it takes the name `run_merge` from mergekit at its import.
        from mergekit.scripts.run_yaml import main as mergekit_yaml

        return _merge_command(mergekit_yaml)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; what it refuses is a message, not a traceback."""
        with shown_by_click():
            return super().invoke(ctx)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; configs and files of the Hub become local ones."""
        name, command, rest = super().resolve_command(ctx, args)
        if name in HEAVY:
            rest = [_local(argument) for argument in rest]
        return name, command, rest

    def format_commands(
        self, ctx: click.Context, formatter: click.HelpFormatter
    ) -> None:
        rows = [
            (name, command.get_short_help_str(limit=80))
            for name, command in self.commands.items()
        ]
        rows += [(name, what) for name, (_, what) in HEAVY.items()]
        rows.sort(key=lambda row: self.list_commands(ctx).index(row[0]))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _merge_command(mergekit_yaml: click.Command) -> click.Command:
    """Return mergekit-yaml under our name; merges by any method work offline."""
    from rpam_mergekit.models.patches import folders_are_local

    command = copy.copy(mergekit_yaml)
    command.help = """Run the merge that CONFIG_FILE describes into OUT_PATH.

    This is mergekit-yaml with all its options, with the method 'rpam' registered: the
    route that needs no start-up file.
    """

    def callback(*arguments: Any, **options: Any) -> Any:
        assert mergekit_yaml.callback is not None
        _read_ours(options["config_file"])
        with folders_are_local():
            return mergekit_yaml.callback(*arguments, **options)

    command.callback = callback
    return command


def _read_ours(config: str) -> None:
    """Refuse a config that cannot be read, or of `rpam` and wrong.

    Of other methods, mergekit says itself what is wrong.
    """
    from rpam_mergekit.checks.config_file import read_config, read_documents
    from rpam_mergekit.checks.request import NAME

    document = read_documents(config)[0]
    if document.content.get("merge_method", NAME) == NAME:
        read_config(config)


def _local(argument: str) -> str:
    """Return the file that ``hf://...`` names, any other argument as it is."""
    if not argument.startswith("hf://"):
        return argument
    from rpam_mergekit.formats.hub_path import local_path

    return str(local_path(argument, "CONFIG"))


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Merge a Long-CoT and a Short-CoT model into one that reasons adaptively.

    From two models and a data set to a merged model:

    \b
      mergekit-rpam sample LONG_MODEL  --dataset gsm8k --out long.samples.jsonl
      mergekit-rpam sample SHORT_MODEL --dataset gsm8k --out short.samples.jsonl
      mergekit-rpam label long.samples.jsonl short.samples.jsonl --out calibration.jsonl
      mergekit-rpam check rpam.yml
      mergekit-yaml rpam.yml out/
      mergekit-rpam compare long.samples.jsonl short.samples.jsonl \\
        merged.samples.jsonl --out report
    """


for command in (sample, grade, label):
    main.add_command(command)


@main.command(context_settings={"ignore_unknown_options": True})
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
def sweep(
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
    from rpam_mergekit.cli.commands import sampled_as
    from rpam_mergekit.evaluate.sweep import parse_weights, run_sweep

    named = parse_weights(weights)
    interruptible(out, run_sweep, config, named, out, keep, list(sampling), sampled_as)


@main.command("compare")
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
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--tokenizer", help="Counts tokens where a file has none: model or folder."
)
@marker_options
@grader_options
def compare_command(files: tuple[Path, ...], out: Path, **options: Any) -> None:
    """Compare models by their sample files: LONG SHORT MERGED [SWEEP...].

    Accuracy, tokens, thinking and its closing, with intervals; the merged model
    against the plain interpolations of the experts (SWEEP, in the order of their
    weights), random mixing of those, and a perfect router of the experts. One file
    alone is summed up, two are Long and Short. For several data sets give folders
    instead of files, with a sample file per data set in each.
    """
    from rpam_mergekit.cli.commands import run_compare

    interruptible(None, run_compare, files, out, **options)


@main.command()
@click.argument("coefficients", type=click.Path(path_type=Path))
@click.option(
    "--out",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder to write report.txt, report.png and report.html to.",
)
def report(coefficients: Path, out: Path) -> None:
    """Show what a merge did: COEFFICIENTS is its coefficients file or output folder.

    Per layer the gap to the right expert before and after, the coefficients by module,
    and which layers moved. report.html opens from disk and needs no other file.
    """
    from rpam_mergekit.cli.commands import run_report

    interruptible(None, run_report, coefficients, out)
