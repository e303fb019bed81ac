"""The calibration file of a job: the pair's own, or one that is spoilt or enriched."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from jobs import Job
from pairs import Pair

from rpam_mergekit.formats.samples import SampleReader


def calibration(pair: Pair) -> Path:
    """Return the pair's calibration file, which `training.calibrate` makes."""
    return pair.cache / "calibration.jsonl"


def calibrated(pair: Pair, job: Job, scratch: Path) -> dict[str, Any]:
    """Return the job's parameters for mergekit, with the path of its calibration file.

    flipped: the share of the queries whose pattern, and response, become the other's.
    neutral: how many queries are added to either pattern that both experts answer
    alike; they are drawn besides `queries_per_pattern` others.
    """
    parameters = dict(job.config["parameters"])
    flipped, neutral = parameters.pop("flipped", 0.0), parameters.pop("neutral", 0)
    file = calibration(pair)
    if not flipped and not neutral:
        return {**parameters, "calibration": str(file)}
    records = [json.loads(line) for line in file.read_text().splitlines()]
    if flipped:
        rng = random.Random(f"flipped-{parameters['seed']}")
        said = {way: first_responses(pair, way) for way in ("long", "short")}
        for record in records:
            if rng.random() < flipped:
                way = "short" if record["pattern"] == "long" else "long"
                response = said[way][record["prompt"]]
                record |= {"pattern": way, "response": response}
    if neutral:
        rng = random.Random(f"neutral-{parameters['seed']}")
        records = drawn(records, parameters["queries_per_pattern"], rng)
        for way in ("long", "short"):
            for _ in range(neutral):
                asked, reply = pair.task.chat(rng)
                records.append({"prompt": asked, "pattern": way, "response": reply})
        parameters["queries_per_pattern"] += neutral
    changed = scratch / "calibration.jsonl"
    changed.write_text("".join(json.dumps(record) + "\n" for record in records))
    return {**parameters, "calibration": str(changed)}


def drawn(
    records: list[dict[str, Any]], each: int, rng: random.Random
) -> list[dict[str, Any]]:
    """Return `each` records of either pattern, or all there are."""
    chosen = []
    for way in ("long", "short"):
        of = [record for record in records if record["pattern"] == way]
        chosen += rng.sample(of, min(each, len(of)))
    return chosen


def first_responses(pair: Pair, way: str) -> dict[str, str]:
    """Return an expert's first sampled response to every query."""
    samples = SampleReader(pair.cache / f"{way}.samples.jsonl")
    return {query.question: query.responses[0].text for query in samples}
