"""Labels queries with the pattern that suits them: two sample files to one set.

The rule (arXiv 2601.03506, section 3) is `pattern_of`. Around it: queries that stand in
an evaluation set, that one file lacks, or that neither model solves are left out, and
what was left out is counted.

The positive model's response is kept: for a `short` query what the Short-CoT model
says, for a `long` one a response that thinks. One that is right by a lucky answer, or
with nothing in its thinking block, would teach the merged model to answer at once on
the very queries that need thought: a `long` query of which no right response thinks is
left out, and counted.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from rpam_mergekit.errors import RpamError
from rpam_mergekit.formats.calibration import PATTERNS
from rpam_mergekit.formats.files import write_whole
from rpam_mergekit.formats.samples import Response, SampledQuery
from rpam_mergekit.grading.responses import (
    ANSWERED,
    CLOSED,
    NONE,
    THINKING,
    Markers,
    thought_of,
)
from rpam_mergekit.questions.leaks import LeakGuard

USUAL = Markers()
PROPER = (NONE, CLOSED, ANSWERED)


def pattern_of(
    long_correct: int, long_count: int, short_correct: int, short_count: int
) -> str | None:
    """Return ``long``, ``short``, or None for a query that neither model solves.

    ``long`` where the Long-CoT model's share of correct responses is higher by more
    than half a response, 1 / (2 k); ties go to ``short``, which is cheaper. Where the
    models were sampled unequally often, k is the smaller number: a difference that the
    coarser sample cannot show decides nothing.
    """
    if not long_correct and not short_correct:
        return None
    gain = Fraction(long_correct, long_count) - Fraction(short_correct, short_count)
    return "long" if gain > Fraction(1, 2 * min(long_count, short_count)) else "short"


@dataclass(frozen=True)
class Summary:
    """What is kept of one model's responses to one query.

    tokens: their mean number, None if unknown; best: the shortest correct response
    whose thinking, if there is any, is properly closed (an answer in a block that the
    prompt has opened: the answer alone); best_thought: the shortest of
    those that think, with something in their thinking block; thoughtful: how many
    correct responses think, properly closed or not.
    """

    correct: int
    count: int
    tokens: float | None
    best: Response | None
    lost: int
    best_thought: Response | None = None
    thoughtful: int = 0

    @classmethod
    def of(cls, query: SampledQuery, markers: Markers = USUAL) -> Summary:
        right = [r for r in query.responses if r.correct]
        proper = [_said(r, markers) for r in right if r.thinking in PROPER]
        thoughts = [r for r in right if _thinks(r, markers)]
        closed = [r for r in thoughts if r.thinking == CLOSED]
        return cls(
            correct=len(right),
            count=len(query.responses),
            tokens=query.tokens,
            best=min(proper, key=_length, default=None),
            lost=sum(r.correct is None for r in query.responses),
            best_thought=min(closed, key=_length, default=None),
            thoughtful=len(thoughts),
        )

    @property
    def accuracy(self) -> float:
        return self.correct / self.count


def _said(response: Response, markers: Markers) -> Response:
    """Return a response without the block that it has not used, if it has one."""
    if response.thinking != ANSWERED:
        return response
    answer = response.text.partition(markers.open)[2].lstrip()
    return response.model_copy(update={"text": answer})


def _thinks(response: Response, markers: Markers) -> bool:
    """Tell whether a response thinks, and has a thought in its thinking block."""
    return response.thinking in THINKING and bool(thought_of(response.text, markers))


def _length(response: Response) -> tuple[float, int, str]:
    tokens = float("inf") if response.tokens is None else response.tokens
    return tokens, len(response.text), response.text


@dataclass(frozen=True)
class Candidate:
    """One model's summary of a query, with the query itself."""

    index: int
    question: str
    messages: tuple[dict[str, str], ...]
    answer: str | None
    source: dict[str, Any]
    summary: Summary

    @classmethod
    def of(cls, query: SampledQuery, markers: Markers = USUAL) -> Candidate:
        answer = ", ".join(query.gold.values) if query.gold else None
        return cls(
            query.index,
            query.question,
            query.messages,
            answer,
            query.source,
            Summary.of(query, markers),
        )


@dataclass(frozen=True)
class Labelled:
    """A query with its label and both models' summaries."""

    query: Candidate
    pattern: str
    long: Summary
    short: Summary

    @property
    def gain(self) -> float:
        """How much more often Long is right than Short."""
        return self.long.accuracy - self.short.accuracy

    @property
    def best(self) -> Response | None:
        """The response to align to: of Long one that thinks."""
        return self.long.best_thought if self.pattern == "long" else self.short.best

    def record(self, responses: bool = True) -> dict[str, Any]:
        """Return the line of the calibration file, without its response if so asked."""
        turns = self.query.messages
        one = len(turns) == 1 and turns[0]["role"] == "user"
        best = self.best if responses else None
        record = {
            **({"prompt": turns[0]["content"]} if one else {"messages": list(turns)}),
            "pattern": self.pattern,
            "response": best.text if best else None,
            "answer": self.query.answer,
            "long_accuracy": round(self.long.accuracy, 6),
            "short_accuracy": round(self.short.accuracy, 6),
            "long_tokens": _rounded(self.long.tokens),
            "short_tokens": _rounded(self.short.tokens),
            "source": self.query.source,
        }
        return {key: value for key, value in record.items() if value is not None}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


