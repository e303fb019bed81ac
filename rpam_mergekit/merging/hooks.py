"""What stays changed in mergekit while this package is loaded: wrapped functions.

`run_merge`, which every merge goes through, and four functions of mergekit-multi. What
is not of `rpam` is handed on as it is. `_startup` calls a function of this module
when the module of mergekit that it wraps has been imported; `activate` calls them
without a start-up file.

`mergekit.merge` is imported when it is needed: it may be the module whose import
imports this package.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from transformers import PretrainedConfig

from rpam_mergekit.chat.template_files import take_out
from rpam_mergekit.checks.examine import examine_merge
from rpam_mergekit.checks.inputs import read_inputs
from rpam_mergekit.errors import refuse
from rpam_mergekit.folder.base_files import base_folder, copy_base_files
from rpam_mergekit.folder.contents import IN_OUTPUT, STOCK_RECIPE
from rpam_mergekit.folder.earlier import clear, finished, refuse_folder
from rpam_mergekit.folder.model_config import CONFIG as MODEL_CONFIG
from rpam_mergekit.folder.model_config import write_config
from rpam_mergekit.merging import multimerge
from rpam_mergekit.merging.fit import fit
from rpam_mergekit.merging.merge import Merge, output_weights
from rpam_mergekit.models.completeness import check_complete
from rpam_mergekit.models.patches import (
    chat_template_of,
    cut_output_config,
    folders_are_local,
    fresh_loaders,
    hub_cache,
)
from rpam_mergekit.models.quantised import drop_claim
from rpam_mergekit.outputs import record
from rpam_mergekit.refusal import shown_by_click
from rpam_mergekit.settings import NAME


def _run_merge(
    original: Any,
    merge_config: MergeConfiguration,
    out_path: str,
    options: MergeOptions,
    config_source: str | None = None,
) -> Any:
    """Examine the config, run the pre-pass, let mergekit merge, complete the folder."""
    if merge_config.merge_method != NAME:
        record.begin(out_path)  # what will be there is no merge by rpam
        return original(merge_config, out_path, options, config_source)
    with hub_cache(options), folders_are_local(), fresh_loaders():
        examination = examine_merge(merge_config, options, config_source)
        merge = Merge(merge_config, options, examination)
        refuse(merge.request.nothing_to_solve())
        refuse_folder(Path(out_path), merge.models.every, options)
        merge.load()
        coefficients = fit(merge, Path(out_path) / IN_OUTPUT)
        said = _begin(Path(out_path), coefficients)
        with cut_output_config(read_inputs(merge.config).layers) as made:
            result = original(
                merge.kernel_config(coefficients),
                out_path,
                options,
                config_source or merge.config.to_yaml(),
            )
        said += _complete(merge, Path(out_path), made[-1])
    for line in said:
        merge.say(f"rpam: {line}")
    return result


def _begin(folder: Path, coefficients: Path) -> list[str]:
    """Take away what an earlier merge left in the folder; return what is to be said."""
    left = clear(folder, coefficients.absolute() == (folder / IN_OUTPUT).absolute())
    if not left:
        return []
    return [f"{folder} also holds what this merge did not make: {', '.join(left)}"]


def _complete(merge: Merge, folder: Path, made: PretrainedConfig) -> list[str]:
    """Complete the folder that mergekit has written; return what is to be said."""
    options, base = merge.options, merge.models.base
    trusted = options.trust_remote_code
    own = base_folder(base)
    weights = output_weights(merge.architecture, made)
    write_config(folder, own / MODEL_CONFIG, base, made, weights, trusted)
    drop_claim(folder)
    named = chat_template_of(merge.config)
    copy_base_files(own, folder, named, _wants_tokenizer(merge))
    check_complete(folder, merge.models.base, trusted)
    thinking = merge.request.template.thinking
    removed, said = take_out(folder, thinking, trusted)
    reason = record.finish(
        folder, merge.config, merge.request, merge.options, merge.layout, removed
    )
    finished(folder)
    return said + ([f"no {STOCK_RECIPE}: {reason}"] if reason else [])


def _wants_tokenizer(merge: Merge) -> bool:
    config = merge.config
    named = config.tokenizer is not None or config.tokenizer_source is not None
    return named or bool(merge.options.copy_tokenizer)


def activate() -> None:
    """Register and wrap without the start-up file; safe to call again."""
    import mergekit.merge

    from rpam_mergekit.merging.method import register

    register()
    hook_run_merge(mergekit.merge)


def _wrap(owner: Any, name: str, replacement: Any) -> None:
    """Put `replacement`, which gets the original first, in its place; only once."""
    original = getattr(owner, name)
    if getattr(original, "rpam_mergekit", False):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with shown_by_click():
            return replacement(original, *args, **kwargs)

    wrapped.rpam_mergekit = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


# Last: once these are there `_startup` calls them, maybe from another thread.


def hook_run_merge(module: Any) -> None:
    """Let `run_merge` of `mergekit.merge` do what a merge by `rpam` needs."""
    _wrap(module, "run_merge", _run_merge)


def hook_multimerge(module: Any) -> None:
    """Let mergekit-multi check all configs first, and outputs that it would skip."""
    for name in ("load_config", "patched_config", "make_tasks"):
        _wrap(module, name, getattr(multimerge, name))
    _wrap(module.MergeModelTask, "execute", multimerge.execute)


if "rpam_mergekit._startup" in sys.modules:
    sys.modules["rpam_mergekit._startup"].catch_up()
