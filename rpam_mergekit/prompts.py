"""Calibration queries as token ids: one chat template, prompt and response spans.

Every query gets the chat template that the merged model will be served with; a
template per pattern would tell the optimisation the label. Batches hold queries of
similar length and are padded on the right to their own longest, by a quarter at most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rpam_mergekit.calibration import CalibrationSet, draw_queries
from rpam_mergekit.errors import RpamError
from rpam_mergekit.settings import RpamSettings

PADDING = 0.25  # of a batch, at most


@dataclass(frozen=True)
class EncodedQuery:
    """Token ids of one query: `prompt_tokens` of prompt, then the response."""

    ids: tuple[int, ...]
    prompt_tokens: int
    pattern: str


@dataclass(frozen=True)
class Batch:
    """Queries padded on the right to the longest of them.

    input_ids, attention_mask: int64 (queries, tokens); the mask is 1 on real tokens.
    deciding: bool (queries, tokens), the tokens from which the response is predicted:
        the last of the prompt and those of the response.
    patterns: one per query.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    deciding: torch.Tensor
    patterns: tuple[str, ...]


def encode_calibration(
    calibration: CalibrationSet, tokenizer, vocabulary: int, settings: RpamSettings
) -> tuple[list[EncodedQuery], list[str]]:
    """Return the drawn queries as token ids, and notes on what was left out or cut.

    `vocabulary` is the number of rows of the embedding. Raises `RpamError` for ids
    beyond it, conversations that the chat template refuses, and a pattern of which
    no query fits `max_tokens`.
    """
    notes = []
    if getattr(tokenizer, "chat_template", None) is None:
        notes.append(
            "the tokenizer has no chat template: prompts are used as plain text"
        )
    prompts, findings = [], []
    for query, line in zip(calibration.queries, calibration.lines, strict=True):
        where = f"{calibration.path}:{line}"
        problem = template_problem(query.conversation, tokenizer)
        if problem is not None:
            findings.append(f"{where}: {problem}")
        ids = [] if problem else prompt_ids(query.conversation, tokenizer)
        findings += _beyond(ids, tokenizer, vocabulary, where)
        prompts.append(ids)
    if findings:
        raise RpamError(*findings[:20])
    usable = [0 < len(ids) <= settings.max_tokens for ids in prompts]
    if not all(usable):
        notes.append(
            f"{usable.count(False)} of {len(usable)} prompts are empty or longer than "
            f"max_tokens ({settings.max_tokens}) and were left out"
        )
    for pattern in dict.fromkeys(q.pattern for q in calibration.queries):
        kept = [
            u
            for u, q in zip(usable, calibration.queries, strict=True)
            if q.pattern == pattern
        ]
        if not any(kept):
            raise RpamError(
                f"parameters.max_tokens: every '{pattern}' prompt of "
                f"{calibration.path} is longer than {settings.max_tokens} tokens. "
                "Raise it."
            )
        if sum(kept) < settings.queries_per_pattern:
            notes.append(
                f"{sum(kept)} usable '{pattern}' queries, fewer than "
                f"queries_per_pattern ({settings.queries_per_pattern}): all are used"
            )
    encoded, cut = [], 0
    for i in draw_queries(
        calibration, usable, settings.queries_per_pattern, settings.seed
    ):
        query = calibration.queries[i]
        ids = prompts[i]
        response: list[int] = []
        if settings.tokens == "prompt+response" and query.response is not None:
            response = tokenizer(query.response, add_special_tokens=False)["input_ids"]
            where = f"{calibration.path}:{calibration.lines[i]}"
            if beyond := _beyond(response, tokenizer, vocabulary, where):
                raise RpamError(*beyond)
        room = settings.max_tokens - len(ids)
        cut += len(response) > room
        encoded.append(EncodedQuery((*ids, *response[:room]), len(ids), query.pattern))
    if cut:
        notes.append(
            f"{cut} responses were cut to fit max_tokens ({settings.max_tokens})"
        )
    if settings.tokens == "prompt+response":
        without = sum(len(e.ids) == e.prompt_tokens for e in encoded)
        if without:
            notes.append(
                f"{without} of {len(encoded)} queries have no response: only their "
                "prompts are aligned"
            )
    return encoded, notes


def make_batches(
    queries: Sequence[EncodedQuery], batch_size: int, pad_id: int
) -> list[Batch]:
    """Return the queries in batches of similar length, longest last.

    A batch has fewer than `batch_size` queries where more would be mostly padding.
    """
    batches: list[list[EncodedQuery]] = []
    tokens = 0
    for query in sorted(queries, key=lambda query: len(query.ids)):
        longest = len(query.ids)
        tokens += longest
        if (
            not batches
            or len(batches[-1]) == batch_size
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
    deciding = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, query in enumerate(queries):
        input_ids[row, : len(query.ids)] = torch.tensor(query.ids)
        attention_mask[row, : len(query.ids)] = 1
        deciding[row, query.prompt_tokens - 1 : len(query.ids)] = True
    return Batch(
        input_ids,
        attention_mask,
        deciding,
        tuple(query.pattern for query in queries),
    )


def template_problem(
    conversation: Sequence[Mapping[str, Any]], tokenizer
) -> str | None:
    """Return what the chat template does wrong with a conversation, or None.

    It may raise an error, or make the same prompt whatever the user says.
    """
    try:
        text = prompt_text(conversation, tokenizer)
        last = {**conversation[-1], "content": f"{conversation[-1]['content']} 0?"}
        other = prompt_text([*conversation[:-1], last], tokenizer)
    except Exception as error:
        return f"the chat template refuses this query: {error}"
    if text != other:
        return None
    role = conversation[-1]["role"]
    return (
        f"the chat template leaves the message of the role '{role}' out: the prompt is "
        f"{text[-60:]!r}, whatever it says"
    )


def prompt_text(
    conversation: Sequence[Mapping[str, str]], tokenizer, **rendering: Any
) -> str:
    """Return the prompt up to where the response begins, by the chat template.

    Plain text, turns apart by an empty line, where the tokenizer has no template.
    `rendering` are further variables of the template.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return "\n\n".join(turn["content"] for turn in conversation)
    return tokenizer.apply_chat_template(
        list(conversation), tokenize=False, add_generation_prompt=True, **rendering
    )


def prompt_ids(conversation: Sequence[Mapping[str, str]], tokenizer) -> list[int]:
    """Return the token ids of `prompt_text`.

    A template writes its own special tokens; plain text gets the tokenizer's.
    """
    text = prompt_text(conversation, tokenizer)
    plain = getattr(tokenizer, "chat_template", None) is None
    return list(tokenizer(text, add_special_tokens=plain)["input_ids"])


def _beyond(ids: Sequence[int], tokenizer, vocabulary: int, where: str) -> list[str]:
    worst = max(ids, default=0)
    if worst < vocabulary:
        return []
    token = tokenizer.convert_ids_to_tokens(worst)
    return [
        f"{where}: token id {worst} ({token!r}) is outside the model's vocabulary of "
        f"{vocabulary}: the tokenizer does not belong to the base model."
    ]
