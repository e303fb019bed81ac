"""Samples k responses per query from one model, grades them, appends them to a file.

A backend (`server.py`, `local.py`) yields queries with all their responses, in
any order; the loop here grades and writes them, so that a killed run loses only the
queries that were under way. Every response has a seed of its own, made of the run's
seed, the query's row and the response's number: a resumed run asks for the very
responses that are missing. Whether the same seed gives the same response is the
backend's promise; each says which it makes.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections import Counter
from collections.abc import AsyncGenerator, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from tqdm import tqdm

from rpam_mergekit.errors import RpamError
from rpam_mergekit.formats.samples import Response, SampledQuery, SampleWriter
from rpam_mergekit.grading.brackets import begun_turn, read_turn
from rpam_mergekit.grading.responses import (
    ANSWERED,
    CLOSED,
    OPEN,
    THINKING,
    WRONG,
    Markers,
    has_ended,
)
from rpam_mergekit.grading.workers import Grader
from rpam_mergekit.questions.load import Question

_MOST_UNGRADED = 64  # queries
T = TypeVar("T")


class SamplingSettings(BaseModel):
    """How responses are drawn; a changed value makes another sample file."""

    model_config = ConfigDict(frozen=True)

    samples: int = Field(12, ge=1)
    temperature: float = Field(0.6, ge=0)
    top_p: float = Field(0.95, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    max_tokens: int = Field(16384, ge=1)
    seed: int = Field(0, ge=0)

    def seed_of(self, index: int, sample: int) -> int:
        """Return the seed of one response, below 2**31."""
        digest = hashlib.sha256(f"{self.seed}/{index}/{sample}".encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1


@dataclass(frozen=True)
class Generated:
    """One response as a backend returns it, not graded yet.

    text: what the model wrote after the prompt; tokens: how many it generated.
    """

    text: str
    tokens: int | None
    finish: str | None
    seed: int | None


class Backend(Protocol):
    """Where responses come from.

    markers: of the model's thinking; opening: the text by which its prompts open it,
    None if that is not known.
    notes: what the user should know, growing while it runs; retries: requests that
    had to be repeated so far.
    """

    markers: Markers
    opening: str | None
    notes: dict[str, None]
    retries: int

    def sample(
        self, questions: Sequence[Question], done: set[int]
    ) -> AsyncGenerator[tuple[Question, list[Generated]], None]:
        """Yield every question whose index is not in `done`, with k responses."""
        ...


@dataclass
class Tally:
    """Running figures of a sample file.

    stopped: finish reasons of responses that neither ended nor were cut off. alike: the
    queries of whose several responses no two differ, draws: how often one of these was
    drawn again. example: the first response, and its right answer.
    """

    queries: int = 0
    responses: int = 0
    correct: int = 0
    tokens: int = 0
    counted: int = 0
    cut_off: int = 0
    alike: int = 0
    draws: int = 0
    stopped: Counter[str] = field(default_factory=Counter)
    example: tuple[str, str] | None = None
    thinking: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def add(self, query: SampledQuery) -> None:
        self.queries += 1
        again = len(query.responses) - 1
        if again > 0 and len({r.text for r in query.responses}) == 1:
            self.alike += 1
            self.draws += again
        if self.example is None and query.responses and query.gold:
            self.example = query.responses[0].text, ", ".join(query.gold.values)
        for response in query.responses:
            self.responses += 1
            self.correct += response.correct is True
            if response.finish == "length":
                self.cut_off += 1
            elif response.finish is not None and not has_ended(response.finish):
                self.stopped[response.finish] += 1
            self.thinking[response.thinking] += 1
            if response.tokens is not None:
                self.tokens += response.tokens
                self.counted += 1
            if response.problem:
                self.problems.append(f"query {query.index}: {response.problem}")

    @property
    def accuracy(self) -> float:
        return self.correct / max(self.responses, 1)

    @property
    def mean_tokens(self) -> float | None:
        return self.tokens / self.counted if self.counted else None

    def lines(self) -> list[str]:
        """Return the figures as lines of text."""
        total = max(self.responses, 1)
        thought = sum(self.thinking[state] for state in THINKING)
        mean = "unknown" if self.mean_tokens is None else f"{self.mean_tokens:.1f}"
        stopped = sum(self.stopped.values())
        reasons = ", ".join(f"{kind} {n}" for kind, n in self.stopped.most_common())
        lines = [
            f"queries           {self.queries}",
            f"responses         {self.responses}",
            f"accuracy          {self.accuracy:.1%}",
            f"mean tokens       {mean}",
            f"cut off           {self.cut_off / total:.1%}",
            *(
                [f"stopped otherwise {stopped / total:.1%} ({reasons}): no answers"]
                if stopped
                else []
            ),
            f"thinking          {thought / total:.1%}",
        ]
        if thought:
            lines += [
                f"  properly closed {self.thinking[CLOSED] / thought:.1%}",
                f"  closed wrongly  {self.thinking[WRONG] / thought:.1%}",
                f"  never closed    {self.thinking[OPEN] / thought:.1%}",
            ]
        if self.thinking[ANSWERED]:
            share = self.thinking[ANSWERED] / total
            lines.append(f"answered in the opened block {share:.1%}")
        if self.example and not self.correct:
            text, right = self.example
            lines.append(
                f"none is right: the first is {shown(text)}, right is {shown(right)}"
            )
        if self.problems:
            lines.append(f"lost grades       {len(self.problems)}")
            lines += [f"  {problem}" for problem in self.problems[:5]]
        return lines


def shown(text: str, most: int = 72) -> str:
    """Return a text as one line that no terminal obeys: escaped, its middle cut out."""
    line = repr(text)
    if len(line) <= most:
        return line
    half = (most - 5) // 2
    return f"{line[:half]} ... {line[-half:]}"


async def run(
    backend: Backend,
    questions: Sequence[Question],
    writer: SampleWriter,
    grader: Grader,
    tally: Tally,
) -> None:
    """Sample, grade and write every question that `writer` does not have yet."""
    progress = tqdm(
        total=len(questions),
        initial=sum(q.index in writer.done for q in questions),
        unit="query",
        desc="sampling",
        dynamic_ncols=True,
        smoothing=0.05,
    )
    # Grading may lag behind by so many queries, never by more.
    places = asyncio.Semaphore(_MOST_UNGRADED)

    async def finish(question: Question, generated: list[Generated]) -> None:
        try:
            query = await graded(
                question, generated, grader, backend.markers, backend.opening
            )
            writer.append(query)
            tally.add(query)
            progress.set_postfix(_postfix(tally, backend.retries), refresh=False)
            progress.update()
        finally:
            places.release()

    generator = backend.sample(questions, set(writer.done))
    with progress:
        async with contextlib.aclosing(generator), Tasks() as tasks:
            failure = None
            try:
                async for question, generated in generator:
                    await places.acquire()
                    tasks.start(finish(question, generated))
            except RpamError as error:
                failure = error  # what came before it is still graded and written
            await tasks.join()
            if failure is not None:
                raise failure


def run_coroutine(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end; where a loop runs (a notebook), in a thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = []

    async def whole() -> T:
        task = asyncio.current_task()
        assert task is not None
        running.append((asyncio.get_running_loop(), task))
        return await coroutine

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(asyncio.run, whole())
        try:
            return future.result()
        except BaseException:  # such as an interruption of the notebook's cell
            if running and not future.done():
                loop, task = running[0]
                loop.call_soon_threadsafe(task.cancel)
            raise


class Tasks:
    """Tasks that live no longer than this context; the first failure is raised.

    An `asyncio.TaskGroup` raises groups of failures, and cannot wait for one task.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None

    def start(self, coroutine: Coroutine[object, object, None]) -> None:
        """Start a task; raise the first failure of those before it."""
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        self.check()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() and self._failure is None:
            self._failure = task.exception()

    def check(self) -> None:
        """Raise the first failure of any task."""
        if self._failure is not None:
            raise self._failure

    async def wait_one(self) -> None:
        """Wait until some task ends; raise the first failure of any."""
        if self._tasks:
            await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.sleep(0)  # lets the tasks' own callbacks run
        self.check()

    async def join(self) -> None:
        """Wait for all tasks; raise the first failure as soon as there is one."""
        while self._tasks:
            await self.wait_one()
        self.check()

    async def __aenter__(self) -> Tasks:
        return self

    async def __aexit__(self, *_: object) -> None:
        left = list(self._tasks)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


async def graded(
    question: Question,
    generated: Sequence[Generated],
    grader: Grader,
    markers: Markers,
    opening: str | None,
) -> SampledQuery:
    """Return the query with its responses graded, whole turns from here on."""
    turns = [begun_turn(g.text, opening, markers) for g in generated]
    verdicts = await grader.grade(
        question.gold, turns, [g.finish for g in generated], markers, opening
    )
    responses = tuple(
        Response(
            text=turn,
            tokens=g.tokens,
            finish=g.finish,
            thinking=read_turn(turn, opening, markers, has_ended(g.finish)).state,
            correct=verdict.correct,
            problem=verdict.problem,
            seed=g.seed,
        )
        for g, turn, verdict in zip(generated, turns, verdicts, strict=True)
    )
    return SampledQuery(
        index=question.index,
        question=question.question,
        messages=question.messages,
        gold=question.gold,
        source=question.source,
        responses=responses,
    )


def _postfix(tally: Tally, retries: int) -> dict[str, Any]:
    shown: dict[str, Any] = {"accuracy": f"{tally.accuracy:.1%}"}
    if tally.mean_tokens is not None:
        shown["tokens"] = f"{tally.mean_tokens:.0f}"
    if retries:
        shown["retries"] = retries
    return shown
