"""Grading in worker processes: nothing a model writes can stop it."""

from __future__ import annotations

import asyncio
import os
import signal

import psutil
import pytest

from rpam_mergekit.grading.answers import Gold
from rpam_mergekit.grading.responses import Markers
from rpam_mergekit.grading.workers import Grader, answers_to_grade

FIVE = Gold(values=("5",))
# Computer algebra tries to write this number down.
HANGS = r"\boxed{9^{9^{9^{9}}}}"


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=1, time_limit=2) as grader:
        yield grader


def workers() -> list[psutil.Process]:
    alive = []
    for child in psutil.Process(os.getpid()).children(recursive=True):
        try:
            command = " ".join(child.cmdline())
            if child.status() != psutil.STATUS_ZOMBIE and "spawn_main" in command:
                alive.append(child)
        except psutil.NoSuchProcess:  # ended since it was listed; zombies too
            continue
    return alive


def grade(grader, gold, *texts, finish="stop"):
    finishes = [finish] * len(texts)
    return asyncio.run(grader.grade(gold, texts, finishes, Markers()))


def test_responses_are_graded(grader):
    verdicts = grade(grader, FIVE, r"\boxed{5}", r"\boxed{6}", "", "It is 5.")
    assert [v.correct for v in verdicts] == [True, False, False, True]


def test_a_hung_grade_is_lost_alone_and_says_so(grader):
    verdicts = grade(grader, FIVE, r"\boxed{5}", HANGS, r"\boxed{\sqrt{25}}")
    assert [v.correct for v in verdicts] == [True, None, True]
    assert "took over 2 s" in verdicts[1].problem
    assert "9^{9^{9^{9}}}" in verdicts[1].problem
    assert grade(grader, FIVE, r"\boxed{\sqrt{25}}")[0].correct is True


def test_a_crashed_worker_loses_one_grade_and_is_replaced():
    with Grader(workers=1, time_limit=60) as grader:
        grade(grader, FIVE, r"\boxed{\sqrt{25}}")  # the worker is up

        async def crash() -> list:
            grading = asyncio.ensure_future(
                grader.grade(FIVE, [HANGS], ["stop"], Markers())
            )
            await asyncio.sleep(0.5)
            for worker in workers():
                worker.send_signal(signal.SIGKILL)
            return await grading

        verdict = asyncio.run(crash())[0]
        assert verdict.correct is None
        assert "ended its process" in verdict.problem
        assert grade(grader, FIVE, r"\boxed{\sqrt{25}}")[0].correct is True


def test_an_idle_worker_that_is_killed_is_replaced():
    with Grader(workers=1, time_limit=60) as grader:
        assert grade(grader, FIVE, r"\boxed{\sqrt{25}}")[0].correct is True
        for worker in workers():
            worker.send_signal(signal.SIGKILL)
        for _ in range(2):
            assert grade(grader, FIVE, r"\boxed{\sqrt{25}}")[0].correct is True


def test_a_broken_pool_leaves_no_worker_behind():
    with Grader(workers=2, time_limit=60) as grader:
        grade(grader, FIVE, r"\boxed{\sqrt{25}}", r"\boxed{\sqrt{26}}")
        before = workers()
        before[0].send_signal(signal.SIGKILL)
        for _ in range(2):
            assert grade(grader, FIVE, r"\boxed{\sqrt{25}}")[0].correct is True
            assert len([w for w in workers() if w not in before]) <= 2
        _, alive = psutil.wait_procs(before, timeout=10)
        assert len(alive) < 2


def test_deep_nesting_is_wrong_not_fatal(grader):
    nested = r"\boxed{" + "(" * 900 + "5" + ")" * 900 + "}"
    assert grade(grader, FIVE, nested, r"\boxed{5}")[1].correct is True


def test_a_response_that_was_cut_off_has_not_answered(grader):
    assert grade(grader, FIVE, r"\boxed{5}", finish="length")[0].correct is False
    assert answers_to_grade(r"\boxed{5}", "length", Markers()) is None


def test_an_answer_of_thousands_of_characters_is_none():
    assert answers_to_grade(r"\boxed{" + "1" * 3000 + "}", "stop", Markers()) is None


def test_equal_answers_are_graded_once(grader, monkeypatch):
    asked = []
    schedule = grader.schedule
    monkeypatch.setattr(
        grader, "schedule", lambda gold, a: asked.append(a) or schedule(gold, a)
    )
    gold = Gold(values=("x+1",))
    verdicts = grade(grader, gold, *[r"\boxed{1+x}"] * 3, r"\boxed{1-x}")
    assert [v.correct for v in verdicts] == [True, True, True, False]
    assert asked == [("1+x",), ("1-x",)]


def test_workers_end_with_the_grader():
    with Grader(workers=2) as grader:
        grade(grader, FIVE, r"\boxed{\sqrt{25}}", r"\boxed{\sqrt{26}}")
        found = workers()
    assert found
    gone, _ = psutil.wait_procs(found, timeout=10)
    assert len(gone) >= 1
