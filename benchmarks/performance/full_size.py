"""The pre-pass on checkpoints of full size, on a GPU.

    python benchmarks/performance/full_size.py [--shapes qwen3-4b] [--layers 4]
    python benchmarks/performance/full_size.py --device cpu --shapes tiny --layers 2

Makes pairs of random bf16 checkpoints in the shapes of Qwen2.5-1.5B and Qwen3-4B and
runs the pre-pass on 64 + 64 queries of real lengths, prompts only and with responses
(cut to `--max-tokens`): seconds per decoder layer, total, peak memory of GPU and host,
and the share of the GPU's bf16 matrix rate, which is measured in the same run. Only
matrix products on real tokens count as work: both experts, the merged stream before and
after, and every step's forward and backward pass. Then `_published.py`, the published
procedure, on a few layers for a few epochs; its time is given per layer and epoch, the
pre-pass's beside it in the same unit, and nothing is extrapolated.

Every run is a process of its own. Needs disk for both checkpoints of a pair (16 GB for
Qwen3-4B, less with --layers, which makes shorter models) under --folder.
"""

import statistics
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from _machine import Outcome, command_line, describe, mib, own_process, table
from _published import Plain, Published
from _random_pairs import fit_pair, full_config, prompts, write_pair
from transformers import AutoModelForCausalLM

SHAPES = ("qwen2.5-1.5b", "qwen3-4b", "tiny")


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def gpu_peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else 0


def make(
    folder: Path, shape: str, layers: int | None, queries: int, device: str
) -> list[tuple[int, int]]:
    """Write a pair and its queries; return the tokens of prompts and responses."""
    config = full_config(shape, layers)
    return write_pair(folder, config, queries, torch.bfloat16, device=device)


def pre_pass(folder: Path, device: str, parameters: Mapping[str, Any]) -> dict:
    """Run the pre-pass; return the seconds of every layer, the total, the GPU's peak.

    A layer ends when it is on disk.
    """
    written: dict[str, float] = {}
    ended = threading.Event()
    watcher = threading.Thread(target=watch, args=(folder, written, ended))
    watcher.start()
    began = time.perf_counter()
    try:
        fit_pair(folder, device, **parameters)
    finally:
        total = time.perf_counter() - began
        ended.set()
        watcher.join()
    # The first file is what lies outside the layers: they begin when it is there.
    layers = [after - before for before, after in pairwise(sorted(written.values()))]
    return {"layers": layers, "total": total, "gpu": gpu_peak(device)}


def watch(folder: Path, written: dict[str, float], ended: threading.Event) -> None:
    """Note when each solved layer was written, until the pre-pass has `ended`.

    The pre-pass keeps them in a folder beside the coefficients file while it runs.
    """
    while not ended.wait(0.01):
        for path in folder.glob("*.unfinished/*/*.safetensors"):
            with suppress(OSError):  # it has been removed at the end
                written.setdefault(path.name, path.stat().st_mtime)


def counted(lengths: list[tuple[int, int]], tokens: str, most: int) -> int:
    """Return the tokens of the queries, left out or cut by `max_tokens`."""
    kept = [(prompt, response) for prompt, response in lengths if prompt <= most]
    if tokens == "prompt":
        return sum(prompt for prompt, _ in kept)
    return sum(min(most, prompt + response) for prompt, response in kept)


