"""What is replayed of a response that is too long: its two ends, and its closing tag.

What a merge has to learn of a long response is how it begins, how it stops thinking and
how it ends. The middle of the thinking is left out, and the tokens behind it follow the
ones before it as if nothing had been there. Every expert and the merged model see the
same tokens.
"""

from __future__ import annotations


def kept_tokens(length: int, limit: int, closing: int | None) -> list[int]:
    """Return which `limit` of a response's `length` tokens are replayed, in order.

    closing: where the closing tag of the thinking begins. Those are kept that are
    nearest to the beginning, to the closing tag on either side of it, or to the end;
    what is kept at the beginning is twice as long as what is kept on a side of the
    others.
    """
    marks = [length - 1] if closing is None else [closing, length - 1]

    def distance(token: int) -> tuple[int, int]:
        return min(token, *(2 * abs(token - mark) for mark in marks)), token

    near = {
        token
        for mark in (0, *marks)
        for token in range(max(0, mark - limit), min(length, mark + limit + 1))
    }
    return sorted(sorted(near, key=distance)[:limit])
