"""What the pre-pass of large models takes: memory and time, computed and measured.

    python benchmarks/performance/large_models.py [--measured qwen2.5-1.5b,qwen3-4b]

First, for published models of 1.5 to 70 billion parameters, what the estimate of
`mergekit-rpam check` says of the pre-pass by its defaults: peak memory, activations,
floating-point operations, and the time that those take at the rates of `--teraflops`
and `--terabytes` a second, which are assumed and not measured. Prompts and responses
have real lengths, cut to `--max-tokens`.

Then the estimate of memory is held against a pre-pass that is run here: pairs of random
bf16 checkpoints with one layer in those shapes, a small vocabulary and few queries,
each in a process of its own. A layer is solved at a time, so that a model's peak is
that of one of its layers, and of its embeddings and head.
"""

import random
import tempfile
from pathlib import Path

import torch
from _machine import command_line, describe, own_process, table
from _random_pairs import (
    FULL,
    RESPONSE_TOKENS,
    _draw,
    fit_pair,
    full_config,
    prompts,
    small_config,
    write_pair,
)

from rpam_mergekit.chat.prompts import Batch, EncodedQuery, make_batches
from rpam_mergekit.checks.estimate import Rates, count_work, peak_bytes
from rpam_mergekit.prepass.memory import activation_bytes
from rpam_mergekit.replay.decoder import Decoder
from rpam_mergekit.routing.figures import SCALES
from rpam_mergekit.routing.holdout import split_queries
from rpam_mergekit.settings import RpamSettings

GIB = 2**30


def queries_of(per_pattern: int, most: int) -> list[EncodedQuery]:
    """Return queries with the lengths of real ones, at most `most` tokens long."""
    rng = random.Random(1)
    found = []
    for ids, pattern in prompts(per_pattern):
        length = len(ids) + _draw(RESPONSE_TOKENS[pattern], rng)
        if len(ids) < most:
            tokens = (1,) * min(most, length)
            found.append(EncodedQuery(tokens, len(ids), pattern))
    return found


class Estimate:
    """What `check` says of a model's pre-pass, before it is written as text."""

    def __init__(self, config, queries: list[EncodedQuery], settings: RpamSettings):
        decoder = Decoder(config)
        solving, held_out = split_queries(queries, settings.held_out, settings.seed)
        batches = make_batches(solving, settings)
        probes: list[Batch] = make_batches(held_out, settings) * 2
        own = dict(decoder.model.named_parameters())
        outside = [v.shape for n, v in own.items() if ".layers." not in n]
        self.parameters = sum(v.numel() for v in own.values())
        self.layer = sum(p.numel() for p in decoder.layers[0].parameters())
        self.peak = peak_bytes(decoder, outside, batches, settings)
        width = config.hidden_size
        self.activations = activation_bytes(batches, width)
        self.activations += activation_bytes(probes, width, 2 + len(SCALES))
        self.work = count_work(decoder, batches, settings, probes=probes)


def settings_of(**changes) -> RpamSettings:
    return RpamSettings.model_validate({"calibration": "c", **changes})


def make(folder: Path, shape: str, per_pattern: int) -> None:
    config = full_config(shape, 1)
    config.vocab_size = small_config().vocab_size
    config.tie_word_embeddings = False
    write_pair(folder, config, per_pattern, torch.bfloat16)


def estimated(shape: str, per_pattern: int, parameters: dict) -> tuple[int, int]:
    """Return the layer's parameters and the bytes that `check` says a run takes."""
    config = full_config(shape, 1)
    config.vocab_size = small_config().vocab_size
    config.tie_word_embeddings = False
    queries = queries_of(per_pattern, parameters["max_tokens"])
    found = Estimate(config, queries, settings_of(**parameters))
    return found.layer, found.peak + found.activations


def main() -> None:
    args = command_line(
        __doc__,
        quick={"models": "qwen2.5-1.5b", "measured": "tiny", "per_pattern": 8},
        models=(",".join(FULL), "to compute for"),
        per_pattern=(512, "queries"),
        max_tokens=2048,
        teraflops=(400.0, "a second, in bfloat16, of a large matrix product"),
        terabytes=(2.5, "a second, of memory"),
        measured=("qwen2.5-1.5b,qwen3-4b,qwen2.5-7b", "to run here"),
        queries=(2, "per pattern, of what is run"),
        longest=(512, "tokens of a query of what is run"),
        steps=(3, "of what is run"),
    )
    print(describe())
    queries = queries_of(args.per_pattern, args.max_tokens)
    rates = Rates(args.teraflops * 1e12, args.terabytes * 1e12)
    rows = []
    for name in args.models.split(","):
        found = Estimate(full_config(name), queries, settings_of())
        rows.append(
            [
                name,
                f"{found.parameters / 1e9:.1f}",
                f"{found.layer / 1e6:.0f}",
                f"{found.peak / GIB:.1f}",
                f"{found.activations / GIB:.0f}",
                f"{found.work.operations / 1e15:.0f}",
                f"{rates.seconds(found.work) / 60:.0f}",
            ]
        )
    print(
        f"\n{len(queries)} queries, {found.work.tokens} tokens with padding; computed "
        f"for {args.teraflops:g} TFLOP/s and {args.terabytes:g} TB/s:\n"
    )
    head = ["model", "parameters, 10^9", "a layer, 10^6", "peak memory, GiB"]
    head += ["activations, GiB", "operations, 10^15", "minutes"]
    print(table(head, rows))

    parameters = {"max_tokens": args.longest, "steps": args.steps}
    rows = []
    for name in filter(None, args.measured.split(",")):
        layer, expected = estimated(name, args.queries, parameters)
        with tempfile.TemporaryDirectory() as folder:
            own_process(make, Path(folder), name, args.queries)
            run = own_process(run_pair, Path(folder), parameters)
        off = expected / run.anonymous - 1
        row = [name, f"{layer / 1e6:.0f}", f"{expected / GIB:.2f}"]
        rows.append([*row, f"{run.anonymous / GIB:.2f}", f"{100 * off:+.0f}"])
    print(
        f"\nrun here, a layer each, {2 * args.queries} queries of at most "
        f"{args.longest} tokens, {args.steps} steps:\n"
    )
    head = ["shape of", "a layer, 10^6", "memory computed, GiB", "measured, GiB"]
    print(table([*head, "computed is off by, %"], rows))


def run_pair(folder: Path, parameters: dict) -> None:
    fit_pair(folder, **parameters)


if __name__ == "__main__":
    main()
