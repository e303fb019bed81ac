"""The source distribution carries what its tests need: the repository's files."""

from __future__ import annotations

import subprocess
import tarfile

import pytest
from conftest import ROOT
from hatchling.builders.sdist import SdistBuilder

# CI's own files; PKG-INFO is added by the build.
LEFT_OUT = (".ci/", ".github/")


def in_git() -> set[str]:
    """Return the files that git has under ROOT; skip where this is no checkout."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip(f"git: {listed.stderr.strip()}")
    return set(listed.stdout.split("\0")) - {""}


def test_the_sdist_has_every_file_of_the_repository(tmp_path):
    tracked = in_git()
    (path,) = SdistBuilder(str(ROOT)).build(directory=str(tmp_path))
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {name for name in tracked if not name.startswith(LEFT_OUT)}
    there = {name for name in wanted if (ROOT / name).exists()}
    assert there - names == set()
    assert not any(name.startswith(LEFT_OUT) for name in names)
