"""Grades responses in worker processes that have a hard time limit.

Computer algebra on what a model wrote can run for ever, eat all memory or crash. Each
grade runs in a worker of its own pool; one that does not come back in time is killed,
loses that one grade, and a new worker takes its place.
"""

from __future__ import annotations

import asyncio
import importlib.util
import multiprocessing
import os
import signal
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rpam_mergekit.errors import RpamError
from rpam_mergekit.extras import needs
from rpam_mergekit.grading.answers import Gold, is_correct, quick_verdict
from rpam_mergekit.grading.brackets import read_turn
from rpam_mergekit.grading.responses import Markers, final_answers, has_ended

if TYPE_CHECKING:
    from pebble import ProcessFuture, ProcessPool

TIME_LIMIT = 10.0  # seconds per grade
MEMORY_LIMIT = 4 * 2**30  # bytes of address space per worker
_GRADES_PER_WORKER = 5000  # then a fresh process takes over, whatever sympy cached
_MOST_ANSWER = 2000  # characters; what is longer is no answer


@dataclass(frozen=True)
class Verdict:
    """Whether a response is correct; None with the reason where no grade came back."""

    correct: bool | None
    problem: str | None = None


WRONG = Verdict(False)


class Grader:
    """A pool of worker processes that grade; a context manager.

    workers: how many; by default one per two cores, at least one. time_limit: seconds
    of one grade.
    """

    def __init__(
        self, workers: int | None = None, time_limit: float = TIME_LIMIT
    ) -> None:
        with needs("sample"):
            import pebble
        if importlib.util.find_spec("math_verify") is None:
            with needs("sample"):
                raise ImportError(name="math-verify")
        self.workers = workers or max(1, (os.cpu_count() or 1) // 2)
        self.time_limit = time_limit
        self._pool_type = pebble.ProcessPool
        self._pool = self._new_pool()

    def _new_pool(self) -> ProcessPool:
        return self._pool_type(
            max_workers=self.workers,
            max_tasks=_GRADES_PER_WORKER,
            initializer=_prepare_worker,
            context=multiprocessing.get_context("spawn"),
        )

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.stop()
        self._pool.join()

    def schedule(self, gold: Gold, answers: Sequence[str]) -> ProcessFuture[bool]:
        """Return a future of the worker's True or False; it may time out or expire."""
        if not self._pool.active:  # an idle worker was killed, by the system maybe
            self._pool.stop()
            self._pool.join()
            self._pool = self._new_pool()
        return self._pool.schedule(
            is_correct, args=(gold, tuple(answers)), timeout=self.time_limit
        )

    async def grade(
        self,
        gold: Gold,
        texts: Sequence[str],
        finishes: Sequence[str | None],
        markers: Markers,
        opening: str | None = None,
    ) -> list[Verdict]:
        """Return a verdict per response of one query.

        `texts` are whole turns, begun with `opening`; see `openings`. A response that
        did not end by itself (see `has_ended`) has not answered.
        Equal answers are graded once.
        """
        pending: dict[tuple[str, ...], asyncio.Future[Verdict]] = {}
        answers_of: list[tuple[str, ...] | None] = []
        for text, finish in zip(texts, finishes, strict=True):
            answers = answers_to_grade(text, finish, markers, opening)
            answers_of.append(answers)
            if answers is not None and answers not in pending:
                pending[answers] = asyncio.ensure_future(self._verdict(gold, answers))
        verdicts = {key: await verdict for key, verdict in pending.items()}
        return [WRONG if a is None else verdicts[a] for a in answers_of]

    async def _verdict(self, gold: Gold, answers: Sequence[str]) -> Verdict:
        from pebble import ProcessExpired

        quick = quick_verdict(gold, answers)
        if quick is not None:
            return Verdict(quick)
        shown = repr(answers[-1][:80])
        try:
            try:
                correct = await asyncio.wrap_future(self.schedule(gold, answers))
            except BrokenProcessPool:  # before this grade had begun
                try:
                    correct = await asyncio.wrap_future(self.schedule(gold, answers))
                except BrokenProcessPool as error:
                    raise RpamError(
                        "the processes that grade end as soon as they start. In a "
                        'script, call this under `if __name__ == "__main__":`, as each '
                        "of them imports the script."
                    ) from error
            return Verdict(correct)
        except RpamError:
            raise
        except TimeoutError:
            return Verdict(
                None, f"grading {shown} took over {self.time_limit:g} s and was stopped"
            )
        except ProcessExpired as error:
            return Verdict(
                None, f"grading {shown} ended its process (exit code {error.exitcode})"
            )
        except Exception as error:  # whatever computer algebra raises on this answer
            return Verdict(
                None, f"grading {shown} failed: {type(error).__name__}: {error}"[:300]
            )


def answers_to_grade(
    text: str,
    finish: str | None,
    markers: Markers,
    opening: str | None = None,
) -> tuple[str, ...] | None:
    """Return the answers a response gives, None if it gives none."""
    if not has_ended(finish):
        return None
    read = read_turn(text, opening, markers, ended=True)
    found = final_answers(read, text)
    found = [answer for answer in found[-8:] if answer.strip()]
    if not found or len(found[-1]) > _MOST_ANSWER:
        return None
    return tuple(answer for answer in found if len(answer) <= _MOST_ANSWER)


def _prepare_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers
    try:
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, hard))
    except (ImportError, ValueError, OSError):
        pass  # no such limit on this system; the time limit remains
    import math_verify  # noqa: F401  # slow to import: not in the first grade's time
