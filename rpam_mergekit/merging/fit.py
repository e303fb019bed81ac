"""From a planned merge to its coefficients file: reused when it fits, or made anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from rpam_mergekit.checks.reuse import (
    alone,
    fingerprint_of,
    reusable,
    unfinished,
    write_solution,
)
from rpam_mergekit.errors import RpamError
from rpam_mergekit.evaluate.routing_report import closing_text
from rpam_mergekit.formats.hub_path import is_hub_path, local_path
from rpam_mergekit.formats.solved_layers import (
    LayerReport,
    SolvedElsewhere,
    SolvedLayers,
    folder_of,
)
from rpam_mergekit.merging.planned import Planned, make_room
from rpam_mergekit.models.checkpoint import Layout
from rpam_mergekit.outputs.folder import IN_OUTPUT
from rpam_mergekit.prepass.memory import knobs, return_freed_memory
from rpam_mergekit.prepass.run import PrePass
from rpam_mergekit.routing.opening import opening_warning
from rpam_mergekit.text import aligned


def fit(planner: Any, out_path: str | Path) -> tuple[Path, Layout]:
    """Return the coefficients file for a merge, running the pre-pass if need be.

    `planner` is mergekit's `MergePlanner`. The file lies where
    `parameters.coefficients` says, or in `rpam/` of the output folder, where loaders
    that read every safetensors file of a model's folder do not see it. Raises
    `RpamError` for whatever cannot be merged, before the pre-pass.
    """
    planned = Planned(planner)
    return coefficients_of(planned, Path(out_path) / IN_OUTPUT), planned.layout


def coefficients_of(planned: Planned, default: Path) -> Path:
    """Return the coefficients file of a planned merge, `default` if it has no name.

    Of several processes the first reads and writes it.
    """
    request, processes = planned.request, planned.processes
    named = request.settings.coefficients
    path = local_path(named, "parameters.coefficients") if named else default
    if request.calibration is None and not path.exists():
        raise RpamError(
            f"parameters.coefficients: no file {path.absolute()}, and no "
            "parameters.calibration to make it from."
        )
    planned.say_notes()
    if request.calibration is None:
        made_from = fingerprint_of(request, planned.fixed, planned.config, [])
        reusable(path, made_from, request, planned.layout)
        planned.say(f"rpam: coefficients taken from {named}")
        return path
    return_freed_memory()
    queries = planned.queries()
    prepass = planned.prepass(queries)
    first = processes.rank == 0
    fingerprint = processes.tell(
        fingerprint_of(request, planned.fixed, planned.config, queries) if first else {}
    )
    on_hub = named is not None and is_hub_path(named)
    with alone(path, planned.say) if first and not on_hub else nullcontext():
        if processes.tell(
            first
            and path.exists()
            and reusable(path, fingerprint, request, planned.layout)
        ):
            planned.say(f"rpam: coefficients reused from {named or path}")
            return path
        if on_hub:
            raise RpamError(
                f"parameters.coefficients: {named} was made from other calibration "
                "data or settings than the config's, and files of the Hub are not "
                "rewritten. Leave parameters.calibration out to merge by it as it is, "
                "or name a file on this machine."
            )
        _solve(planned, prepass, path, fingerprint)
    planned.say(f"rpam: coefficients written to {path}")
    del prepass
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return path


def _solve(
    planned: Planned, prepass: PrePass, path: Path, fingerprint: Mapping[str, Any]
) -> None:
    """Run the pre-pass, behind what an earlier run has solved; write the file."""
    first = planned.processes.rank == 0
    solved = (SolvedLayers if first else SolvedElsewhere)(
        unfinished(path) / folder_of(fingerprint)
    )
    if solved:
        planned.say(
            f"rpam: {len(solved)} of {len(planned.layout.layers)} layers were solved "
            f"by a run that did not end; going on behind them ({solved.folder})"
        )
    planned.say(f"rpam: {make_room(prepass, solved.folder)}")
    with knobs(prepass.settings, prepass.shelf):
        opens = _opening(planned, prepass)
    solution = replace(prepass.run(solved), opens=opens)
    if first:
        write_solution(path, solution, planned.models, planned.layout, fingerprint)
        planned.say(layer_table(solution.layers))
        planned.say(
            closing_text(
                solution.operating_point.record(), [asdict(r) for r in solution.layers]
            )
        )
        solved.remove()
    planned.processes.tell(None)  # nobody leaves before the file is there


def _opening(planned: Planned, prepass: PrePass) -> float | None:
    """Return how likely Long opens its thinking by itself; say it if it is not.

    None where the template in use does not open it.
    """
    if not planned.request.template.thinking.takes_out:
        return None
    opens = prepass.opening_probability()
    if opens is not None:
        models = planned.models
        model = str(models.every[models.patterns.index("long")])
        weight = prepass.settings.opening_weight
        if warning := opening_warning(opens, model, weight):
            planned.say(f"rpam: {warning}")
    return opens


def layer_table(reports: Sequence[LayerReport]) -> str:
    """Return one line per layer: divergence, gap before and after, coefficient."""
    head = ["layer", "divergence", "gap before", "gap after", "mean coefficient"]
    head += ["heaviest token", ""]
    rows = [
        [
            str(r.layer),
            f"{r.divergence:.4f}",
            f"{r.gap_before:.4f}",
            f"{r.gap_after:.4f}",
            f"{r.mean_coefficient:.4f}",
            f"{r.heaviest_token:.0%}",
            "" if r.optimised else "not optimised",
        ]
        for r in reports
    ]
    lines = aligned([head, *rows])
    lines.append(
        "gap: squared distance to the expert each query should follow; 1 is the "
        "distance of the other expert. heaviest token: what share of a query's "
        "objective lies on one token"
    )
    return "\n".join(lines)
