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
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from mergekit import merge_methods
from mergekit.common import dtype_from_name
from mergekit.config import ConditionalParameter, MergeConfiguration
from mergekit.merge_methods.base import (
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    TensorGroup,
)

from rpam_mergekit.adapters import merge_adapters
from rpam_mergekit.check import NAME, check_config, check_keys, weight_parameter
from rpam_mergekit.checkpoint import Layout
from rpam_mergekit.coefficients import open_coefficients, written
from rpam_mergekit.completeness import check_complete
from rpam_mergekit.errors import RpamError, refuse
from rpam_mergekit.fit import fit
from rpam_mergekit.references import reachable

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
            ParameterSpec("tensor", str | None, NON_BASE, default=None),
            ParameterSpec("coefficients", str | None, SHARED, default=None),
            ParameterSpec("written_dtype", str | None, SHARED, default=None),
        ),
        contract=InputContract(
            base=BasePolicy.REQUIRED,
            min_inputs=2,
            max_inputs=2,
            min_non_base=1,
            max_non_base=1,
        ),
    )

    def validate_inputs(
        self,
        input_ids: Sequence[Hashable],
        base_id: Hashable | None = None,
        *,
        group_name: str | None = None,
    ) -> None:
        """Refuse callers that plan no named tensors, such as mergekit-pytorch."""
        if group_name is None:
            raise RpamError(NO_PLANNER)
        super().validate_inputs(input_ids, base_id, group_name=group_name)

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> torch.Tensor:
        """Return the merged tensor, computed in float32 and rounded once."""
        (other,) = group.non_base
        assert group.base is not None  # the contract requires it
        base = group.base.tensor
        weight = parameters["weight"][other.id]
        tensor = parameters["tensor"][other.id]
        if weight is not None:
            parts = {"scalar": torch.tensor(weight, dtype=torch.float32)}
        elif tensor is not None:
            file = open_coefficients(parameters["coefficients"])
            parts = file.parts(tensor)
        else:
            raise RpamError(f"{group.metadata.name}: no coefficient. {NO_PLANNER}")
        dtype = dtype_from_name(parameters["written_dtype"])
        parts = {part: value.to(base.device) for part, value in parts.items()}
        return written(base, other.tensor, parts, dtype)


METHOD = RpamMerge()


def register(_module: Any = None) -> None:
    """Make `rpam` known to mergekit; does nothing if it is known already."""
    if METHOD.spec.name not in {
        m.spec.name for m in merge_methods.registered_methods()
    }:
        merge_methods.register(METHOD)


def hook_planner(module: Any) -> None:
    """Let `MergePlanner` of `mergekit.plan` run the pre-pass before it plans."""

    def around(original: Any) -> Any:
        @functools.wraps(original)
        def plan_to_disk(self: Any, out_path: str) -> Any:
            if self.config.merge_method != NAME:
                return original(self, out_path)
            with _injected(self.config, *fit(self, out_path)):
                return original(self, out_path)

        return plan_to_disk

    _wrap(module.MergePlanner, "plan_to_disk", around)


def hook_run_merge(module: Any) -> None:
    """Let `run_merge` of `mergekit.merge` check the config before any download.

    And the model when it is written.
    """

    def around(original: Any) -> Any:
        @functools.wraps(original)
        def run_merge(
            merge_config: MergeConfiguration,
            out_path: str,
            options: Any,
            config_source: str | None = None,
        ) -> Any:
            if merge_config.merge_method != NAME:
                return original(merge_config, out_path, options, config_source)
            with reachable(options):
                request = check_config(merge_config, options, config_source)
                models = request.models
                merge_adapters((models.base, models.other), options)
                result = original(merge_config, out_path, options, config_source)
                check_complete(out_path, models.base, options.trust_remote_code)
            return result

        return run_merge

    _wrap(module, "run_merge", around)


def hook_multimerge(module: Any) -> None:
    """Let mergekit-multi refuse unknown keys, which it drops when it reads a config."""

    def around(original: Any) -> Any:
        @functools.wraps(original)
        def load_config(config_source: str, intermediate_dir: str) -> Any:
            for document in yaml.safe_load_all(config_source):
                if isinstance(document, dict) and document.get("merge_method") == NAME:
                    refuse(check_keys(document))
            return original(config_source, intermediate_dir)

        return load_config

    _wrap(module, "load_config", around)


def activate() -> None:
    """Register and hook without the start-up file; safe to call again."""
    import mergekit.merge
    import mergekit.plan

    register()
    hook_planner(mergekit.plan)
    hook_run_merge(mergekit.merge)


def _wrap(owner: Any, name: str, around: Any) -> None:
    original = getattr(owner, name)
    if not getattr(original, "rpam_mergekit", False):
        wrapped = around(original)
        wrapped.rpam_mergekit = True
        setattr(owner, name, wrapped)


@contextmanager
def _injected(
    config: MergeConfiguration, coefficients: Path, layout: Layout
) -> Iterator[None]:
    """Give the planner the kernel's parameters; the user's config stays as it was.

    Filters match parts of names and the first match wins: longest names first.
    """
    infos = [*layout.outside, *(info for layer in layout.layers for info in layer)]
    infos.sort(key=lambda info: -len(info.name))
    forced = [
        ConditionalParameter(filter=info.name, value=info.force_dtype)
        for info in infos
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


if "rpam_mergekit._startup" in sys.modules:
    sys.modules["rpam_mergekit._startup"].catch_up(sys.modules[__name__])
