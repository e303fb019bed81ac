"""What a page of the documentation has: commands, links, anchors."""

from __future__ import annotations

import re

FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)


def shell_lines(page) -> list[str]:
    """Return the lines of a page's shell blocks, continued lines joined."""
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    text = "\n".join(blocks).replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip()]


def links(page) -> list[tuple[str, str]]:
    """Return the relative links of a page: path ('' for the page itself), anchor."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\((?!\w+:)([^)\s]*)\)", text)
    return [(path, anchor) for path, _, anchor in (t.partition("#") for t in targets)]


def anchors(page) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*?)\s*#*$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number = 0
        while (name := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(name)
    return found
