"""Single values of a JSON text are replaced; every other byte stays as it is.

A model's JSON files are read by many programs and compared by people; a key that is
not changed keeps its name, its place and the spelling of its value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

Key = str | int
_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder(strict=False)


def with_value(text: str, path: Sequence[Key], value: Any) -> str:
    """Return a JSON text with another value at `path`: keys, and places in lists.

    The last key is added, behind the others, if it is not there. Raises `KeyError` for
    a way to it that is not there.
    """
    start = _skip(text, 0)
    for key in path[:-1]:
        start = _members(text, start)[0][key][0]
    members, first, end = _members(text, start)
    found = members.get(path[-1])
    if found is not None:
        written = _written(text, value, found[0])
        return f"{text[: found[0]]}{written}{text[found[1] :]}"
    written = _written(text, value, first if members else end)
    if text[start] == "{":
        written = f"{json.dumps(path[-1])}: {written}"
    if not members:
        return f"{text[: start + 1]}{written}{text[end:]}"
    last = max(stop for _, stop in members.values())
    return f"{text[:last]},{text[start + 1 : first]}{written}{text[last:]}"


def _members(text: str, start: int) -> tuple[dict[Key, tuple[int, int]], int, int]:
    """Return where an object's or list's values lie, by key or place.

    And where the first member begins, and the closing bracket.
    """
    if text[start] not in "{[":
        raise KeyError(f"no object or list at character {start}")
    first = at = _skip(text, start + 1)
    found: dict[Key, tuple[int, int]] = {}
    while text[at] not in "}]":
        key: Key = len(found)
        if text[start] == "{":
            key, at = _DECODER.raw_decode(text, at)
            at = _skip(text, _skip(text, at) + 1)
        end = _DECODER.raw_decode(text, at)[1]
        found[key] = (at, end)
        at = _skip(text, end)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return found, first, at


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None  # it matches nothing too
    return found.end()


def _written(text: str, value: Any, at: int) -> str:
    """Return a value as JSON, its lines indented as the one that it begins on."""
    line = text[text.rfind("\n", 0, at) + 1 : at]
    indent = line[: len(line) - len(line.lstrip(" \t"))]
    written = json.dumps(
        value, ensure_ascii=text.isascii(), indent=2 if "\n" in text.strip() else None
    )
    return written.replace("\n", f"\n{indent}")
