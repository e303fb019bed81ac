"""The commands `sample`, `grade` and `label`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from rpam_mergekit.cli.options import (
    PATH,
    grader_options,
    interruptible,
    marker_options,
    say,
)
from rpam_mergekit.errors import RpamError
from rpam_mergekit.sampling.request import (
    DTYPES,
    GradeRequest,
    LabelRequest,
    SampleRequest,
    SamplingOptions,
)


@click.command("sample")
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
    default=SampleRequest.samples,
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
    "--temperature",
    type=click.FloatRange(min=0),
    default=SampleRequest.temperature,
    show_default=True,
    help="How freely tokens are drawn: 1 as the model predicts them, below 1 the "
    "likely ones more often, 0 always the likeliest, so that all K responses are the "
    "same.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=SampleRequest.top_p,
    show_default=True,
    help="Draw only from the likeliest tokens that together have this probability; 1 "
    "draws from all.",
)
@click.option(
    "--top-k",
    type=click.IntRange(min=1),
    help="Draw only from so many of the likeliest tokens. [default: off; a server may "
    "have a limit of its own]",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=SampleRequest.max_tokens,
    show_default=True,
    help="Longest response; one that is cut off counts as not answered.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=SampleRequest.seed,
    show_default=True,
    help="Of the drawing: every response has a seed of its own, made of this one, so "
    "that another number gives other responses.",
)
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
    default=SampleRequest.concurrency,
    show_default=True,
    help="Requests under way at once, over all servers.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=SampleRequest.timeout,
    show_default=True,
    help="Seconds after which a request is given up and repeated.",
)
@click.option(
    "--retries",
    type=click.IntRange(min=0),
    default=SampleRequest.retries,
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
    default=SampleRequest.device,
    show_default=True,
    help="In this process: cpu, cuda, cuda:1, mps, auto, or auto-map to spread a model "
    "over all GPUs.",
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default=SampleRequest.dtype,
    show_default=True,
    help="In this process: computation and weights; auto is the checkpoint's.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=SampleRequest.batch_size,
    show_default=True,
    help="In this process: responses generated at once.",
)
@click.option("--revision", help="Revision of the model.")
@click.option("--trust-remote-code", is_flag=True, help="Run the model's own code.")
@marker_options
@grader_options
def sample_command(**options: Any) -> None:
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
    request = SampleRequest(**read_options(options))
    from rpam_mergekit.sampling.sample import sample

    with interruptible(request.out):
        tally = sample(request, say)
    click.echo("\n".join(tally.lines()))
    click.echo(f"written to {request.out}")


SERVER_OPTIONS = (
    "concurrency",
    "timeout",
    "retries",
    "requests_per_minute",
    "extra_body",
    "tokenizer",
)
PROCESS_OPTIONS = ("device", "dtype", "batch_size", "revision", "trust_remote_code")


def read_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of `sample` as fields of its request.

    Raises `RpamError` for what is no JSON object, and for options that do nothing with
    the backend that was chosen. Of the command whose context is the current one.
    """
    server = bool(options["base_url"])
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
    return {**options, "extra_body": _object(options["extra_body"])}


def _object(text: str | None) -> dict[str, Any]:
    import json

    try:
        found = json.loads(text) if text else {}
    except json.JSONDecodeError as error:
        raise RpamError(f"--extra-body: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise RpamError(f"--extra-body: found {text}, expected a JSON object.")
    return found


def sampling_options(arguments: list[str]) -> SamplingOptions:
    """Return what options of `sample` say of a model that is not named yet.

    Raises click's usage errors, and `RpamError` for --out.
    """
    if "--out" in [argument.split("=")[0] for argument in arguments]:
        raise RpamError("--out: cannot be given to a sweep's sampling.")
    words = ["MODEL", "--out", "OUT", *arguments]
    with sample_command.make_context("sample", words) as context:
        if context.params["base_url"]:
            raise RpamError("--base-url: cannot be given to a sweep's sampling.")
        fields = read_options(context.params)
    return SamplingOptions(
        **{k: v for k, v in fields.items() if k not in ("model", "out")}
    )


@click.command("grade")
@click.argument("source", type=PATH)
@click.option("--out", required=True, type=PATH, help="Sample file to write (JSONL).")
@click.option(
    "--tokenizer", help="Counts tokens where SOURCE has none: model or folder."
)
@marker_options
@grader_options
def grade_command(**options: Any) -> None:
    """Grade the responses of SOURCE anew, into a sample file.

    SOURCE is a sample file, one of lm-eval (--log_samples), or the minimal format: a
    JSONL with 'question', 'answer' and 'responses' (texts).
    """
    from rpam_mergekit.sampling.sample import grade

    request = GradeRequest(**options)
    with interruptible(request.out):
        tally = grade(request, say)
    click.echo("\n".join(tally.lines()))
    click.echo(f"written to {request.out}")


class _SeveralExcludes(click.Command):
    """Lets `--exclude` take every value up to the next option, as a shell's * gives."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        import glob

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
    "label",
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
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=LabelRequest.seed,
    show_default=True,
    help="Of the choice, where --per-pattern or --balance leaves queries out.",
)
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
def label_command(by: str | None, plot: Path | None, **options: Any) -> None:
    """Label queries with the pattern that suits them, from two sample files.

    A query is labelled 'long' where the Long-CoT model is right more often by over
    half a response, else 'short'; queries that neither solves are left out. The
    positive model's shortest correct response is kept: of Long one that thinks.
    'long' queries that have none are left out, too.

    LONG and SHORT are sample files of the two models on the same queries; those of
    lm-eval and the minimal format of 'grade' do too.
    """
    with interruptible():
        _label(LabelRequest(**options), by, plot)


def _label(request: LabelRequest, by: str | None, plot: Path | None) -> None:
    from rpam_mergekit.evaluate import label_report
    from rpam_mergekit.evaluate.plots import check_picture
    from rpam_mergekit.formats.samples import check_folder
    from rpam_mergekit.sampling.label_files import labels_of
    from rpam_mergekit.sampling.labels import write_calibration

    out = Path(request.out)
    check_folder(out)
    if plot:
        check_folder(plot)
        check_picture(plot)
    labels = labels_of(request, say)
    click.echo(label_report.table(labels, labels.guard))
    if by:
        click.echo(label_report.table_by(labels, by))
    write_calibration(out, labels)
    click.echo(f"{len(labels.chosen)} queries written to {out}")
    if plot:
        label_report.plot(plot, labels)
        click.echo(f"picture: {plot}")
