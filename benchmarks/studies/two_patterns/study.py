"""Merge and measure every model of the study, for docs/evidence.md.

    python benchmarks/studies/two_patterns/study.py [--quick]

Every model is merged by mergekit from the study's pairs and answers the same test
queries. That takes hours: results are appended to results/PAIR.jsonl as they come, and
a run goes on where the last one ended. `evidence.py` writes the report from them.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import json_lines
from calibrations import calibrated, calibration
from jobs import GROUPS, STUDYS_OWN, Job, interpolation, jobs, shortened
from pairs import PAIRS, STUDIED, Pair, cache
from tqdm import tqdm
from training import build, calibrate

from rpam_mergekit.parameters import parse_settings

RESULTS = Path(__file__).parent / "results"
SMALLEST_STEP = 1 / 160  # of the sweep, whose steps are halved where models differ


def mergekit_config(pair: Pair, config: dict[str, Any]) -> dict[str, Any]:
    """Return the whole config of a job."""
    method = config["merge_method"]
    long, short = str(pair.path / "long"), str(pair.path / "short")
    models: list[dict[str, Any]] = [{"model": long}, {"model": short}]
    for model, weight in zip(models, config.get("weights", ()), strict=False):
        model["parameters"] = {"weight": weight}
        if "density" in config:
            model["parameters"]["density"] = config["density"]
    whole: dict[str, Any] = {
        "merge_method": method,
        "models": models,
        "parameters": dict(config.get("parameters", {})),
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    if method in ("linear", "karcher"):
        return whole
    if method == "slerp":
        return {**whole, "base_model": long}
    if method != "rpam" and pair.ancestor:
        return {**whole, "base_model": str(pair.ancestor)}
    if "density" in config:  # normalised, one task vector would always weigh 1
        whole["parameters"]["normalize"] = False
    # Long is the base: its own task vector is nothing.
    return {**whole, "base_model": long, "models": models[1:]}


def run_job(job: Job) -> dict[str, Any]:
    """Make one model and measure it; return its record."""
    import torch
    import transformers
    from measure import chat_log_likelihood, held_out, load, measure
    from variants import fit_variant

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    pair = PAIRS[job.pair]
    record: dict[str, Any] = {
        "job": json.loads(job.key),
        "models": digest(pair),
        "settings": settings(job.config),
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "out"
        if job.config:
            config = dict(job.config)
            if config["merge_method"] == "rpam":
                config["parameters"] = calibrated(pair, job, Path(scratch))
            variant = config.get("parameters", {}).pop("variant", None)
            coefficients = folder / "rpam" / "coefficients.safetensors"
            whole = mergekit_config(pair, config)
            began = time.perf_counter()
            if variant is not None:
                fit_variant(variant, whole, coefficients)
            merge(whole, folder, config.get("random_seed"))
            record["seconds"] = round(time.perf_counter() - began, 2)
            if coefficients.exists():
                record["coefficient_bytes"] = coefficients.stat().st_size
        else:
            folder = pair.path / job.name
        model, tokenizer = load(folder)
        asked = {
            seed: held_out(pair.task, seed, job.queries, job.split)
            for seed in job.seeds
        }
        record["sums"] = measure(model, tokenizer, pair.task, asked)
        record["chat"] = chat_log_likelihood(model, tokenizer, pair)
    return record


def merge(config: dict[str, Any], folder: Path, random_seed: int | None) -> None:
    """Merge in this process, by mergekit."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    run_merge(
        MergeConfiguration.model_validate(config),
        str(folder),
        MergeOptions(quiet=True, random_seed=random_seed),
    )


def digest(pair: Pair) -> str:
    """Return a digest of both experts' weights and the calibration file."""
    found = hashlib.sha256()
    for way in ("long", "short"):
        found.update((pair.path / way / "model.safetensors").read_bytes())
    found.update(calibration(pair).read_bytes())
    return found.hexdigest()[:16]


def settings(config: dict[str, Any]) -> dict[str, Any] | None:
    """Return the settings that matter of an RPAM merge, today's defaults among them."""
    if config.get("merge_method") != "rpam":
        return None
    given = {k: v for k, v in config["parameters"].items() if k not in STUDYS_OWN}
    return parse_settings(given).cache_key()


class Results:
    """The records of one pair: those of these checkpoints and of today's defaults."""

    def __init__(self, pair: Pair, folder: Path) -> None:
        self.path = folder / f"{pair.name}.jsonl"
        self.records: dict[str, dict[str, Any]] = {}
        records = json_lines.read(self.path)
        models = digest(pair) if records else ""
        for record in records:
            today = settings(record["job"]["config"])
            if record["models"] == models and record["settings"] == today:
                key = json.dumps(record["job"], sort_keys=True)
                self.records[key] = record

    def add(self, record: dict[str, Any]) -> None:
        self.records[json.dumps(record["job"], sort_keys=True)] = record
        json_lines.append(self.path, record)


def refinement(pair: Pair, results: Results) -> list[Job]:
    """Return weights between those of the sweep where its models differ much."""
    points = {}
    for record in results.records.values():
        job = record["job"]
        if job["group"] in ("sweep", "experts"):
            weight = {"long": 0.0, "short": 1.0}.get(job["name"])
            weight = float(job["name"]) if weight is None else weight
            of = [s for strata in record["sums"].values() for s in strata.values()]
            points[weight] = [
                sum(column) / sum(s[0] for s in of) for column in zip(*of, strict=True)
            ]
    found = []
    for (a, left), (b, right) in itertools.pairwise(sorted(points.items())):
        apart = abs(left[1] - right[1]), abs(left[2] - right[2])
        longest = points[0.0][2]
        if b - a > SMALLEST_STEP and (apart[0] > 0.05 or apart[1] > 0.06 * longest):
            found.append(interpolation(pair, (a + b) / 2))
    return found


def run_all(
    todo: list[Job], results: dict[str, Results], workers: int, desc: str
) -> None:
    todo = [job for job in todo if job.key not in results[job.pair].records]
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, maxtasksperchild=20) as pool:
        found = pool.imap_unordered(run_job, todo)
        for record in tqdm(found, total=len(todo), desc=desc, unit="model"):
            results[record["job"]["pair"]].add(record)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=STUDIED)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few models of the quickstart's pair, one seed: minutes, not hours",
    )
    args = parser.parse_args()
    chosen = [PAIRS[name] for name in args.pairs]
    if args.quick:
        chosen = [PAIRS["chains-qwen2"]]
        os.environ["RPAM_LAB"] = str(cache() / "quick")
        prepare_quickly(chosen[0])
    for pair in chosen:
        build(pair)
        calibrate(pair)
    results = {pair.name: Results(pair, args.results) for pair in chosen}
    for group in args.groups:
        todo = [job for pair in chosen for job in jobs(pair, group)]
        if args.quick:
            todo = [job for full in todo if (job := shortened(full))]
        run_all(todo, results, args.workers, group)
        while group == "sweep" and not args.quick:
            more = [job for p in chosen for job in refinement(p, results[p.name])]
            if not more:
                break
            run_all(more, results, args.workers, "sweep, finer")


def prepare_quickly(pair: Pair) -> None:
    """Take the calibration file that lies beside the pair instead of sampling one."""
    pair.cache.mkdir(parents=True, exist_ok=True)
    shutil.copy(pair.path / "calibration.jsonl", calibration(pair))


if __name__ == "__main__":
    main()
