"""Benchmarks and examples use nothing of the package that is private."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.paths import ROOT

SCRIPTS = sorted(
    path
    for folder in ("benchmarks", "examples")
    for path in (ROOT / folder).rglob("*.py")
    if "cache" not in path.parts
)


def private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def methods(tree: ast.AST) -> set[str]:
    """Return the private names of a file's methods, and of its classes' attributes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            found |= {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return {name for name in found if private(name)}


PACKAGE = sorted((ROOT / "rpam_mergekit").rglob("*.py"))
PRIVATE = {name for path in PACKAGE for name in methods(ast.parse(path.read_text()))}


def private_uses(tree: ast.AST) -> Iterator[str]:
    """Yield what a file imports, looks up or overrides of the package's private names.

    A class that is derived from none of another file may have such names of its own.
    """
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    derived = any(node.bases for node in classes)
    own = set() if derived else methods(tree)
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(a.name for a in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Attribute) and node.attr in PRIVATE - own:
            names = [node.attr]
        elif isinstance(node, ast.ClassDef) and node.bases:
            names = [
                inner.name
                for inner in node.body
                if isinstance(inner, ast.FunctionDef) and inner.name in PRIVATE
            ]
        yield from (
            name
            for name in names
            if private(name) and (name in PRIVATE or "rpam_mergekit" in names)
        )


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_script_uses_only_what_is_public(path: Path):
    assert list(private_uses(ast.parse(path.read_text(encoding="utf-8")))) == []


def test_what_is_private_is_found():
    source = """
import rpam_mergekit._startup
from rpam_mergekit.prepass.run import PrePass, _load_layer
from somewhere import _theirs
class Variant(PrePass):
    def _initial(self):
        return self._advanced(0, 0, 0)
    def _own(self):
        return self._theirs
"""
    tree = ast.parse(source)
    assert sorted(private_uses(tree)) == [
        "_advanced",
        "_initial",
        "_load_layer",
        "_startup",
    ]
