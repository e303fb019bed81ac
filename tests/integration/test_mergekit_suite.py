"""The comparison of mergekit's own tests with and without the plugin works.

On an sdist with four small tests; mergekit's own take minutes, and CI runs them.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile

import pytest

from helpers.paths import ROOT

TESTS = """
import importlib.util, os, pytest

ARMED = "RPAM_MERGEKIT_AUTOLOAD" not in os.environ

@pytest.mark.parametrize("method", ["linear", "rpam"] if ARMED else ["linear"])
def test_every_method(method):
    assert importlib.util.find_spec("tests.common")

def test_network():
    raise OSError("no route")

def test_disturbed():
    assert not ARMED, "the plugin is in the way"

def test_skipped():
    pytest.skip("no GPU")
"""


@pytest.fixture
def suite(tmp_path):
    sdist = tmp_path / "mergekit-9.tar.gz"
    files = {"pyproject.toml": "", "tests/test_it.py": TESTS, "mergekit/x.py": "1 / 0"}
    with tarfile.open(sdist, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"mergekit-9/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        script = str(ROOT / "tests" / "mergekit_suite.py")
        return subprocess.run(
            [sys.executable, script, "--sdist", str(sdist), *options],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    return run


def test_a_test_that_the_plugin_disturbs_is_named(suite):
    process = suite()
    assert process.returncode == 1, process.stdout + process.stderr
    report = process.stdout[process.stdout.index("with rpam: ") :].splitlines()
    assert report[0] == "with rpam: 5 tests, 2 passed, 2 failure, 1 skipped"
    assert report[1] == "without: 4 tests, 2 passed, 1 failure, 1 skipped"
    case = "tests.test_it::test_"
    assert report[2] == f"only with rpam: {case}every_method[rpam]: passed"
    assert report[3] == f"fails both times: {case}network: failure: OSError: no route"
    assert report[4] == f"{case}disturbed"
    assert report[5].startswith("  with rpam: failure: AssertionError: the plugin is")
    assert report[6:] == ["  without: passed"]


def test_a_selection_that_ends_alike_is_good(suite):
    process = suite("-k", "not disturbed")
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.endswith("no test ends otherwise with the plugin\n")
