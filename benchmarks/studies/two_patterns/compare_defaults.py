"""Compare the defaults of two versions of the project on the study's pairs.

    python benchmarks/studies/two_patterns/compare_defaults.py --old ../before --new .

`--old` and `--new` are roots of checkouts. Every pair is merged by `mergekit-yaml` with
either version's defaults, in turn, on the same checkpoints, calibration file and seed;
the models answer the same held-out queries, asked by the code beside this script. A
line of JSON is appended to `--results` for every model, and none is made twice for the
same code, checkpoints and settings. Then Markdown tables are printed; differences are
paired by seed. Experts that the study has measured are not measured again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import json_lines
from calibrations import calibrated
from figures import Mix, Point, interval, over_chance, point
from jobs import SEEDS, Job, rpam
from pairs import PAIRS, Pair, cache
from study import RESULTS, digest, mergekit_config, run_job
from study import Results as Study
from tables import percent, table
from tqdm import tqdm
from training import build, calibrate

VERSIONS = ("old", "new")
Record = dict[str, Any]


def code_digest(root: Path) -> str:
    """Return a digest of the package's source under `root`."""
    found = hashlib.sha256()
    for path in sorted((root / "rpam_mergekit").rglob("*.py")):
        found.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:16]


class Results:
    """The records of the results file, by what their figures depend on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[tuple, Record] = {
            self._key(record): record for record in json_lines.read(path)
        }

    def get(self, job: Job, models: str, code: str | None) -> Record | None:
        return self.records.get((job.key, models, code))

    def add(self, record: Record) -> None:
        self.records[self._key(record)] = record
        json_lines.append(self.path, record)

    @staticmethod
    def _key(record: Record) -> tuple:
        job = json.dumps(record["job"], sort_keys=True)
        return job, record["models"], record["code"]


def run(command: Sequence[str], root: Path) -> str:
    """Run `command` with the package under `root`; return what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} with {root}:\n{done.stderr[-3000:]}")
    return done.stdout


def check_root(root: Path) -> None:
    """Refuse a root whose package is not the one that its merges would use."""
    where = "import rpam_mergekit; print(rpam_mergekit.__file__)"
    used = Path(run([sys.executable, "-c", where], root).strip())
    if root not in used.parents:
        raise SystemExit(f"{root}: merges would use {used}")


def merged(job: Job, root: Path) -> Record:
    """Merge and measure; return seconds of wall and CPU time, and the sums."""
    from measure import held_out, load, measure

    pair, (seed,) = PAIRS[job.pair], job.seeds
    with tempfile.TemporaryDirectory() as scratch:
        written, out = Path(scratch) / "rpam.yml", Path(scratch) / "out"
        config = {**job.config, "parameters": calibrated(pair, job, Path(scratch))}
        # JSON is YAML.
        written.write_text(json.dumps(mergekit_config(pair, config)), "utf-8")
        command = str(Path(sys.executable).parent / "mergekit-yaml")
        began, used = time.perf_counter(), cpu_of_children()
        run([command, str(written), str(out)], root)
        seconds, cpu = time.perf_counter() - began, cpu_of_children() - used
        asked = {seed: held_out(pair.task, seed, job.queries, job.split)}
        sums = measure(*load(out), pair.task, asked)
    return {"seconds": round(seconds, 2), "cpu": round(cpu, 2), "sums": sums}


def cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Comparison:
    """Two versions on some pairs, with some seeds and sizes of the calibration set."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.pairs = [PAIRS[name] for name in args.pairs]
        self.seeds = tuple(args.seeds)
        self.sizes: list[int | None] = args.queries_per_pattern or [None]
        self.steps = {} if args.steps is None else {"steps": args.steps}
        self.asked = {"queries": args.queries, "split": args.split}
        self.roots = {v: getattr(args, v).resolve() for v in VERSIONS}
        self.code = {v: code_digest(root) for v, root in self.roots.items()}
        self.models = {pair.name: digest(pair) for pair in self.pairs}
        self.results = Results(args.results or cache() / "defaults.jsonl")

    def expert(self, pair: Pair, way: str) -> Job:
        return Job(pair.name, "experts", way, seeds=self.seeds, **self.asked)

    def merge(self, pair: Pair, seed: int, size: int | None) -> Job:
        chosen = {} if size is None else {"queries_per_pattern": size}
        job = rpam(pair, "main", "defaults", seed, **self.steps, **chosen)
        return replace(job, **self.asked)

    def merges(self) -> Iterator[tuple[Job, str]]:
        """Yield every merge and its version; they take turns in being the first."""
        versions = list(VERSIONS)
        for seed in self.seeds:
            for pair in self.pairs:
                for size in self.sizes:
                    for version in versions:
                        yield self.merge(pair, seed, size), version
                    versions.reverse()

    def found(self, job: Job, version: str | None = None) -> Record | None:
        code = None if version is None else self.code[version]
        return self.results.get(job, self.models[job.pair], code)

    def run(self) -> None:
        """Make and measure what the results lack, and print a line for each."""
        for root in self.roots.values():
            check_root(root)
        for pair in self.pairs:
            for way in ("long", "short"):
                job = self.expert(pair, way)
                if not self.found(job):
                    known = Study(pair, RESULTS).records.get(job.key)
                    self.results.add({**(known or run_job(job)), "code": None})
        todo = [each for each in self.merges() if not self.found(*each)]
        for job, version in tqdm(todo, desc="merging", unit="model"):
            record = {
                "job": json.loads(job.key),
                "models": self.models[job.pair],
                "code": self.code[version],
                **merged(job, self.roots[version]),
            }
            self.results.add(record)
            tqdm.write(f"{version} {json.dumps(record)}")

    def report(self) -> list[str]:
        """Return the tables."""
        compared, thinking = [], []
        for pair in self.pairs:
            mix = dict(zip(pair.task.difficulties, pair.task.mix, strict=True))
            experts = {w: self.found(self.expert(pair, w)) for w in ("long", "short")}
            for way, record in experts.items():
                points = [point(record, seed, mix) for seed in self.seeds]
                name = f"{pair.name}, {way.title()}"
                compared.append([name, *figures(points), *[""] * 5])
                thinking.append([name, *by_difficulty([record], self.seeds, pair)])
            for size in self.sizes:
                of = {
                    v: [self.found(self.merge(pair, s, size), v) for s in self.seeds]
                    for v in VERSIONS
                }
                name = pair.name if size is None else f"{pair.name}, {size} queries"
                compared += self._rows(name, of, experts, mix)
                for version, records in of.items():
                    shown = by_difficulty(records, self.seeds, pair)
                    thinking.append([f"{name}, {version}", *shown])
        head = ["", "right, %", "tokens", "closed, %", "over chance", "new - old"]
        head += ["seconds", "CPU seconds", "of old's CPU time"]
        lines = table(head, compared)
        return [*lines, *table(["", "thinks, % / right, % by difficulty"], thinking)]

    def _rows(
        self,
        name: str,
        of: dict[str, list[Record]],
        experts: dict[str, Record],
        mix: Mix,
    ) -> Iterator[list[str]]:
        points = {
            version: [
                point(r, seed, mix) for r, seed in zip(records, self.seeds, strict=True)
            ]
            for version, records in of.items()
        }
        for version, records in of.items():
            chance = [
                over_chance(r, experts["long"], experts["short"], seed, mix)
                for r, seed in zip(records, self.seeds, strict=True)
            ]
            gains = [
                new.accuracy - old.accuracy
                for old, new in zip(points["old"], points["new"], strict=True)
            ]
            cpu = [r["cpu"] / o["cpu"] for r, o in zip(records, of["old"], strict=True)]
            yield [
                f"{name}, {version}",
                *figures(points[version]),
                percent(chance, "+"),
                percent(gains, "+") if version == "new" else "",
                f"{mean([r['seconds'] for r in records]):.0f}",
                f"{mean([r['cpu'] for r in records]):.0f}",
                f"{mean(cpu):.2f}" if version == "new" else "",
            ]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def figures(points: Sequence[Point]) -> list[str]:
    """Return accuracy, tokens and closed thinking, with half intervals over seeds."""
    tokens, half = interval({"": [p.tokens for p in points]})
    closed = [p.closed for p in points if not math.isnan(p.closed)]
    return [
        percent([p.accuracy for p in points]),
        f"{tokens:.2f}" if math.isnan(half) else f"{tokens:.2f} ± {half:.2f}",
        f"{100 * mean(closed):.1f}" if closed else "-",
    ]


def by_difficulty(
    records: Sequence[Record], seeds: Sequence[int], pair: Pair
) -> list[str]:
    """Return the share that thinks and that is right at every difficulty."""
    shown = []
    for difficulty in pair.task.difficulties:
        of = [
            point(record, seed, {difficulty: 1})
            for record in records
            for seed in seeds
            if str(seed) in record["sums"]
        ]
        thinks, right = mean([p.thinks for p in of]), mean([p.accuracy for p in of])
        shown.append(f"{100 * thinks:.0f}/{100 * right:.0f}")
    return [" ".join(shown)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for version in VERSIONS:
        parser.add_argument(f"--{version}", type=Path, required=True, metavar="ROOT")
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument(
        "--queries-per-pattern",
        nargs="+",
        type=int,
        metavar="N",
        help="sizes of the calibration set that are compared, such as 64 512",
    )
    parser.add_argument(
        "--steps", type=int, help="not the versions' own: a test of this script"
    )
    parser.add_argument("--queries", type=int, default=100, help="of each difficulty")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--results", type=Path, help="default: in the study's cache")
    args = parser.parse_args()
    for name in args.pairs:
        build(PAIRS[name])
        calibrate(PAIRS[name])
    comparison = Comparison(args)
    comparison.run()
    print("\n".join(comparison.report()))


if __name__ == "__main__":
    main()
