"""Does a merge of three experts follow each where it is meant? Do uniform merges?

    python benchmarks/studies/three_patterns/compare.py [--settings] [--quick]

Trains three tiny experts of one base (`experts.py`: each answers every query in
its own form) and merges them by mergekit: with `rpam`, and uniformly, with `linear` on
a grid of weights and with `task_arithmetic`, `ties`, `dare_ties` from the base. Every
model answers the same held-out queries, greedily.

The score, fixed beforehand, is the mean over the patterns of the share of responses
that are right and of the form of the pattern's expert. The best uniform merges are
chosen by the very queries that are reported, which favours them. A seed is one draw of
calibration queries, one start of the coefficients and one draw of test queries; figures
are means over seeds ± standard error. Checkpoints and results are kept in --folder,
and what it has is not made again.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2] / "performance"))

import torch
import transformers
from _machine import describe, table
from experts import BASES, PATTERNS, cache, calibrate, train
from merges import Figures, Job, Sums, around, figures, run_all, uniform

from rpam_mergekit.merging.hooks import activate

ALONE = [Job("", name) for name in (*PATTERNS, "base")]
CALIBRATION = 768  # queries of each pattern, of which every seed draws its own
DRAWN = {"queries_per_pattern": 256}
FEWER = {"queries_per_pattern": 32}  # where settings are compared, to tell them apart
METHODS = ("linear", "task_arithmetic", "ties", "dare_ties")
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "long_share 1/3: a third each": {"long_share": 1 / 3},
    "long_share 0.5": {"long_share": 0.5},
    "initial_weight 2/3: a third each": {"initial_weight": 2 / 3},
    "a third each, both": {"initial_weight": 2 / 3, "long_share": 1 / 3},
    "long_share 0.8": {"long_share": 0.8},
    "initial_weight 0.2": {"initial_weight": 0.2},
    "initial_weight 0.9": {"initial_weight": 0.9},
    "outside_weight 2/3": {"outside_weight": 2 / 3},
    "granularity tensor": {"granularity": "tensor"},
    "granularity row": {"granularity": "row"},
    "granularity element": {"granularity": "element"},
    "contrastive_weight 0.1": {"contrastive_weight": 0.1},
    "8 queries": {"queries_per_pattern": 8},
    "128 queries": {"queries_per_pattern": 128},
    "60 epochs": {"epochs": 60},
}
SKILL: dict[str, dict[str, Any]] = {
    "defaults": {},
    "60 epochs": {"epochs": 60},
    "prompt_weight 0": {"prompt_weight": 0.0},
    "60 epochs, prompt_weight 0": {"epochs": 60, "prompt_weight": 0.0},
}
HELD_OUT = "validation"  # where settings are compared
SHOWN = {"right": "right", "routed": "its form"}  # by pattern


def router(experts: Sequence[Sums]) -> Sums:
    """Return the sums of asking each query of the expert that its pattern names."""
    by_pattern = dict(zip(PATTERNS, experts, strict=True))
    return {
        seed: {pattern: of[seed][pattern] for pattern, of in by_pattern.items()}
        for seed in experts[0]
    }


def cell(values: Iterable[float], scale: float = 100) -> str:
    """Return the mean over seeds and its standard error; shares in percent."""
    found = [scale * value for value in values]
    mean = f"{statistics.mean(found):.1f}"
    if len(found) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(found) / math.sqrt(len(found)):.1f}"


def mean(of: Sequence[Figures], name: str) -> float:
    return statistics.mean(one[name] for one in of)


def best(
    measured: dict[Job, list[Figures]],
    by: str,
    allowed: Callable[[Job, list[Figures]], bool],
) -> tuple[Job, list[Figures]]:
    """Return the uniform merge that is best `by` a figure, and its figures."""
    candidates = [(j, of) for j, of in measured.items() if allowed(j, of)]
    return max(candidates, key=lambda one: mean(one[1], by))


def tables(rows: dict[str, list[Figures]]) -> str:
    """Return a table of the whole and one by pattern."""
    whole = [
        [
            name,
            *(cell(f[n] for f in of) for n in ("both", "right", "routed", "thinks")),
            cell((f["tokens"] for f in of), 1),
        ]
        for name, of in rows.items()
    ]
    parts = [
        [name, *(cell(f[f"{p} {n}"] for f in of) for p in PATTERNS for n in SHOWN)]
        for name, of in rows.items()
    ]
    head = ("", "score", "right", "form of its expert", "thinks", "mean tokens")
    columns = [f"{p}: {words}" for p in PATTERNS for words in SHOWN.values()]
    return table(head, whole) + "\n\n" + table(["", *columns], parts)


def measure_uniform(args: argparse.Namespace) -> dict[Job, list[Figures]]:
    """Return the figures of the uniform merges, more of them around the best one."""
    grid = list(uniform(args.steps, args.coarse))
    if args.quick:
        grid = [next(job for job in grid if job.method == m) for m in METHODS]
    found = {}
    for finer in range(args.rounds + 1):
        sums = run_all(grid, args.folder, args.seeds, args.queries)
        found |= {job: figures(of) for job, of in sums.items()}
        job, _ = best(found, "both", lambda job, _: job.method in METHODS[:2])
        grid = list(around(job.weights, 1 / args.steps / 2 ** (finer + 1)))
    return found


def compare(args: argparse.Namespace) -> None:
    """Print the experts, the merged model, the best uniform merges and a router."""
    merges = [Job("rpam", "defaults", (), DRAWN, seed) for seed in args.seeds]
    jobs = [*ALONE, *merges]
    sums = run_all(jobs, args.folder, args.seeds, args.queries)
    others = measure_uniform(args)
    merged = [of for job in merges for of in figures(sums[job])]
    rows = {f"{job.name} alone": figures(sums[job]) for job in ALONE}
    for method in METHODS:
        job, of = best(others, "both", lambda job, _, m=method: job.method == m)
        rows[f"best {job.method} {job.name}"] = of
    tokens = mean(merged, "tokens")
    chosen = {
        "best by score": best(others, "both", lambda *_: True),
        "best by form": best(others, "routed", lambda *_: True),
        "most often right at no more tokens": best(
            others, "right", lambda _, of: mean(of, "tokens") <= tokens
        ),
    }
    rows |= {f"{why}: {j.method} {j.name}": of for why, (j, of) in chosen.items()}
    rows["**merged with rpam**"] = merged
    experts = [sums[job] for job in ALONE[: len(PATTERNS)]]
    rows["router that knows the pattern"] = figures(router(experts))
    print(tables(rows))
    apart = [
        cell(a[figure] - b[figure] for a, b in zip(merged, of, strict=True))
        for figure, (_, of) in zip(("both", "routed"), chosen.values(), strict=False)
    ]
    print(
        f"\n{len(others)} uniform merges. Above the best of them by score: {apart[0]}; "
        f"above the best by form, in form: {apart[1]} points."
    )


def compare_settings(args: argparse.Namespace) -> None:
    few = args.settings == "defaults"
    jobs = {
        name: [
            Job(
                "rpam", name, (), (FEWER if few else DRAWN) | parameters, seed, HELD_OUT
            )
            for seed in args.seeds
        ]
        for name, parameters in (SETTINGS if few else SKILL).items()
    }
    every = [job for of in jobs.values() for job in of]
    sums = run_all(every, args.folder, args.seeds, args.queries)
    rows = {n: [f for job in of for f in figures(sums[job])] for n, of in jobs.items()}
    print(tables(rows))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="by default three-BASE-SEED in $RPAM_LAB or ../two_patterns/cache",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument(
        "--queries", type=int, default=100, help="held out, of each pattern and seed"
    )
    parser.add_argument(
        "--steps", type=int, default=10, help="of the grid of linear's weights"
    )
    parser.add_argument(
        "--coarse", type=int, default=4, help="of the other methods' grid"
    )
    parser.add_argument(
        "--rounds", type=int, default=2, help="of ever finer steps around the best"
    )
    parser.add_argument(
        "--settings",
        nargs="?",
        choices=["defaults", "skill"],
        const="defaults",
        help="compare settings of rpam instead, on validation queries: around the "
        "defaults, with few calibration queries, or those that may keep more skill",
    )
    parser.add_argument(
        "--training-seed", type=int, default=0, help="of the base and the experts"
    )
    parser.add_argument(
        "--base",
        choices=[base for base in BASES if base != "quick"],
        default="half",
        help="what the base has learned; see experts.py",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a test of the script: experts that err"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    activate()
    if args.quick:
        args.seeds, args.queries, args.steps, args.coarse = args.seeds[:1], 12, 2, 2
        args.rounds, args.base = 0, "quick"
    with tempfile.TemporaryDirectory() as scratch:
        args.folder = args.folder or (
            Path(scratch)
            if args.quick
            else cache() / f"three-{args.base}-{args.training_seed}"
        )
        args.folder = args.folder.absolute()  # mergekit looks for a/b on the Hub
        prepare(args)
        (compare_settings if args.settings else compare)(args)
    print(f"\n{describe()}")


def prepare(args: argparse.Namespace) -> None:
    """Train the experts and make the calibration file, if they are not there."""
    args.folder.mkdir(parents=True, exist_ok=True)
    train(args.folder, args.base, args.training_seed)
    path = args.folder / "calibration.jsonl"
    if not path.exists():
        each = 16 if args.quick else CALIBRATION
        calibrate(args.folder, each, path, keep_wrong=args.quick)


if __name__ == "__main__":
    main()
