"""The calibration set on its way through the layers: streams of hidden states.

Each expert's stream runs on its own outputs, the merged one on the merged model's. Per
query one expert is positive, the one that the query's pattern names; the others are
negative.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from rpam_mergekit.replay.activations import OnShelf, Shelf, ShelvedList
from rpam_mergekit.replay.calls import Call


class Stream:
    """This process's queries of one batch.

    Hidden states are float32 (queries, tokens, width) and lie on the shelf.

    experts: hidden states of the base model, then of the others.
    merged: those of the merged model.
    calls: every layer's call, as recorded.
    counted: bool (queries, tokens), false on padding.
    patterns: int64 (queries,), which of the experts is the positive one.
    token_weights: (queries, tokens), of single tokens; zero on padding.
    shares: (queries, tokens), the same scaled so that a query weighs the same whatever
        its length and all batches' sum to 1.
    weights: `shares`, by what a token's distance counts in this layer, see
        `prepass.measures.weigh_layer`.
    decisions: bool (queries, tokens), see `prompts.EncodedQuery.decisions`.
    prompt_ends: int64 (queries,), the prompts' last tokens. opens: bool (queries,),
        whether the response begins by opening its thinking.
    queries: of the whole batch, all processes' together.
    """

    merged = OnShelf()

    def __init__(
        self,
        *,
        calls: Sequence[Call],
        experts: Sequence[torch.Tensor],
        merged: torch.Tensor,
        counted: torch.Tensor,
        patterns: torch.Tensor,
        token_weights: torch.Tensor,
        shares: torch.Tensor,
        decisions: torch.Tensor | None = None,
        prompt_ends: torch.Tensor | None = None,
        opens: torch.Tensor | None = None,
        queries: int | None = None,
        shelf: Shelf | None = None,
    ) -> None:
        self.shelf = shelf or Shelf()
        self.calls = calls
        self.experts = ShelvedList(experts, self.shelf)
        self.merged = merged
        self.counted = counted
        self.patterns = patterns
        self.token_weights = token_weights
        self.shares = self.weights = shares
        self.decisions = torch.zeros_like(counted) if decisions is None else decisions
        none = torch.zeros_like(patterns)
        self.prompt_ends = none if prompt_ends is None else prompt_ends
        self.opens = none.bool() if opens is None else opens
        self.queries = len(counted) if queries is None else queries

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
