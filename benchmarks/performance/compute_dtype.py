"""Does bfloat16 make the pre-pass faster here, and what does it lose?

    python benchmarks/performance/compute_dtype.py [--pairs random-1536,quickstart]

Runs the pre-pass with float32 and with bfloat16 matrix products in turn, each run in a
process of its own, and compares the seconds of the CPU that they took (or, on a GPU,
the seconds that passed) and the gap that they leave. `random-WIDTH` is a pair of random
checkpoints with one decoder layer, `qwen2.5-1.5b` such a layer in the shape of that
model, with prompts and responses of real lengths, which `--max-tokens` cuts;
`quickstart` is the trained pair in `examples/quickstart` with its calibration queries.
Any other name is that of a config file, its paths as seen from the project's root. The
number of steps is the same, so that equal gaps mean equally good merges.
"""

import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from _machine import command_line, describe, own_process, spread, table
from _random_pairs import full_config, rpam_config, small_config, write_pair

from rpam_mergekit.cli.main import main as mergekit_rpam
from rpam_mergekit.formats.coefficients import CoefficientsFile

ROOT = Path(__file__).parents[2]
DTYPES = ("float32", "bfloat16")


def random_pair(name: str, folder: Path, per_pattern: int) -> None:
    """Write a pair of one layer."""
    if name.startswith("random-"):
        config = small_config(int(name.removeprefix("random-")), 1)
    else:
        config = full_config(name, 1)
        config.vocab_size = small_config().vocab_size  # outside of the layers
    write_pair(folder, config, per_pattern)


def config_of(name: str, folder: Path, per_pattern: int) -> dict[str, Any]:
    if name == "quickstart":
        name = str(ROOT / "examples" / "quickstart" / "rpam.yml")
    if name.endswith((".yml", ".yaml")):
        return yaml.safe_load(Path(name).read_text())
    folder.mkdir()
    own_process(random_pair, name, folder, per_pattern)
    return rpam_config(folder)


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def run(config: dict[str, Any], device: str, folder: Path) -> tuple[float, list[float]]:
    """Return the seconds of a pre-pass, and every layer's gap after it."""
    path, out = folder / "fit.yml", folder / "coefficients.safetensors"
    out.unlink(missing_ok=True)
    path.write_text(yaml.safe_dump(config))
    clock = time.perf_counter if device != "cpu" else cpu_seconds
    began = clock()
    options = ["--out", str(out), "--device", device, "--quiet"]
    mergekit_rpam(["fit", str(path), *options], standalone_mode=False)
    seconds = clock() - began
    layers = CoefficientsFile(out).metadata["layers"]
    return seconds, [layer["gap_after"] for layer in layers]


def main() -> None:
    args = command_line(
        __doc__,
        quick={"pairs": "random-128", "steps": 4, "max_tokens": 64, "repetitions": 1},
        pairs=("random-384,qwen2.5-1.5b,quickstart", "separated by commas"),
        per_pattern=(8, "queries of a random pair"),
        steps=(40, "of a layer"),
        max_tokens=(2048, "of a query of a random pair"),
        batch_tokens=(256, "tokens of a batch; the default of the setting"),
        device="cpu",
        repetitions=3,
    )
    os.chdir(ROOT)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for pair in args.pairs.split(","):
            folder = Path(name) / Path(pair).stem
            config = config_of(pair, folder, args.per_pattern)
            folder.mkdir(exist_ok=True)
            parameters = {**config["parameters"], "steps": args.steps}
            parameters["batch_tokens"] = args.batch_tokens
            if pair.startswith(("random-", "qwen")):
                parameters["max_tokens"] = args.max_tokens
            found: dict[str, list[tuple[float, list[float]]]] = {d: [] for d in DTYPES}
            for _ in range(args.repetitions):
                for dtype in DTYPES:
                    with_dtype = {**parameters, "compute_dtype": dtype}
                    changed = {**config, "parameters": with_dtype}
                    outcome = own_process(run, changed, args.device, folder)
                    found[dtype].append(outcome.value)
            ratios = [
                b[0] / f[0]
                for f, b in zip(found["float32"], found["bfloat16"], strict=True)
            ]
            gaps = {d: found[d][0][1] for d in DTYPES}
            rows.append(
                [
                    pair,
                    *(spread([seconds for seconds, _ in found[d]]) for d in DTYPES),
                    spread(ratios),
                    *(f"{sum(gaps[d]) / len(gaps[d]):.4f}" for d in DTYPES),
                    *(f"{gaps[d][-1]:.4f}" for d in DTYPES),
                ]
            )
    print(describe())
    print(f"{args.steps} steps a layer, batches of {args.batch_tokens} tokens\n")
    head = ["pair", *(f"{d}: seconds" for d in DTYPES), "bfloat16 / float32"]
    head += [f"mean gap, {d}" for d in DTYPES] + [f"last gap, {d}" for d in DTYPES]
    print(table(head, rows))


if __name__ == "__main__":
    main()
