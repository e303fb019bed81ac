"""The published procedure, written plainly; what `speed.py` and `full_size.py` beat.

From the words of the paper (arXiv 2601.03506), for these benchmarks: decoder layer
after decoder layer, 50 epochs of Adam with batches of 16 prompts of one pattern, a
merging coefficient per weight element (or per tensor, or a low-rank field of them) from
0.5 on, the summed squared error plus omega times the contrastive term. Both models are
in memory whole.

Where the authors' code departs from the paper, this follows the code in what it costs
(prompts are padded to 1024 tokens, here on the right; both experts' outputs of a layer
are computed again at every step) and the paper in the problem that is solved (padding
does not count, each expert runs on its own stream, coefficients are float32), so that
it solves the same problem as rpam-mergekit.

It is no command; for decoders like Qwen2's, Qwen3's and Llama's.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM


@dataclass(frozen=True)
class Published:
    """The published settings; `layers`: how many from the first on (None: all)."""

    granularity: str = "element"  # or low_rank, or tensor
    rank: int = 16
    epochs: int = 50
    batch_size: int = 16
    padded: int = 1024
    learning_rate: float = 0.01
    contrastive_weight: float = 1000.0
    temperature: float = 0.1
    initial_weight: float = 0.5
    layers: int | None = None
    seed: int = 0
    device: str = "cpu"


@dataclass
class Batch:
    """Prompts of one pattern; hidden states are (prompts, padded tokens, width)."""

    ids: torch.Tensor
    real: torch.Tensor  # bool (prompts, padded tokens)
    positive: str
    streams: dict[str, torch.Tensor] = field(default_factory=dict)
    mask: torch.Tensor = field(init=False)  # bool (prompts, 1, tokens, tokens)

    def __post_init__(self) -> None:
        length = self.real.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        self.mask = causal.to(self.real.device) & self.real[:, None, None, :]


class Plain:
    """Both models, whole, and the coefficients that `run` finds."""

    def __init__(self, folder: Path, settings: Published) -> None:
        self.settings = settings
        self.models = {
            pattern: AutoModelForCausalLM.from_pretrained(
                folder / pattern, dtype=torch.float32
            ).to(settings.device)
            for pattern in ("long", "short")
        }
        for model in self.models.values():
            model.eval().requires_grad_(False)
        self.coefficients: dict[str, torch.Tensor] = {}
        self.seconds: list[float] = []  # per layer

    def run(self, prompts: Sequence[tuple[list[int], str]]) -> dict[str, torch.Tensor]:
        """Return the coefficient of every weight of the layers: Short-CoT's share."""
        batches = self._batches(prompts)
        count = len(self.models["long"].model.layers)
        for index in range(min(self.settings.layers or count, count)):
            began = time.perf_counter()
            self._solve(index, batches)
            if self.settings.device.startswith("cuda"):
                torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - began)
        return self.coefficients

    @torch.no_grad()
    def _batches(self, prompts: Sequence[tuple[list[int], str]]) -> list[Batch]:
        batches, size = [], self.settings.batch_size
        embeddings = {p: m.model.embed_tokens.weight for p, m in self.models.items()}
        change = embeddings["short"] - embeddings["long"]
        merged = embeddings["long"] + self.settings.initial_weight * change
        for pattern in ("long", "short"):
            chosen = [ids for ids, label in prompts if label == pattern]
            for start in range(0, len(chosen), size):
                batch = self._pad(chosen[start : start + size], pattern)
                for name, table in {**embeddings, "merged": merged}.items():
                    batch.streams[name] = table[batch.ids]
                batches.append(batch)
        return batches

    def _pad(self, prompts: Sequence[list[int]], pattern: str) -> Batch:
        ids = torch.zeros(len(prompts), self.settings.padded, dtype=torch.long)
        real = torch.zeros_like(ids, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            kept = prompt[: self.settings.padded]
            ids[row, : len(kept)] = torch.tensor(kept)
            real[row, : len(kept)] = True
        device = self.settings.device
        return Batch(ids.to(device), real.to(device), pattern)

    def _solve(self, index: int, batches: list[Batch]) -> None:
        layers = {
            p: dict(self._layer(p, index).named_parameters()) for p in self.models
        }
        leaves = {name: self._leaves(w) for name, w in layers["long"].items()}

        def merged() -> dict[str, torch.Tensor]:
            return {
                name: weight + _field(leaves[name]) * (layers["short"][name] - weight)
                for name, weight in layers["long"].items()
            }

        optimiser = torch.optim.Adam(
            [leaf for parts in leaves.values() for leaf in parts],
            lr=self.settings.learning_rate,
        )
        rng = random.Random(self.settings.seed)
        for _ in range(self.settings.epochs):
            for batch in rng.sample(batches, len(batches)):
                with torch.no_grad():
                    experts = {p: self._forward(p, index, batch) for p in layers}
                optimiser.zero_grad()
                hidden = self._forward("merged", index, batch, merged())
                self._loss(hidden, experts, batch).backward()
                optimiser.step()
        with torch.no_grad():
            for batch in batches:
                after = {p: self._forward(p, index, batch) for p in layers}
                after["merged"] = self._forward("merged", index, batch, merged())
                batch.streams = after
        for name, parts in leaves.items():
            self.coefficients[f"model.layers.{index}.{name}"] = _field(parts).detach()

    def _leaves(self, weight: torch.Tensor) -> list[torch.Tensor]:
        """Return what is optimised for a weight; `_field` makes coefficients of it."""
        initial, granularity = self.settings.initial_weight, self.settings.granularity
        if granularity == "low_rank" and weight.dim() == 2:
            rows, columns = weight.shape
            rank = self.settings.rank
            leaves = [
                torch.full((rows, 1), initial),
                torch.zeros(1, columns),
                0.01 * torch.randn(rows, rank),
                torch.zeros(rank, columns),
            ]
        else:
            shape = () if granularity == "tensor" else weight.shape
            leaves = [torch.full(shape, initial)]
        return [leaf.to(weight.device).requires_grad_() for leaf in leaves]

    def _layer(self, pattern: str, index: int) -> torch.nn.Module:
        return self.models[pattern].model.layers[index]

    def _forward(
        self,
        stream: str,
        index: int,
        batch: Batch,
        weights: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Return what a layer makes of a stream, by default with its own weights."""
        hidden = batch.streams[stream]
        owner = "long" if stream == "merged" else stream
        layer = self._layer(owner, index)
        positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
        arguments = {
            "attention_mask": batch.mask,
            "position_ids": positions,
            "position_embeddings": self.models[owner].model.rotary_emb(
                hidden, positions
            ),
        }
        output = functional_call(layer, weights or {}, (hidden,), arguments)
        return output[0] if isinstance(output, tuple) else output

    def _loss(
        self, hidden: torch.Tensor, experts: dict[str, torch.Tensor], batch: Batch
    ) -> torch.Tensor:
        negative = "short" if batch.positive == "long" else "long"
        real = batch.real.unsqueeze(-1)
        m, p, n = (
            x * real for x in (hidden, experts[batch.positive], experts[negative])
        )
        loss = (m - p).square().sum()
        if not self.settings.contrastive_weight:
            return loss
        units = [torch.nn.functional.normalize(x.flatten(1), dim=1) for x in (m, p, n)]
        near = (units[0] * units[1]).sum(dim=1) / self.settings.temperature
        far = units[0] @ units[2].T / self.settings.temperature
        everything = torch.cat([near.unsqueeze(1), far], dim=1).logsumexp(dim=1)
        return loss + self.settings.contrastive_weight * (everything - near).mean()


def _field(leaves: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the coefficients of a weight."""
    if len(leaves) == 1:
        return leaves[0]
    row, column, left, right = leaves
    return row + column + left @ right
