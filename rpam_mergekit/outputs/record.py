"""What every output folder carries besides the model: how it was made.

`rpam.json`, written last, so that its existence means that the merge is whole; for
scalar coefficients the stock recipe of the same merge; the section of the model card.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import ConditionalParameter, MergeConfiguration
from mergekit.options import MergeOptions

from rpam_mergekit.chat.thinking import ThinkingMode
from rpam_mergekit.checks.inputs import read_inputs
from rpam_mergekit.checks.request import MergeRequest
from rpam_mergekit.errors import RpamError
from rpam_mergekit.folder.base_files import base_folder, file_digests
from rpam_mergekit.folder.contents import (
    IN_OUTPUT,
    RECORD,
    STOCK_RECIPE,
    weight_digests,
)
from rpam_mergekit.formats.coefficients import CoefficientsFile
from rpam_mergekit.formats.files import digest_of_file, make_ordinary, write_whole
from rpam_mergekit.formats.hub_path import local_path
from rpam_mergekit.models.adapters import merged_from
from rpam_mergekit.models.layout import Layout
from rpam_mergekit.models.references import public_name
from rpam_mergekit.outputs.card import PAPER, complete
from rpam_mergekit.outputs.stock_recipe import (
    finer_entries,
    recipe_text,
    write_recipe,
)
from rpam_mergekit.settings import NAME

FORMAT = 1


def begin(out_path: str | Path) -> None:
    """Take back what an earlier merge into this folder says of it."""
    for name in (RECORD, STOCK_RECIPE):
        (Path(out_path) / name).unlink(missing_ok=True)


def finish(
    out_path: str | Path,
    config: MergeConfiguration,
    request: MergeRequest,
    options: MergeOptions,
    layout: Layout,
    removed: bool = False,
) -> str | None:
    """Complete the folder of a merge that has been written; `rpam.json` comes last.

    `config` is the user's, before mergekit planned. `removed`: whether the opening of
    the thinking was taken out of the chat template there. Returns why there is no stock
    recipe where scalar coefficients would allow one.
    """
    folder = Path(out_path)
    named = request.settings.coefficients
    path = local_path(named, "parameters.coefficients") if named else folder / IN_OUTPUT
    file = CoefficientsFile(path, request.settings.reasoning)
    path_named = named or IN_OUTPUT.as_posix()
    record = record_of(file, config, request, options, path_named, removed)
    record["weights"] = weight_digests(folder)
    record["base_files"] = file_digests(base_folder(request.models.base))
    reason = None
    if not finer_entries(file):
        try:
            named = request.template.named_in(config)
            write_recipe(
                folder / STOCK_RECIPE, recipe_text(named, request, layout, file)
            )
        except RpamError as error:
            reason = " ".join(error.findings)
    card = folder / "README.md"
    if options.write_model_card and card.exists():
        text = complete(card.read_text(encoding="utf-8"), record)
        card.write_text(text, encoding="utf-8")
    written = (*folder.iterdir(), *folder.glob("*/*"))
    make_ordinary(p for p in written if p.is_file() and not p.is_symlink())
    write_whole(folder / RECORD, f"{json.dumps(record, indent=1)}\n".encode())
    return reason


def record_of(
    file: CoefficientsFile,
    config: MergeConfiguration,
    request: MergeRequest,
    options: MergeOptions,
    path: str,
    removed: bool = False,
) -> dict[str, Any]:
    """Return what `rpam.json` says of a merge by `file`, which `path` names.

    Models have the names of `request`: the file may have been made elsewhere, from
    folders of another machine.
    """
    made_from, models = file.metadata["fingerprint"], request.models
    return {
        "format": FORMAT,
        "method": NAME,
        "algorithm": made_from["algorithm"],
        "paper": PAPER,
        "versions": {
            "rpam_mergekit": file.metadata["version"],
            **{name: version(name) for name in ("mergekit", "torch", "transformers")},
        },
        "models": [
            {
                "model": public_name(model),
                "pattern": pattern,
                "role": "base" if role == "base" else "other",
                "content": made_from[role],
                **_adapted(model, options),
            }
            for role, pattern, model in zip(
                models.roles, models.patterns, models.every, strict=True
            )
        ],
        "calibration": _calibration(made_from, request),
        "settings": made_from["settings"],
        "dtype": config.dtype,
        "out_dtype": config.out_dtype,
        **output_settings(config),
        "thinking": {
            **_thinking(request.template.thinking, removed),
            "opens_by_itself": file.metadata.get("opens"),
        },
        "coefficients": {
            "path": path,
            "sha256": digest_of_file(Path(file.path)),
            "bytes": os.path.getsize(file.path),
        },
        "layers": file.metadata["layers"],
        "operating_point": file.metadata.get("operating_point"),
        "scale": file.scale,
    }


def _thinking(thinking: ThinkingMode, removed: bool) -> dict[str, Any]:
    markers = thinking.markers
    return {
        "mode": thinking.mode,
        "opening": thinking.opening,
        "removed_from_template": removed,
        "open": markers and markers.open,
        "close": markers and markers.close,
    }


def output_settings(config: MergeConfiguration) -> dict[str, Any]:
    """Return what else of a config decides about the output, as JSON, by its keys."""
    inputs = read_inputs(config)
    weights = [(i.model, i.parameters.get("weight")) for i in inputs.named]
    weights.append((None, (config.parameters or {}).get("weight")))
    found: dict[str, Any] = {
        "weight": [_plain(w) for model, w in weights if model != config.base_model],
        "layer_ranges": [list(layers) for _, layers in inputs.layer_ranges],
        "reasoning": (config.parameters or {}).get("reasoning", 0.0),
        "chat_template": config.chat_template,
        "tokenizer": None,
    }
    if config.tokenizer_source is not None:
        found["tokenizer"] = {}
    elif config.tokenizer is not None:
        found["tokenizer"] = config.tokenizer.model_dump(
            mode="json", exclude={"source"}, exclude_defaults=True
        )
    return found


def _plain(setting: Any) -> Any:
    """Return a parameter's setting as JSON."""
    if isinstance(setting, list):
        return [_plain(one) for one in setting]
    if isinstance(setting, ConditionalParameter):
        return setting.model_dump(mode="json")
    return setting


def _adapted(model: ModelReference, options: MergeOptions) -> dict[str, Any]:
    if model.lora is None:
        return {}
    return {"merged_from": merged_from(model, options)}


def _calibration(
    made_from: Mapping[str, Any], request: MergeRequest
) -> dict[str, Any] | None:
    if made_from["calibration"] is None:
        return None
    found: dict[str, Any] = {"digest": made_from["calibration"]}
    if request.calibration is not None:
        counts = Counter(query.pattern for query in request.calibration.queries)
        found["queries"] = {p: counts[p] for p in request.models.patterns}
    return found
