"""The commands that a page of the documentation shows."""

from __future__ import annotations

import re

BLOCK = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)


def shell_lines(page) -> list[str]:
    """Return the lines of a page's shell blocks, continued lines joined."""
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    text = "\n".join(blocks).replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip()]
