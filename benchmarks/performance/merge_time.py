"""What does the merge itself cost, behind the pre-pass, against mergekit's `linear`?

    python benchmarks/performance/merge_time.py [--folder /tmp] [--quick]

Makes a pair of bf16 checkpoints of about 1 GB each and a coefficients file per
granularity (by the pre-pass on two queries, one epoch). Then merges with
`coefficients:` only and with mergekit's own `linear`, interleaved, each run in a
process of its own: time of `mergekit.merge.run_merge`, the libraries being imported
before, and peak memory. `linear` is run as it is used by default (in the checkpoints'
bf16) and in float32, which is what rpam computes in. "Digests" is the part of the run
that reads both checkpoints to tell whether the coefficients belong to them: the same
function is timed once more right behind the merge.

Needs about 6 GB on the disk of --folder.
"""

import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch
from _machine import (
    MIB,
    Outcome,
    command_line,
    describe,
    mib,
    own_process,
    spread,
    table,
)
from _random_pairs import (
    checkpoint_bytes,
    fit_pair,
    rpam_config,
    small_config,
    write_pair,
)
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from rpam_mergekit.formats.coefficients import CoefficientsFile
from rpam_mergekit.merging.hooks import activate
from rpam_mergekit.models.weights import content_digests

LIMITS = {"tensor": 1.25, "low_rank": 1.25, "element": 1.6}
MEMORY = 0.10  # above linear's peak, plus one tensor's coefficients
LINEAR = "linear, bf16"


def make(folder: Path, hidden: int, layers: int) -> int:
    """Write a pair; return the bytes of one checkpoint."""
    config = small_config(hidden, layers, intermediate_size=5 * hidden)
    write_pair(folder, config, 1, torch.bfloat16, longest=16)
    return checkpoint_bytes(folder)


def config_of(folder: Path, variant: str) -> dict:
    """Return the merge config of a variant: a granularity, or a kind of `linear`."""
    models = [{"model": str(folder / name)} for name in ("long", "short")]
    if variant in LIMITS:
        config = rpam_config(folder, coefficients=str(coefficients(folder, variant)))
        del config["parameters"]["calibration"]
        return config
    for model in models:
        model["parameters"] = {"weight": 0.5}
    config = {"merge_method": "linear", "models": models}
    if variant != LINEAR:
        config |= {"dtype": "float32", "out_dtype": "bfloat16"}
    return config


def coefficients(folder: Path, granularity: str) -> Path:
    return folder / f"{granularity}.safetensors"


def solve(folder: Path, granularity: str) -> int:
    """Make a coefficients file; return the bytes of its largest tensor's."""
    path = coefficients(folder, granularity)
    settings = {"granularity": granularity, "epochs": 1, "max_tokens": 16}
    fit_pair(folder, out=path, **settings)
    file = CoefficientsFile(path)
    return max(
        sum(value.nbytes for value in file.parts(name).values()) for name in file.names
    )


def merge(config: dict, out: Path) -> tuple[float, float]:
    """Merge into `out` and remove it; return seconds, and those of the digests."""
    activate()
    parsed = MergeConfiguration.model_validate(config)
    began = time.perf_counter()
    run_merge(parsed, str(out), MergeOptions(quiet=True, device="cpu"))
    merged = time.perf_counter()
    if parsed.merge_method == "rpam":
        content_digests(parsed.referenced_models())
    digested = time.perf_counter()
    shutil.rmtree(out)
    return merged - began, digested - merged


def report(runs: dict[str, list[Outcome]], largest: dict[str, int]) -> None:
    def seconds(variant: str) -> list[float]:
        return [run.value[0] for run in runs[variant]]

    def peak(variant: str) -> int:
        return max(run.anonymous for run in runs[variant])

    rows = []
    for variant, outcomes in runs.items():
        ratios = [
            ours / linear
            for ours, linear in zip(seconds(variant), seconds(LINEAR), strict=True)
        ]
        without = [
            (run.value[0] - run.value[1]) / linear
            for run, linear in zip(outcomes, seconds(LINEAR), strict=True)
        ]
        digests = (
            spread((run.value[1] for run in outcomes), ".3f")
            if variant in LIMITS
            else ""
        )
        verdict = memory = ""
        if variant in LIMITS:
            limit = LIMITS[variant]
            held = sorted(ratios)[len(ratios) // 2] <= limit
            verdict = f"{'yes' if held else 'NO'} ({limit})"
            allowed = (1 + MEMORY) * peak(LINEAR) + largest[variant]
            memory = f"{'yes' if peak(variant) <= allowed else 'NO'} ({mib(allowed)})"
        resident = max(run.resident for run in outcomes)
        row = [variant, spread(seconds(variant)), digests, spread(ratios)]
        row += [spread(without), verdict, mib(peak(variant)), mib(resident), memory]
        rows.append(row)
    head = ["", "seconds, median (least, most)", "of which digests"]
    head += [f"times {LINEAR}", "without digests", "within", "anonymous peak, MiB"]
    head += ["resident peak, MiB", "within, MiB"]
    print("\n" + table(head, rows))


def main() -> None:
    args = command_line(
        __doc__,
        quick={"hidden": 128, "layers": 2, "repetitions": 1},
        hidden=1536,
        layers=12,
        granularities="tensor,low_rank,element",
        repetitions=5,
        folder=(Path, "for the checkpoints"),
    )
    wanted = args.granularities.split(",")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        size = own_process(make, folder, args.hidden, args.layers).value
        largest = {g: own_process(solve, folder, g).value for g in wanted}
        runs: dict[str, list[Outcome]] = {
            variant: [] for variant in (LINEAR, "linear, float32", *wanted)
        }
        for _ in range(args.repetitions):
            for variant, outcomes in runs.items():
                with suppress(AttributeError):
                    os.sync()  # what the last run wrote is not this one's time
                arguments = config_of(folder, variant), folder / "out"
                outcomes.append(own_process(merge, *arguments))
    print(describe())
    files = ", ".join(f"{g} {largest[g] / MIB:.2f}" for g in wanted)
    print(
        f"checkpoints of {size / 1e9:.2f} GB in bf16, {args.repetitions} repetitions, "
        f"interleaved; the largest tensor's coefficients in MiB: {files}"
    )
    report(runs, largest)


if __name__ == "__main__":
    main()
