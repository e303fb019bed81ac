"""Labels queries from the sample files of the two models, into a calibration file.

`label` is what the command of this name does. It prints nothing but progress bars;
what the user should know goes to `say`, a line at a time.
"""

from __future__ import annotations

from pathlib import Path

from rpam_mergekit.formats.samples import check_folder
from rpam_mergekit.questions.benchmarks import PRESETS
from rpam_mergekit.questions.leaks import read_guard
from rpam_mergekit.sampling.labels import (
    Candidate,
    Labels,
    label_queries,
    write_calibration,
)
from rpam_mergekit.sampling.read_samples import GradedSamples
from rpam_mergekit.sampling.request import LabelRequest, Say, log
from rpam_mergekit.sampling.run import run_coroutine


def label(request: LabelRequest, say: Say = log) -> Labels:
    """Label the queries of two sample files and write the calibration file.

    Returns the labels. Raises `RpamError` for files that cannot be read or have not
    finished, and if a pattern has no query; then nothing is written.
    """
    labels = labels_of(request, say)
    write_calibration(Path(request.out), labels)
    return labels


def labels_of(request: LabelRequest, say: Say = log) -> Labels:
    """Return the labels of the queries of two sample files; write nothing."""
    return run_coroutine(_labels(request, say))


async def _labels(request: LabelRequest, say: Say) -> Labels:
    check_folder(Path(request.out))
    guard = read_guard(request.exclude)
    files = [GradedSamples(Path(p), request) for p in (request.long, request.short)]
    for file in files:
        _warn_of_evaluation_set(file, say)
    models = [file.header.get("model") for file in files]
    if models[0] is not None and models[0] == models[1]:
        say(f"note: both files are of the model {models[0]}")
    candidates: list[list[Candidate]] = []
    for file in files:
        of = [Candidate.of(query, file.markers) async for query in file.queries()]
        file.refuse_unfinished(len(of), request.partial)
        candidates.append(of)
    return label_queries(
        candidates[0],
        candidates[1],
        guard,
        per_pattern=request.per_pattern,
        balance=request.balance,
        seed=request.seed,
        responses=not request.prompts_only,
    )


def _warn_of_evaluation_set(file: GradedSamples, say: Say) -> None:
    dataset = file.header.get("dataset", {})
    preset = PRESETS.get(dataset.get("preset") or "")
    if preset is not None and dataset.get("split") == preset.evaluation:
        say(
            f"note: {file.path} holds queries that models are evaluated on "
            f"({preset.name}, split {preset.evaluation}): calibrate on them, and "
            "figures on that benchmark mean nothing"
        )
