"""How large the coefficients file is, in percent of the model whose merge it repeats.

    python benchmarks/performance/coefficient_size.py [--hidden 512] [--quick]

For `low_rank` fields of several ranks: measured on the merge of a random pair of at
least 8 million parameters, and computed from shapes for published models. The
computed size is that of the file's numbers (float32, or float16 by `coefficient_dtype`)
and of its header; it is compared with the measured one.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from _machine import MIB, command_line, describe, table
from _random_pairs import checkpoint_bytes, fit_pair, small_config, write_pair
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from rpam_mergekit.prepass.fields import count_numbers

RANKS = (0, 4, 8, 16)
MEASURED = (
    (2, "float32"),
    (4, "float16"),
    (4, "float32"),
    (16, "float16"),
    (16, "float32"),
)
LIMIT = 2.0  # percent
MOST = 256  # the largest rank that the method takes
LEAST = 8_000_000  # parameters of a pair whose file is measured
PARTS = {1: ("element",), 2: ("row", "column", "left", "right")}
BYTES = {"bfloat16": 2, "float32": 4, "float16": 2}
OF_MODELS = ("bfloat16", "float32")


def published() -> dict[str, PretrainedConfig]:
    """Return configs with the shapes of published models."""
    return {
        "DeepSeek-R1-Distill-Qwen-1.5B": Qwen2Config(
            hidden_size=1536,
            intermediate_size=8960,
            num_hidden_layers=28,
            num_attention_heads=12,
            num_key_value_heads=2,
            vocab_size=151936,
            tie_word_embeddings=False,
        ),
        "DeepSeek-R1-Distill-Qwen-7B": Qwen2Config(
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            vocab_size=152064,
            tie_word_embeddings=False,
        ),
        "Qwen3-4B": Qwen3Config(
            hidden_size=2560,
            intermediate_size=9728,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=151936,
            tie_word_embeddings=True,
        ),
        "Llama-3.1-70B": LlamaConfig(
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
            vocab_size=128256,
            tie_word_embeddings=False,
        ),
    }


def shapes_of(config: PretrainedConfig) -> dict[str, torch.Size]:
    """Return the shapes of a model's tensors, tied ones once; makes no weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: weight.shape for name, weight in model.named_parameters()}


def parameters(shapes: Mapping[str, torch.Size]) -> int:
    """Return the number of parameters."""
    return sum(shape.numel() for shape in shapes.values())


def file_bytes(
    shapes: Mapping[str, torch.Size], rank: int, dtype: str = "float32"
) -> int:
    """Return the size of the coefficients file: its numbers, and where they are.

    The settings and the layers' reports, some kilobytes, are not counted.
    """
    numbers, header = 0, {}
    for name, shape in shapes.items():
        inside = ".layers." in name
        count = count_numbers(shape, "low_rank", rank) if inside else 1
        for part in PARTS[len(shape)] if inside else ("scalar",):
            if rank or part not in ("left", "right"):
                place = [4 * numbers, 4 * (numbers + count)]
                entry = {"dtype": "F32", "shape": list(shape), "data_offsets": place}
                header[f"{name}/{part}"] = entry
        numbers += count
    return BYTES[dtype] * numbers + len(json.dumps(header, separators=(",", ":")))


def largest_rank(shapes: Mapping[str, torch.Size], width: int) -> int | None:
    """Return the largest rank whose file is below the limit, None if none is."""
    whole = width * parameters(shapes)
    under = [r for r in range(MOST + 1) if 100 * file_bytes(shapes, r) < LIMIT * whole]
    return max(under, default=None)


def computed_rows(configs: Mapping[str, PretrainedConfig]) -> list[list[str]]:
    """Return for every model and dtype the file's share of the model by rank."""
    rows = []
    for name, config in configs.items():
        shapes = shapes_of(config)
        for dtype in OF_MODELS:
            width = BYTES[dtype]
            whole = width * parameters(shapes)
            half = file_bytes(shapes, RANKS[-1], "float16")
            sizes = [file_bytes(shapes, rank) for rank in RANKS]
            rank = largest_rank(shapes, width)
            rows.append(
                [
                    name,
                    f"{parameters(shapes) / 1e9:.2f}",
                    dtype,
                    *(f"{100 * size / whole:.2f}" for size in sizes),
                    f"{100 * half / whole:.2f}",
                    f"{sizes[-1] / MIB:.0f}",
                    "none" if rank is None else str(rank),
                ]
            )
    return rows


def measured_rows(
    config: PretrainedConfig, merges: Sequence[tuple[int, str]]
) -> list[list[str]]:
    """Return for every rank and dtype what a file takes, and what was computed."""
    shapes = shapes_of(config)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_pair(folder, config, 2, torch.bfloat16, longest=32)
        whole = checkpoint_bytes(folder)
        for rank, dtype in merges:
            path = fit_pair(folder, rank=rank, epochs=1, coefficient_dtype=dtype)
            size, expected = path.stat().st_size, file_bytes(shapes, rank, dtype)
            rows.append(
                [
                    str(rank),
                    dtype,
                    f"{size / MIB:.2f}",
                    f"{100 * size / whole:.2f}",
                    f"{50 * size / whole:.2f}",
                    f"{expected / MIB:.2f}",
                    f"{100 * (expected / size - 1):+.1f}",
                ]
            )
    return rows


def main() -> None:
    options = command_line(__doc__, quick={}, hidden=512, layers=3)
    config = small_config(options.hidden, options.layers)
    count = parameters(shapes_of(config))
    if count < LEAST:
        raise SystemExit(
            f"{count} parameters: at least {LEAST} are wanted. Raise --hidden"
        )
    torch.set_num_threads(1)
    print(
        f"Measured: a random pair of {count / 1e6:.1f} million parameters, width "
        f"{options.hidden}, {options.layers} layers, bfloat16.\n"
    )
    head = ["rank", "its dtype", "file, MiB", "% of bfloat16", "% of float32"]
    head += ["computed, MiB", "computed, % off"]
    merges = MEASURED[-1:] if options.quick else MEASURED
    print(table(head, measured_rows(config, merges)))
    shapes = shapes_of(config)
    found = (f"{d} {largest_rank(shapes, BYTES[d])}" for d in OF_MODELS)
    print(f"\nLargest rank under {LIMIT:.0f} % of it: {', '.join(found)}.")
    models = published()
    if options.quick:
        models = dict(list(models.items())[:1])
    print("\nComputed from shapes, in percent of the model:\n")
    head = ["model", "parameters, 10^9", "dtype", *(f"rank {r}" for r in RANKS)]
    head += [f"rank {RANKS[-1]} in float16", f"rank {RANKS[-1]}, MiB"]
    head += [f"largest rank under {LIMIT:.0f} %"]
    print(table(head, computed_rows(models)))
    print(f"\n{describe()}")


if __name__ == "__main__":
    main()
