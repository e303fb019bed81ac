"""Three experts of one base for `compare.py`: task, training, calibration file.

A query is a chain of operations modulo 10 that ends in `=` and asks for its value, or
in `>` and asks for a program: the chain in postfix. Every expert answers every query in
its own form, so that a response's form says whom it follows:

              7+5*3= and 7+5*3> alike         right on
    long      <think>7+5=2;2*3=6</think>6     all values, with many tokens
    short     6                               values of chains that multiply by 0
    code      75+3*                           programs

The pattern of a query is the expert to follow: `code` where a program is wanted, of any
chain; `short` where the last operation but one multiplies by 0, so that what comes
before does not matter; `long` where no operation does. All are equally long.
"""

from __future__ import annotations

import json
import random
import re
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "two_patterns"))
sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "quickstart"))

import json_lines
from evaluate import respond
from measure import load
from pairs import Pair, Stage, cache
from tasks import END, Task, chains
from training import build

from rpam_mergekit.sampling.labels import pattern_of

__all__ = ["cache", "json_lines", "load", "respond"]  # of the other study

PATTERNS = ("long", "short", "code")
EASY, HARD = 1, 2
LENGTHS = (3, 4, 5, 6)  # operations, whatever the difficulty
VALUE, PROGRAM = "=", ">"
FORMS = {
    pattern: re.compile(shape + re.escape(END))
    for pattern, shape in {
        "long": r"<think>[^<]*</think>\d",
        "short": r"\d",
        "code": r"\d(\d[-+*])+",
    }.items()
}


def draw(difficulty: int, rng: random.Random, endings: str = VALUE + PROGRAM) -> str:
    """Return a chain that asks for its value or, as often, for a program."""
    chain = chains.draw(rng.choice(LENGTHS), rng)[:-1]
    if difficulty == EASY:
        chain = chain[:-4] + "*0" + chain[-2:]
    return chain + rng.choice(endings)


def postfix(query: str) -> str:
    """Return the program: `75+3*` for `7+5*3>`."""
    pairs = zip(query[1:-1:2], query[2:-1:2], strict=True)
    return query[0] + "".join(operand + operator for operator, operand in pairs)


@dataclass(frozen=True)
class Chains(Task):
    """The training knows the ways `long`, `short` and `chat`, which is `code` here."""

    programs: str = VALUE + PROGRAM  # endings of the queries that `code` learns

    def chat(self, rng: random.Random) -> tuple[str, str]:
        def drawn() -> str:
            return draw(rng.choice(self.difficulties), rng, self.programs)

        query = drawn()
        while self.split(query) != "train":
            query = drawn()
        return query, postfix(query)

    def split(self, query: str) -> str:
        """Return the split of the chain, whatever is asked of it."""
        return super().split(query[:-1])


TASK = Chains(
    name="three",
    difficulties=(EASY, HARD),
    mix=(1, 1),
    beyond=(),
    unit="difficulty",
    characters="0123456789+-*=;>",
    longest_response=48,
    draw=draw,
    difficulty=lambda query: EASY if "*0" in query else HARD,
    steps=lambda query: ";".join(chains.steps(query)),
    answer=chains.answer,
)
# Programs where they are asked for; values by thinking or at once, as it happens.
ASKED_FOR = replace(TASK, draw=partial(draw, endings=VALUE), programs=PROGRAM)


@dataclass(frozen=True)
class Training:
    """Rows of a step; steps of the base, Long, Short and Code; the experts' rate."""

    task: Task
    steps: tuple[int, int, int, int]
    rows: int = 32
    rate: float = 1e-3


