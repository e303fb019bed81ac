"""Calibration queries as token ids: one chat template, prompt and response spans.

Every query gets the chat template that the merged model will be served with; a
template per pattern would tell the optimisation the label. Batches hold queries of
similar length and are padded on the right to their own longest, by a quarter at most.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rpam_mergekit.chat.rendering import prompt_ids, template_problem
from rpam_mergekit.chat.shortening import kept_tokens
from rpam_mergekit.chat.thinking import ThinkingMode, thinking_of
from rpam_mergekit.errors import RpamError, refuse
from rpam_mergekit.formats.calibration import CalibrationSet, draw_queries
from rpam_mergekit.settings import RpamSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PADDING = 0.25  # of a batch, at most
MOST_FINDINGS = 20


@dataclass(frozen=True)
class EncodedQuery:
    """Token ids of one query: `prompt_tokens` of prompt, then the response.

    opening: how many tokens of the response open its thinking; 0 if it answers at once.
    closing: where in `ids` the closing tag of the thinking begins, if there is one.
    ended: whether the response's last token is there, so that the end token would
        follow.
    jumps: where in `ids` a token stands that did not follow the one before it: what
        was between them is left out.
    """

    ids: tuple[int, ...]
    prompt_tokens: int
    pattern: str
    opening: int = 0
    closing: int | None = None
    ended: bool = False
    jumps: tuple[int, ...] = ()

    @property
    def responds(self) -> bool:
        """Whether there is a response."""
        return len(self.ids) > self.prompt_tokens

    @property
    def decisions(self) -> tuple[int, ...]:
        """The positions from which the response's decisions are predicted.

        Its first token, the closing of its thinking, and its end.
        """
        found = {self.prompt_tokens - 1}
        if self.closing is not None:
            found.add(self.closing - 1)
        if self.ended:
            found.add(len(self.ids) - 1)
        return tuple(sorted(found))


@dataclass(frozen=True)
class Batch:
    """Queries padded on the right to the longest of them.

    input_ids, attention_mask: int64 (queries, tokens); the mask is 1 on real tokens.
    predicts_response: bool (queries, tokens), the tokens from which the response is
        predicted: the last of the prompt and those of the response.
    decisions: bool (queries, tokens), see `EncodedQuery.decisions`.
    patterns: one per query. queries: as they were encoded, in the order of the rows.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    predicts_response: torch.Tensor
    decisions: torch.Tensor
    queries: tuple[EncodedQuery, ...]

    @property
    def patterns(self) -> tuple[str, ...]:
        """The pattern of every query."""
        return tuple(query.pattern for query in self.queries)


def encode_calibration(
    calibration: CalibrationSet,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int,
    settings: RpamSettings,
    thinking: ThinkingMode | None = None,
) -> tuple[list[EncodedQuery], list[str]]:
    """Return the drawn queries as token ids, and notes on what was left out or cut.

    `vocabulary` is the number of rows of the embedding; `thinking` says who opens the
    thinking, by default as the tokenizer's own template has it. Raises `RpamError` for
    ids beyond the vocabulary, conversations that the chat template refuses, and a
    pattern of which no query fits `max_tokens`.
    """
    template = getattr(tokenizer, "chat_template", None)
    notes = []
    if template is None:
        notes.append(
            "the tokenizer has no chat template: prompts are used as plain text"
        )
    if thinking is None:
        thinking = thinking_of(tokenizer, template, calibration.queries, settings)
    prompts = _prompts(calibration, tokenizer, vocabulary, thinking)
    usable = [0 < len(ids) <= settings.max_tokens for ids in prompts]
    notes += _left_out(calibration, usable, settings)
    encoded, lengths = [], []
    for i in draw_queries(
        calibration, usable, settings.queries_per_pattern, settings.seed
    ):
        query, response, opening, closing = calibration.queries[i], [], 0, None
        if settings.tokens == "prompt+response" and query.response is not None:
            text = thinking.response(query.response, query.pattern)
            response = response_ids(text, tokenizer, thinking)
            opening, closing = brackets(text, tokenizer, thinking)
            where = f"{calibration.path}:{calibration.lines[i]}"
            refuse(_beyond(response, tokenizer, vocabulary, where))
        kept = _replayed(len(prompts[i]), len(response), closing, settings)
        lengths.append(len(response))
        encoded.append(
            _query(prompts[i], response, kept, query.pattern, opening, closing)
        )
    notes += _cut(encoded, lengths, settings)
    without = sum(not query.responds for query in encoded)
    if settings.tokens == "prompt+response" and without:
        notes.append(
            f"{without} of {len(encoded)} queries have no response: only their "
            "prompts are aligned"
        )
    return encoded, notes


