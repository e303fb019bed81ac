r"""Answers as text, LaTeX or plain: tidied, unwrapped, taken apart into lists."""

from __future__ import annotations

import re

from rpam_mergekit.grading.numbers import number

_BRACKETS = {"(": ")", "[": "]", "\\{": "\\}"}


def outer_brackets(text: str) -> tuple[str, str]:
    """Return the brackets around the whole of `text` ("" for none) and the inside."""
    opening = next((o for o in _BRACKETS if text.startswith(o)), None)
    if opening is None:
        return "", text
    closing = next((c for c in _BRACKETS.values() if text.endswith(c)), None)
    inner = text[len(opening) : len(text) - len(closing or "")]
    if closing is None or not _balanced(inner):
        return "", text
    return opening + closing, inner


def _balanced(text: str) -> bool:
    depth = 0
    for token in re.findall(r"\\[{}]|[()\[\]{}]", text):
        depth += 1 if token[-1] in "([{" else -1
        if depth < 0:
            return False
    return depth == 0


_AND = re.compile(r"\\text\{\s*(?:and|or)\s*\}|\band\b|\bor\b|;|\\quad|\\qquad")


def split_list(text: str) -> list[str]:
    r"""Return the items of a list: split at commas outside brackets, and at "and".

    ``a \pm b`` gives both. A number with its thousands set off is one item.
    """
    if number(text) is not None:
        return [text]
    items, depth, start = [], 0, 0
    text = _AND.sub(",", text)
    for match in re.finditer(r"\\[{}]|[()\[\]{},]", text):
        token = match.group()
        if token == ",":
            if depth == 0:
                items.append(text[start : match.start()])
                start = match.end()
        else:
            depth += 1 if token[-1] in "([{" else -1
    items.append(text[start:])
    items = [item.strip() for item in items if item.strip(" $")]
    return [
        variant
        for item in items
        for variant in (
            [item.replace("\\pm", "+"), item.replace("\\pm", "-")]
            if "\\pm" in item
            else [item]
        )
    ]


def tidy(text: str) -> str:
    r"""Return `text` without what does not change its meaning: $, \left, spaces."""
    text = text.strip().replace("\u2212", "-").replace("\u00a0", " ")
    text = re.sub(r"\\(?:left|right|displaystyle|bigl?|bigr?|Bigl?|Bigr?)\b", "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\(?:mbox|mathrm|textrm|operatorname)\b", r"\\text", text)
    text = re.sub(r"(?<!\\)\\[!,;: ]|~", " ", text)
    text = re.sub(r"(?<!\\)(?:\$|\\[()\[\]])", "", text)
    return text.strip().removesuffix(".").strip()


def squeezed(text: str) -> str:
    """Return `text` without white space."""
    return re.sub(r"\s+", "", text)


def unwrap(text: str) -> str:
    r"""Return `text` with ``\text{...}`` and its like replaced by what they hold."""
    before = None
    while before != text:
        before = text
        text = re.sub(
            r"\\(?:text|textbf|mathbf|textit|boxed)\s*\{([^{}]*)\}", r"\1", text
        )
    return text


def plain_words(text: str) -> str:
    """Return the words of `text` in lower case, without punctuation."""
    return re.sub(r"[\s.,;:!()\"']+", " ", unwrap(text)).strip().casefold()


def only_words(text: str) -> bool:
    """Return whether `text` is words and punctuation, without mathematics."""
    return bool(re.fullmatch(r"\W*[A-Za-z][A-Za-z\s.,'()-]*", text))
