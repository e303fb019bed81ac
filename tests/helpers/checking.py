"""What `mergekit-rpam check` must have said of a config."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import Result


def found(result: Result, *parts: str) -> None:
    """Assert that a config is refused for these reasons, and nothing crashed."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert "rpam: " in result.stderr
    for part in parts:
        assert part in result.stderr
    assert "no problems found" not in result.stdout


def noted(result: Result, *parts: str) -> None:
    """Assert that a config passes, with these notes."""
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith("no problems found\n")
    for part in parts:
        assert part in result.stdout


def sound(result: Result) -> None:
    assert result.exit_code == 0, result.output
    assert "note:" not in result.stdout.replace("note: 8 usable", "")


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
