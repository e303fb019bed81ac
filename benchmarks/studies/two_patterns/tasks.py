"""The study's tasks: what is asked, both ways of answering, how hard a query is.

Three kinds: chains of operations modulo 10 (the quickstart's), multiplication of a
number by a digit with carries, and following edges in a small graph. In the last one
the difficulty is a digit of the prompt and independent of the prompt's length.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "examples" / "quickstart"))

import chains  # noqa: E402

THINK, END_THINK, END = chains.THINK, chains.END_THINK, "<|end|>"
CHAT = "!"  # begins what is no query


def prompt(query: str) -> str:
    """Return the query as the chat template writes it."""
    return f"<|user|>{query}<|end|><|assistant|>"


@dataclass(frozen=True)
class Task:
    """A task; every callable is pure but for its random generator.

    ``draw(difficulty, rng)`` makes a query; ``steps(query)`` what the Long-CoT expert
    writes before it answers. ``mix``: how often each difficulty is asked, the mix of
    calibration, validation and test. ``beyond``: difficulties outside of it, on which
    no model was trained or calibrated.
    """

    name: str
    difficulties: tuple[int, ...]
    mix: tuple[float, ...]
    beyond: tuple[int, ...]
    unit: str
    characters: str
    longest_response: int
    draw: Callable[[int, random.Random], str]
    difficulty: Callable[[str], int]
    steps: Callable[[str], str]
    answer: Callable[[str], str]
    spoken: str = "0123456789"
    # Too few queries of these difficulties exist to hold any out.
    never_held_out: tuple[int, ...] = field(default=())

    def long_response(self, query: str) -> str:
        return THINK + self.steps(query) + END_THINK + self.answer(query)

    def short_response(self, query: str) -> str:
        return self.answer(query)

    def chat(self, rng: random.Random) -> tuple[str, str]:
        """Return a prompt that is no query, and what both experts say: it reversed."""
        said = "".join(rng.choices(self.spoken, k=rng.randrange(3, 9)))
        return CHAT + said, said[::-1]

    def split(self, query: str) -> str:
        """Return `train`, `validation` or `test`, by a hash of the query."""
        if self.difficulty(query) in self.never_held_out:
            return "train"
        bucket = hashlib.sha256(query.encode()).digest()[0] % 8
        return {0: "validation", 1: "test"}.get(bucket, "train")

    def queries(
        self, count: int, split: str, seed: int, mix: dict[int, float] | None = None
    ) -> list[str]:
        """Return distinct queries of a split, by default in the task's mix."""
        rng = random.Random(f"{self.name}-{split}-{seed}")
        mix = mix or dict(zip(self.difficulties, self.mix, strict=True))
        chosen: dict[str, None] = {}
        for difficulty, weight in mix.items():
            want = len(chosen) + round(count * weight / sum(mix.values()))
            anything = difficulty in self.never_held_out
            for _ in range(200 * count):
                if len(chosen) == want:
                    break
                query = self.draw(difficulty, rng)
                if anything or self.split(query) == split:
                    chosen[query] = None
        return list(chosen)


def draw_product(digits: int, rng: random.Random) -> str:
    """Return ``3847*6=``: a number of ``digits`` digits times one from 2 to 9."""
    first = rng.choice("123456789")
    rest = "".join(rng.choice("0123456789") for _ in range(digits - 1))
    return f"{first}{rest}*{rng.randrange(2, 10)}="


def carries(query: str) -> str:
    """Return the product of each digit, last digit first, plus what was carried."""
    number, factor = query.removesuffix("=").split("*")
    written, carried = [], 0
    for digit in reversed(number):
        value = int(digit) * int(factor) + carried
        written.append(f"{value:02d}")
        carried = value // 10
    return ";".join(written)


def product(query: str) -> str:
    number, factor = query.removesuffix("=").split("*")
    return str(int(number) * int(factor))


NODES = "abcdefghij"


def draw_walk(hops: int, rng: random.Random) -> str:
    """Return ``ca,ab,bc:b3=``: edges in any order, where to start, how many hops.

    Every node has one edge to another; there are 5 to 9 nodes whatever ``hops`` is.
    """
    nodes = rng.sample(NODES, rng.randrange(5, 10))
    edges = [n + rng.choice([m for m in nodes if m != n]) for n in nodes]
    rng.shuffle(edges)
    return f"{','.join(edges)}:{rng.choice(nodes)}{hops}="


def walk(query: str) -> list[str]:
    """Return the edges followed."""
    edges, start = query.removesuffix("=").split(":")
    follow = dict(edge for edge in edges.split(","))
    at, taken = start[0], []
    for _ in range(int(start[1])):
        taken.append(at + follow[at])
        at = follow[at]
    return taken


TIMES = 6  # that a step is written


def restated(query: str) -> str:
    """Return every step six times before the next one, numbered by step and time.

    `117+5=2;127+5=2;` to `167+5=2;212*3=6;` and on: what is computed last stands last,
    hundreds of tokens behind the opening.
    """
    return ";".join(
        f"{number % 10}{time}{step}"
        for number, step in enumerate(chains.steps(query), start=1)
        for time in range(1, TIMES + 1)
    )


CHAINS = Task(
    name="chains",
    difficulties=chains.DIFFICULTIES,
    mix=chains.MIX,
    beyond=(9, 10),
    unit="operations",
    characters="0123456789+-*=;",
    longest_response=96,
    draw=chains.draw,
    difficulty=chains.operations,
    steps=lambda query: ";".join(chains.steps(query)),
    answer=chains.answer,
    never_held_out=(1, 2),
)
# The same queries: named alike, split and drawn alike.
RESTATED = replace(CHAINS, longest_response=490, steps=restated)
PRODUCTS = Task(
    name="products",
    difficulties=(1, 2, 3, 4, 5, 6),
    mix=(1, 4, 4, 1, 1, 1),
    beyond=(7,),
    unit="digits",
    characters="0123456789*=;!",
    longest_response=48,
    draw=draw_product,
    difficulty=lambda query: query.index("*"),
    steps=carries,
    answer=product,
    never_held_out=(1,),
)
GRAPH = Task(
    name="graph",
    difficulties=(1, 2, 3, 4, 5, 6),
    mix=(4, 4, 1, 1, 1, 1),
    beyond=(7, 8),
    unit="hops",
    characters="abcdefghij,:;=12345678!",
    longest_response=48,
    draw=draw_walk,
    difficulty=lambda query: int(query[-2]),
    steps=lambda query: ";".join(walk(query)),
    answer=lambda query: walk(query)[-1][1],
    spoken=NODES,
)
TASKS = {task.name: task for task in (CHAINS, PRODUCTS, GRAPH)}
