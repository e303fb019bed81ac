"""Run the study: `python benchmarks/lab/study.py` (hours; what is done is kept).

Every model is merged by mergekit from the lab's pairs and answers the same test
queries. Results are appended to results/PAIR.jsonl as they come; a run goes on where
the last one ended. `evidence.py` writes the report from them.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

from pairs import PAIRS, Pair, build, cache, calibrate
from tqdm import tqdm

GROUPS = ("main", "sweep", "methods", "ablations")
RESULTS = Path(__file__).parent / "results"
SEEDS = (2, 3, 4)  # 0 and 1 were looked at while the defaults were sought
COARSE, SMALLEST_STEP = 1 / 20, 1 / 160
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of Short
# Granularity and the like are compared on a smaller calibration set, for time.
REFERENCE = {"queries_per_pattern": 128}
ABLATED = ("chains-qwen2", "graph-qwen3")
ABLATIONS: dict[str, dict[str, Any]] = {
    "reference": {},
    "layer": {"granularity": "layer"},
    "module": {"granularity": "module"},
    "tensor": {"granularity": "tensor"},
    "tensor, L-BFGS": {"granularity": "tensor", "solver": "lbfgs"},
    "row": {"granularity": "row"},
    "element": {"granularity": "element"},
    **{f"rank {rank}": {"rank": rank} for rank in (0, 1, 2, 4, 8)},
    "prompts only": {"tokens": "prompt"},
    "prompts only, element": {"tokens": "prompt", "granularity": "element"},
    "weighted by token": {"alignment": "sum"},
    "prompt_weight 1": {"prompt_weight": 1.0},
    "prompt_weight 0": {"prompt_weight": 0.0},
    "long_share 0.5": {"long_share": 0.5},
    "long_share 0.8": {"long_share": 0.8},
    "contrastive 0.01": {"contrastive_weight": 0.01},
    "contrastive 0.1": {"contrastive_weight": 0.1},
    "contrastive 1": {"contrastive_weight": 1.0},
    "initial 0.1": {"initial_weight": 0.1},
    "initial 0.9": {"initial_weight": 0.9},
    "outside averaged": {"outside_weight": 0.5},
    "outside of Short": {"outside_weight": 1.0},
    **{
        f"{count} queries": {"queries_per_pattern": count}
        for count in (8, 32, 64, 256, 512)
    },
    **{f"labels flipped {share:.0%}": {"flipped": share} for share in (0.1, 0.2, 0.3)},
    "layers 0.3": {"layers": 0.3},
    "layers 0.6": {"layers": 0.6},
    "epochs 5": {"epochs": 5},
    "epochs 30": {"epochs": 30},
    "learning rate 0.02": {"learning_rate": 0.02},
    "learning rate 0.1": {"learning_rate": 0.1},
    "batches of 32": {"batch_size": 32},
    "batches of 64": {"batch_size": 64},
    "regularization 0.1": {"regularization": 0.1},
    "regularization 1": {"regularization": 1.0},
    "regularization 1 to Long": {"regularization": 1.0, "initial_weight": 0.0},
    "preset paper": {"preset": "paper", "queries_per_pattern": 64, "epochs": 50},
    "preset qa-merging": {
        "preset": "qa-merging",
        "queries_per_pattern": 64,
        "epochs": 50,
    },
}


# What a quick run is made of.
QUICK = {f"{share:.5f}" for share in (0.15, 0.25, 0.4, 0.7)}
QUICK |= {"ties 0.5, density 0.7", "karcher", "reference", "tensor"}
QUICK_PARAMETERS = {"queries_per_pattern": 96, "epochs": 15}


@dataclass(frozen=True)
class Job:
    """One model to make and measure.

    config: what of a mergekit config is not the models' paths; empty for an expert.
    seeds: whose test queries it answers; of an RPAM merge also its own seed.
    queries: how many of each difficulty and seed, of which split.
    """

    pair: str
    group: str
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = SEEDS
    queries: int = 100
    split: str = "test"

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


def interpolation(pair: Pair, weight: float) -> Job:
    config = {"merge_method": "linear", "weights": [1 - weight, weight]}
    return Job(pair.name, "sweep", f"{weight:.5f}", config)


def other_methods(pair: Pair) -> Iterator[Job]:
    """Yield every other method of mergekit on its own small grid.

    Task vectors are taken from the pair's common ancestor, where it is known.
    """

    def job(method: str, setting: str, **config: Any) -> Job:
        return Job(
            pair.name,
            "methods",
            f"{method} {setting}".strip(),
            {"merge_method": method, **config},
        )

    for share in SHARES:
        weights = [1 - share, share]
        for scale in (0.8, 1.25):
            scaled = [scale * weight for weight in weights]
            yield job("task_arithmetic", f"{share} x {scale}", weights=scaled)
        yield job("slerp", str(share), parameters={"t": share})
        for density in (0.3, 0.7):
            shared = {"weights": weights, "density": density}
            yield job("ties", f"{share}, density {density}", **shared)
            seeded = {**shared, "random_seed": 0}
            yield job("dare_ties", f"{share}, density {density}", **seeded)
    for top in (0.1, 0.5, 1.0):
        yield job("sce", f"top {top}", parameters={"select_topk": top})
    yield job("karcher", "")


def rpam(pair: Pair, group: str, name: str, seed: int, **parameters: Any) -> Job:
    config = {"merge_method": "rpam", "parameters": {"seed": seed, **parameters}}
    return Job(pair.name, group, name, config, (seed,))


def mergekit_config(pair: Pair, config: dict[str, Any]) -> dict[str, Any]:
    """Return the whole config of a job."""
    method = config["merge_method"]
    long, short = str(pair.path / "long"), str(pair.path / "short")
    weights = config.get("weights", [None, None])
    base = str(pair.ancestor or long)
    models = []
    for model, weight in zip((long, short), weights, strict=True):
        parameters: dict[str, Any] = {} if weight is None else {"weight": weight}
        if "density" in config:
            parameters["density"] = config["density"]
        models.append({"model": model, "parameters": parameters})
    whole: dict[str, Any] = {
        "merge_method": method,
        "models": models,
        "parameters": config.get("parameters", {}),
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    if method in ("rpam", "slerp"):
        base = long
    if method not in ("linear", "karcher"):
        whole["base_model"] = base
    if base == long and "base_model" in whole and method != "slerp":
        whole["models"] = models[1:]  # the base's own task vector is nothing
        if "density" in config:  # normalised, one vector would always weigh 1
            whole["parameters"] = {**whole["parameters"], "normalize": False}
    return whole


def run_job(job: Job) -> dict[str, Any]:
    """Make one model and measure it; return its record."""
    import torch
    import transformers
    from measure import chat_log_likelihood, held_out, load, measure

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    pair = PAIRS[job.pair]
    record: dict[str, Any] = {"job": json.loads(job.key), "models": digest(pair)}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "out"
        if job.config:
            config = dict(job.config)
            if config["merge_method"] == "rpam":
                config["parameters"] = calibrated(pair, job, Path(scratch))
            began = time.perf_counter()
            merge(mergekit_config(pair, config), folder, config.get("random_seed"))
            record["seconds"] = round(time.perf_counter() - began, 2)
            coefficients = folder / "rpam" / "coefficients.safetensors"
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
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    run_merge(
        MergeConfiguration.model_validate(config),
        str(folder),
        MergeOptions(quiet=True, random_seed=random_seed),
    )


def calibrated(pair: Pair, job: Job, scratch: Path) -> dict[str, Any]:
    """Return the parameters with the calibration file; some of its labels flipped."""
    parameters = dict(job.config["parameters"])
    file = calibration(pair)
    share = parameters.pop("flipped", 0.0)
    if share:
        rng = random.Random(f"flipped-{parameters['seed']}")
        said = {way: first_responses(pair, way) for way in ("long", "short")}
        flipped = []
        for line in file.read_text().splitlines():
            record = json.loads(line)
            if rng.random() < share:
                way = "short" if record["pattern"] == "long" else "long"
                response = said[way][record["prompt"]]
                record |= {"pattern": way, "response": response}
            flipped.append(json.dumps(record))
        file = scratch / "flipped.jsonl"
        file.write_text("\n".join(flipped) + "\n")
    return {**parameters, "calibration": str(file)}


def calibration(pair: Pair) -> Path:
    return pair.cache / "calibration.jsonl"


def first_responses(pair: Pair, way: str) -> dict[str, str]:
    """Return an expert's first sampled response to every query."""
    lines = (pair.cache / f"{way}.samples.jsonl").read_text().splitlines()[1:]
    records = [json.loads(line) for line in lines]
    return {r["question"]: r["responses"][0]["text"] for r in records}


