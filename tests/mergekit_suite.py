"""Do mergekit's own tests end with the plugin as they do without?

    python tests/mergekit_suite.py [-n 2] [-k EXPRESSION] [--sdist FILE]

Fetches the sdist of the installed mergekit, which carries its tests, into a temporary
folder, adds the module that they import and the sdist lacks, and runs them twice in the
environment of this Python: with the start-up file in force and with
RPAM_MERGEKIT_AUTOLOAD=0. Ends with status 1 and a list where a test ends otherwise or
one that only the plugin adds fails, and with 2 where nothing could be compared. Tests
that fail both times, such as those that need a network, are listed but do no harm.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

COMMON = Path(__file__).parent / "helpers" / "mergekit_common.py"
SWITCH = "RPAM_MERGEKIT_AUTOLOAD"
KNOWN = (
    "from mergekit.merge_methods import registered_methods as known; "
    "print('rpam' in [method.spec.name for method in known()])"
)
Outcomes = dict[str, str]  # of each test, by its name


def fetch(folder: Path) -> Path:
    """Return the sdist of the installed mergekit, from the package registry."""
    wanted = f"mergekit=={version('mergekit')}"
    arguments = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", wanted]
    command = [sys.executable, "-m", "pip", *arguments, "--dest", str(folder)]
    subprocess.run(command, check=True)
    (sdist,) = folder.glob("*.tar.gz")
    return sdist


def unpack(sdist: Path, folder: Path) -> None:
    """Lay the sdist's tests into `folder`, without its package, and what they miss."""
    with tarfile.open(sdist) as archive:
        for member in archive.getmembers():
            _, _, inside = member.name.partition("/")
            if inside == "pyproject.toml" or inside.startswith("tests/"):
                member.name = inside
                archive.extract(member, folder, filter="data")
    (folder / "tests" / "__init__.py").touch()
    if not (folder / "tests" / "common.py").exists():
        shutil.copy(COMMON, folder / "tests" / "common.py")


def environment(armed: bool) -> dict[str, str]:
    """Return the variables of a Python with or without the plugin."""
    others = {name: value for name, value in os.environ.items() if name != SWITCH}
    return others if armed else {**others, SWITCH: "0"}


def has_method(armed: bool, folder: Path) -> bool:
    """Return whether mergekit knows the method `rpam` in this state."""
    command = [sys.executable, "-c", KNOWN]
    printed = subprocess.check_output(
        command, text=True, cwd=folder, env=environment(armed)
    )
    return printed.split()[-1] == "True"


def run_tests(folder: Path, armed: bool, options: list[str]) -> Outcomes:
    """Return how mergekit's tests end in this state."""
    report = folder / f"{'armed' if armed else 'not_armed'}.xml"
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=no"]
    command += ["-p", "no:cacheprovider", f"--junitxml={report}", *options, "tests"]
    process = subprocess.run(command, cwd=folder, env=environment(armed), check=False)
    if process.returncode not in (0, 1):
        sys.exit(2)  # pytest has said why
    return read_outcomes(report)


def read_outcomes(report: Path) -> Outcomes:
    """Return the outcomes in a JUnit report; of an error, where it was, too."""
    outcomes: Outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        kinds = {child.tag: child.get("message") or "" for child in case}
        outcome = next((k for k in ("error", "failure", "skipped") if k in kinds), None)
        # A teardown that fails makes a second entry of the same name.
        if outcome is not None or name not in outcomes:
            first_line = (kinds.get(outcome or "") or "\n").splitlines()[0]
            outcomes[name] = f"{outcome}: {first_line}" if outcome else "passed"
    return outcomes


def kind(outcome: str) -> str:
    """Return the outcome without its message."""
    return outcome.partition(":")[0]


def differences(armed: Mapping[str, str], plain: Mapping[str, str]) -> list[str]:
    """Return a line for every test that does not end with the plugin as without.

    A test that only one state has is one, but for one that the plugin adds, as mergekit
    tests every method that is registered, and that passes.
    """
    lines = []
    for name in sorted({*armed, *plain}):
        with_it, without = (states.get(name, "not there") for states in (armed, plain))
        added = name not in plain and with_it == "passed"
        if kind(with_it) != kind(without) and not added:
            lines.append(f"{name}\n  with rpam: {with_it}\n  without: {without}")
    return lines


def report(armed: Outcomes, plain: Outcomes) -> int:
    """Print what both runs gave and return the exit status."""
    for state, outcomes in (("with rpam", armed), ("without", plain)):
        counts = Counter(map(kind, outcomes.values()))
        told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        print(f"{state}: {len(outcomes)} tests, {told}")
    for name in sorted(set(armed) - set(plain)):
        print(f"only with rpam: {name}: {armed[name]}")
    for name in sorted(set(armed) & set(plain)):
        if kind(armed[name]) == kind(plain[name]) in ("failure", "error"):
            print(f"fails both times: {name}: {plain[name]}")
    lines = differences(armed, plain)
    print("\n".join(lines) or "no test ends otherwise with the plugin")
    return 1 if lines else 0


def main() -> int:
    """Run mergekit's tests in both states and compare them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-n", type=int, default=0, help="pytest-xdist's processes")
    parser.add_argument(
        "-k", metavar="EXPRESSION", help="only these tests, as pytest's"
    )
    parser.add_argument("--sdist", type=Path, help="this one instead of fetching it")
    arguments = parser.parse_args()
    options = ["-n", str(arguments.n)] if arguments.n else []
    options += ["-k", arguments.k] if arguments.k else []
    with tempfile.TemporaryDirectory(prefix="mergekit-suite-") as name:
        folder = Path(name)
        unpack(arguments.sdist or fetch(folder), folder)
        if not has_method(True, folder) or has_method(False, folder):
            print(f"the start-up file is not installed, or {SWITCH} does not stop it")
            return 2
        armed, plain = (run_tests(folder, state, options) for state in (True, False))
        return report(armed, plain)


if __name__ == "__main__":
    sys.exit(main())
