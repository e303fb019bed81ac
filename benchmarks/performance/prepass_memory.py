"""Does the pre-pass's memory grow with the number of layers?

    python benchmarks/performance/prepass_memory.py [--quick]

Runs the pre-pass, from the config to the coefficients file, on pairs of random bf16
checkpoints of 8, 16, 32 and 64 decoder layers of one size and the same prompts, and
loads both models whole for comparison, every run in a process of its own. Peaks are
above what interpreter and libraries take.

Anonymous memory is what a process has written itself and must be flat. Mapped memory is
pages of the checkpoint files. transformers leaves the weights of a whole model there,
so that the two are compared by their resident memory, anonymous and mapped together.
"""

import shutil
import tempfile
from pathlib import Path

import torch
from _machine import command_line, describe, mib, numbers, own_process, table
from _random_pairs import checkpoint_bytes, fit_pair, small_config, write_pair
from transformers import AutoModelForCausalLM

FLAT = 0.10  # how much the largest peak may lie above the smallest


def make(folder: Path, hidden: int, layers: int, per_pattern: int) -> int:
    """Write a pair; return the bytes of one checkpoint."""
    config = small_config(hidden, layers, intermediate_size=4 * hidden)
    write_pair(folder, config, per_pattern, torch.bfloat16)
    return checkpoint_bytes(folder)


def pre_pass(folder: Path, granularity: str, per_pattern: int, tokens: str) -> None:
    # Epochs repeat the same steps: they cost time, no memory.
    fit_pair(
        folder,
        granularity=granularity,
        epochs=1,
        queries_per_pattern=per_pattern,
        tokens=tokens,
    )


def whole(folder: Path) -> float:
    """Load both models as they are and read every weight."""
    models = [
        AutoModelForCausalLM.from_pretrained(folder / pattern, dtype="auto")
        for pattern in ("long", "short")
    ]
    return sum(float(p.detach().sum()) for model in models for p in model.parameters())


def main() -> None:
    args = command_line(
        __doc__,
        quick={"layers": "2,16", "hidden": 64, "per_pattern": 2},
        layers="8,16,32,64",
        hidden=1024,
        per_pattern=(16, "queries"),
        granularity="low_rank",
        tokens="prompt",
        folder=(Path, "for the pairs, on a large disk"),
    )
    rows, peaks, below = [], [], []
    for layers in numbers(args.layers):
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            folder = Path(name)
            made = own_process(make, folder, args.hidden, layers, args.per_pattern)
            ours = own_process(
                pre_pass, folder, args.granularity, args.per_pattern, args.tokens
            )
            both = own_process(whole, folder)
            shutil.rmtree(folder / "short")
        peaks.append(ours.anonymous)
        if layers >= 16:
            below.append(ours.resident < both.resident)
        figures = [
            mib(value)
            for run in (ours, both)
            for value in (run.anonymous, run.mapped, run.resident)
        ]
        rows.append([layers, mib(made.value), *figures, f"{ours.seconds:.0f}"])
        print(*rows[-1], flush=True)
    head = ["layers", "a checkpoint, MiB", "pre-pass: anonymous", "mapped", "resident"]
    head += ["both whole: anonymous", "mapped", "resident", "pre-pass, seconds"]
    print(describe())
    print(
        f"{args.hidden} wide, bf16, {args.per_pattern} queries per pattern of real "
        f"lengths ({args.tokens}), granularity {args.granularity}; peaks in MiB"
    )
    print("\n" + table(head, rows))
    rise = max(peaks) / min(peaks) - 1
    print(
        f"\nanonymous peak: the largest {100 * rise:.1f} % above the smallest "
        f"({'flat' if rise <= FLAT else 'NOT flat'} within {100 * FLAT:.0f} %)"
    )
    if below:
        print(
            "from 16 layers on, resident, below both models whole: "
            f"{'yes' if all(below) else 'NO'}"
        )


if __name__ == "__main__":
    main()
