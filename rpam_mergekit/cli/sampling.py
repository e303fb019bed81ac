"""The commands `sample`, `grade` and `label`, and the options that others share."""

from __future__ import annotations

import glob
import json
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from rpam_mergekit.errors import RpamError

PATH = click.Path(dir_okay=False, path_type=Path)


def interruptible(resumable: Path | None, function, *arguments, **options) -> None:
    """Run what a command does; an interruption says how to go on, without a trace."""
    import asyncio  # not at the top: help needs it not

    try:
        result = function(*arguments, **options)
        if asyncio.iscoroutine(result):
            asyncio.run(result)
    except KeyboardInterrupt:
        then = "."
        if resumable is not None:
            then = (
                f": {resumable} keeps what was finished. Run the same command to go on."
            )
        click.echo(f"\nrpam: stopped{then}", err=True)
        raise SystemExit(130) from None


def marker_options(function):
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


def grader_options(function):
    for option in (
        click.option(
            "--grading-time-limit",
            type=click.FloatRange(min=0.1),
            default=10.0,
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


@click.command()
@click.argument("model")
@click.option(
    "--dataset",
    required=True,
    help="A preset (gsm8k, math, math500, minerva, olympiadbench, aime24, aime25, "
    "gpqa-diamond), a JSONL file with 'question' and 'answer', or a Hub data set "
    "(owner/name).",
)
@click.option("--out", required=True, type=PATH, help="Sample file to write (JSONL).")
@click.option(
    "-k",
    "--samples",
    type=click.IntRange(min=1),
    default=12,
    show_default=True,
    help="Responses per query.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Ask only the first queries.")
@click.option("--shuffle", type=int, help="Ask in a random order with this seed.")
@click.option("--split", help="Split of a Hub data set; a preset has a default.")
@click.option("--config", help="Configuration of a Hub data set.")
@click.option("--preset", help="Read the rows of --dataset as this preset's.")
@click.option("--question-column", help="Column of the questions.")
@click.option("--answer-column", help="Column of the gold answers.")
@click.option("--dataset-revision", help="Revision of a Hub data set.")
@click.option("--system", help="System message.")
@click.option(
    "--instruction",
    help="Text after each question, such as where to put the answer; '' for none. "
    "[default: the preset's]",
)
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.6, show_default=True
)
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=0.95,
    show_default=True,
)
@click.option("--top-k", type=click.IntRange(min=1), help="[default: off]")
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=16384,
    show_default=True,
    help="Longest response; one that is cut off counts as not answered.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--base-url",
    multiple=True,
    help="OpenAI-compatible server, such as http://localhost:8000/v1; repeat it to "
    "share the queries out among several. Without it the model runs in this process. "
    "The key is read from OPENAI_API_KEY.",
)
@click.option(
    "--concurrency",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Requests under way at once, over all servers.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=1800.0,
    show_default=True,
    help="Seconds after which a request is given up and repeated.",
)
@click.option(
    "--retries",
    type=click.IntRange(min=0),
    default=12,
    show_default=True,
    help="How often a request is repeated, with growing pauses, before the run stops.",
)
@click.option(
    "--requests-per-minute",
    type=click.FloatRange(min=0, min_open=True),
    help="Keep below a server's rate limit.",
)
@click.option(
    "--extra-body",
    help='JSON object of further fields of a request, such as {"min_p": 0.05}.',
)
@click.option(
    "--tokenizer",
    help="Of the served model: folder or Hub name. Its chat template says whether the "
    "thinking is opened, and it counts tokens where the server does not. [default: "
    "MODEL's, only for the template]",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="In this process: cpu, cuda, cuda:1, mps, auto, or auto-map to spread a model "
    "over all GPUs.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="In this process: computation and weights; auto is the checkpoint's.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="In this process: responses generated at once.",
)
@click.option("--revision", help="Revision of the model.")
@click.option("--trust-remote-code", is_flag=True, help="Run the model's own code.")
@marker_options
@grader_options
def sample(model: str, dataset: str, out: Path, **options: Any) -> None:
    """Sample K graded responses per query of a data set from MODEL.

    MODEL is the name under which a server (--base-url) serves it, else a folder or a
    Hub name, with @REVISION or +ADAPTER (LoRA) as in mergekit's configs. Finished
    queries are appended to --out as they come; after a stop of any kind, the same
    command goes on where it was. A changed setting is refused.

    \b
      vllm serve Qwen/Qwen3-4B-Thinking-2507 --port 8000
      mergekit-rpam sample Qwen/Qwen3-4B-Thinking-2507 --dataset gsm8k \\
        --base-url http://localhost:8000/v1 --out long.samples.jsonl
    """
    from rpam_mergekit.cli.commands import run_sample

    _check_backend_options(bool(options["base_url"]))
    extra = options.pop("extra_body")
    try:
        extra_body = json.loads(extra) if extra else {}
    except json.JSONDecodeError as error:
        raise RpamError(f"--extra-body: not JSON: {error}") from None
    if not isinstance(extra_body, dict):
        raise RpamError(f"--extra-body: found {extra}, expected a JSON object.")
    interruptible(out, run_sample, model, dataset, out, extra_body, **options)


