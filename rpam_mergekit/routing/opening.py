"""Does the model that thinks open its thinking by itself?

One that was always given the opening by its template may never have learnt to write it.
A merge whose prompts end before the opening would then answer everything at once,
whatever its coefficients. One pass over a few prompts tells, before anything is solved.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from tqdm import tqdm

from rpam_mergekit.chat.prompts import Batch, EncodedQuery
from rpam_mergekit.replay.experts import Experts
from rpam_mergekit.replay.layer_weights import float32

QUERIES = 32
LIKELY = 0.5  # mean probability of the opening, from which a model opens by itself


def opening_queries(queries: Sequence[EncodedQuery], seed: int) -> list[EncodedQuery]:
    """Return at most `QUERIES` queries of `long` that think, cut behind their opening.

    Drawn with a generator of their own seeded by `seed`.
    """
    thinking = [query for query in queries if query.opening and query.pattern == "long"]
    drawn = random.Random(f"opening/{seed}")
    return [
        EncodedQuery(
            query.ids[: query.prompt_tokens + query.opening],
            query.prompt_tokens,
            query.pattern,
            opening=query.opening,
        )
        for query in drawn.sample(thinking, min(QUERIES, len(thinking)))
    ]


@torch.no_grad()
def opening_probability(
    experts: Experts, expert: int, batches: Sequence[Batch], quiet: bool = False
) -> float:
    """Return the mean probability that a model opens its thinking.

    expert: the model's number. batches: of `opening_queries`. The product over the
    tokens of the opening, from the end of the prompt on.
    """
    decoder = experts.decoder
    embeddings = float32(experts.load(expert, experts.embeddings))
    recorded = [
        decoder.record(embeddings, batch.input_ids, batch.attention_mask)
        for batch in batches
    ]
    states = [hidden for hidden, _ in recorded]
    layers = range(experts.layers)
    for index in tqdm(layers, desc="does Long open by itself", disable=quiet):
        weights = float32(experts.layer_of(index, expert))
        for number, (_, calls) in enumerate(recorded):
            states[number] = decoder.replay(
                index, weights, states[number], calls[index]
            )
    outside = float32(experts.load(expert, experts.outside))
    found: list[float] = []
    for batch, hidden in zip(batches, states, strict=True):
        for row, query in enumerate(batch.queries):
            first = query.prompt_tokens - 1
            logits = decoder.logits(outside, hidden[row, first : len(query.ids) - 1])
            targets = torch.tensor(query.ids[first + 1 :])
            logs = logits.cpu().double().log_softmax(-1).gather(1, targets[:, None])
            found.append(float(logs.sum().exp()))
    return sum(found) / len(found)


def opening_warning(probability: float, model: str, weight: float) -> str | None:
    """Return what to say of a model that seldom opens its thinking; None if it does.

    weight: of the opening's term in the pre-pass.
    """
    if probability >= LIKELY:
        return None
    remedy = (
        f"The pre-pass has a term for it (parameters.opening_weight: {weight:g})"
        if weight
        else "Set parameters.opening_weight, such as 0.3"
    )
    return (
        f"warning: {model} opens its thinking by itself with a probability of "
        f"{probability:.0%} only: its template has always done it. From its hidden "
        f"states alone the merged model would hardly think. {remedy}; if the merge "
        "does not route, use thinking: template, which always thinks."
    )
