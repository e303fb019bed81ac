"""What a merge config asks for, once it is understood."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mergekit.config import ParameterSetting

from rpam_mergekit.checks.templates import TemplateInUse
from rpam_mergekit.formats.calibration import CalibrationSet
from rpam_mergekit.models.layout import Layout, MergeModels
from rpam_mergekit.settings import RpamSettings

NAME = "rpam"


def weight_parameter() -> Any:
    """Return the specification of `weight`, which a user may set per model.

    Imports mergekit's merge methods, which must not be imported from the top of a
    module that `method` needs: that import is what registers `method`.
    """
    from mergekit.merge_methods.base import ParameterScope, ParameterSpec

    return ParameterSpec("weight", float | None, ParameterScope.NON_BASE, default=None)


@dataclass(frozen=True)
class MergeRequest:
    """A config that has passed the checks.

    `calibration` is None where a coefficients file is to be used as it is.
    `weight_settings` are the user's own `weight:` settings for every other model,
    highest precedence first. `template` is the chat template in use.
    """

    settings: RpamSettings
    models: MergeModels
    calibration: CalibrationSet | None
    weight_settings: tuple[tuple[Mapping[str, ParameterSetting] | None, ...], ...]
    template: TemplateInUse = field(default_factory=TemplateInUse)

    def fixed_weights(self, layout: Layout) -> dict[str, float]:
        """Return the weights the user set, by entry, as mergekit resolves them."""
        from mergekit.parameter_resolver import resolve_parameter

        fixed, weight = {}, weight_parameter()
        last = max(len(layout.layers) - 1, 1)
        groups = [(0.0, layout.outside)]
        groups += [(i / last, layer) for i, layer in enumerate(layout.layers)]
        if len(layout.layers) == 1:
            groups[1] = (1.0, layout.layers[0])
        for number, settings in enumerate(self.weight_settings):
            for t, infos in groups:
                for info in infos:
                    value = resolve_parameter(
                        weight, settings, tensor_name=info.name, t=t
                    )
                    if value is not None:
                        fixed[self.models.entry(number, info.name)] = value
        return fixed
