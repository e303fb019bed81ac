"""What the commands share: options, and how they print and end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import click

from rpam_mergekit.sampling.request import GradingOptions, Location

PATH = click.Path(dir_okay=False, path_type=Path)
Command = TypeVar("Command", bound=Callable[..., object])


def say(text: str) -> None:
    """Print a line to stderr."""
    click.echo(text, err=True)


@contextmanager
def interruptible(resumable: Location | None = None) -> Iterator[None]:
    """Let an interruption say how to go on, without a trace.

    resumable: what keeps the work that was finished, if anything does.
    """
    try:
        yield
    except KeyboardInterrupt:
        then = "."
        if resumable is not None:
            then = (
                f": {resumable} keeps what was finished. Run the same command to go on."
            )
        say(f"\nrpam: stopped{then}")
        raise SystemExit(130) from None


def marker_options(function: Command) -> Command:
    """Give a command the fields of `ThinkingOptions`."""
    for option in (
        click.option(
            "--opened-by-prompt/--not-opened-by-prompt",
            "opened_by_prompt",
            default=None,
            help="Whether the chat template already opens the thinking (as those of "
            "DeepSeek-R1 and Qwen3-Thinking-2507 do), where that cannot be found out: "
            "of a served model whose tokenizer is not at hand, and of files that do "
            "not say it.",
        ),
        click.option(
            "--think-close",
            help="Marker that closes the thinking. [default: as it is opened]",
        ),
        click.option(
            "--think-open",
            help="Marker that opens the thinking. [default: the chat template's or the "
            "file's, else <think>]",
        ),
    ):
        function = option(function)
    return function


def grader_options(function: Command) -> Command:
    """Give a command the fields of `GradingOptions` but the tokenizer."""
    for option in (
        click.option(
            "--grading-time-limit",
            type=click.FloatRange(min=0.1),
            default=GradingOptions.grading_time_limit,
            show_default=True,
            help="Seconds after which a grade is given up.",
        ),
        click.option(
            "--graders",
            type=click.IntRange(min=1),
            help="Processes that grade. [default: half the cores]",
        ),
    ):
        function = option(function)
    return function
