"""Files: digests of their content, small ones written whole, and their mode."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def digest(files: Iterable[Path]) -> str:
    """Return the SHA-256 of the SHA-256s of files, in hex and one a line, by name."""
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(digest_of_file, sorted(files)))
    return hashlib.sha256("".join(f"{one}\n" for one in found).encode()).hexdigest()


def digest_of_file(path: Path) -> str:
    """Return a file's SHA-256 in hex; what the Hub's cache knows is not read."""
    stored = path.resolve()
    if stored.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", stored.name):
        return stored.name  # the Hub's cache names large files by their SHA-256
    content = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            content.update(block)
    return content.hexdigest()


def make_ordinary(paths: Iterable[Path]) -> None:
    """Give files the mode that a new file in their folder gets.

    safetensors makes its files readable for their owner alone, and a copy may have the
    mode of what it was copied from.
    """
    modes: dict[Path, int] = {}
    for path in paths:
        if path.parent not in modes:
            new = path.parent / ".rpam.partial"
            new.unlink(missing_ok=True)
            new.touch()
            modes[path.parent] = new.stat().st_mode & 0o777
            new.unlink()
        path.chmod(modes[path.parent])


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, from beside it. Raises `OSError`."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
