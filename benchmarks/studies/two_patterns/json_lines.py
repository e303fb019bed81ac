"""Records of both studies as JSON Lines, appended as they come. No command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read(path: Path) -> list[dict[str, Any]]:
    """Return the records, none if there is no file; cut off a half-written last one."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:  # killed while it wrote
        path.write_bytes(whole)
    return [json.loads(line) for line in whole.decode().splitlines()]


def append(path: Path, record: dict[str, Any]) -> None:
    """Add a record; make the file and its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
