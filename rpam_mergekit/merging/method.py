"""The merge method `rpam` and how it gets into mergekit's planner.

A mergekit kernel sees single tensors only. So the pre-pass runs when a merge is
planned, once, on the main thread, before any weight is in memory; its result, a
coefficients file, reaches the kernel through mergekit's own parameters: the file's
path, and for every tensor its name. Per-input parameters are resolved by the *input*
tensor's name. A user's own `weight` setting reaches the kernel the same way and wins.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from mergekit import merge_methods
from mergekit.architecture import ConfiguredModuleArchitecture, WeightInfo
from mergekit.common import dtype_from_name
from mergekit.config import ConditionalParameter, MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods.base import (
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    TensorGroup,
)
from mergekit.options import MergeOptions

from rpam_mergekit.chat.template_files import take_out
from rpam_mergekit.checks.examine import NAME, check_merge, weight_parameter
from rpam_mergekit.checks.inputs import cut_config, read_inputs
from rpam_mergekit.errors import RpamError
from rpam_mergekit.formats.coefficients import open_coefficients, written
from rpam_mergekit.merging import multimerge
from rpam_mergekit.merging.fit import fit
from rpam_mergekit.merging.planned import already_checked
from rpam_mergekit.models.adapters import merge_adapters
from rpam_mergekit.models.checkpoint import Layout, entry_name
from rpam_mergekit.models.completeness import check_complete
from rpam_mergekit.models.references import reachable
from rpam_mergekit.outputs import record
from rpam_mergekit.outputs.stock_recipe import RECIPE

NO_PLANNER = (
    "this command has no planner, so that the pre-pass cannot run. Use mergekit-yaml, "
    "mergekit-multi or 'mergekit-rpam merge' with model folders instead."
)
SHARED, NON_BASE = ParameterScope.SHARED, ParameterScope.NON_BASE


class RpamMerge(GroupMergeMethod):
    """The kernel: the merge formula with coefficients from the file."""

    spec = MergeMethodSpec(
        name=NAME,
        pretty_name="RPAM (Reasoning Pattern Alignment Merging)",
        reference_url="https://arxiv.org/abs/2601.03506",
        parameters=(
            weight_parameter(),
            ParameterSpec("pattern", str | None, NON_BASE, default=None),
            ParameterSpec("tensor", str | None, NON_BASE, default=None),
            ParameterSpec("coefficients", str | None, SHARED, default=None),
            ParameterSpec("reasoning", float, SHARED, default=0.0),
            ParameterSpec("written_dtype", str | None, SHARED, default=None),
        ),
        contract=InputContract(
            base=BasePolicy.REQUIRED,
            min_inputs=2,
            min_non_base=1,
        ),
    )

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> torch.Tensor:
        """Return the merged tensor, computed in float32 and rounded once."""
        assert group.base is not None  # the contract requires it
        base = group.base.tensor
        parts = [
            {
                part: value.to(base.device)
                for part, value in _parts(group, other.id, parameters).items()
            }
            for other in group.non_base
        ]
        others = [other.tensor for other in group.non_base]
        dtype = dtype_from_name(parameters["written_dtype"])
        return written(base, others, parts, dtype)


def _parts(
    group: TensorGroup, other: Hashable, parameters: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Return the parts of a tensor's coefficient for one of the other models.

    A `weight` needs no file: callers without a planner, such as mergekit-pytorch and
    merges in memory, can give every other model one.
    """
    weight = parameters["weight"][other]
    tensor = parameters["tensor"][other]
    if weight is not None:
        return {"scalar": torch.tensor(weight, dtype=torch.float32)}
    if tensor is None:
        raise RpamError(
            f"{NO_PLANNER} Or give every other model a `weight`: "
            f"{group.metadata.name or 'a tensor'} has none."
        )
    pattern = parameters["pattern"][other]
    file = open_coefficients(parameters["coefficients"], parameters["reasoning"])
    return file.parts(entry_name(pattern, tensor, len(group.non_base)))


METHOD = RpamMerge()


def register(_module: Any = None) -> None:
    """Make `rpam` known to mergekit; does nothing if it is known already."""
    if METHOD.spec.name not in {
        m.spec.name for m in merge_methods.registered_methods()
    }:
        merge_methods.register(METHOD)


