"""The chat templates in an output folder, rid of the opening; no other byte changes.

They lie in files of their own, or as texts of the tokenizer's JSON, one or several.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rpam_mergekit.chat.template_rewriting import generation_prompt, without_opening
from rpam_mergekit.chat.thinking import ThinkingMode
from rpam_mergekit.formats.files import write_whole
from rpam_mergekit.grading.brackets import opening_of
from rpam_mergekit.grading.responses import Markers

JINJA = ("chat_template.jinja", "additional_chat_templates/*.jinja")
IN_JSON = ("tokenizer_config.json", "chat_template.json")
KEY = "chat_template"
_LITERAL = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_UNIT = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    r"|\\u[0-9a-fA-F]{4}|\\.|.",
    re.DOTALL,
)


def take_out(
    folder: Path, thinking: ThinkingMode, trust_remote_code: bool = False
) -> tuple[bool, list[str]]:
    """Take the opening out of every chat template in a model's folder, if it is to be.

    Returns whether prompts by the folder's template end without it now, and what is
    to be said about templates that still open the thinking.
    """
    markers = thinking.markers
    if not thinking.takes_out or markers is None:
        return False, []
    tokenizer = tokenizer_in(folder, trust_remote_code)
    if tokenizer is None or not tokenizer.chat_template:
        return False, [
            f"{folder} has no chat template: serve it with one that does not end its "
            f"prompts with {thinking.opening!r}"
        ]
    left = [
        f"{path}: the opening {thinking.opening!r} could not be taken out of a chat "
        "template in it, which is not the one in use"
        for path, text in _texts(folder)
        if not _rewrite(path, text, tokenizer, markers)
    ]
    shipped = tokenizer_in(folder, trust_remote_code)
    prompt = generation_prompt(shipped, shipped.chat_template) if shipped else None
    return prompt is not None and not opening_of(prompt, markers), left


def tokenizer_in(
    folder: Path, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer in a model's folder, None where there is none."""
    try:
        return AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
    except Exception:  # of many kinds: there is none
        return None


def _texts(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield the files that templates lie in, with their text as it is."""
    for pattern in (*JINJA, *IN_JSON):
        for path in sorted(folder.glob(pattern)):
            yield path, path.read_bytes().decode("utf-8")


def _rewrite(
    path: Path, text: str, tokenizer: PreTrainedTokenizerBase, markers: Markers
) -> bool:
    """Write a file without openings; tell whether that was possible for all of it."""
    whole = True
    changed = {}
    for template in dict.fromkeys(_templates(path, text)):
        new = without_opening(tokenizer, template, markers)
        whole = whole and new is not None
        changed[template] = new if isinstance(new, str) else template
    if path.suffix == ".json":
        rewritten = _LITERAL.sub(lambda found: _edited(found[0], changed), text)
    else:
        rewritten = changed[text]
    if rewritten != text:
        write_whole(path, rewritten.encode("utf-8"))
    return whole


def _templates(path: Path, text: str) -> Iterator[str]:
    if path.suffix != ".json":
        yield text
        return
    content = json.loads(text)
    found = content.get(KEY) if isinstance(content, dict) else None
    if isinstance(found, str):
        yield found
    elif isinstance(found, list):  # of names with templates
        yield from (one["template"] for one in found)
    elif isinstance(found, dict):
        yield from found.values()


def _edited(literal: str, changed: dict[str, str]) -> str:
    """Return a JSON string with the text it stands for changed, its spelling kept."""
    old = json.loads(literal, strict=False)
    new = changed.get(old, old)
    if new == old:
        return literal
    start = _shared(old, new)
    kept = _shared(old[start:][::-1], new[start:][::-1])
    units = _UNIT.findall(literal[1:-1])  # one for every character of `old`
    middle = json.dumps(new[start : len(new) - kept], ensure_ascii=literal.isascii())
    tail = units[len(units) - kept :]
    return f'"{"".join(units[:start])}{middle[1:-1]}{"".join(tail)}"'


def _shared(one: str, other: str) -> int:
    """Return how many characters two texts begin with in common."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
