"""What the merge of a pair loses and saves if its responses are shortened.

    python benchmarks/studies/two_patterns/limits.py [--limits 0 256 128 64]

Merges the pair with every `max_response_tokens` (0: whole), all else at its default,
and lets the merged models answer validation queries, every difficulty equally frequent;
the experts and plain interpolations of them answer the same. Accuracy has its standard
error; "hull" is the accuracy that mixing two models of the sweep at random reaches at
the merge's tokens. Routing is by the pre-pass on the queries it held out, and by the
model when it generates, on the same ones. Seconds are user CPU time of `mergekit-yaml`.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "performance"))

import yaml
from _machine import describe, table
from calibrations import calibration
from evaluate import hull_at_tokens, interpolated
from measure import load, measure
from pairs import PAIRS, Pair
from routing import generated, held_out


@dataclass(frozen=True)
class Measured:
    """What a model did on the queries; `thinks` by difficulty."""

    queries: int
    accuracy: float
    tokens: float
    closed: float | None
    cut_off: float
    by_difficulty: str
    thinks: str


def answered(model, tokenizer, pair: Pair, queries: Sequence[str]) -> Measured:
    """Return what a model does on `queries`."""
    strata = measure(model, tokenizer, pair.task, {0: queries})["0"]
    count, correct, tokens, thinks, closed, cut_off = (
        sum(column) for column in zip(*strata.values(), strict=True)
    )
    return Measured(
        int(count),
        correct / count,
        tokens / count,
        closed / thinks if thinks else None,
        cut_off / count,
        " ".join(f"{100 * of[1] / of[0]:.0f}" for of in strata.values()),
        " ".join(f"{100 * of[3] / of[0]:.0f}" for of in strata.values()),
    )


def merge(pair: Pair, limit: int, seed: int, folder: Path) -> tuple[Path, float]:
    """Merge a pair; return the output folder and the user CPU seconds it took."""
    parameters = {"calibration": str(calibration(pair)), "seed": seed}
    config = {
        "merge_method": "rpam",
        "base_model": str(pair.path / "long"),
        "models": [{"model": str(pair.path / "short")}],
        "parameters": {**parameters, "max_response_tokens": limit},
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    path, out = folder / f"{limit}-{seed}.yml", folder / f"{limit}-{seed}"
    path.write_text(yaml.safe_dump(config))
    command = [str(Path(sys.executable).parent / "mergekit-yaml"), str(path), str(out)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run([*command, "--quiet"], check=True)
    return out, resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def routed(out: Path, pair: Pair) -> list[str]:
    """Return the held-out routing of either pattern, measured and generated."""
    point = json.loads((out / "rpam.json").read_text())["operating_point"]
    found = generated(out, held_out(out, calibration(pair)))
    return [
        *(
            f"{100 * figures['routed']:.0f}, {100 * found[pattern]:.0f}"
            for pattern, figures in point["held_out"]["patterns"].items()
        ),
        f"{point['scale']:g}",
    ]


def row(name: str, found: Measured, hull: float | None = None) -> list[str]:
    error = (found.accuracy * (1 - found.accuracy) / found.queries) ** 0.5
    return [
        name,
        f"{100 * found.accuracy:.1f} ± {100 * error:.1f}",
        f"{found.tokens:.1f}",
        "-" if hull is None else f"{100 * hull:.1f}",
        found.by_difficulty,
        found.thinks,
        "-" if found.closed is None else f"{100 * found.closed:.0f}",
    ]


HEAD = ["accuracy, %", "tokens", "hull, %", "right by difficulty, %"]
HEAD += ["thinks, %", "closed, %"]
ROUTED = ["held out: long, measured and generated, %", "short", "scale", "seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pair", choices=PAIRS, default="chains-long")
    parser.add_argument("--limits", type=int, nargs="*", default=[0, 256, 128, 64])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--sweep", type=float, nargs="*", default=[w / 10 for w in range(1, 10)]
    )
    parser.add_argument("--queries", type=int, default=40, help="of each difficulty")
    args = parser.parse_args()
    pair = PAIRS[args.pair]
    task = pair.task
    flat = dict.fromkeys(task.difficulties, 1.0)
    queries = task.queries(args.queries * len(flat), "validation", 0, flat)
    long, tokenizer = load(pair.path / "long")
    short, _ = load(pair.path / "short")
    print(describe(), flush=True)
    points = {"Long": long, "Short": short}
    found = {n: answered(m, tokenizer, pair, queries) for n, m in points.items()}
    for weight in args.sweep:
        model = interpolated(long, short, weight)
        found[f"{weight:g} of Short"] = answered(model, tokenizer, pair, queries)
    print(table(["", *HEAD], [row(*point) for point in found.items()]), flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for limit in args.limits:
            for seed in args.seeds:
                out, seconds = merge(pair, limit, seed, Path(folder))
                merged = answered(*load(out), pair, queries)
                hull = hull_at_tokens([*found.values()], merged.tokens)
                cells = row(str(limit or "whole"), merged, hull)
                rows.append([*cells, *routed(out, pair), f"{seconds:.0f}"])
                print("|".join(rows[-1]), file=sys.stderr, flush=True)
    print(table(["max_response_tokens", *HEAD, *ROUTED], rows))


if __name__ == "__main__":
    main()