def hook_planner(module: Any) -> None:
    """Let `MergePlanner` of `mergekit.plan` run the pre-pass before it plans."""

    def plan_to_disk(original: Any, planner: Any, out_path: str) -> Any:
        if planner.config.merge_method != NAME:
            return original(planner, out_path)
        coefficients, layout = fit(planner, out_path)
        cut_config(planner.out_model_config, read_inputs(planner.config))
        with _injected(planner, coefficients, layout):
            return original(planner, out_path)

    _wrap(module.MergePlanner, "plan_to_disk", plan_to_disk)


def hook_run_merge(module: Any) -> None:
    """Let `run_merge` of `mergekit.merge` check the config before any download.

    And the model when it is written.
    """

    def run_merge(
        original: Any,
        merge_config: MergeConfiguration,
        out_path: str,
        options: MergeOptions,
        config_source: str | None = None,
    ) -> Any:
        if merge_config.merge_method != NAME:
            record.begin(out_path)  # what will be there is no merge by rpam
            return original(merge_config, out_path, options, config_source)
        with reachable(options), record.folders_are_local(), _own_loaders():
            examined = check_merge(merge_config, options, config_source)
            request = examined.request
            assert request is not None
            given = merge_config.model_copy(deep=True)  # planning rewrites it
            record.begin(out_path)
            models = request.models
            merge_adapters(models.every, options)
            source = config_source or given.to_yaml()
            with already_checked(merge_config, examined):
                result = original(merge_config, out_path, options, source)
            check_complete(out_path, models.base, options.trust_remote_code)
            thinking, trusted = request.template.thinking, options.trust_remote_code
            removed, said = take_out(Path(out_path), thinking, trusted)
            reason = record.finish(out_path, given, request, options, removed)
        said += [f"no {RECIPE}: {reason}"] if reason else []
        for line in () if options.quiet else said:
            click.echo(f"rpam: {line}", err=True)
        return result

    _wrap(module, "run_merge", run_merge)


def hook_multimerge(module: Any) -> None:
    """Let mergekit-multi check all configs first, and outputs that it would skip."""
    for name in ("load_config", "patched_config", "make_tasks"):
        _wrap(module, name, getattr(multimerge, name))
    _wrap(module.MergeModelTask, "execute", multimerge.execute)


def activate() -> None:
    """Register and hook without the start-up file; safe to call again."""
    import mergekit.merge
    import mergekit.plan

    register()
    hook_planner(mergekit.plan)
    hook_run_merge(mergekit.merge)


def _wrap(owner: Any, name: str, replacement: Any) -> None:
    """Put `replacement`, which gets the original first, in its place; only once."""
    original = getattr(owner, name)
    if getattr(original, "rpam_mergekit", False):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    wrapped.rpam_mergekit = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


@contextmanager
def _own_loaders() -> Iterator[None]:
    """Keep no loader of a model from one merge of a process to the next.

    mergekit's know a folder as it was when they were made, by the options of then.
    """
    LoaderCache.loaders.clear()
    try:
        yield
    finally:
        LoaderCache.loaders.clear()


@contextmanager
def _injected(planner: Any, coefficients: Path, layout: Layout) -> Iterator[None]:
    """Give the planner the kernel's parameters; the user's config stays as it was.

    Filters match parts of names and the first match wins: longest names first. Of the
    inputs' tensors for what belongs to an input, of the output's for its dtype.
    """
    config = planner.config
    infos = [*layout.outside, *(info for layer in layout.layers for info in layer)]
    infos.sort(key=lambda info: -len(info.name))
    forced = [
        ConditionalParameter(filter=info.name, value=info.force_dtype)
        for info in _output_weights(planner)
        if info.force_dtype
    ]
    original = config.parameters
    config.parameters = {
        **(original or {}),
        "coefficients": os.path.abspath(coefficients),
        "tensor": [ConditionalParameter(filter=i.name, value=i.name) for i in infos],
        "written_dtype": [*forced, ConditionalParameter(value=config.out_dtype or "")],
    }
    try:
        yield
    finally:
        config.parameters = original


def _output_weights(planner: Any) -> list[WeightInfo]:
    """Return the output's tensors, longest names first."""
    infos = [
        info
        for module in planner.arch_info.modules.values()
        for info in ConfiguredModuleArchitecture(
            info=module.architecture,
            config=planner.out_model_config,
            weight_prefix=module.weight_prefix,
        ).all_weights()
    ]
    return sorted(infos, key=lambda info: -len(info.name))


if "rpam_mergekit._startup" in sys.modules:
    sys.modules["rpam_mergekit._startup"].catch_up(sys.modules[__name__])
