"""Samples a model into a sample file, and grades the responses of one anew.

`sample` and `grade` are what the commands of these names do. They print nothing but a
progress bar; what the user should know goes to `say`, a line at a time.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rpam_mergekit import __version__
from rpam_mergekit.errors import RpamError
from rpam_mergekit.formats.samples import (
    SampleReader,
    SampleWriter,
    check_folder,
    is_sample_file,
)
from rpam_mergekit.questions.load import Question, QuestionSet, load_questions
from rpam_mergekit.questions.rows import Dataset
from rpam_mergekit.sampling.read_samples import GradedSamples, grader_of, tokenizer_of
from rpam_mergekit.sampling.request import (
    GradeRequest,
    SampleRequest,
    SamplingOptions,
    Say,
    log,
    recorded,
)
from rpam_mergekit.sampling.run import (
    Backend,
    SamplingSettings,
    Tally,
    run,
    run_coroutine,
)
from rpam_mergekit.sampling.turns import (
    check_questions,
    continued,
    thinking_header,
    turns_here,
    turns_served,
)

# So many draws must be the same as the first ones to be worth a word.
_FEWEST_DRAWS = 8


def sample(request: SampleRequest, say: Say = log) -> Tally:
    """Sample graded responses from a model into a sample file; return its figures.

    A file that an earlier run has begun is gone on with. Raises `RpamError` for what
    cannot be sampled, and for a file that was begun with other settings.
    """
    return run_coroutine(_sample(request, say))


def grade(request: GradeRequest, say: Say = log) -> Tally:
    """Grade the responses of a file anew into a sample file; return its figures.

    Raises `RpamError` for a file that cannot be read, or an `out` that is finished.
    """
    return run_coroutine(_grade(request, say))


def questions_of(options: SamplingOptions) -> QuestionSet:
    """Return the queries that the options name, before `limit` cuts them."""
    dataset = Dataset(
        options.dataset,
        preset=options.preset,
        config=options.config,
        split=options.split,
        revision=options.dataset_revision,
        question_column=options.question_column,
        answer_column=options.answer_column,
    )
    return load_questions(
        dataset,
        system=options.system,
        instruction=options.instruction,
        shuffle=options.shuffle,
    )


async def _sample(request: SampleRequest, say: Say) -> Tally:
    async with contextlib.AsyncExitStack() as stack:  # closes connections to servers
        return await _sampled(request, say, stack)


async def _sampled(
    request: SampleRequest, say: Say, stack: contextlib.AsyncExitStack
) -> Tally:
    settings = SamplingSettings(
        samples=request.samples,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        max_tokens=request.max_tokens,
        seed=request.seed,
    )
    out = Path(request.out)
    check_folder(out)
    questions = questions_of(request)
    _tell(questions.notes, say)
    asked = questions.questions[: request.limit]
    known = _header_of(out)
    backend, identity = await _backend(request, settings, asked, known, say, stack)
    header = {
        "model": request.model,
        **identity,
        "dataset": questions.description,
        "sampling": {
            **settings.model_dump(),
            "extra_body": recorded(request.extra_body),
        },
        "thinking": thinking_header(backend.markers, backend.opening),
        "software": _software(),
    }
    tally = Tally()
    with SampleWriter(out, header) as writer:
        left = [q for q in asked if q.index not in writer.done]
        if writer.done:
            for query in SampleReader(out):
                tally.add(query)
            say(f"{out} has {len(writer.done)} queries; {len(left)} are left.")
        if left:
            with grader_of(request) as grader:
                await run(backend, asked, writer, grader, tally)
        if not writer.finished:
            writer.finish()
    _tell(backend.notes, say)
    if request.base_url and tally.alike == tally.queries and settings.temperature:
        _tell(_alike(tally, settings), say)
    return tally


def _alike(tally: Tally, settings: SamplingSettings) -> list[str]:
    """Return a note on a server that seems to ignore the temperature."""
    if tally.draws < _FEWEST_DRAWS:
        return []
    return [
        f"none of the {tally.queries} queries has two different responses, although "
        f"the temperature is {settings.temperature:g}: the server ignores it, or the "
        "model is certain of all that it says. transformers serve samples only where "
        'generation_config.json has "do_sample": true.'
    ]


async def _backend(
    request: SampleRequest,
    settings: SamplingSettings,
    asked: Sequence[Question],
    known: Mapping[str, Any],
    say: Say,
    stack: contextlib.AsyncExitStack,
) -> tuple[Backend, dict[str, Any]]:
    """Return the backend, and what identifies the model in the file's header.

    `known` is the header of the file that the run goes on with, if there is one.
    """
    if request.base_url:
        return await _server(request, settings, asked, known, say, stack)
    return _in_this_process(request, settings, asked, say)


async def _server(
    request: SampleRequest,
    settings: SamplingSettings,
    asked: Sequence[Question],
    known: Mapping[str, Any],
    say: Say,
    stack: contextlib.AsyncExitStack,
) -> tuple[Backend, dict[str, Any]]:
    from rpam_mergekit.sampling.server import ServerBackend, ServerOptions

    tokenizer = tokenizer_of(request.tokenizer)
    server = ServerBackend(
        request.model,
        settings,
        ServerOptions(
            base_urls=request.base_url,
            concurrency=request.concurrency,
            timeout=request.timeout,
            retries=request.retries,
            requests_per_minute=request.requests_per_minute,
            tokenizer=tokenizer,
        ),
        request.extra_body,
    )
    stack.push_async_callback(server.close)
    await server.check()
    names = [request.model, *server.roots]
    messages = asked[0].messages
    turns = turns_served(names, tokenizer, messages, request, request.extra_body)
    turns = continued(turns, known, request)
    _tell(turns.notes, say)
    server.heed(turns)
    return server, {"backend": "server"}


def _in_this_process(
    request: SampleRequest,
    settings: SamplingSettings,
    asked: Sequence[Question],
    say: Say,
) -> tuple[Backend, dict[str, Any]]:
    from rpam_mergekit.sampling.local import (
        ModelOptions,
        TransformersBackend,
        local_digest,
        read_tokenizer,
    )

    model = request.model
    options = ModelOptions(
        revision=request.revision,
        device=request.device,
        dtype=request.dtype,
        batch_size=request.batch_size,
        trust_remote_code=request.trust_remote_code,
    )
    tokenizer = read_tokenizer(model, options)
    check_questions(model, asked, tokenizer, request.system)
    turns = turns_here(model, tokenizer, asked[0].messages, request)
    _tell(turns.notes, say)
    backend = TransformersBackend(
        model, settings, options, turns.markers, turns.opening, tokenizer
    )
    weights = {
        "revision": request.revision,
        "digest": local_digest(model),
        "dtype": request.dtype,
    }
    return backend, {"backend": "transformers", "weights": weights}


async def _grade(request: GradeRequest, say: Say) -> Tally:
    source, out = Path(request.source), Path(request.out)
    samples = GradedSamples(source, request, regrade=True)
    told, opened = request.opened_by_prompt, bool(samples.opening)
    if told is not None and told != opened:
        flag = "--opened-by-prompt" if told else "--not-opened-by-prompt"
        _tell([f"{flag} is not heeded: {source} itself tells otherwise"], say)
    tally = Tally()
    with SampleWriter(out, {**samples.header, "software": _software()}) as writer:
        if writer.finished:
            raise RpamError(f"--out: {out} exists and is finished; name another file.")
        for query in SampleReader(out):
            tally.add(query)
        async for query in samples.queries(skip=writer.done):
            writer.append(query)
            tally.add(query)
        if samples.finished:
            writer.finish()
    if not samples.finished:
        _tell([f"the run that writes {source} has not finished"], say)
    return tally


def _tell(notes: Iterable[str], say: Say) -> None:
    for note in notes:
        say(f"note: {note}")


def _header_of(path: Path) -> dict[str, Any]:
    """Return the header of a sample file to go on with, nothing if there is none."""
    with contextlib.suppress(RpamError):  # torn, or not ours: the writer says so
        if path.is_file() and is_sample_file(path):
            return SampleReader(path).header
    return {}


def _software() -> dict[str, str]:
    found = {"rpam-mergekit": __version__, "python": platform.python_version()}
    for name in ("math-verify", "transformers", "openai"):
        try:
            found[name] = version(name)
        except ImportError:
            continue
    return found
