"""Where does the pre-pass's time go?

    python benchmarks/performance/profile_prepass.py [--quick]

Runs the pre-pass on a pair of random checkpoints and prompts as long as those of the
authors' pool: once with a clock around each of its phases, and once under PyTorch's
profiler, for the share of every operation in the time of all.
"""

import argparse
import functools
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from _machine import describe, table
from _random_pairs import fit_pair, small_config, write_calibration, write_pair
from torch.profiler import ProfilerActivity, profile

from rpam_mergekit.formats.solved_layers import SolvedLayers
from rpam_mergekit.models.weights import ExpertWeights
from rpam_mergekit.prepass.run import PrePass

PHASES = {
    "solving": (PrePass, "_minimise"),
    "experts' outputs": (PrePass, "run_experts"),
    "gap before and after, merged stream": (PrePass, "layer_gap"),
    "loading weights": (ExpertWeights, "layer"),
    "recording": (PrePass, "_entered"),
    "solved layers to disk": (SolvedLayers, "__setitem__"),
}
SHOWN = 12


def clocked(seconds: dict[str, float]) -> None:
    """Put a clock around every phase."""
    for phase, (owner, name) in PHASES.items():
        original = getattr(owner, name)

        @functools.wraps(original)
        def timed(*args, _original=original, _phase=phase, **kwargs):
            began = time.perf_counter()
            try:
                return _original(*args, **kwargs)
            finally:
                seconds[_phase] += time.perf_counter() - began

        setattr(owner, name, timed)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--per-pattern", type=int, default=32, help="queries")
    parser.add_argument("--granularity", default="low_rank")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="a test of this script")
    args = parser.parse_args()
    if args.quick:
        args.hidden, args.layers, args.per_pattern, args.epochs = 64, 1, 4, 2
    settings = {"granularity": args.granularity, "tokens": "prompt"}
    seconds: dict[str, float] = defaultdict(float)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pair(folder, small_config(args.hidden, args.layers), torch.bfloat16)
        write_calibration(folder / "calibration.jsonl", args.per_pattern)
        fit_pair(folder, epochs=1, **settings)  # what is slow the first time only
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            fit_pair(folder, epochs=min(args.epochs, 3), **settings)
        clocked(seconds)
        began = time.perf_counter()
        fit_pair(folder, epochs=args.epochs, **settings)
        whole = time.perf_counter() - began
    print(describe())
    print(
        f"{args.hidden} wide, {args.layers} layers, {args.per_pattern} prompts per "
        f"pattern, granularity {args.granularity}, {args.epochs} epochs: {whole:.1f} s"
    )
    rows = [[phase, f"{100 * seconds[phase] / whole:.1f} %"] for phase in PHASES]
    rest = 100 * (1 - sum(seconds.values()) / whole)
    rows.append(["the rest (configs, digests, calibration file)", f"{rest:.1f} %"])
    print("\n" + table(["phase", "share of the time"], rows))
    events = sorted(profiled.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    rows = [
        [event.key, f"{100 * event.self_cpu_time_total / total:.1f} %", event.count]
        for event in events[:SHOWN]
    ]
    print("\n" + table(["operation", "share of its own time", "calls"], rows))


if __name__ == "__main__":
    main()
