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
    queries: list[EncodedQuery] = []
    if request.calibration is not None:
        queries = _encode(planner, request, say)
    fixed = request.fixed_weights(layout)
    first = processes.rank == 0
    fingerprint = processes.tell(
        fingerprint_of(request, fixed, config, queries) if first else {}
    )
    if request.calibration is None:
        reusable(path, fingerprint, request, layout)
        say(f"rpam: coefficients taken from {path}")
        return path, layout
    with alone(path, say) if first else nullcontext():
        if processes.tell(
            first and path.exists() and reusable(path, fingerprint, request, layout)
        ):
            say(f"rpam: coefficients reused from {path}")
            return path, layout
        folder = unfinished(path) / folder_of(fingerprint)
        solved = (SolvedLayers if first else SolvedElsewhere)(folder)
        if solved:
            say(
                f"rpam: {len(solved)} of {len(layout.layers)} layers were solved by a "
                f"run that did not end; going on behind them ({solved.folder})"
            )
        prepass = _prepass(planner, request, layout, queries, fixed, folder, processes)
        say(f"rpam: {_whereabouts(prepass)}")
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
    folder: Path,
    processes: Processes,
) -> PrePass:
    """Return the pre-pass of a merge, for whose files `folder` has room."""
    options, settings = planner.options, request.settings
    model_config = request.models.base.config(
        trust_remote_code=options.trust_remote_code
    )
    decoder = Decoder(
        model_config,
        local_device(options.device or "cpu"),
        options.trust_remote_code,
    )
    batches = make_batches(queries, settings.batch_size, pad_id=0)
    width = model_config.get_text_config().hidden_size
    check_disk(
        folder,
        2 * coefficient_bytes(decoder, settings),
        "the coefficients, by layer and as a whole,",
    )
    shelf = choose_shelf(
        settings.activations,
        activation_bytes(batches, width) // processes.count,
        decoder.device,
        folder / f"activations-{processes.rank}",
    )
    return PrePass(
        request.models,
        layout,
        decoder,
        batches,
        settings,
        dtype=planner.config.dtype,
        out_dtype=planner.config.out_dtype,
        fixed=fixed,
        shelf=shelf,
        processes=processes,
        quiet=options.quiet,
    )


def _whereabouts(prepass: PrePass) -> str:
    """Return what is worked on, and where it lies."""
    width = prepass.decoder.model.config.get_text_config().hidden_size
    tokens = sum(int(batch.attention_mask.sum()) for batch in prepass.batches)
    size = readable(activation_bytes(prepass.batches, width))
    of = f", {prepass.processes.count} processes" if prepass.processes.count > 1 else ""
    return (
        f"{sum(len(b.patterns) for b in prepass.batches)} queries, {tokens} tokens; "
        f"activations of {size} on {PLACES[prepass.shelf.place]}{of}"
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