def digest(pair: Pair) -> str:
    """Return a digest of both experts' weights and the calibration file."""
    found = hashlib.sha256()
    for way in ("long", "short"):
        found.update((pair.path / way / "model.safetensors").read_bytes())
    found.update(calibration(pair).read_bytes())
    return found.hexdigest()[:16]


class Results:
    """The records of one pair, those made from other checkpoints left out."""

    def __init__(self, pair: Pair, folder: Path) -> None:
        self.path = folder / f"{pair.name}.jsonl"
        self.records: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            models = digest(pair)
            content = self.path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if whole != content:  # killed while it wrote
                self.path.write_bytes(whole)
            for line in whole.decode().splitlines():
                record = json.loads(line)
                if record["models"] == models:
                    key = json.dumps(record["job"], sort_keys=True)
                    self.records[key] = record

    def add(self, record: dict[str, Any]) -> None:
        self.records[json.dumps(record["job"], sort_keys=True)] = record
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def jobs(pair: Pair, group: str) -> Iterator[Job]:
    """Yield what a study of `pair` needs, but for the refinement of the sweep."""
    if group == "main":
        yield Job(pair.name, "experts", "long")
        yield Job(pair.name, "experts", "short")
        for seed in SEEDS:
            yield rpam(pair, "main", "defaults", seed)
    elif group == "sweep":
        for step in range(1, round(1 / COARSE)):
            yield interpolation(pair, step * COARSE)
    elif group == "methods":
        yield from other_methods(pair)
    elif pair.name in ABLATED:  # settings are chosen on queries of their own
        yield Job(pair.name, "validation", "long", split="validation")
        yield Job(pair.name, "validation", "short", split="validation")
        for name, parameters in ABLATIONS.items():
            for seed in SEEDS:
                job = rpam(pair, "ablations", name, seed, **REFERENCE | parameters)
                yield replace(job, split="validation")


def shortened(job: Job) -> Job | None:
    """Return the job as a quick run does it: one seed, fewer queries; None if not."""
    config = dict(job.config)
    if config.get("merge_method") == "rpam":
        asked_for = job.group == "main" or job.name in QUICK
        if job.seeds != SEEDS[:1] or not asked_for:
            return None
        config["parameters"] = {**config["parameters"], **QUICK_PARAMETERS}
    elif job.group in ("sweep", "methods") and job.name not in QUICK:
        return None
    return replace(job, config=config, seeds=SEEDS[:1], queries=40)


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
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
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