def layer_work(shape: str, epochs: int, tokens: int) -> float:
    """Return the operations of a layer's matrix products over all of its passes."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(full_config(shape, 1))
    weights = model.model.layers[0].parameters()
    passes = 2 + 2 + 3 * epochs  # a backward pass is two forward ones
    return 2 * tokens * passes * sum(w.numel() for w in weights if w.dim() > 1)


def plainly(
    folder: Path, device: str, queries: int, layers: int, epochs: int, padded: int
) -> dict:
    """Run the published procedure on the first layers; return its figures."""
    settings = Published(epochs=epochs, layers=layers, padded=padded, device=device)
    plain = Plain(folder, settings)
    plain.run(prompts(queries))
    return {"layers": plain.seconds, "gpu": gpu_peak(device)}


def matrix_rate(device: str, dtype: str, size: int) -> float:
    """Return the operations a second of a product of two large square matrices."""
    kind = getattr(torch, dtype)
    one, two = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
    rates = []
    for _ in range(6):
        synchronize(device)
        began = time.perf_counter()
        for _ in range(4):
            torch.mm(one, two)
        synchronize(device)
        rates.append(4 * 2 * size**3 / (time.perf_counter() - began))
    return statistics.median(rates[1:])  # the first chooses a kernel


def row(name: str, tokens: int, share: float, run: Outcome) -> list[str]:
    found = run.value
    return [
        name,
        str(tokens),
        f"{statistics.median(found['layers']):.2f}",
        f"{min(found['layers']):.2f} to {max(found['layers']):.2f}",
        f"{found['total']:.1f}",
        mib(found["gpu"]) if found["gpu"] else "",
        mib(run.anonymous),
        mib(run.resident),
        f"{100 * share:.1f} %",
    ]


def main() -> None:
    args = command_line(
        __doc__,
        shapes="qwen2.5-1.5b,qwen3-4b",
        device="cuda",
        layers=(int, "make the models this short"),
        per_pattern=(64, "queries"),
        max_tokens=2048,
        granularity="low_rank",
        epochs=15,
        batch_size=16,
        plain_layers=1,
        plain_epochs=1,
        plain_padded=1024,
        folder=(Path, "for the checkpoints"),
    )
    unknown = set(args.shapes.split(",")) - set(SHAPES)
    if unknown:
        raise SystemExit(f"--shapes: unknown {sorted(unknown)}; known: {SHAPES}")
    cuda = args.device.startswith("cuda")
    start = "spawn" if cuda else "fork"  # CUDA does not work in forked processes
    if cuda and not (
        torch.backends.cuda.is_built()
        and own_process(torch.cuda.is_available, start=start).value
    ):
        raise SystemExit(
            "No CUDA device here: nothing measured. --device cpu --shapes tiny tries "
            "the script out."
        )
    size = 8192 if cuda else 1024
    rates = {
        dtype: own_process(matrix_rate, args.device, dtype, size, start=start).value
        for dtype in ("bfloat16", "float32")
    }
    rows, plain_rows = [], []
    for shape in args.shapes.split(","):
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            folder = Path(name)
            making = (folder, shape, args.layers, args.per_pattern, args.device)
            lengths = own_process(make, *making, start=start).value
            for tokens in ("prompt", "prompt+response"):
                count = counted(lengths, tokens, args.max_tokens)
                parameters = {
                    "granularity": args.granularity,
                    "epochs": args.epochs,
                    "batch_size": args.batch_size,
                    "max_tokens": args.max_tokens,
                    "tokens": tokens,
                }
                arguments = (folder, args.device, parameters)
                run = own_process(pre_pass, *arguments, start=start)
                each = statistics.median(run.value["layers"])
                rate = layer_work(shape, args.epochs, count) / each
                share = rate / rates["bfloat16"]
                rows.append(row(f"{shape}, {tokens}", count, share, run))
                print(*rows[-1], flush=True)
                if tokens == "prompt":
                    layer = each
            if args.plain_layers:
                arguments = (folder, args.device, args.per_pattern, args.plain_layers)
                arguments += (args.plain_epochs, args.plain_padded)
                plain = own_process(plainly, *arguments, start=start)
                each = statistics.median(plain.value["layers"]) / args.plain_epochs
                row_ = [shape, f"{each:.2f}", f"{layer / args.epochs:.2f}"]
                row_ += [f"{each / (layer / args.epochs):.1f}"]
                row_ += [mib(plain.value["gpu"]) if cuda else "", mib(plain.anonymous)]
                plain_rows.append(row_)
    print(describe(args.device))
    shown = ", ".join(f"{n} {rate / 1e12:.2f}" for n, rate in rates.items())
    print(
        f"{args.per_pattern} + {args.per_pattern} queries, granularity "
        f"{args.granularity}, {args.epochs} epochs, batches of {args.batch_size}; "
        f"matrix products in TFLOP/s: {shown}"
    )
    head = ["", "tokens", "seconds a layer, median", "least to most"]
    head += ["total, seconds", "GPU peak, MiB", "host anonymous peak, MiB"]
    head += ["host resident peak, MiB", "share of the bf16 matrix rate"]
    print("\n" + table(head, rows))
    if plain_rows:
        print(
            f"\nPlain procedure, {args.plain_layers} layers, {args.plain_epochs} "
            "epochs, against the pre-pass on prompts; per layer and epoch, by element "
            "in the plain one"
        )
        head = ["", "plain, seconds", "ours, seconds", "ratio", "plain's GPU peak, MiB"]
        head += ["host anonymous peak, MiB"]
        print("\n" + table(head, plain_rows))


if __name__ == "__main__":
    main()
