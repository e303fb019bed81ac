"""Of a long response both ends stay, and what stands around its closing tag."""

from __future__ import annotations

import itertools

import pytest

from rpam_mergekit.chat.shortening import kept_tokens


def runs(kept: list[int]) -> list[tuple[int, int]]:
    """Return the first and last token of every run of neighbours."""
    starts = [kept[0], *(b for a, b in itertools.pairwise(kept) if b > a + 1)]
    ends = [*(a for a, b in itertools.pairwise(kept) if b > a + 1), kept[-1]]
    return list(zip(starts, ends, strict=True))


def test_by_hand():
    # The answer is short: its beginning and what closes and ends are two runs.
    assert runs(kept_tokens(1000, 64, 990)) == [(0, 36), (973, 999)]
    # It is as long as the thinking.
    assert runs(kept_tokens(1000, 64, 500)) == [(0, 25), (488, 512), (987, 999)]
    # There is no closing tag.
    assert runs(kept_tokens(1000, 64, None)) == [(0, 42), (979, 999)]


@pytest.mark.parametrize("limit", [16, 17, 63, 256])
@pytest.mark.parametrize("length", [257, 300, 2048])
@pytest.mark.parametrize("share", [None, 0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0])
def test_what_decides_is_kept_with_what_stands_around_it(limit, length, share):
    closing = None if share is None else round(share * (length - 1))
    kept = kept_tokens(length, limit, closing)
    assert len(set(kept)) == len(kept) == limit
    assert kept == sorted(kept)
    assert len(runs(kept)) <= 3
    around = limit // 6
    needed = [range(2 * around), range(length - around, length)]
    if closing is not None:
        needed.append(range(max(0, closing - around), min(length, closing + around)))
    for span in needed:
        assert set(span) <= set(kept)


def test_it_is_quick_for_responses_of_any_length():
    kept = kept_tokens(10**9, 256, 10**9 - 400)
    assert len(kept) == 256