def _prompts(
    calibration: CalibrationSet,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int,
    thinking: ThinkingMode,
) -> list[list[int]]:
    """Return all prompts as token ids. Raises `RpamError` with all findings."""
    prompts, findings = [], []
    for query, line in zip(calibration.queries, calibration.lines, strict=True):
        where = f"{calibration.path}:{line}"
        problem = template_problem(query.conversation, tokenizer)
        if problem is not None:
            findings.append(f"{where}: {problem}")
        ids = [] if problem else prompt_ids(query.conversation, tokenizer, thinking)
        findings += _beyond(ids, tokenizer, vocabulary, where)
        prompts.append(ids)
    refuse(findings[:MOST_FINDINGS])
    return prompts


def _left_out(
    calibration: CalibrationSet, usable: Sequence[bool], settings: RpamSettings
) -> list[str]:
    """Return notes on prompts that are left out, and on patterns with few queries.

    Raises `RpamError` for a pattern without any usable prompt.
    """
    notes = []
    if not all(usable):
        notes.append(
            f"{usable.count(False)} of {len(usable)} prompts are empty or longer than "
            f"max_tokens ({settings.max_tokens}) and were left out"
        )
    for pattern in dict.fromkeys(q.pattern for q in calibration.queries):
        kept = sum(
            u
            for u, q in zip(usable, calibration.queries, strict=True)
            if q.pattern == pattern
        )
        if not kept:
            raise RpamError(
                f"parameters.max_tokens: every '{pattern}' prompt of "
                f"{calibration.path} is longer than {settings.max_tokens} tokens. "
                "Raise it."
            )
        if kept < settings.queries_per_pattern:
            notes.append(
                f"{kept} usable '{pattern}' queries, fewer than "
                f"queries_per_pattern ({settings.queries_per_pattern}): all are used"
            )
    return notes


def _replayed(
    prompt: int, response: int, closing: int | None, settings: RpamSettings
) -> Sequence[int]:
    """Return which tokens of a response are replayed, of lengths in tokens.

    Those that `max_response_tokens` leaves; else what fits `max_tokens`.
    """
    room = max(0, settings.max_tokens - prompt)
    limit = settings.max_response_tokens
    if 0 < limit < response:
        return kept_tokens(response, min(limit, room), closing)
    return range(min(response, room))


def _cut(
    encoded: Sequence[EncodedQuery], lengths: Sequence[int], settings: RpamSettings
) -> list[str]:
    """Return notes on responses that are not replayed whole; `lengths` are theirs."""
    limit, notes = settings.max_response_tokens, []
    cut = sum(
        len(query.ids) - query.prompt_tokens < length
        for query, length in zip(encoded, lengths, strict=True)
    )
    shortened = sum(0 < limit < length for length in lengths)
    if cut > shortened:
        notes.append(
            f"{cut - shortened} responses were cut to fit max_tokens "
            f"({settings.max_tokens})"
        )
    if shortened:
        notes.append(
            f"{shortened} of {len(encoded)} responses are longer than "
            f"max_response_tokens ({limit}): the middle of their thinking was left out"
        )
    return notes


