"""The source distribution carries what its tests need: the repository's files."""

from __future__ import annotations

import subprocess
import tarfile

import pytest
from hatchling.builders.sdist import SdistBuilder

from helpers.paths import ROOT

ADDED = {"PKG-INFO", ".gitignore"}  # by the build


def in_git(*options: str) -> set[str]:
    """Return the files that git has under ROOT; skip where this is no checkout.

    But those whose first part begins with a point: settings of editors and servers.
    """
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", *options]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip(f"git: {listed.stderr.strip()}")
    names = set(listed.stdout.split("\0")) - {""}
    return {n for n in names if not n.startswith(".") and (ROOT / n).exists()}


def test_the_sdist_has_every_file_of_the_repository_and_no_other(tmp_path):
    tracked, new = in_git(), in_git("--others", "--exclude-standard")
    (path,) = SdistBuilder(str(ROOT)).build(directory=str(tmp_path))
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert tracked - names == set()
    assert names - tracked - new == ADDED
