"""The task of this pair: word problems of 1 to 6 additions and subtractions.

``Tom has 8 pears. Then Tom buys 3 more. Later Tom eats 5. How many pears does Tom
have now?`` A problem is made of sentences from small lists, with numbers from 0 to 15.
Its difficulty is its number of steps.

A problem belongs to one split by a hash of its text, so that the splits never overlap:
``train`` (experts and calibration), ``validation`` (choices between settings) and
``test`` (the figures that are reported).

    python words.py questions.jsonl      # for `mergekit-rpam sample --dataset`
    python words.py calibration.jsonl --calibration --queries 900
"""

import argparse
import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path

DIFFICULTIES = tuple(range(1, 7))
SPLITS = ("train", "validation", "test")
# Half of what is asked takes a single step, as most of what is asked is easy.
MIX = (5, 1, 1, 1, 1, 1)
MOST, LARGEST_STEP = 15, 6

NAMES, FOOD, THINGS = (
    listed.split()
    for listed in (
        "Tom Anna Ben Lucy Sam Mia Leo Ella Max Jack Ruth Emma Omar Hugo Ivy Rosa",
        "apples pears cookies candies carrots peaches eggs",
        "marbles stickers coins books pencils cards balloons shells stamps buttons "
        "toys stones keys tickets",
    )
)
START = ("{who} has {n} {what}.", "{who} starts with {n} {what}.")
LINK = ("Then {who} {does}.", "Next {who} {does}.", "Later {who} {does}.")
ADD = ("buys {n} more", "finds {n} more", "gets {n} more", "wins {n} more")
TAKE = ("gives away {n}", "loses {n}", "sells {n}", "drops {n}")
EAT = "eats {n}"
ASK = "How many {what} does {who} have now?"


@dataclass(frozen=True)
class Problem:
    """A word problem; `steps` are its operations, such as ``(8, "+", 3, 11)``."""

    question: str
    steps: tuple[tuple[int, str, int, int], ...]

    @property
    def answer(self) -> str:
        return str(self.steps[-1][-1])

    @property
    def difficulty(self) -> int:
        return len(self.steps)


def draw(difficulty: int, rng: random.Random) -> Problem:
    """Return a random problem of `difficulty` steps."""
    who = rng.choice(NAMES)
    what = rng.choice(FOOD + THINGS)
    total = rng.randint(2, 9)
    sentences = [rng.choice(START).format(who=who, n=total, what=what)]
    steps = []
    for _ in range(difficulty):
        step = _step(total, rng)
        does = _verb(step[1], what, rng).format(n=step[2])
        sentences.append(rng.choice(LINK).format(who=who, does=does))
        steps.append(step)
        total = step[-1]
    sentences.append(ASK.format(what=what, who=who))
    return Problem(" ".join(sentences), tuple(steps))


def _step(total: int, rng: random.Random) -> tuple[int, str, int, int]:
    """Return an operation on `total` that stays between 0 and `MOST`."""
    plus = total < 2 or (total < MOST and rng.random() < 0.5)
    room = MOST - total if plus else total
    n = rng.randint(1, min(room, LARGEST_STEP))
    return (total, "+", n, total + n) if plus else (total, "-", n, total - n)


def _verb(sign: str, what: str, rng: random.Random) -> str:
    if sign == "+":
        return rng.choice(ADD)
    return rng.choice((*TAKE, EAT) if what in FOOD else TAKE)


def long_response(problem: Problem) -> str:
    """Return what the Long-CoT expert learns: a step a line, then the answer."""
    lines = [f"{before}{sign}{n}={after}" for before, sign, n, after in problem.steps]
    return "<think>\n" + "\n".join(lines) + f"\n</think>\n{problem.answer}"


def short_response(problem: Problem) -> str:
    """Return what the Short-CoT expert learns: the bare number."""
    return problem.answer


def split(question: str) -> str:
    """Return the split that the text of a question belongs to."""
    bucket = hashlib.sha256(question.encode()).digest()[0] % 8
    return {0: "validation", 1: "test"}.get(bucket, "train")


def problems(count: int, of_split: str, seed: int, mix=MIX) -> list[Problem]:
    """Return `count` distinct problems of a split, difficulties as in `mix`."""
    rng = random.Random(f"{of_split}-{seed}")
    chosen: dict[str, Problem] = {}
    shares = [sum(mix[:n]) / sum(mix) for n in DIFFICULTIES]
    for difficulty, share in zip(DIFFICULTIES, shares, strict=True):
        while len(chosen) < round(count * share):
            problem = draw(difficulty, rng)
            if split(problem.question) == of_split:
                chosen[problem.question] = problem
    return list(chosen.values())


def record(problem: Problem) -> dict[str, str | int]:
    """Return a row of a data set for `mergekit-rpam sample`."""
    return {
        "question": problem.question,
        "answer": problem.answer,
        "steps": problem.difficulty,
    }


def calibration_query(problem: Problem) -> dict[str, str]:
    """Return a labelled query: what takes one step is for Short, the rest for Long.

    With the response that the expert was trained to give.
    """
    long = problem.difficulty > 1
    return {
        "prompt": problem.question,
        "pattern": "long" if long else "short",
        "response": long_response(problem) if long else short_response(problem),
        "answer": problem.answer,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="JSONL to write")
    parser.add_argument(
        "--calibration", action="store_true", help="write labelled queries, shuffled"
    )
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    found = problems(args.queries, args.split, args.seed)
    rows = [(calibration_query if args.calibration else record)(one) for one in found]
    if args.calibration:
        random.Random(0).shuffle(rows)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    args.out.write_text(lines, encoding="utf-8")
    print(f"{len(found)} queries written to {args.out}")


if __name__ == "__main__":
    main()