SERVER_OPTIONS = (
    "concurrency",
    "timeout",
    "retries",
    "requests_per_minute",
    "extra_body",
    "tokenizer",
)
PROCESS_OPTIONS = ("device", "dtype", "batch_size", "revision", "trust_remote_code")


def _check_backend_options(server: bool) -> None:
    """Refuse options that do nothing with the backend that was chosen."""
    context = click.get_current_context()
    idle = PROCESS_OPTIONS if server else SERVER_OPTIONS
    given = [
        f"--{name.replace('_', '-')}"
        for name in idle
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT
    ]
    if given:
        where = "in this process, without --base-url" if server else "with --base-url"
        raise RpamError(f"{', '.join(given)}: works only {where}.")


@click.command()
@click.argument("source", type=PATH)
@click.option("--out", required=True, type=PATH, help="Sample file to write (JSONL).")
@click.option(
    "--tokenizer", help="Counts tokens where SOURCE has none: model or folder."
)
@marker_options
@grader_options
def grade(source: Path, out: Path, **options: Any) -> None:
    """Grade the responses of SOURCE anew, into a sample file.

    SOURCE is a sample file, one of lm-eval (--log_samples), or the minimal format: a
    JSONL with 'question', 'answer' and 'responses' (texts).
    """
    from rpam_mergekit.cli.commands import run_grade

    interruptible(out, run_grade, source, out, **options)


class _SeveralExcludes(click.Command):
    """Lets `--exclude` take every value up to the next option, as a shell's * gives."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        expanded: list[str] = []
        taking = False
        for arg in args:
            if taking and not arg.startswith("-"):
                matches = sorted(glob.glob(arg)) or [arg]
                expanded += [part for match in matches for part in ("--exclude", match)]
                continue
            taking = arg == "--exclude"
            if not taking:
                expanded.append(arg)
        return super().parse_args(ctx, expanded)


@click.command(
    cls=_SeveralExcludes,
    short_help="Label queries with the pattern that suits them, from two sample files.",
)
@click.argument("long", type=PATH)
@click.argument("short", type=PATH)
@click.option(
    "--out", required=True, type=PATH, help="Calibration file to write (JSONL)."
)
@click.option(
    "--exclude",
    multiple=True,
    help="Evaluation sets whose queries must not be calibrated on: JSONL files or "
    "presets (their evaluation splits), as many as follow. LONG and SHORT come first.",
)
@click.option(
    "--per-pattern", type=click.IntRange(min=1), help="At most so many of a pattern."
)
@click.option("--balance", is_flag=True, help="As many queries of either pattern.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--prompts-only",
    is_flag=True,
    help="Write no responses, for a merge with 'tokens: prompt'; it does not matter "
    "then whether Long's think.",
)
@click.option(
    "--by",
    help="Field of the data set's rows (such as level): also show the share of "
    "'short' per value.",
)
@click.option("--plot", type=PATH, help="Picture of accuracy gained against tokens.")
@click.option("--partial", is_flag=True, help="Accept sample files of unfinished runs.")
@click.option(
    "--tokenizer", help="Counts tokens where a file has none: model or folder."
)
@marker_options
@grader_options
def label(long: Path, short: Path, out: Path, **options: Any) -> None:
    """Label queries with the pattern that suits them, from two sample files.

    A query is labelled 'long' where the Long-CoT model is right more often by over
    half a response, else 'short'; queries that neither solves are left out. The
    positive model's shortest correct response is kept: of Long one that thinks.
    'long' queries that have none are left out, too.

    LONG and SHORT are sample files of the two models on the same queries; those of
    lm-eval and the minimal format of 'grade' do too.
    """
    from rpam_mergekit.cli.commands import run_label

    interruptible(None, run_label, long, short, out, **options)
