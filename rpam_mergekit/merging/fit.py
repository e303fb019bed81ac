"""From a merge to its coefficients file: reused if it fits, or made by the pre-pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from mergekit.options import MergeOptions

from rpam_mergekit.chat.prompts import EncodedQuery, encode_calibration, make_batches
from rpam_mergekit.chat.rendering import end_token
from rpam_mergekit.checks.config_file import Document
from rpam_mergekit.checks.examine import examine_merge
from rpam_mergekit.checks.fingerprint import (
    changed_since,
    exclusive,
    unfinished,
    write_solution,
)
from rpam_mergekit.errors import RpamError, refuse
from rpam_mergekit.evaluate.routing_report import closing_text
from rpam_mergekit.folder.contents import IN_OUTPUT
from rpam_mergekit.formats.hub_path import is_hub_path
from rpam_mergekit.formats.solved_layers import (
    LayerReport,
    SolvedByFirst,
    SolvedLayers,
)
from rpam_mergekit.merging.merge import Merge
from rpam_mergekit.models.patches import (
    fresh_loaders,
    hub_cache,
    set_chat_template,
)
from rpam_mergekit.models.tokenizers import load_tokenizer
from rpam_mergekit.models.weights import ExpertWeights
from rpam_mergekit.prepass.memory import (
    activation_bytes,
    check_disk,
    choose_store,
    coefficient_bytes,
    explain_out_of_memory,
    readable,
    return_freed_memory,
)
from rpam_mergekit.prepass.run import PrePass
from rpam_mergekit.processes import joined, local_device
from rpam_mergekit.replay.decoder import Decoder
from rpam_mergekit.routing.figures import SCALES
from rpam_mergekit.routing.holdout import as_many, split_queries
from rpam_mergekit.routing.opening import opening_warning
from rpam_mergekit.text import aligned

PLACES = {"device": "the device", "host": "the host", "disk": "disk"}


def fit(merge: Merge, default: Path, variant: type[PrePass] | None = None) -> Path:
    """Return the coefficients file of a merge, running the pre-pass if need be.

    It lies where `parameters.coefficients` says, else at `default`. Of several
    processes the first reads and writes it. variant: of the pre-pass. Raises
    `RpamError` for whatever cannot be merged, before the pre-pass.
    """
    request, processes = merge.request, merge.processes
    named, path = request.settings.coefficients, merge.coefficients(default)
    if request.calibration is None and not path.exists():
        raise RpamError(
            f"parameters.coefficients: no file {path.absolute()}, and no "
            "parameters.calibration to make it from."
        )
    refuse(request.nothing_to_solve(merge.layout))
    merge.say_notes()
    if request.calibration is None:
        others = changed_since(path, merge.fingerprint(), request, merge.layout)
        merge.say(f"rpam: coefficients taken from {named}")
        if others:
            merge.say(f"rpam: they were solved with other values: {', '.join(others)}")
        return path
    return_freed_memory()
    queries, end = encode_queries(merge)
    prepass = prepass_of(merge, queries, end, variant or PrePass)
    first = processes.rank == 0
    fingerprint = processes.broadcast(merge.fingerprint(queries) if first else {})
    on_hub = named is not None and is_hub_path(named)
    with exclusive(path, merge.say) if first and not on_hub else nullcontext():
        changed: list[str] | None = None  # there is no file
        if first and path.exists():
            changed = changed_since(path, fingerprint, request, merge.layout)
        if processes.broadcast(changed == []):
            if first and not on_hub:  # a run killed right after it wrote the file
                SolvedLayers(unfinished(path, fingerprint)).remove()
            merge.say(f"rpam: coefficients reused from {named or path}")
            return path
        if on_hub:
            raise RpamError(
                f"parameters.coefficients: {named} was made from other calibration "
                "data or settings than the config's, and files of the Hub are not "
                "rewritten. Leave parameters.calibration out to merge by it as it is, "
                "or name a file on this machine."
            )
        if changed:
            merge.say(f"rpam: solved anew; changed since: {', '.join(changed)}")
        _solve(merge, prepass, path, fingerprint)
    merge.say(f"rpam: coefficients written to {path}")
    del prepass
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return path


def fit_document(
    document: Document,
    options: MergeOptions,
    out: str | Path | None = None,
    variant: type[PrePass] | None = None,
) -> Path:
    """Run the pre-pass of the merge that a config describes; write no model.

    out: the coefficients file; None: what `parameters.coefficients` names. Started by
    torchrun, all processes share the calibration set. variant: of the pre-pass, which
    the file does not name. Returns the file. Raises `RpamError` for whatever keeps the
    config from being merged.
    """
    assert document.config is not None
    config = document.config
    if out is not None:
        parameters = {**(config.parameters or {}), "coefficients": str(out)}
        config = config.model_copy(update={"parameters": parameters})
    with hub_cache(options), fresh_loaders():
        examination = examine_merge(config, options, document.text)
        assert examination.request is not None
        if examination.request.settings.coefficients is None:
            raise RpamError(
                "the coefficients file has no name: give --out, or name it in "
                "parameters.coefficients."
            )
        refuse(examination.request.nothing_to_solve())
        with joined(local_device(options.device or "cpu")) as processes:
            merge = Merge(config, options, examination, processes)
            merge.load()
            return fit(merge, IN_OUTPUT, variant)


def encode_queries(merge: Merge) -> tuple[list[EncodedQuery], int | None]:
    """Return the drawn calibration queries as the merged model will see them.

    And the token that ends its turns.
    """
    tokenizer = load_tokenizer(merge.models.base, merge.options)
    set_chat_template(tokenizer, merge.config)
    assert merge.request.calibration is not None
    queries, notes = encode_calibration(
        merge.request.calibration,
        tokenizer,
        merge.base_config.get_text_config().vocab_size,
        merge.request.settings,
        merge.request.template.thinking,
    )
    for note in notes:
        merge.say(f"rpam: {note}")
    return queries, end_token(tokenizer)


def prepass_of(
    merge: Merge,
    queries: Sequence[EncodedQuery],
    end: int | None,
    variant: type[PrePass],
) -> PrePass:
    """Return the pre-pass of a merge. Raises `RpamError` for what cannot be replayed.

    `end`: the token that ends a turn.
    """
    options, settings, config = merge.options, merge.request.settings, merge.config
    decoder = Decoder(
        merge.base_config,
        local_device(options.device or "cpu"),
        options.trust_remote_code,
        merge.compute_dtype,
    )
    solving, held_out = split_queries(queries, settings.held_out, settings.seed)
    return variant(
        ExpertWeights(
            merge.models, merge.layout, decoder, config.dtype, config.out_dtype
        ),
        make_batches(solving, settings),
        settings,
        fixed=merge.fixed,
        processes=merge.processes,
        quiet=options.quiet,
        held_out=make_batches(held_out, settings),
        of_solved=make_batches(as_many(solving, held_out, settings.seed), settings),
        end=end,
    )


def place_activations(prepass: PrePass, folder: Path) -> str:
    """Give the pre-pass a store, with files in `folder`; return what lies where.

    Raises `RpamError` if the disk is too small for them or for the coefficients.
    """
    settings, processes = prepass.settings, prepass.processes
    check_disk(
        folder,
        2 * coefficient_bytes(prepass.decoder, settings, prepass.others),
        "the coefficients, by layer and as a whole,",
    )
    width = prepass.decoder.model.config.get_text_config().hidden_size
    experts = 1 + prepass.others
    size = activation_bytes(prepass.batches, width, experts)
    probes = [batch for of in prepass.measured.values() for batch in of]
    size += activation_bytes(probes, width, experts + len(SCALES))
    prepass.store = choose_store(
        settings.activations,
        size // processes.count,
        prepass.decoder.device,
        folder / f"activations-{processes.rank}",
    )
    queries = sum(len(batch.patterns) for batch in prepass.batches)
    tokens = sum(int(batch.attention_mask.sum()) for batch in prepass.batches)
    steps, count = settings.steps_of(len(prepass.batches)), len(prepass.batches)
    seen = (
        f"; {steps} steps a layer see {steps / count:.0%} of the {count} batches"
        if settings.solver == "adam" and steps < count
        else ""
    )
    of = f", {processes.count} processes" if processes.count > 1 else ""
    return (
        f"{queries} queries, {tokens} tokens; activations of {readable(size)} on "
        f"{PLACES[prepass.store.place]}{of}{seen}"
    )


def _solve(
    merge: Merge, prepass: PrePass, path: Path, fingerprint: Mapping[str, Any]
) -> None:
    """Run the pre-pass, behind what an earlier run has solved; write the file."""
    first = merge.processes.rank == 0
    solved = (SolvedLayers if first else SolvedByFirst)(unfinished(path, fingerprint))
    if solved:
        merge.say(
            f"rpam: {len(solved)} of {len(merge.layout.layers)} layers were solved "
            f"by a run that did not end; going on behind them ({solved.folder})"
        )
    merge.say(f"rpam: {place_activations(prepass, solved.folder)}")
    with explain_out_of_memory(prepass.settings, prepass.store):
        opens = _opening(merge, prepass)
    solution = replace(prepass.run(solved), opens=opens)
    if first:
        write_solution(path, solution, merge.models, merge.layout, fingerprint)
        merge.say(layer_table(solution.layers))
        merge.say(
            closing_text(
                solution.operating_point.record(),
                [asdict(r) for r in solution.layers],
                prepass.settings.granularity,
            )
        )
        solved.remove()
    merge.processes.broadcast(None)  # nobody leaves before the file is there


def _opening(merge: Merge, prepass: PrePass) -> float | None:
    """Return how likely Long opens its thinking by itself; say it if it is not.

    None where the template in use does not open it.
    """
    if not merge.request.template.thinking.takes_out:
        return None
    opens = prepass.opening_probability()
    if opens is not None:
        models = merge.models
        model = str(models.every[models.patterns.index("long")])
        weight = prepass.settings.opening_weight
        if warning := opening_warning(opens, model, weight):
            merge.say(f"rpam: {warning}")
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
