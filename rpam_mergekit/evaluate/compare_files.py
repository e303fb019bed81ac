"""Compares models by their sample files: reads them, and hands them to `compare`.

`compare` here is what the command of this name does, without its texts, tables and
picture: those are in `comparison_report`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rpam_mergekit.errors import RpamError
from rpam_mergekit.evaluate.compare import (
    Comparison,
    Model,
    QueryFigures,
    by_weight,
    compare_models,
)
from rpam_mergekit.sampling.read_samples import GradedSamples
from rpam_mergekit.sampling.request import GradingOptions, Location
from rpam_mergekit.sampling.run import run_coroutine

ROLES = ("long", "short", "merged")


@dataclass(frozen=True, kw_only=True)
class CompareRequest(GradingOptions):
    """Compare the models of several sample files.

    files: of the Long-CoT, the Short-CoT and the merged model, then of interpolations;
    one file alone is the merged model's. For several data sets folders, with a sample
    file per data set in each. by: field of the data set's rows that says how hard a
    query is. draws, seed: of the bootstrap. partial: accept files of runs that have
    not finished.
    """

    files: Sequence[Location]
    by: str | None = None
    partial: bool = False
    draws: int = 2000
    seed: int = 0


def compare(request: CompareRequest) -> Comparison:
    """Return accuracy, tokens and thinking of the models, with intervals.

    Raises `RpamError` for files that cannot be read, have not finished or share no
    query. `comparison_report.text` shows the outcome, `.write` writes it to a folder.
    """
    return run_coroutine(_compare(request))


async def _compare(request: CompareRequest) -> Comparison:
    roles = ROLES if len(request.files) > 1 else ("merged",)
    models: list[Model] = []
    for place, file in enumerate(map(Path, request.files)):
        role = roles[place] if place < len(roles) else "sweep"
        name = file.name.removesuffix(".jsonl").removesuffix(".samples")
        if any(model.name == name for model in models):
            name = f"{name} ({place + 1})"
        models.append(await _read(file, Model(name, role), request))
    models = models[: len(roles)] + by_weight(models[len(roles) :])
    return compare_models(models, by=request.by, draws=request.draws, seed=request.seed)


async def _read(file: Path, model: Model, request: CompareRequest) -> Model:
    """Return `model` with the figures of its sample file, or of those in a folder."""
    parts = sorted(file.glob("*.jsonl")) if file.is_dir() else [file]
    if not parts:
        raise RpamError(f"{file}: the folder holds no .jsonl file.")
    for part in parts:
        samples = GradedSamples(part, request)
        dataset = samples.header.get("dataset", {}).get("name") or part.stem
        # Of one file the name does not matter: files of other names are paired.
        dataset = dataset if len(parts) > 1 else "queries"
        async for query in samples.queries():
            key = (dataset, query.question)
            model.queries.setdefault(key, QueryFigures.of(query))
        samples.refuse_unfinished(len(model.queries), request.partial)
    return model
