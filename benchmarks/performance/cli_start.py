"""How long does `mergekit-rpam COMMAND --help` take, against an import of click?

    python benchmarks/performance/cli_start.py [--rounds N] [--quick]

Every round runs the help of every command and `python -c "import click"` once each, in
an order of its own, so that all meet the same state of the machine; one round before
them fills the caches and counts for nothing. A command's ratio is taken within a round.
Prints medians (least, most); the target is a median ratio of at most 4.
"""

import argparse
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

from _machine import describe, table

from rpam_mergekit.cli.main import main as mergekit_rpam

TARGET = 4.0
CLICK = 'python -c "import click"'


def commands() -> dict[str, list[str]]:
    """Return what is measured: a name, and the arguments of the interpreter."""
    rows = {CLICK: ["-c", "import click"]}
    for name in ("", *mergekit_rpam.commands):
        words = [*name.split(), "--help"]
        rows[" ".join(["mergekit-rpam", *words])] = ["-m", "rpam_mergekit.cli", *words]
    return rows


def seconds(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def one_round(rows: dict[str, list[str]], order: random.Random) -> dict[str, float]:
    names = order.sample(list(rows), len(rows))
    times = {name: seconds(rows[name]) for name in names}
    return {name: times[name] for name in rows}


def shown(values: Sequence[float], scale: float = 1) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle * scale:.3g} ({low * scale:.3g}, {high * scale:.3g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="two rounds")
    options = parser.parse_args()
    rows, order = commands(), random.Random(0)
    one_round(rows, order)
    rounds = [
        one_round(rows, order) for _ in range(2 if options.quick else options.rounds)
    ]
    ratios = {name: [times[name] / times[CLICK] for times in rounds] for name in rows}
    print(describe())
    print(f"\n{len(rounds)} rounds\n")
    print(
        table(
            ["", "milliseconds, median (least, most)", "times the import of click"],
            [
                [name, shown([t[name] for t in rounds], 1000), shown(ratios[name])]
                for name in rows
            ],
        )
    )
    worst = max(statistics.median(ratios[name]) for name in rows)
    print(f"\nlargest median ratio {worst:.2f}, target {TARGET:g}")


if __name__ == "__main__":
    main()
