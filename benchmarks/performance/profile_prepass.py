"""Where does the pre-pass's time go?

    python benchmarks/performance/profile_prepass.py [--quick]
    python benchmarks/performance/profile_prepass.py --config CONFIG

Runs the pre-pass on a pair of random checkpoints and prompts as long as those of the
authors' pool: once under Python's profiler, for the share of each of its phases in the
time of all, and once under PyTorch's, for that of every operation. A phase is a
function of the package, with all that it calls. With `--config` it is the pre-pass of
that config, and its phases only. The held-out queries, and as many that are solved on,
are counted with the experts' outputs where they go through the experts.
"""

import cProfile
import pstats
import tempfile
from pathlib import Path

import torch
from _machine import command_line, describe, table
from _random_pairs import fit_pair, small_config, write_pair
from torch.profiler import ProfilerActivity, profile

from rpam_mergekit.cli.main import main as mergekit_rpam

PHASES = {
    "solving": "prepass/layer.py:minimise",
    "experts' outputs": "prepass/run.py:run_experts",
    "gap before and after, merged stream": "prepass/run.py:layer_gap",
    "loading weights": "models/weights.py:layer",
    "recording": "replay/recording.py:streams",
    "measuring the routing, layers": "routing/probes.py:advance",
    "measuring the routing, heads": "routing/probes.py:operating_point",
    "solved layers to disk": "formats/solved_layers.py:__setitem__",
}
SHOWN = 12


def seconds_of(calls: pstats.Stats, phase: str) -> float:
    """Return the time in a function and what it calls, 0 if it was not called."""
    file, _, function = phase.partition(":")
    return sum(
        seconds
        for (path, _, name), (_, _, _, seconds, _) in calls.stats.items()
        if Path(path).as_posix().endswith(f"/{file}") and name == function
    )


def print_phases(calls: pstats.Stats, what: str) -> None:
    whole, seconds = calls.total_tt, {n: seconds_of(calls, PHASES[n]) for n in PHASES}
    print(describe())
    print(f"{what}: {whole:.1f} s")
    rows = [[phase, f"{100 * seconds[phase] / whole:.1f} %"] for phase in PHASES]
    rest = 100 * (1 - sum(seconds.values()) / whole)
    rows.append(["the rest (configs, digests, calibration file)", f"{rest:.1f} %"])
    print("\n" + table(["phase", "share of the time"], rows))


def of_config(path: Path) -> None:
    """Profile the pre-pass of a config."""
    with tempfile.TemporaryDirectory() as name, cProfile.Profile() as clocked:
        out = ["--out", str(Path(name) / "coefficients.safetensors"), "--quiet"]
        mergekit_rpam(["fit", str(path), *out], standalone_mode=False)
    print_phases(pstats.Stats(clocked), str(path))


def main() -> None:
    args = command_line(
        __doc__,
        quick={"hidden": 64, "layers": 1, "per_pattern": 4, "epochs": 2},
        hidden=512,
        layers=2,
        per_pattern=(32, "queries"),
        granularity="low_rank",
        epochs=15,
        config=(Path, "profile the pre-pass of this config"),
    )
    if args.config:
        of_config(args.config)
        return
    settings = {"granularity": args.granularity, "tokens": "prompt"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = small_config(args.hidden, args.layers)
        write_pair(folder, config, args.per_pattern, torch.bfloat16)
        fit_pair(folder, epochs=1, **settings)  # what is slow the first time only
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            fit_pair(folder, epochs=min(args.epochs, 3), **settings)
        with cProfile.Profile() as clocked:
            fit_pair(folder, epochs=args.epochs, **settings)
    calls = pstats.Stats(clocked)
    print_phases(
        calls,
        f"{args.hidden} wide, {args.layers} layers, {args.per_pattern} prompts per "
        f"pattern, granularity {args.granularity}, {args.epochs} epochs",
    )
    events = sorted(profiled.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    rows = [
        [event.key, f"{100 * event.self_cpu_time_total / total:.1f} %", event.count]
        for event in events[:SHOWN]
    ]
    print("\n" + table(["operation", "share of its own time", "calls"], rows))


if __name__ == "__main__":
    main()
