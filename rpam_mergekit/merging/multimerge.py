"""mergekit-multi: several merges in one file, some of which merge others' outputs.

It takes every text of a config for the name of a model, looks at a config only when
its turn has come, and skips any output that exists. For configs of `rpam` models
alone are models, all are looked at before the first merge, and an output is skipped
only if it is what would come (see `stale`). `hooks` puts the functions whose first
argument is `original` in the place of mergekit's.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from rpam_mergekit.checks.config_file import check_keys
from rpam_mergekit.checks.examine import examine
from rpam_mergekit.checks.inputs import (
    not_passed_on,
    with_one_spelling,
    with_references,
)
from rpam_mergekit.errors import RpamError, refuse
from rpam_mergekit.folder.contents import RECORD
from rpam_mergekit.merging.stale import NEXT, check_up_to_date, forget_other_models
from rpam_mergekit.models.patches import folders_are_local, hub_cache
from rpam_mergekit.settings import NAME


def load_config(original: Any, config_source: str, intermediate_dir: str) -> Any:
    """Refuse configs of `rpam` with keys that mergekit drops when it reads them."""
    refuse(
        [
            _named(document.get("name"), finding)
            for document in yaml.safe_load_all(config_source)
            if isinstance(document, dict) and document.get("merge_method") == NAME
            for finding in check_keys(document)
        ]
    )
    return original(config_source, intermediate_dir)


def patched_config(
    original: Any,
    config: MergeConfiguration,
    merge_names: Collection[str | None],
    working_dir: str,
) -> tuple[MergeConfiguration, set[str]]:
    """Return a config with the folders of other merges in place of their names.

    And the names that it has. mergekit would put folders wherever a text is the name
    of a merge, as `merge_method: rpam` beside a merge called rpam, and end where a
    text is no model, as a chat template with two `+`.
    """
    if config.merge_method != NAME:
        patched: tuple[MergeConfiguration, set[str]]
        patched = original(config, merge_names, working_dir)
        return patched
    used: set[str] = set()

    def replaced(model: ModelReference) -> ModelReference:
        if model.model.path not in merge_names:
            return model
        used.add(model.model.path)
        path = os.path.join(working_dir, model.model.path)
        inner = model.model.model_copy(update={"path": path})
        return model.model_copy(update={"model": inner})

    return with_references(with_one_spelling(config), replaced), used


def make_tasks(
    original: Any,
    merge_configs: Mapping[str | None, MergeConfiguration],
    dependencies: Mapping[str | None, set[str]],
    merge_options: MergeOptions,
    intermediate_dir: str,
    *rest: Any,
) -> Any:
    """Refuse what is wrong with any config of `rpam`, before the first is merged.

    Outputs of the same file are not looked at: they may be yet to come.
    """
    outputs = {
        os.path.join(intermediate_dir, name)
        for name in merge_configs
        if name is not None
    }
    ours = {n: c for n, c in merge_configs.items() if c.merge_method == NAME}
    findings = []
    with hub_cache(merge_options):
        for name, config in ours.items():
            found = list(not_passed_on(config))
            found += found or examine(config, merge_options, outputs).findings
            findings += [_named(name, finding) for finding in found]
    refuse(findings)
    try:
        return original(
            merge_configs, dependencies, merge_options, intermediate_dir, *rest
        )
    except ValueError as error:
        if not ours or "Circular" not in str(error):
            raise
        raise RpamError(
            f"{error}. A merge cannot need its own output. A name that merges of this "
            "file have means their outputs: write ./NAME for a folder called so."
        ) from None


def execute(original: Any, task: Any, **inputs: Any) -> Any:
    """Refuse an output that a task would skip if it is old; else do the task.

    Of another method's, the merges by `rpam` that lead to it are compared by time.
    Where a task skips nothing, an output's coefficients of other models are deleted.
    """
    config = MergeConfiguration.model_validate(yaml.safe_load(task.config_yaml))
    out = Path(task.out_path)
    if config.merge_method != NAME:
        if task.lazy and _would_skip(out):
            _check_time(out, task)
    else:
        with hub_cache(task.options):
            if not task.lazy:
                forget_other_models(config, out, task.options)
            elif _would_skip(out):
                check_up_to_date(config, out, task.options)
    with folders_are_local() if any(_records(task)) else nullcontext():
        return original(task, **inputs)


def _would_skip(out: Path) -> bool:
    """Tell whether mergekit-multi takes what is in `out` for a finished merge."""
    from mergekit.scripts.multimerge import MODEL_CHECK_FILENAMES

    return (out / "config.json").exists() and any(
        (out / name).exists() for name in MODEL_CHECK_FILENAMES
    )


def _check_time(out: Path, task: Any) -> None:
    merged_at = (out / "config.json").stat().st_mtime
    newer = [r.parent for r in _records(task) if r.stat().st_mtime > merged_at]
    if newer:
        raise RpamError(
            f"{out} was merged from {newer[0]}, which has been merged anew by rpam "
            f"since. mergekit-multi would skip it. {NEXT}"
        )


def _records(task: Any) -> Iterator[Path]:
    """Yield the records of the merges by `rpam` that lead to a task's output."""
    for name in task.input_merges:
        earlier = task.input_merges[name]
        record = Path(earlier.out_path) / RECORD
        if record.exists():
            yield record
        yield from _records(earlier)


def _named(name: str | None, finding: str) -> str:
    return finding if name is None else f"{name}: {finding}"
