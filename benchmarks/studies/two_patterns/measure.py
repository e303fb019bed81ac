"""What a model of the study does on queries: right, how long, does it think.

Greedy decoding in float32 through transformers' own `generate`. Figures are sums by
seed (a part of the test queries) and difficulty, so that any mix of difficulties can be
computed from them afterwards.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from evaluate import grade, respond
from pairs import Pair
from tasks import END, Task, prompt
from transformers import AutoModelForCausalLM, AutoTokenizer

FIGURES = ("queries", "correct", "tokens", "thinks", "closed", "cut_off")
# seed -> difficulty -> sums in the order of FIGURES
Sums = dict[str, dict[str, list[float]]]


def held_out(task: Task, seed: int, each: int, split: str) -> list[str]:
    """Return `each` queries of every difficulty, in and beyond calibration's.

    Those of two seeds are drawn apart and overlap only where there are few at all.
    """
    mix = dict.fromkeys((*task.difficulties, *task.beyond), 1.0)
    return task.queries(each * len(mix), split, seed, mix)


def load(folder: Path):
    """Return a checkpoint's model, in float32, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def measure(model, tokenizer, task: Task, asked: Mapping[int, Sequence[str]]) -> Sums:
    """Return the sums of `FIGURES` on the queries that are `asked`, by seed."""
    sums: Sums = {}
    every = sorted({query for queries in asked.values() for query in queries})
    said = respond(model, tokenizer, every, task.longest_response)
    by_query = dict(zip(every, said, strict=True))
    for seed, queries in asked.items():
        strata = sums[str(seed)] = {}
        for query in queries:
            response = by_query[query]
            tokens = len(tokenizer(response, add_special_tokens=False)["input_ids"])
            figures = {
                "queries": 1.0,
                "tokens": float(tokens),
                **grade(task.answer(query), response),
                "cut_off": float(not response.endswith(END)),
            }
            of = strata.setdefault(str(task.difficulty(query)), [0.0] * len(FIGURES))
            for at, name in enumerate(FIGURES):
                of[at] += figures[name] or 0.0
    return sums


@torch.inference_mode()
def chat_log_likelihood(model, tokenizer, pair: Pair, count: int = 300) -> float | None:
    """Return the mean log-likelihood per token of replies both experts were taught.

    They answer prompts that are no queries. None for pairs that learned none.
    """
    if not pair.chats:
        return None
    rng = random.Random(f"{pair.name}-chat")
    total = tokens = 0.0
    for _ in range(count):
        said, reply = pair.task.chat(rng)
        ids = tokenizer(prompt(said) + reply + END, return_tensors="pt")["input_ids"]
        start = len(tokenizer(prompt(said))["input_ids"])
        scores = model(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)
        total += scores.gather(1, ids[0, start:, None]).sum().item()
        tokens += ids.shape[1] - start
    return total / tokens