def _query(
    prompt: Sequence[int],
    response: Sequence[int],
    kept: Sequence[int],
    pattern: str,
    opening: int,
    closing: int | None,
) -> EncodedQuery:
    """Return a query of whose response the tokens `kept` are left, its marks with it.

    A closing tag without the token from which it is predicted is none.
    """
    start = len(prompt)
    place = {token: start + n for n, token in enumerate(kept)}
    closes = closing is not None and {closing - 1, closing} - {-1} <= place.keys()
    return EncodedQuery(
        (*prompt, *(response[token] for token in kept)),
        start,
        pattern,
        opening=sum(token < opening for token in kept),
        closing=place[closing] if closes and closing is not None else None,
        ended=bool(kept) and kept[-1] == len(response) - 1,
        jumps=tuple(
            place[token]
            for before, token in itertools.pairwise(kept)
            if token > before + 1
        ),
    )


def make_batches(
    queries: Sequence[EncodedQuery], settings: RpamSettings, pad_id: int = 0
) -> list[Batch]:
    """Return the queries in batches of similar length, longest last.

    A batch has at most `settings.batch_tokens` tokens with its padding (but one query
    at least), at most `settings.batch_size` queries, and fewer where more would be
    mostly padding.
    """
    most_tokens = settings.batch_tokens or float("inf")
    most_queries = settings.batch_size or float("inf")
    batches: list[list[EncodedQuery]] = []
    tokens = 0
    for query in sorted(queries, key=lambda query: len(query.ids)):
        longest = len(query.ids)
        tokens += longest
        if (
            not batches
            or len(batches[-1]) >= most_queries
            or longest * (len(batches[-1]) + 1) > most_tokens
            or tokens < (1 - PADDING) * longest * (len(batches[-1]) + 1)
        ):
            batches.append([])
            tokens = longest
        batches[-1].append(query)
    return [_pad(batch, pad_id) for batch in batches]


def _pad(queries: Sequence[EncodedQuery], pad_id: int) -> Batch:
    longest = max(len(query.ids) for query in queries)
    input_ids = torch.full((len(queries), longest), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    predicts_response = torch.zeros_like(input_ids, dtype=torch.bool)
    decisions = torch.zeros_like(predicts_response)
    for row, query in enumerate(queries):
        input_ids[row, : len(query.ids)] = torch.tensor(query.ids)
        attention_mask[row, : len(query.ids)] = 1
        predicts_response[row, query.prompt_tokens - 1 : len(query.ids)] = True
        decisions[row, list(query.decisions)] = True
    return Batch(
        input_ids, attention_mask, predicts_response, decisions, tuple(queries)
    )


def response_ids(
    text: str, tokenizer: PreTrainedTokenizerBase, thinking: ThinkingMode
) -> list[int]:
    """Return the token ids of a response.

    Its opening is encoded by itself, as it was when Long wrote what follows: a line
    break at its end never was part of a longer token.
    """
    head = thinking.begins if thinking.takes_out else ""
    if head != head.rstrip() and text.startswith(head):
        parts = [head, text.removeprefix(head)]
    else:
        parts = [text]
    encoded = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts]
    return [token for ids in encoded for token in ids]


def brackets(
    text: str, tokenizer: PreTrainedTokenizerBase, thinking: ThinkingMode
) -> tuple[int, int | None]:
    """Return how many of a response's tokens open its thinking, and where it closes.

    0 where it does not begin by opening it; None where it closes nothing. A tokenizer
    may join a bracket's first characters with what stands before them; then it is the
    token behind.
    """
    if thinking.markers is None:
        return 0, None
    opened, closed = thinking.markers.open, thinking.markers.close
    opening = 0
    if text.lstrip().startswith(opened):
        head = text.partition(opened)[0] + opened
        opening = len(response_ids(head, tokenizer, thinking))
    start = text.find(closed)
    if start < 0:
        return opening, None
    whole = response_ids(text, tokenizer, thinking)
    before = response_ids(text[:start], tokenizer, thinking)
    return opening, min(len(before), len(whole) - 1)


def _beyond(
    ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int,
    where: str,
) -> list[str]:
    worst = max(ids, default=0)
    if worst < vocabulary:
        return []
    token = tokenizer.convert_ids_to_tokens(worst)
    return [
        f"{where}: token id {worst} ({token!r}) is outside the model's vocabulary of "
        f"{vocabulary}: the tokenizer does not belong to the base model."
    ]
