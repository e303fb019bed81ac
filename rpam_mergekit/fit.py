"""From a planned merge to its coefficients file: reused when it fits, or made anew.

The fingerprint in the file says what its coefficients were made from: the content of
both models, the encoded calibration queries, and every setting that matters.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from transformers import AutoTokenizer

from rpam_mergekit import __version__
from rpam_mergekit.check import MergeRequest, check_config, config_notes
from rpam_mergekit.checkpoint import Layout, content_digest, plan_layout
from rpam_mergekit.coefficients import CoefficientsFile, write_coefficients
from rpam_mergekit.decoder import Decoder
from rpam_mergekit.errors import RpamError
from rpam_mergekit.prepass import LayerReport, PrePass
from rpam_mergekit.prompts import EncodedQuery, encode_calibration, make_batches
from rpam_mergekit.tables import aligned

# Raised whenever the same inputs would give other coefficients than before.
ALGORITHM = 1
IN_OUTPUT = Path("rpam") / "coefficients.safetensors"


def fit(planner: Any, out_path: str | Path) -> tuple[Path, Layout]:
    """Return the coefficients file for a merge, running the pre-pass if need be.

    `planner` is mergekit's `MergePlanner`. The file lies where
    `parameters.coefficients` says, or in `rpam/` of the output folder, where loaders
    that read every safetensors file of a model's folder do not see it. Raises
    `RpamError` for whatever cannot be merged, before the pre-pass.
    """
    config, options = planner.config, planner.options
    request = check_config(config, options)
    models = request.models
    layout = plan_layout(
        planner.arch_info, planner.out_model_config, [models.base, models.other]
    )
    path = Path(request.settings.coefficients or Path(out_path) / IN_OUTPUT)
    file = CoefficientsFile(path) if path.exists() else None
    if request.calibration is None and file is None:
        raise RpamError(
            f"parameters.coefficients: no file {path.absolute()}, and no "
            "parameters.calibration to make it from."
        )
    for note in config_notes(models, options):
        _say(f"rpam: {note}", options)
    queries: list[EncodedQuery] = []
    if request.calibration is not None:
        queries = _encode(planner, request)
    fingerprint = _fingerprint(request, layout, config, queries)
    if file is not None:
        if _reusable(file, fingerprint, request, layout):
            _say(f"rpam: coefficients reused from {path}", options)
            return path, layout
        del file
    decoder = Decoder(
        models.base.config(trust_remote_code=options.trust_remote_code),
        options.device or "cpu",
        options.trust_remote_code,
    )
    prepass = PrePass(
        models,
        layout,
        decoder,
        make_batches(queries, request.settings.batch_size, pad_id=0),
        request.settings,
        dtype=config.dtype,
        out_dtype=config.out_dtype,
        fixed=request.fixed_weights(layout),
        quiet=options.quiet,
    )
    solution = prepass.run()
    write_coefficients(
        path,
        solution.entries,
        {
            "version": __version__,
            "models": {
                "base": _public_name(models.base),
                "other": _public_name(models.other),
            },
            "fingerprint": fingerprint,
            "layers": [dataclasses.asdict(report) for report in solution.layers],
        },
    )
    _say(layer_table(solution.layers), options)
    _say(f"rpam: coefficients written to {path}", options)
    del prepass, decoder, solution
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return path, layout


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


def _encode(planner: Any, request: MergeRequest) -> list[EncodedQuery]:
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
        _say(f"rpam: {note}", planner.options)
    return queries


def _fingerprint(
    request: MergeRequest, layout: Layout, config: Any, queries: Sequence[EncodedQuery]
) -> dict[str, Any]:
    calibration = request.calibration
    encoded = json.dumps([dataclasses.astuple(q) for q in queries]).encode()
    return {
        "algorithm": ALGORITHM,
        "base": content_digest(request.models.base),
        "other": content_digest(request.models.other),
        "patterns": [request.models.base_pattern, request.models.other_pattern],
        "calibration": calibration.digest if calibration else None,
        "queries": hashlib.sha256(encoded).hexdigest(),
        "settings": request.settings.model_dump(
            exclude={"calibration", "coefficients", "preset"}
        ),
        "fixed": request.fixed_weights(layout),
        "dtype": config.dtype,
        "out_dtype": config.out_dtype,
    }


def _reusable(
    file: CoefficientsFile,
    fingerprint: Mapping[str, Any],
    request: MergeRequest,
    layout: Layout,
) -> bool:
    """Tell whether `file` was made from the same inputs; refuse other models' files."""
    made_from = file.metadata["fingerprint"]
    for role in ("base", "other"):
        if made_from[role] != fingerprint[role]:
            raise RpamError(
                f"parameters.coefficients: {file.path} belongs to other models: its "
                f"{role} model was {file.metadata['models'][role]}, whose content "
                f"differs from {getattr(request.models, role)}. Delete the file to "
                "make it anew, or name another one."
            )
    if request.calibration is None:
        infos = [*layout.outside, *(i for layer in layout.layers for i in layer)]
        lacking = sorted({i.name for i in infos} - set(file.names))
        if lacking:
            raise RpamError(f"{file.path}: no coefficients for {lacking[0]}.")
        return True
    return bool(made_from == fingerprint)


def _public_name(model: ModelReference) -> str:
    """Return a model's name without the folders of this machine."""
    local = Path(LoaderCache().get(model).index.base_path)
    if Path(model.model.path).exists():
        return local.name
    return str(model)


def _say(text: str, options: Any) -> None:
    if not options.quiet:
        click.echo(text, err=True)
