"""Every benchmark is in the README with its command, and imports what is public."""

from __future__ import annotations

import ast
import re

import pytest

from helpers.benchmarks import FOLDER

SOURCES = sorted(FOLDER.rglob("*.py"))
SCRIPTS = [path for path in SOURCES if '"__main__"' in path.read_text()]
NAMES = [path.relative_to(FOLDER).as_posix() for path in SCRIPTS]
README = (FOLDER / "README.md").read_text(encoding="utf-8")


def test_the_readme_has_a_line_for_every_script_and_for_no_other():
    rows = re.findall(r"^\| `(\S+\.py)[^`]*`.* \| .*\w.* \|$", README, re.MULTILINE)
    commands = [name for name in rows if "/" in name or (FOLDER / name).exists()]
    assert sorted(commands) == sorted(NAMES)


@pytest.mark.parametrize("path", SCRIPTS, ids=NAMES)
def test_a_script_says_how_it_is_called(path):
    documented = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    name = path.relative_to(FOLDER).as_posix()
    assert f"    python benchmarks/{name}" in documented


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_nothing_private_of_the_package_is_imported(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [
        f"{node.module}.{alias.name}"
        if isinstance(node, ast.ImportFrom)
        else alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    ]
    ours = [name for name in names if name.startswith(("rpam_mergekit", "mergekit"))]
    assert not [name for name in ours if "._" in name]
