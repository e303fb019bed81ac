"""What the commands do, once their options are parsed."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from rpam_mergekit import __version__
from rpam_mergekit.errors import RpamError
from rpam_mergekit.evaluate import label_report
from rpam_mergekit.extras import needs
from rpam_mergekit.formats.samples import (
    SampleReader,
    SampleWriter,
    check_folder,
    is_sample_file,
)
from rpam_mergekit.sampling import labels as labeling
from rpam_mergekit.sampling.leaks import read_guard
from rpam_mergekit.sampling.questions import Question, QuestionSet, load_questions
from rpam_mergekit.sampling.read_samples import Intake, grader_of, tokenizer_of
from rpam_mergekit.sampling.rows import Dataset
from rpam_mergekit.sampling.run import Backend, SamplingSettings, Tally
from rpam_mergekit.sampling.run import run as sample_all
from rpam_mergekit.sampling.turns import (
    check_questions,
    continued,
    thinking_header,
    turns_here,
    turns_served,
)


async def run_sample(
    model: str, dataset: str, out: Path, extra_body: dict[str, Any], **options: Any
) -> None:
    """Sample `model` on `dataset` into `out`; see `mergekit-rpam sample --help`."""
    o = options
    settings = SamplingSettings(
        samples=o["samples"],
        temperature=o["temperature"],
        top_p=o["top_p"],
        top_k=o["top_k"],
        max_tokens=o["max_tokens"],
        seed=o["seed"],
    )
    check_folder(out)
    questions = questions_of(dataset, o)
    _say(questions.notes)
    asked = questions.questions[: o["limit"]]
    known = _header_of(out)
    backend, identity = await _backend(model, settings, asked, known, extra_body, o)
    header = {
        "model": model,
        **identity,
        "dataset": questions.description,
        "sampling": {**settings.model_dump(), "extra_body": extra_body},
        "thinking": thinking_header(backend.markers, backend.opening),
        "software": _software(),
    }
    with SampleWriter(out, header) as writer:
        tally = Tally()
        left = [q for q in asked if q.index not in writer.done]
        if writer.done:
            for query in SampleReader(out):
                tally.add(query)
            click.echo(
                f"{out} has {len(writer.done)} queries; {len(left)} are left.", err=True
            )
        if left:
            with grader_of(o) as grader:
                await sample_all(backend, asked, writer, grader, tally)
        if not writer.finished:
            writer.finish()
    _say(backend.notes)
    click.echo("\n".join(tally.lines()))
    click.echo(f"written to {out}")


# Options of `sample` that change the responses.
SAMPLED_BY = (
    "samples",
    "limit",
    "temperature",
    "top_p",
    "top_k",
    "max_tokens",
    "seed",
    "dtype",
    "think_open",
    "think_close",
    "opened_by_prompt",
)


def questions_of(dataset: str, o: dict[str, Any]) -> QuestionSet:
    """Return the queries that the options of `sample` name."""
    return load_questions(
        Dataset(
            dataset,
            preset=o["preset"],
            config=o["config"],
            split=o["split"],
            revision=o["dataset_revision"],
            question_column=o["question_column"],
            answer_column=o["answer_column"],
        ),
        system=o["system"],
        instruction=o["instruction"],
        shuffle=o["shuffle"],
    )


async def _backend(
    model: str,
    settings: SamplingSettings,
    asked: Sequence[Question],
    known: Mapping[str, Any],
    extra_body: dict[str, Any],
    o: dict[str, Any],
) -> tuple[Backend, dict[str, Any]]:
    """Return the backend, and what identifies the model in the file's header.

    `known` is the header of the file that the run goes on with, if there is one.
    """
    if o["base_url"]:
        from rpam_mergekit.sampling.server import ServerBackend, ServerOptions

        tokenizer = tokenizer_of(o["tokenizer"])
        server = ServerBackend(
            model,
            settings,
            ServerOptions(
                base_urls=o["base_url"],
                concurrency=o["concurrency"],
                timeout=o["timeout"],
                retries=o["retries"],
                requests_per_minute=o["requests_per_minute"],
                tokenizer=tokenizer,
            ),
            extra_body,
        )
        await server.check()
        names = [model, *server.roots]
        turns = turns_served(names, tokenizer, asked[0].messages, o, extra_body)
        turns = continued(turns, known, o)
        _say(turns.notes)
        server.heed(turns)
        return server, {"backend": "server"}
    from rpam_mergekit.sampling.local import (
        ModelOptions,
        TransformersBackend,
        local_digest,
        read_tokenizer,
    )

    options = ModelOptions(
        revision=o["revision"],
        device=o["device"],
        dtype=o["dtype"],
        batch_size=o["batch_size"],
        trust_remote_code=o["trust_remote_code"],
    )
    tokenizer = read_tokenizer(model, options)
    check_questions(model, asked, tokenizer, o["system"])
    turns = turns_here(model, tokenizer, asked[0].messages, o)
    _say(turns.notes)
    backend = TransformersBackend(
        model, settings, options, turns.markers, turns.opening, tokenizer
    )
    return backend, {
        "backend": "transformers",
        "weights": {
            "revision": o["revision"],
            "digest": local_digest(model),
            "dtype": o["dtype"],
        },
    }


async def run_grade(source: Path, out: Path, **options: Any) -> None:
    """Grade the responses of `source` anew into `out`."""
    reader = Intake(source, options, regrade=True)
    said, opened = options["opened_by_prompt"], bool(reader.opening)
    if said is not None and said != opened:
        flag = "--opened-by-prompt" if said else "--not-opened-by-prompt"
        _say([f"{flag} is not heeded: {source} itself tells otherwise"])
    tally = Tally()
    with SampleWriter(out, {**reader.header, "software": _software()}) as writer:
        if writer.finished:
            raise RpamError(f"--out: {out} exists and is finished; name another file.")
        for query in SampleReader(out):
            tally.add(query)
        async for query in reader.queries(skip=writer.done):
            writer.append(query)
            tally.add(query)
        if reader.finished:
            writer.finish()
    if not reader.finished:
        click.echo(f"note: the run that writes {source} has not finished", err=True)
    click.echo("\n".join(tally.lines()))
    click.echo(f"written to {out}")


async def run_label(long: Path, short: Path, out: Path, **options: Any) -> None:
    """Label the queries of two sample files into the calibration file `out`."""
    o = options
    check_folder(out)
    if o["plot"]:
        check_folder(o["plot"])
        with needs("plot"):
            import matplotlib  # noqa: F401
    guard = read_guard(o["exclude"])
    candidates: list[list[labeling.Candidate]] = []
    readers = [Intake(path, o) for path in (long, short)]
    for reader in readers:
        _warn_of_evaluation_set(reader)
    models = [reader.header.get("model") for reader in readers]
    if models[0] is not None and models[0] == models[1]:
        click.echo(f"note: both files are of the model {models[0]}", err=True)
    for reader in readers:
        kept = [
            labeling.Candidate.of(query, reader.markers)
            async for query in reader.queries()
        ]
        _check_finished(reader, len(kept), o["partial"])
        candidates.append(kept)
    labels = labeling.label(
        candidates[0],
        candidates[1],
        guard,
        per_pattern=o["per_pattern"],
        balance=o["balance"],
        seed=o["seed"],
        responses=not o["prompts_only"],
    )
    click.echo(label_report.table(labels, guard))
    if o["by"]:
        click.echo(label_report.table_by(labels, o["by"]))
    labeling.write_calibration(out, labels)
    click.echo(f"{len(labels.chosen)} queries written to {out}")
    if o["plot"]:
        label_report.plot(o["plot"], labels)
        click.echo(f"picture: {o['plot']}")


async def run_compare(files: tuple[Path, ...], out: Path, **options: Any) -> None:
    """Compare the models of several sample files; writes the report into `out`."""
    from rpam_mergekit.evaluate import comparison_report as compare_report
    from rpam_mergekit.evaluate.compare import Model, QueryFigures, by_weight, compare

    with needs("plot"):
        import matplotlib  # noqa: F401
    roles = ["long", "short", "merged"] if len(files) > 1 else ["merged"]
    models: list[Model] = []
    for place, path in enumerate(files):
        role = roles[place] if place < len(roles) else "sweep"
        parts = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not parts:
            raise RpamError(f"{path}: the folder holds no .jsonl file.")
        name = path.name.removesuffix(".jsonl").removesuffix(".samples")
        if any(model.name == name for model in models):
            name = f"{name} ({place + 1})"
        model = Model(name, role)
        for part in parts:
            reader = Intake(part, options)
            dataset = reader.header.get("dataset", {}).get("name") or part.stem
            # Of one file the name does not matter: files of other names are paired.
            dataset = dataset if len(parts) > 1 else "queries"
            async for query in reader.queries():
                key = (dataset, query.question)
                model.queries.setdefault(key, QueryFigures.of(query))
            _check_finished(reader, len(model.queries), options["partial"])
        models.append(model)
    models = models[: len(roles)] + by_weight(models[len(roles) :])
    found = compare(
        models, by=options["by"], draws=options["draws"], seed=options["seed"]
    )
    click.echo(compare_report.text(found))
    compare_report.write(out, found)
    click.echo(f"written to {out}")


def run_report(coefficients: Path, out: Path) -> None:
    """Write the report on a coefficients file into `out`."""
    from rpam_mergekit.evaluate import coefficient_report
    from rpam_mergekit.evaluate.coefficient_figures import read_report

    with needs("plot"):
        import matplotlib  # noqa: F401
    found = read_report(coefficients)
    click.echo(coefficient_report.text(found))
    coefficient_report.write(out, found)
    click.echo(f"written to {out}")


def _say(notes: Iterable[str]) -> None:
    for note in notes:
        click.echo(f"note: {note}", err=True)


def _header_of(path: Path) -> dict[str, Any]:
    """Return the header of a sample file to go on with, nothing if there is none."""
    with contextlib.suppress(RpamError):  # torn, or not ours: the writer says so
        if path.is_file() and is_sample_file(path):
            return SampleReader(path).header
    return {}


def _check_finished(reader: Intake, queries: int, partial: bool) -> None:
    if not reader.finished and not partial:
        raise RpamError(
            f"{reader.path}: the run that writes it has not finished ({queries} "
            "queries so far). Run its command again to finish it, or give --partial "
            "to take what is there."
        )


def _warn_of_evaluation_set(reader: Intake) -> None:
    from rpam_mergekit.sampling.benchmarks import PRESETS

    dataset = reader.header.get("dataset", {})
    preset = PRESETS.get(dataset.get("preset") or "")
    if preset is not None and dataset.get("split") == preset.evaluation:
        click.echo(
            f"note: {reader.path} holds queries that models are evaluated on "
            f"({preset.name}, split {preset.evaluation}): calibrate on them, and "
            "figures on that benchmark mean nothing",
            err=True,
        )


def _software() -> dict[str, str]:
    found = {"rpam-mergekit": __version__, "python": platform.python_version()}
    for name in ("math-verify", "transformers", "openai"):
        try:
            found[name] = version(name)
        except ImportError:
            continue
    return found


def sampled_as(sample: Sequence[str]) -> dict[str, Any]:
    """Return what tells this sweep's samples from others'.

    Refuses sampling options and data sets that cannot be, before anything is merged.
    """
    from rpam_mergekit.cli.sampling import sample as command

    named = [option.split("=")[0] for option in sample]
    for option in ("--out", "--base-url"):
        if option in named:
            raise RpamError(f"{option}: cannot be given to a sweep's sampling.")
    options = command.make_context("sample", ["MODEL", "--out", "OUT", *sample]).params
    questions = questions_of(options["dataset"], options)
    sampling = {name: options[name] for name in SAMPLED_BY}
    return {"sampling": sampling, "dataset": questions.description}