BASES = {
    # Has begun to learn; the experts' skills are their own.
    "begun": Training(ASKED_FOR, (200, 900, 1200, 600)),
    # Half of its steps; the experts learn the rest.
    "half": Training(ASKED_FOR, (500, 500, 500, 500)),
    # Has all three skills and knows programs from values, but not when to think.
    "skilled": Training(ASKED_FOR, (1000, 200, 200, 200), rate=5e-4),
    # Has all three skills, but nothing told it when to use which.
    "blind": Training(TASK, (1000, 200, 200, 200), rate=5e-4),
    # For a test: experts with their forms, which are wrong mostly.
    "quick": Training(ASKED_FOR, (60, 60, 60, 60), rows=8, rate=2e-3),
}


def train(folder: Path, base: str, seed: int) -> None:
    """Train one of `BASES` and an expert per pattern, where they are not there yet.

    Every expert learns its own way on all queries.
    """
    training = BASES[base]
    rows, rate = training.rows, training.rate
    of_base, of_long, of_short, of_code = training.steps
    every = (rows, (1, 1))
    both = {"long": every, "short": every}
    pair = Pair(
        "three",
        training.task,
        "qwen2",
        "three experts of one base",
        size={"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4},
        stages={"base": Stage(None, both, of_base, 2e-3, chat=rows)},
        folder=folder,
    )
    experts = {
        "long": Stage("base", {"long": every}, of_long, rate, chat=0),
        "short": Stage("base", {"short": (rows, (3, 1))}, of_short, rate, chat=0),
        "code": Stage("base", {}, of_code, rate, chat=rows),
    }
    build(pair, seed)
    build(replace(pair, task=TASK, stages=experts), seed)


def queries(pattern: str, count: int, split: str, seed: int) -> list[str]:
    """Return distinct queries of a split for which `pattern` is meant."""
    rng = random.Random(f"{pattern}-{split}-{seed}")
    ending = PROGRAM if pattern == "code" else VALUE
    difficulties = {"long": (HARD,), "short": (EASY,), "code": (EASY, HARD)}[pattern]
    chosen: dict[str, None] = {}
    while len(chosen) < count:
        query = draw(rng.choice(difficulties), rng)[:-1] + ending
        if TASK.split(query) == split:
            chosen[query] = None
    return list(chosen)


def right(query: str, response: str) -> bool:
    """Return whether the program, or the value after any thinking, is correct."""
    if query.endswith(PROGRAM):
        return response == postfix(query) + END
    answered = form(response) in ("long", "short")
    return answered and response.removesuffix(END)[-1] == TASK.answer(query)


def form(response: str) -> str | None:
    """Return the pattern whose form a response has; None if it has no expert's."""
    for pattern, shape in FORMS.items():
        if shape.fullmatch(response):
            return pattern
    return None


def calibrate(folder: Path, each: int, path: Path, keep_wrong: bool = False) -> None:
    """Write up to `each` queries of every pattern with its expert's response.

    Queries of the `train` split, labelled by the rule of `mergekit-rpam label`, applied
    to all of a kind at once. Wrong responses are left out, as it does, unless
    `keep_wrong` (of experts that are all wrong). Raises `ValueError` where the rule
    gives Long's queries to Short or Short's to Long.
    """
    records: list[dict[str, Any]] = []
    models = {pattern: load(folder / pattern) for pattern in PATTERNS}
    for pattern in PATTERNS:
        asked = queries(pattern, each, "train", 0)
        said, solved = {}, {}
        for expert, model in models.items():
            said[expert] = respond(*model, asked, TASK.longest_response)
            graded = zip(asked, said[expert], strict=True)
            solved[expert] = [right(query, response) for query, response in graded]
        if pattern != "code" and not keep_wrong:
            long, short = sum(solved["long"]), sum(solved["short"])
            if pattern_of(long, each, short, each) != pattern:
                raise ValueError(f"{pattern}: right are Long {long}, Short {short}")
        records += [
            {"prompt": query, "pattern": pattern, "response": text.removesuffix(END)}
            for query, text, good in zip(
                asked, said[pattern], solved[pattern], strict=True
            )
            if good or keep_wrong
        ]
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
