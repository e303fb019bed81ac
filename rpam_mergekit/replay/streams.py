"""The calibration set on its way through the layers: streams of hidden states.

Each expert's stream runs on its own outputs, the merged one on the merged model's. Per
query one expert is positive, the one that the query's pattern names; the others are
negative.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from rpam_mergekit.replay.activations import Stored, StoredList, TensorStore
from rpam_mergekit.replay.calls import Call


class Stream:
    """This process's queries of one batch.

    Hidden states are float32 (queries, tokens, width) and are kept in the store.

    experts: hidden states of the base model, then of the others.
    merged: those of the merged model.
    calls: every layer's call, as recorded.
    is_token: bool (queries, tokens), false on padding.
    patterns: int64 (queries,), which of the experts is the positive one.
    token_weights: (queries, tokens), of single tokens; zero on padding.
    normalized_weights: (queries, tokens), the same scaled so that a query weighs the
        same whatever its length and all batches' sum to 1.
    weights: `normalized_weights`, by what a token's distance counts in this layer, see
        `prepass.measures.weigh_layer`.
    decisions: bool (queries, tokens), see `prompts.EncodedQuery.decisions`.
    prompt_ends: int64 (queries,), the prompts' last tokens. opens: bool (queries,),
        whether the response begins by opening its thinking.
    queries: of the whole batch, all processes' together.
    """

    merged = Stored()

    def __init__(
        self,
        *,
        calls: Sequence[Call],
        experts: Sequence[torch.Tensor],
        merged: torch.Tensor,
        is_token: torch.Tensor,
        patterns: torch.Tensor,
        token_weights: torch.Tensor,
        normalized_weights: torch.Tensor,
        decisions: torch.Tensor | None = None,
        prompt_ends: torch.Tensor | None = None,
        opens: torch.Tensor | None = None,
        queries: int | None = None,
        store: TensorStore | None = None,
    ) -> None:
        self.store = store or TensorStore()
        self.calls = calls
        self.experts = StoredList(experts, self.store)
        self.merged = merged
        self.is_token = is_token
        self.patterns = patterns
        self.token_weights = token_weights
        self.normalized_weights = self.weights = normalized_weights
        self.decisions = torch.zeros_like(is_token) if decisions is None else decisions
        none = torch.zeros_like(patterns)
        self.prompt_ends = none if prompt_ends is None else prompt_ends
        self.opens = none.bool() if opens is None else opens
        self.queries = len(is_token) if queries is None else queries

    @property
    def positive(self) -> torch.Tensor:
        """Hidden states of the expert that each query's pattern names."""
        return self._of(self.patterns)

    @property
    def negatives(self) -> Iterator[torch.Tensor]:
        """Hidden states of the other experts, one of them for each query at a time."""
        for number in range(len(self.experts) - 1):
            yield self._of(number + (self.patterns <= number).long())

    def _of(self, expert: torch.Tensor) -> torch.Tensor:
        """Return for each query the hidden states of the expert of that number."""
        states: torch.Tensor = self.experts[0]
        for number in range(1, len(self.experts)):
            chosen = (expert == number)[:, None, None]
            states = torch.where(chosen, self.experts[number], states)
        return states
