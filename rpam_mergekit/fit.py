"""From a planned merge to its coefficients file: reused when it fits, or made anew.

The fingerprint in the file says what its coefficients were made from: the content of
both models, the encoded calibration queries, and every setting that matters.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from filelock import FileLock, Timeout
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from transformers import AutoTokenizer

from rpam_mergekit import __version__
from rpam_mergekit.check import MergeRequest, check_config, config_notes
from rpam_mergekit.checkpoint import Layout, MergeModels, content_digest, plan_layout
from rpam_mergekit.coefficients import CoefficientsFile, write_coefficients
from rpam_mergekit.decoder import Decoder
from rpam_mergekit.errors import RpamError
from rpam_mergekit.prepass import PrePass
from rpam_mergekit.prompts import EncodedQuery, encode_calibration, make_batches
from rpam_mergekit.solved import LayerReport, Solution, SolvedLayers, folder_of
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
    if request.calibration is None and not path.exists():
        raise RpamError(
            f"parameters.coefficients: no file {path.absolute()}, and no "
            "parameters.calibration to make it from."
        )
    for note in config_notes(models, options):
        _say(f"rpam: {note}", options)
    queries: list[EncodedQuery] = []
    if request.calibration is not None:
        queries = _encode(planner, request)
    fixed = request.fixed_weights(layout)
    fingerprint = _fingerprint(request, fixed, config, queries)
    if request.calibration is None:
        _reusable(path, fingerprint, request, layout)
        _say(f"rpam: coefficients taken from {path}", options)
        return path, layout
    with _alone(path, options):
        if path.exists() and _reusable(path, fingerprint, request, layout):
            _say(f"rpam: coefficients reused from {path}", options)
            return path, layout
        solved = SolvedLayers(unfinished(path) / folder_of(fingerprint))
        if solved:
            _say(
                f"rpam: {len(solved)} of {len(layout.layers)} layers were solved by a "
                f"run that did not end; going on behind them ({solved.folder})",
                options,
            )
        prepass = PrePass(
            models,
            layout,
            Decoder(
                models.base.config(trust_remote_code=options.trust_remote_code),
                options.device or "cpu",
                options.trust_remote_code,
            ),
            make_batches(queries, request.settings.batch_size, pad_id=0),
            request.settings,
            dtype=config.dtype,
            out_dtype=config.out_dtype,
            fixed=fixed,
            quiet=options.quiet,
        )
        solution = prepass.run(solved)
        _write(path, solution, models, fingerprint)
        _say(layer_table(solution.layers), options)
        solved.remove()
    _say(f"rpam: coefficients written to {path}", options)
    del prepass, solution
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return path, layout


def unfinished(path: Path) -> Path:
    """Return the folder of what runs that did not end have solved for `path`."""
    return path.with_name(path.name + ".unfinished")


def _write(
    path: Path,
    solution: Solution,
    models: MergeModels,
    fingerprint: Mapping[str, Any],
) -> None:
    metadata = {
        "version": __version__,
        "models": {
            "base": _public_name(models.base),
            "other": _public_name(models.other),
        },
        "fingerprint": fingerprint,
        "layers": [dataclasses.asdict(report) for report in solution.layers],
    }
    try:
        write_coefficients(path, solution.entries, metadata)
    except OSError as error:
        raise RpamError(
            f"{path} cannot be written: {error}. All layers are solved and safe in "
            f"{unfinished(path)}. Make room, and run the same command again."
        ) from error


@contextmanager
def _alone(path: Path, options: Any) -> Iterator[None]:
    """Let one run at a time make the coefficients file at `path`; others wait."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(f".{path.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _say(f"rpam: waiting for another run that makes {path}", options)
            lock.acquire()
    except OSError as error:
        raise RpamError(
            f"parameters.coefficients: {path} cannot be written: {error}. Name "
            "another file."
        ) from error
    try:
        yield
    finally:
        lock.release()


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
    request: MergeRequest,
    fixed: Mapping[str, float],
    config: Any,
    queries: Sequence[EncodedQuery],
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
        "fixed": dict(fixed),
        "dtype": config.dtype,
        "out_dtype": config.out_dtype,
    }


def _reusable(
    path: Path,
    fingerprint: Mapping[str, Any],
    request: MergeRequest,
    layout: Layout,
) -> bool:
    """Tell whether a file was made from these inputs; refuse other models' files."""
    file = CoefficientsFile(path)
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
