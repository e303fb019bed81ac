"""The command `mergekit-rpam`.

Help and usage errors come at once: the modules of the commands import click only, what
a command needs it imports when it runs.
"""

from __future__ import annotations

from typing import Any

import click

from rpam_mergekit import __version__
from rpam_mergekit.cli.check import check_command
from rpam_mergekit.cli.evaluate import compare_command, report_command, sweep_command
from rpam_mergekit.cli.fit import fit_command
from rpam_mergekit.cli.merge import merge_command
from rpam_mergekit.cli.sample import grade_command, label_command, sample_command
from rpam_mergekit.cli.share import export_command, push_command
from rpam_mergekit.refusal import shown_by_click

# In the order of their use, as the help lists them.
COMMANDS = (
    sample_command,
    grade_command,
    label_command,
    check_command,
    fit_command,
    merge_command,
    export_command,
    push_command,
    sweep_command,
    compare_command,
    report_command,
)
TAKE_HUB_FILES = ("check", "fit", "merge", "export", "push")


class _Group(click.Group):
    """Lists the commands as they are added, and fetches configs from the Hub."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; what it refuses is a message, not a traceback."""
        with shown_by_click():
            return super().invoke(ctx)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; configs and files of the Hub become local ones."""
        name, command, rest = super().resolve_command(ctx, args)
        if name in TAKE_HUB_FILES and not {"-h", "--help"}.intersection(rest):
            rest = [_local(argument) for argument in rest]
        return name, command, rest


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

    Then the same for another data set, such as math500, with LONG_MODEL, SHORT_MODEL
    and out/, and:

    \b
      mergekit-rpam compare test-long.jsonl test-short.jsonl test-merged.jsonl \\
        --out report
    """


for command in COMMANDS:
    main.add_command(command)
