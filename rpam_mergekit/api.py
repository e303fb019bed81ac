"""What the commands do, as functions of Python; see `docs/python-api.md`.

A config is the path of a YAML file, its content as a mapping, or mergekit's own
`MergeConfiguration`. `options` are mergekit's, by the names of its `MergeOptions`, such
as `device="cuda"`, `lora_merge_cache="cache"` or `quiet=True`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from pydantic import ValidationError

from rpam_mergekit.checks.config_file import (
    Document,
    document_of,
    read_config,
    read_one,
)
from rpam_mergekit.checks.examine import Examination
from rpam_mergekit.checks.examine_document import examine_document
from rpam_mergekit.errors import RpamError, suggestion
from rpam_mergekit.merging.export import export_recipe
from rpam_mergekit.merging.fit import fit_document
from rpam_mergekit.merging.hooks import activate
from rpam_mergekit.models.patches import fresh_loaders, hub_cache
from rpam_mergekit.settings import NAME

OTHER_METHODS = {
    "fit": f"'fit' runs the pre-pass of '{NAME}'; other methods have none.",
    "merge": f"This merges by '{NAME}'; mergekit-yaml runs the other methods.",
    "export": f"'export' writes merges by '{NAME}' as recipes; others are recipes "
    "already.",
}

Config: TypeAlias = str | Path | Mapping[str, Any] | MergeConfiguration


def check(config: Config, **options: Any) -> Examination:
    """Examine a config as the command `check` does; nothing large is read.

    Returns what was found: `findings`, texts on what would stop the merge; `notes` on
    what may surprise; `request`, what the config asks for. Raises `RpamError` where
    the file cannot be read as one config.
    """
    merge_options = _options(options)
    activate()
    if isinstance(config, str | Path):
        document = read_one(config)
    else:
        document = document_of(_content(config))
    with hub_cache(merge_options), fresh_loaders():
        examination = examine_document(document, merge_options)
    findings = document.located(examination.findings)
    return replace(examination, findings=findings)


def fit(config: Config, out: str | Path | None = None, **options: Any) -> Path:
    """Run the pre-pass of a merge, or find that its coefficients are there already.

    out: the coefficients file to write; None: what `parameters.coefficients` names.
    Started by torchrun, all processes share the calibration set. Returns the file.
    Raises `RpamError` for whatever keeps the config from being merged.
    """
    activate()
    document, merge_options = _document(config, "fit"), _options(options)
    _apply(merge_options)
    return fit_document(document, merge_options, out)


def merge(config: Config, out: str | Path, **options: Any) -> Path:
    """Merge the models of a config into the folder `out`, pre-pass included.

    As `mergekit-yaml` does it, by mergekit's own `run_merge`. Returns the folder.
    Raises `RpamError` for whatever keeps the config from being merged.
    """
    import mergekit.merge

    activate()
    document, merge_options = _document(config, "merge"), _options(options)
    _apply(merge_options)
    run_merge = mergekit.merge.run_merge  # as `activate` has wrapped it
    assert document.config is not None
    run_merge(document.config, str(out), merge_options, config_source=document.text)
    return Path(out)


def export(
    config: Config,
    coefficients: str | Path,
    out: str | Path | None = None,
    **options: Any,
) -> Path:
    """Write a merge by one coefficient per tensor as a recipe for stock mergekit.

    coefficients: the coefficients file, or the output folder of the merge. out: the
    recipe to write, beside that file by default. Returns the recipe. Raises `RpamError`
    where no stock recipe gives the same bytes.
    """
    activate()
    document, merge_options = _document(config, "export"), _options(options)
    _apply(merge_options)
    return export_recipe(document, str(coefficients), out, merge_options)


def _document(config: Config, verb: str) -> Document:
    """Return a config by `rpam` that mergekit can read."""
    if isinstance(config, str | Path):
        document = read_config(config)
    else:
        document = document_of(_content(config))
        if document.findings:
            raise RpamError(*document.findings)
    assert document.config is not None
    method = document.config.merge_method
    if method != NAME:
        raise RpamError(f"merge_method: found '{method}'. {OTHER_METHODS[verb]}")
    return document


def _content(config: Mapping[str, Any] | MergeConfiguration) -> Mapping[str, Any]:
    if isinstance(config, MergeConfiguration):
        import yaml

        content: dict[str, Any] = yaml.safe_load(config.to_yaml())
        return content
    return config


def _apply(options: MergeOptions) -> None:
    """Set what the options say of the whole process, such as threads.

    torch takes the number of interop threads once, before it computes anything; it is
    the last that mergekit sets.
    """
    try:
        options.apply_global_options()
    except RuntimeError as error:
        if "interop" not in str(error):
            raise


def _options(given: Mapping[str, Any]) -> MergeOptions:
    unknown = [name for name in given if name not in MergeOptions.model_fields]
    if unknown:
        raise RpamError(
            *(
                f"{name}: unknown option.{suggestion(name, MergeOptions.model_fields)}"
                for name in unknown
            )
        )
    try:
        return MergeOptions(**given)
    except ValidationError as error:
        raise RpamError(
            *(f"{one['loc'][0]}: {one['msg']}." for one in error.errors())
        ) from error