@dataclass
class Labels:
    """The outcome: what was labelled, what was chosen of it, what was left out."""

    labelled: list[Labelled] = field(default_factory=list)
    chosen: list[Labelled] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    thoughtless: int = 0  # `long` queries of which no right response thinks
    responses: bool = True  # whether they are written
    guard: LeakGuard = field(default_factory=LeakGuard)  # what it kept out

    def of(self, pattern: str, chosen: bool = True) -> list[Labelled]:
        rows = self.chosen if chosen else self.labelled
        return [row for row in rows if row.pattern == pattern]


def label_queries(
    long: Iterable[Candidate],
    short: Iterable[Candidate],
    guard: LeakGuard,
    *,
    per_pattern: int | None = None,
    balance: bool = False,
    seed: int = 0,
    responses: bool = True,
) -> Labels:
    """Return the labels of the queries that both models answered.

    Of each pattern at most `per_pattern` queries are chosen, and with `balance` as
    many of either, at random with `seed`. Without `responses`, for a merge that aligns
    prompts only, it does not matter whether they think.
    """
    labels = Labels(responses=responses, guard=guard)
    ours = _candidates(long, "Long", labels)
    theirs = _candidates(short, "Short", labels)
    missing = len(theirs.keys() - ours.keys())
    other_prompts = lost = 0
    for question, query in sorted(ours.items(), key=lambda kv: (kv[1].index, kv[0])):
        other = theirs.get(question)
        if other is None:
            missing += 1
            continue
        contents = [turn["content"] for turn in query.messages]
        found = guard.leak(question, *contents)
        if found is not None:
            labels.dropped[f"stand in the evaluation set {found}"] += 1
            continue
        a, b = query.summary, other.summary
        lost += a.lost + b.lost
        other_prompts += query.messages != other.messages
        pattern = pattern_of(a.correct, a.count, b.correct, b.count)
        if pattern is None:
            labels.dropped["neither model solves them"] += 1
            continue
        if pattern == "long" and responses and not a.thoughtful:
            labels.thoughtless += 1
            continue
        labels.labelled.append(Labelled(query, pattern, a, b))
    if missing:
        labels.dropped["only one file has them"] = missing
    _choose(labels, per_pattern, balance, seed)
    if labels.thoughtless:
        reason = "are 'long', but no right response of Long thinks"
        labels.dropped[reason] = labels.thoughtless
    _add_notes(labels, other_prompts, lost)
    return labels


def _add_notes(labels: Labels, other_prompts: int, lost: int) -> None:
    if other_prompts:
        labels.notes.append(
            f"{other_prompts} queries were put to the models in different words: "
            "Long's are used"
        )
    if lost:
        labels.notes.append(f"{lost} lost grades count as not correct")
    bare = sum(row.best is None for row in labels.chosen)
    if bare and labels.responses:
        labels.notes.append(
            f"{bare} queries have no response: no correct one closes its thinking "
            "properly"
        )


def _candidates(
    queries: Iterable[Candidate], side: str, labels: Labels
) -> dict[str, Candidate]:
    """Return the queries of one file by their question; the first of equal ones."""
    found: dict[str, Candidate] = {}
    for query in queries:
        kept = found.setdefault(query.question, query)
        if kept is not query:
            labels.dropped[f"repeat a question in {side}'s file"] += 1
            if query.index < kept.index:  # files are in the order of finishing
                found[query.question] = query
    return found


def _choose(labels: Labels, per_pattern: int | None, balance: bool, seed: int) -> None:
    of_pattern = {p: labels.of(p, chosen=False) for p in PATTERNS}
    most = per_pattern or len(labels.labelled)
    if balance:
        most = min(most, *(len(rows) for rows in of_pattern.values()))
    chosen: set[int] = set()
    for pattern, rows in of_pattern.items():
        if len(rows) > most:
            rows = sorted(rows, key=lambda row: _rank(row, seed))[:most]
            labels.dropped[f"more '{pattern}' than asked for"] = (
                len(of_pattern[pattern]) - most
            )
        chosen |= {id(row) for row in rows}
    labels.chosen = [row for row in labels.labelled if id(row) in chosen]


def _rank(row: Labelled, seed: int) -> bytes:
    """Return a random order that other queries do not change."""
    return hashlib.sha256(f"{seed}/{row.query.question}".encode()).digest()


def write_calibration(path: Path, labels: Labels) -> None:
    """Write the chosen queries, the whole file or nothing.

    Raises `RpamError` if a pattern has no query: the merge could learn nothing.
    """
    if labels.thoughtless and not labels.of("long"):
        raise RpamError(
            f"none of Long's right responses to the {labels.thoughtless} 'long' "
            "queries thinks: nothing is written. As examples they would teach the "
            "merged model to answer at once where it must think. If the thinking was "
            "stripped from LONG (lm-eval does so with think_end_token, servers with a "
            "reasoning parser), sample without; if its brackets are others, name them "
            "with --think-open and --think-close; or give --prompts-only, for a merge "
            "with 'tokens: prompt'."
        )
    if not labels.chosen:
        raise RpamError("no query is left to label: nothing is written.")
    for pattern in PATTERNS:
        if not labels.of(pattern):
            raise RpamError(
                f"no query is labelled '{pattern}': nothing is written. The merge "
                "learns where to reason from queries of both patterns; "
                + (
                    "sample harder queries, or check that LONG and SHORT are not "
                    "swapped."
                    if pattern == "long"
                    else "sample easier queries, or check SHORT's grades."
                )
            )
    records = (row.record(labels.responses) for row in labels.chosen)
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    try:
        write_whole(path, "".join(lines).encode())
    except OSError as error:
        raise RpamError(f"--out: cannot write {path}: {error.strerror}") from None
