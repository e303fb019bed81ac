"""The merge method `rpam`: the kernel that mergekit calls for every tensor.

The kernel sees single tensors only. The coefficients file, which the pre-pass has
written before mergekit plans, reaches it through mergekit's own parameters (see
`Merge.kernel_config`); a user's own `weight` setting reaches it the same way and wins.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Sequence
from typing import Any

import mergekit.merge_methods as merge_methods  # "from" may deadlock among threads
import torch
from mergekit.common import dtype_from_name
from mergekit.merge_methods.base import (
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    TensorGroup,
)

from rpam_mergekit.checks.request import weight_parameter
from rpam_mergekit.errors import RpamError
from rpam_mergekit.formats.coefficients import entry_name, open_coefficients, written
from rpam_mergekit.refusal import Refusal, shown_by_click
from rpam_mergekit.settings import NAME

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

    def validate_inputs(
        self,
        input_ids: Sequence[Hashable],
        base_id: Hashable | None = None,
        *,
        group_name: str | None = None,
    ) -> None:
        """Refuse callers without a planner that name no base model."""
        if group_name is None and base_id is None:
            raise Refusal(f"base_model: missing. {NO_PLANNER}")
        super().validate_inputs(input_ids, base_id, group_name=group_name)

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
    if weight is not None:
        return {"scalar": torch.tensor(weight, dtype=torch.float32)}
    path = parameters["coefficients"]
    if path is None:
        raise Refusal(
            f"{NO_PLANNER} Or give every other model a `weight`: "
            f"{group.metadata.name or 'a tensor'} has none."
        )
    # The name in the input model, where slices have given the output another.
    tensor = parameters["tensor"][other] or group.metadata.name
    pattern = parameters["pattern"][other]
    with shown_by_click():
        try:
            file = open_coefficients(path, parameters["reasoning"])
        except OSError as error:
            raise RpamError(f"no coefficients file {path}") from error
        return file.parts(entry_name(pattern, tensor, len(group.non_base)))


METHOD = RpamMerge()


def register(_module: Any = None) -> None:
    """Make `rpam` known to mergekit; does nothing if it is known already."""
    if METHOD.spec.name not in {
        m.spec.name for m in merge_methods.registered_methods()
    }:
        merge_methods.register(METHOD)


if "rpam_mergekit._startup" in sys.modules:
    sys.modules["rpam_mergekit._startup"].catch_up()
