"""What the study makes: every model of a pair, as a `Job`. Nothing is run here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pairs import Pair

GROUPS = ("main", "sweep", "methods", "ablations")
SEEDS = (2, 3, 4)  # 0 and 1 were looked at while the defaults were sought
COARSE = 1 / 20
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of Short
# Granularity and the like are compared on a smaller calibration set, for time.
REFERENCE = {"queries_per_pattern": 128}
ABLATED = ("chains-qwen2", "graph-qwen3", "products-llama-apart")
# Among a job's parameters, but not of the merge method: see calibrations, variants.
STUDYS_OWN = ("flipped", "neutral", "variant")
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
    "outside learned": {"variant": "learned outside"},
    **{
        f"{count} queries": {"queries_per_pattern": count}
        for count in (8, 32, 64, 256, 512)
    },
    **{f"labels flipped {share:.0%}": {"flipped": share} for share in (0.1, 0.2, 0.3)},
    "layers 0.3": {"layers": 0.3},
    "layers 0.6": {"layers": 0.6},
    "epochs 5": {"epochs": 5},
    "epochs 30": {"epochs": 30},
    "epochs 30, early stop": {"epochs": 30, "variant": "early stop"},
    "learning rate 0.02": {"learning_rate": 0.02},
    "learning rate 0.1": {"learning_rate": 0.1},
    "batches of 32": {"batch_size": 32},
    "batches of 64": {"batch_size": 64},
    "regularization 0.1": {"regularization": 0.1},
    "regularization 1": {"regularization": 1.0},
    "regularization 1 to Long": {"regularization": 1.0, "initial_weight": 0.0},
    "32 neutral queries more": {"neutral": 32},
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
QUICK_PARAMETERS = {"queries_per_pattern": 48, "steps": 80}


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
            if "neutral" in parameters and not pair.chats:
                continue  # it was taught nothing that both experts say alike
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
    return replace(job, config=config, seeds=SEEDS[:1], queries=16)
