"""What a merge will take: time, peak memory and disk of its pre-pass, by formula.

Floating-point operations and bytes are counted from the shapes of a decoder layer and
the encoded calibration queries; how long they take is measured for a second on the
device. Attention, mixtures of experts and the optimiser are counted roughly.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rpam_mergekit.chat.prompts import Batch
from rpam_mergekit.prepass.fields import count_numbers
from rpam_mergekit.replay.decoder import Decoder
from rpam_mergekit.replay.recording import BLOCK
from rpam_mergekit.routing.figures import SCALES
from rpam_mergekit.settings import RpamSettings

FLOAT = 4  # bytes
MEASURED = 0.3  # seconds, of either rate
LARGEST = 2048  # rows and columns of the matrix product that is timed
# Of the rate of one large matrix product, what a layer reaches. This and KEPT were
# fitted to pairs as those of benchmarks/performance/prepass_memory.py, 256 to 1024
# wide.
EFFICIENCY = 0.75
# Passes over a layer's weights per step besides its matrix products: the merged weight
# and its gradient, of one other model; and over the coefficients, Adam's.
PASSES = 12
# Of a layer's inputs and outputs per token, how often the backward pass has them.
KEPT = 3
ADAM = 5  # numbers per coefficient: itself, its gradient (twice), two moments


@dataclass(frozen=True)
class Work:
    """What the pre-pass computes: floating-point operations, and bytes it moves."""

    operations: float
    moved: float
    tokens: int  # with padding


@dataclass(frozen=True)
class Rates:
    """Of this device, measured: operations and bytes a second."""

    operations: float
    moved: float

    def seconds(self, work: Work) -> float:
        """Return how long `work` takes."""
        computing = work.operations / (EFFICIENCY * self.operations)
        return computing + work.moved / self.moved


def count_work(
    decoder: Decoder,
    batches: Sequence[Batch],
    settings: RpamSettings,
    experts: int = 2,
    probes: Sequence[Batch] = (),
) -> Work:
    """Return what the pre-pass of `experts` models, the base included, computes.

    Every expert goes through each layer once, the merged model twice, to know the gap
    before and after; a step is a forward and a backward pass, twice as long, over one
    batch. `probes`, the held-out queries and as many that are solved on, go once
    through each layer by every expert and at every scale.
    """
    layers = len(decoder.layers)
    optimised = max(1, round(settings.layers * layers))
    once = experts + 2 + (experts if optimised < layers else 0)
    every = [p for layer in decoder.layers for p in layer.parameters()]
    weights = sum(p.numel() for p in every)
    numbers = sum(
        count_numbers(p.shape, settings.granularity, settings.rank) for p in every
    )
    steps = settings.steps_of(len(batches)) * optimised / layers
    forward = sum(_forward(decoder, batch) for batch in batches)
    measured = sum(_forward(decoder, batch) for batch in probes)
    passes = 3 * steps / len(batches)
    fields = 0 if settings.granularity != "low_rank" else 6 * settings.rank
    others = experts - 1
    return Work(
        forward * (once + passes)
        + measured * (experts + len(SCALES))
        + fields * weights * steps * others,
        PASSES * FLOAT * (weights * (steps + 2) + numbers * steps) * others,
        sum(batch.input_ids.numel() for batch in batches),
    )


def _forward(decoder: Decoder, batch: Batch) -> float:
    """Return the operations of all layers' forward pass over one batch."""
    config = decoder.model.config.get_text_config()
    queries, length = batch.input_ids.shape
    used = sum(
        p.numel() * _share(p, config)
        for layer in decoder.layers
        for p in layer.parameters()
        if p.dim() > 1
    )
    width: int = config.hidden_size
    attention = 4 * width * length * len(decoder.layers)
    return queries * length * (2 * used + attention)


def _share(parameter: torch.Tensor, config: object) -> float:
    """Return how much of a weight a token uses: its own of fused experts."""
    chosen = getattr(config, "num_experts_per_tok", None)
    if parameter.dim() < 3 or not isinstance(chosen, int):
        return 1.0
    return min(1.0, chosen / parameter.shape[0])


def layer_bytes(
    decoder: Decoder,
    batches: Sequence[Batch],
    settings: RpamSettings,
    experts: int = 2,
) -> int:
    """Return the peak memory of optimising one layer, without activations on the store.

    In float32: base and task vectors, the merged weights and their gradients, the
    coefficients with Adam's state, and what the backward pass of the largest batch
    keeps.
    """
    size = 8 if settings.solver == "lbfgs" else FLOAT
    largest = 0
    tokens = max(batch.input_ids.numel() for batch in batches)
    for layer in decoder.layers:
        weights = list(layer.parameters())
        numbers = sum(p.numel() for p in weights)
        widths = sum(sum(p.shape[-2:]) for p in weights if p.dim() > 1)
        coefficients = (experts - 1) * sum(
            count_numbers(p.shape, settings.granularity, settings.rank) for p in weights
        )
        held = (experts + 2) * numbers * size
        held += ADAM * coefficients * size
        held += KEPT * widths * tokens * size
        largest = max(largest, held)
    return largest


def outside_bytes(shapes: Sequence[Sequence[int]]) -> int:
    """Return what the merged embeddings, final norm and head take, in float32.

    They are held while the last layer is solved (the term of the opening looks through
    them) and while the routing is measured.
    """
    return sum(torch.Size(shape).numel() * FLOAT for shape in shapes)


def merging_bytes(shapes: Sequence[Sequence[int]], experts: int = 2) -> int:
    """Return the peak memory of merging embeddings, final norm and head.

    The merged ones and, of the largest tensor, all models', each as large as in
    float32; base and task vectors, the product, the sum and the rounded result are of
    some rows only.
    """
    largest = max((torch.Size(shape).numel() for shape in shapes), default=0)
    at_a_time = experts * largest + (experts + 3) * min(BLOCK, largest)
    return outside_bytes(shapes) + FLOAT * at_a_time


def peak_bytes(
    decoder: Decoder,
    outside: Sequence[Sequence[int]],
    batches: Sequence[Batch],
    settings: RpamSettings,
    experts: int = 2,
) -> int:
    """Return the pre-pass's peak memory, without activations on the store.

    outside: the shapes of what is outside the layers.
    """
    layer = layer_bytes(decoder, batches, settings, experts)
    if settings.opening_weight:
        layer += outside_bytes(outside)
    return max(layer, merging_bytes(outside, experts))


def measure(
    device: torch.device | str, tokens: int, rows: int, columns: int, dtype: str
) -> Rates:
    """Return this device's rates, for matrix products of about the pre-pass's sizes.

    Takes less than two seconds.
    """
    number = getattr(torch, dtype)
    tokens, rows, columns = (min(LARGEST, max(1, n)) for n in (tokens, rows, columns))
    left = torch.ones(tokens, rows, device=device, dtype=number)
    right = torch.ones(rows, columns, device=device, dtype=number)
    vector = torch.ones(1 << 22, device=device)
    product = _seconds(lambda: left @ right, device)
    added = _seconds(lambda: vector + vector, device)
    return Rates(2 * tokens * rows * columns / product, FLOAT * vector.numel() / added)


def _seconds(run: Callable[[], torch.Tensor], device: torch.device | str) -> float:
    """Return the median seconds of one `run`."""
    times: list[float] = []
    end = time.perf_counter() + MEASURED
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 1000):
        start = time.perf_counter()
        run()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]
