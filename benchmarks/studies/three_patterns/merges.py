"""The models of `compare.py`: merged by mergekit, asked, kept as JSON Lines."""

from __future__ import annotations

import hashlib
import itertools
import json
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from experts import PATTERNS, TASK, form, json_lines, load, queries, respond, right
from study import merge
from tqdm import tqdm

from rpam_mergekit.parameters import parse_settings

FIGURES = ("queries", "right", "routed", "both", "tokens", "thinks")
# seed -> pattern -> sums in the order of FIGURES
Sums = dict[str, dict[str, list[float]]]
Figures = dict[str, float]


@dataclass(frozen=True)
class Job:
    """One model to make and to ask; no method: an expert as it is.

    weights: of long, short and code. seed: of an `rpam` merge, which then answers that
    seed's queries only.
    """

    method: str
    name: str
    weights: tuple[float, ...] = ()
    parameters: dict[str, Any] = field(default_factory=dict, hash=False)
    seed: int | None = None
    split: str = "test"

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


def uniform(steps: int, coarse: int) -> Iterator[Job]:
    """Yield the uniform merges: weights in `steps`, or `coarse` ones.

    A weight is that of an expert's task vector from the base; of `linear` they sum to
    1, which makes it the same.
    """

    def simplex(parts: int) -> Iterator[tuple[float, ...]]:
        for counts in itertools.product(range(parts + 1), repeat=3):
            if sum(counts) == parts:
                yield tuple(count / parts for count in counts)

    for weights in simplex(steps):
        if max(weights) < 1:
            yield Job("linear", _shown(weights), weights)
        for scale in (0.25, 0.5, 0.75):
            yield arithmetic([scale * weight for weight in weights])
    for weights in simplex(coarse):
        for scale in (1.5, 2.0, 3.0):
            yield arithmetic([scale * weight for weight in weights])
        for method, density, scale in itertools.product(
            ("ties", "dare_ties"), (0.3, 0.7), (0.5, 1.0, 2.0)
        ):
            scaled = tuple(scale * weight for weight in weights)
            name = f"{_shown(scaled)}, density {density}"
            yield Job(method, name, scaled, {"density": density, "normalize": False})


def arithmetic(weights: Iterable[float]) -> Job:
    """Return the base plus the experts' task vectors times their weights."""
    rounded = tuple(round(weight, 6) for weight in weights)
    return Job("task_arithmetic", _shown(rounded), rounded)


def around(weights: Sequence[float], step: float) -> Iterator[Job]:
    """Yield what is one step away in some of the weights."""
    for shifts in itertools.product((-step, 0, step), repeat=3):
        if any(shifts):
            yield arithmetic(w + s for w, s in zip(weights, shifts, strict=True))


def _shown(weights: Iterable[float]) -> str:
    return " ".join(f"{weight:.3g}" for weight in weights)


def config_of(job: Job, folder: Path) -> dict[str, Any]:
    """Return the mergekit config of a job."""
    whole: dict[str, Any] = {
        "merge_method": job.method,
        "parameters": dict(job.parameters),
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    if job.method == "rpam":
        calibration = {"calibration": str(folder / "calibration.jsonl")}
        models = [_model(folder, p, {"pattern": p}) for p in PATTERNS[1:]]
        whole["parameters"] |= {**calibration, "seed": job.seed}
        return {**whole, "base_model": str(folder / PATTERNS[0]), "models": models}
    density = whole["parameters"].pop("density", None)
    of_model = {} if density is None else {"density": density}
    whole["models"] = [
        _model(folder, pattern, {"weight": weight, **of_model})
        for pattern, weight in zip(PATTERNS, job.weights, strict=True)
    ]
    if job.method == "linear":
        return whole
    return {**whole, "base_model": str(folder / "base")}


def _model(folder: Path, name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {"model": str(folder / name), "parameters": parameters}


def measure(model: Any, tokenizer: Any, asked: dict[str, list[str]]) -> dict[str, Any]:
    """Return the sums of `FIGURES` by pattern."""
    every = [query for of in asked.values() for query in of]
    said = dict(
        zip(every, respond(model, tokenizer, every, TASK.longest_response), strict=True)
    )
    sums = {}
    for pattern, of in asked.items():
        rows = []
        for query in of:
            correct, routed = right(query, said[query]), form(said[query]) == pattern
            tokens = len(tokenizer(said[query], add_special_tokens=False)["input_ids"])
            thinks = said[query].startswith("<think>")
            rows.append((1, correct, routed, correct and routed, tokens, thinks))
        sums[pattern] = [sum(column) for column in zip(*rows, strict=True)]
    return sums


def run_job(job: Job, folder: Path, seeds: Iterable[int], each: int) -> Sums:
    """Make one model and ask it `each` queries of every pattern and seed."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        if job.method:
            merge(config_of(job, folder), out, 0)
        model, tokenizer = load(out if job.method else folder / job.name)
        return {
            str(seed): measure(
                model,
                tokenizer,
                {p: queries(p, each, job.split, seed) for p in PATTERNS},
            )
            for seed in ([job.seed] if job.seed is not None else seeds)
        }


def run_all(
    jobs: Sequence[Job], folder: Path, seeds: Sequence[int], each: int
) -> dict[Job, Sums]:
    """Return the sums of every job; what `folder` has is not made again.

    That is, what was made of the same checkpoints, calibration file and defaults, and
    has answered the same queries.
    """
    path = folder / "results.jsonl"
    problem = [digest(folder), list(seeds), each, parse_settings({}).cache_key()]
    records = json_lines.read(path)
    done = {r["job"]: r["sums"] for r in records if r["problem"] == problem}
    todo = [job for job in jobs if job.key not in done]
    for job in tqdm(todo, unit="model", mininterval=5):
        done[job.key] = run_job(job, folder, seeds, each)
        record = {"job": job.key, "sums": done[job.key], "problem": problem}
        json_lines.append(path, record)
    return {job: done[job.key] for job in jobs}


def digest(folder: Path) -> str:
    """Return a digest of what is merged, and by which calibration file."""
    found = hashlib.sha256((folder / "calibration.jsonl").read_bytes())
    for name in (*PATTERNS, "base"):
        found.update((folder / name / "model.safetensors").read_bytes())
    return found.hexdigest()[:16]


def figures(sums: Sums) -> list[Figures]:
    """Return by seed the shares and means, of every pattern and their mean."""
    found = []
    for _, patterns in sorted(sums.items()):
        of = {
            f"{pattern} {name}": value / row[0]
            for pattern, row in patterns.items()
            for name, value in zip(FIGURES, row, strict=True)
        }
        means = {n: statistics.mean(of[f"{p} {n}"] for p in patterns) for n in FIGURES}
        found.append(of | means)
    return found
