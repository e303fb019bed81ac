"""Benchmarks as programs, and the tables that they print."""

from __future__ import annotations

import re
import subprocess
import sys

from helpers.commands import run
from helpers.paths import ROOT

FOLDER = ROOT / "benchmarks"


def benchmark(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the script `name` under benchmarks/, such as `performance/speed`."""
    return run([sys.executable, str(FOLDER / f"{name}.py"), *options])


def tables(process: subprocess.CompletedProcess[str]) -> list[list[dict[str, str]]]:
    """Return the rows of every Markdown table, by column."""
    assert process.returncode == 0, process.stderr
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", process.stdout, re.MULTILINE):
        head, _, *rows = (
            [cell.strip() for cell in line.split("|")[1:-1]]
            for line in block.splitlines()
        )
        # Columns of one name (what is above them differs) are numbered.
        names = [n + "'" * head[:i].count(n) for i, n in enumerate(head)]
        found.append([dict(zip(names, row, strict=True)) for row in rows])
    return found


def number(cell: str) -> float:
    """Return the median of a cell such as `1.20 (1.10, 1.30)`."""
    return float(cell.split()[0])
