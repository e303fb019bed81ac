"""Does a killed merge, run again, end with the bytes of one that was left alone?

    python benchmarks/performance/random_kills.py [--kills 20] [--quick]

Runs a merge to its end and notes how long it takes. Then, 20 times: starts the same
merge in a new folder, kills it (SIGKILL) after a random part of that time, from the
first reading of the config to the last file written, runs the same command again until
it ends, and compares every file of the output folder. Each run is `mergekit-yaml`'s own
code in a process of its own, forked when the libraries have been imported: kills while
Python starts meet nothing. Exits with 1 if any byte differs.
"""

import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import yaml
from _machine import command_line, describe, own_process, table
from _random_pairs import checkpoint_bytes, rpam_config, small_config, write_pair
from mergekit.scripts.run_yaml import main as mergekit_yaml

from rpam_mergekit.merging.hooks import activate

SHARDS = 12  # of the output, so that kills can fall between two of them


def make(folder: Path, hidden: int, layers: int, per_pattern: int, epochs: int) -> None:
    write_pair(folder, small_config(hidden, layers), per_pattern, longest=100)
    config = rpam_config(folder, epochs=epochs, tokens="prompt")
    (folder / "rpam.yml").write_text(yaml.safe_dump(config))


def run(pair: Path, out: Path) -> None:
    """Be `mergekit-yaml rpam.yml out`, its messages in a file beside `out`."""
    log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    activate()
    options = ["--out-shard-size", str(checkpoint_bytes(pair) // SHARDS)]
    mergekit_yaml([str(pair / "rpam.yml"), str(out), *options])


def start(pair: Path, out: Path) -> multiprocessing.Process:
    context = multiprocessing.get_context("fork")
    process = context.Process(target=run, args=(pair, out))
    process.start()
    return process


def finish(pair: Path, out: Path) -> float:
    """Run to the end; return the seconds."""
    began = time.perf_counter()
    process = start(pair, out)
    process.join()
    if process.exitcode:
        raise SystemExit(f"the merge failed:\n{out.with_suffix('.log').read_text()}")
    return time.perf_counter() - began


def phase(out: Path, layers: int) -> str:
    """Return what a killed run was doing, from what it left."""
    solved = list(out.rglob("layer-*.safetensors"))
    shards = list(out.glob("*.safetensors"))
    coefficients = (out / "rpam" / "coefficients.safetensors").exists()
    if shards:
        written = sum("-of-" in shard.name for shard in shards)
        what = f"{written} renamed" if written else f"{len(shards)} of them begun"
        return f"writing the shards, {what}"
    if coefficients:
        return "between the pre-pass and the first shard"
    if list(out.rglob("outside*.safetensors")):
        if len(solved) == layers:
            return "writing the coefficients"
        return f"solving layer {len(solved)}"
    return "reading config, models and queries"


def content(out: Path) -> dict[str, bytes]:
    """Return every file of the output folder but the lock."""
    files = [p for p in out.rglob("*") if p.is_file() and p.suffix != ".lock"]
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(files)}


def differing(found: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    names = sorted(found.keys() | expected.keys())
    return [name for name in names if found.get(name) != expected.get(name)]


def main() -> None:
    args = command_line(
        __doc__,
        quick={"kills": 4, "hidden": 64, "layers": 3},
        kills=20,
        seed=0,
        hidden=512,
        layers=6,
        per_pattern=(4, "queries"),
        epochs=2,
    )
    rng = random.Random(args.seed)
    rows, phases, broken = [], Counter(), 0
    with tempfile.TemporaryDirectory() as name:
        pair = Path(name)
        of_pair = (args.hidden, args.layers, args.per_pattern, args.epochs)
        own_process(make, pair, *of_pair)
        (pair / "alone").mkdir()
        whole = finish(pair, pair / "alone" / "out")
        expected = content(pair / "alone" / "out")
        for kill in range(args.kills):
            folder = pair / f"kill-{kill}"
            folder.mkdir()
            after = rng.uniform(0, whole)
            process = start(pair, folder / "out")
            process.join(after)
            ended = process.exitcode is not None
            if not ended:
                os.kill(process.pid, signal.SIGKILL)
                process.join()
            hit = "had ended" if ended else phase(folder / "out", args.layers)
            phases[hit.split(",")[0].rstrip(" 0123456789")] += 1
            finish(pair, folder / "out")
            wrong = differing(content(folder / "out"), expected)
            broken += bool(wrong)
            same = "identical" if not wrong else "DIFFERENT: " + ", ".join(wrong)
            rows.append([kill + 1, f"{after:.2f}", hit, same])
            shutil.rmtree(folder)
    print(describe())
    print(
        f"pair {args.hidden} wide, {args.layers} layers; {whole:.2f} s without a kill; "
        f"seed {args.seed}; {len(expected)} files compared"
    )
    print("\n" + table(["kill", "after, seconds", "while", "files"], rows))
    print("\n" + table(["killed while", "times"], phases.most_common()))
    print(f"\n{args.kills - broken} of {args.kills} identical to the uninterrupted run")
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
