"""What does the start-up file cost every start of Python?

    python benchmarks/performance/startup_time.py [--pairs 200] [--python PATH ...]

Two virtual environments are alike but for the start-up file and the two modules that it
imports. `python -c pass` runs in them in turn. Printed are the medians of wall time and
of CPU time, and the median difference of two neighbouring runs, in milliseconds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODULES = ("__init__.py", "_startup.py")


def environment(python: str, folder: Path, armed: bool) -> str:
    """Make a virtual environment and return its Python."""
    subprocess.run([python, "-m", "venv", "--without-pip", folder], check=True)
    made = str(folder / "bin" / "python")
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.check_output([made, "-c", where], text=True).strip())
    if armed:
        shutil.copy(ROOT / "startup" / "rpam_mergekit.pth", site)
        (site / "rpam_mergekit").mkdir()
        for name in MODULES:
            shutil.copy(ROOT / "rpam_mergekit" / name, site / "rpam_mergekit")
    shown = "import sys; print('rpam_mergekit._startup' in sys.modules)"
    printed = subprocess.check_output([made, "-c", shown], text=True)
    assert printed.strip() == str(armed)
    return made


def start(python: str) -> tuple[float, float]:
    """Start Python once; return the milliseconds of wall and of CPU time."""
    begin = time.perf_counter()
    process = os.posix_spawn(python, [python, "-c", "pass"], os.environ)
    _, status, usage = os.wait4(process, 0)
    wall = time.perf_counter() - begin
    assert status == 0
    return 1000 * wall, 1000 * (usage.ru_utime + usage.ru_stime)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--python", nargs="+", default=[sys.executable])
    arguments = parser.parse_args()
    for name in ("PYTHONPATH", "RPAM_MERGEKIT_AUTOLOAD"):
        os.environ.pop(name, None)
    print(f"{arguments.pairs} pairs of starts, {os.cpu_count()} CPUs, milliseconds\n")
    print("| Python | time | with | without | difference |\n|---|---|---|---|---|")
    for python in arguments.python:
        with tempfile.TemporaryDirectory() as folder:
            both = [environment(python, Path(folder) / n, n == "a") for n in "ab"]
            runs = [[start(p) for p in both] for _ in range(arguments.pairs + 3)][3:]
        shown = "import platform; print(platform.python_version())"
        version = subprocess.check_output([python, "-c", shown], text=True).strip()
        for index, kind in enumerate(("wall", "CPU")):
            armed, plain = zip(
                *([r[index] for r in pair] for pair in runs), strict=True
            )
            gaps = [a - b for a, b in zip(armed, plain, strict=True)]
            values = map(statistics.median, (armed, plain, gaps))
            print(
                f"| {version} | {kind} | " + " | ".join(f"{v:.2f}" for v in values), "|"
            )


if __name__ == "__main__":
    main()
