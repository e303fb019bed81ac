"""From a planned merge to its coefficients file: reused when it fits, or made anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
import torch
from transformers import AutoTokenizer

from rpam_mergekit.check import MergeRequest, check_config, config_notes
from rpam_mergekit.checkpoint import Layout, plan_layout
from rpam_mergekit.decoder import Decoder
from rpam_mergekit.errors import RpamError
from rpam_mergekit.memory import (
    activation_bytes,
    check_disk,
    choose_shelf,
    coefficient_bytes,
    readable,
    return_freed_memory,
)
from rpam_mergekit.parallel import Processes, local_device
from rpam_mergekit.prepass import PrePass
from rpam_mergekit.prompts import EncodedQuery, encode_calibration, make_batches
from rpam_mergekit.reuse import (
    Say,
    alone,
    fingerprint_of,
    reusable,
    unfinished,
    write_solution,
)
from rpam_mergekit.solved import (
    LayerReport,
    SolvedElsewhere,
    SolvedLayers,
    folder_of,
)
from rpam_mergekit.tables import aligned

IN_OUTPUT = Path("rpam") / "coefficients.safetensors"
PLACES = {"device": "the device", "host": "the host", "disk": "disk"}


def fit(
    planner: Any, out_path: str | Path, processes: Processes | None = None
) -> tuple[Path, Layout]:
    """Return the coefficients file for a merge, running the pre-pass if need be.

    `planner` is mergekit's `MergePlanner`. The file lies where
    `parameters.coefficients` says, or in `rpam/` of the output folder, where loaders
    that read every safetensors file of a model's folder do not see it. Of several
    `processes` the first reads and writes it. Raises `RpamError` for whatever cannot
    be merged, before the pre-pass.
    """
    config, options = planner.config, planner.options
    processes = processes or Processes()
    say = _speaker(options, processes)
    request = check_config(config, options)
    models = request.models
    layout = plan_layout(
        planner.arch_info, planner.out_model_config, [models.base, models.other]
    )
    path = Path(request.settings.coefficients or Path(out_path) / IN_OUTPUT)
    if request.calibration is None and not path.exists():
        raise RpamError(
            f"parameters.coefficients: no file {path.absolute()}, and no "
            "parameters.calibration to make it from."
        )
    for note in config_notes(models, options):
        say(f"rpam: {note}")
    fixed = request.fixed_weights(layout)
    first = processes.rank == 0
    if request.calibration is None:
        reusable(path, fingerprint_of(request, fixed, config, []), request, layout)
        say(f"rpam: coefficients taken from {path}")
        return path, layout
    return_freed_memory()
    queries = _encode(planner, request, say)
    prepass = _prepass(planner, request, layout, queries, fixed, processes)
    fingerprint = processes.tell(
        fingerprint_of(request, fixed, config, queries) if first else {}
    )
    with alone(path, say) if first else nullcontext():
        if processes.tell(
            first and path.exists() and reusable(path, fingerprint, request, layout)
        ):
            say(f"rpam: coefficients reused from {path}")
            return path, layout
        solved = (SolvedLayers if first else SolvedElsewhere)(
            unfinished(path) / folder_of(fingerprint)
        )
        if solved:
            say(
                f"rpam: {len(solved)} of {len(layout.layers)} layers were solved by a "
                f"run that did not end; going on behind them ({solved.folder})"
            )
        say(f"rpam: {_make_room(prepass, solved.folder)}")
        solution = prepass.run(solved)
        if first:
            write_solution(path, solution, models, fingerprint)
            say(layer_table(solution.layers))
            solved.remove()
        processes.tell(None)  # nobody leaves before the file is there
    say(f"rpam: coefficients written to {path}")
    del prepass, solution
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return path, layout


def _prepass(
    planner: Any,
    request: MergeRequest,
    layout: Layout,
    queries: Sequence[EncodedQuery],
    fixed: Mapping[str, float],
    processes: Processes,
) -> PrePass:
    """Return the pre-pass of a merge. Raises `RpamError` for its architecture."""
    options, config = planner.options, planner.config
    base_config = request.models.base.config(
        trust_remote_code=options.trust_remote_code
    )
    device = local_device(options.device or "cpu")
    return PrePass(
        request.models,
        layout,
        Decoder(
            base_config,
            device,
            options.trust_remote_code,
            request.settings.compute_dtype,
        ),
        make_batches(queries, request.settings.batch_size, pad_id=0),
        request.settings,
        dtype=config.dtype,
        out_dtype=config.out_dtype,
        fixed=fixed,
        processes=processes,
        quiet=options.quiet,
    )


def _make_room(prepass: PrePass, folder: Path) -> str:
    """Give the pre-pass a shelf, with files in `folder`; return what lies where.

    Raises `RpamError` if the disk is too small for them or for the coefficients.
    """
    settings, processes = prepass.settings, prepass.processes
    check_disk(
        folder,
        2 * coefficient_bytes(prepass.decoder, settings),
        "the coefficients, by layer and as a whole,",
    )
    width = prepass.decoder.model.config.get_text_config().hidden_size
    size = activation_bytes(prepass.batches, width)
    prepass.shelf = choose_shelf(
        settings.activations,
        size // processes.count,
        prepass.decoder.device,
        folder / f"activations-{processes.rank}",
    )
    queries = sum(len(batch.patterns) for batch in prepass.batches)
    tokens = sum(int(batch.attention_mask.sum()) for batch in prepass.batches)
    of = f", {processes.count} processes" if processes.count > 1 else ""
    return (
        f"{queries} queries, {tokens} tokens; activations of {readable(size)} on "
        f"{PLACES[prepass.shelf.place]}{of}"
    )


def layer_table(reports: Sequence[LayerReport]) -> str:
    """Return one line per layer: divergence, gap before and after, coefficient."""
    head = ["layer", "divergence", "gap before", "gap after", "mean coefficient", ""]
    rows = [
        [
            str(r.layer),
            f"{r.divergence:.4f}",
            f"{r.gap_before:.4f}",
            f"{r.gap_after:.4f}",
            f"{r.mean_coefficient:.4f}",
            "" if r.optimised else "not optimised",
        ]
        for r in reports
    ]
    lines = aligned([head, *rows])
    lines.append(
        "gap: squared distance to the expert each query should follow; 1 is the "
        "distance of the other expert"
    )
    return "\n".join(lines)


def _encode(planner: Any, request: MergeRequest, say: Say) -> list[EncodedQuery]:
    """Return the drawn calibration queries as the merged model will see them."""
    from mergekit.merge import _set_chat_template

    base = request.models.base
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            base.model.path,
            revision=base.model.revision,
            trust_remote_code=planner.options.trust_remote_code,
        )
    except Exception as error:
        raise RpamError(
            f"{base}: its tokenizer cannot be loaded, which the calibration queries "
            f"need: {str(error).strip().splitlines()[0]}"
        ) from error
    _set_chat_template(tokenizer, planner.config)
    vocabulary = planner.out_model_config.get_text_config().vocab_size
    assert request.calibration is not None
    queries, notes = encode_calibration(
        request.calibration, tokenizer, vocabulary, request.settings
    )
    for note in notes:
        say(f"rpam: {note}")
    return queries


def _speaker(options: Any, processes: Processes) -> Say:
    """Return what tells the user something; only the first process does."""
    if options.quiet or processes.rank > 0:
        return lambda text: None
    return lambda text: click.echo(text, err=True)
