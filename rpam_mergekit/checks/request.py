"""What a merge config asks for, once it is understood."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mergekit.config import MergeConfiguration, ParameterSetting

from rpam_mergekit.checks.templates import TemplateInUse
from rpam_mergekit.formats.calibration import CalibrationSet
from rpam_mergekit.models.layout import Layout, MergeModels
from rpam_mergekit.settings import MODEL_PARAMETERS, NAME, RpamSettings

SOURCE = re.compile(r"(models|sources)\[\d+\]$")


def weight_parameter() -> Any:
    """Return the specification of `weight`, which a user may set per model.

    Imports mergekit's merge methods, which must not be imported from the top of a
    module that `method` needs: that import is what registers `method`.
    """
    from mergekit.merge_methods.base import ParameterScope, ParameterSpec

    return ParameterSpec("weight", float | None, ParameterScope.NON_BASE, default=None)


def belongs(name: str, where: str) -> str | None:
    """Return where a key belongs that stands at `where`, which does not take it.

    None for what is nowhere a key. ``where`` is such as ``models[0].parameters``, or
    empty at the top level.
    """
    if name in MODEL_PARAMETERS:
        if SOURCE.search(where):
            return f" It is a parameter: write it under {where}.parameters."
        of = " or the top-level parameters" if name == "weight" else ""
        return f" Write it under the parameters of a model{of}."
    if name in RpamSettings.model_fields and where != "parameters":
        return f" It is the whole merge's: write {name} under the top-level parameters."
    if name in MergeConfiguration.model_fields and where:
        return " It belongs to the top level of the config, beside merge_method."
    if name == "layer_range" and where.startswith("models"):
        return " Only the sources of slices have it."
    others = sorted(_methods_with(name))
    if others:
        shown = ", ".join(others[:3]) + (" and others" if len(others) > 3 else "")
        return (
            f" It is a parameter of {shown}. rpam has none of the kind, as it finds "
            "the weights itself: leave it out."
        )
    return None


def _methods_with(parameter: str) -> list[str]:
    """Return mergekit's own methods that have a parameter."""
    from mergekit.merge_methods import registered_methods

    return [
        method.spec.name
        for method in registered_methods()
        if method.spec.name != NAME
        and parameter in [one.name for one in method.spec.parameters]
    ]


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

    def nothing_to_solve(self, layout: Layout | None = None) -> list[str]:
        """Return a finding if the user's weights leave the pre-pass nothing to solve.

        Without a layout, where every tensor has a weight, whatever its name. A file
        that is used as it is has been solved: there is no pre-pass then.
        """
        if self.calibration is None or not self.fixes_all(layout):
            return []
        return [
            "weight: every weight of every decoder layer is fixed, so that nothing is "
            "left to solve: the calibration file would change nothing, and the merge "
            "would be a plain interpolation. Leave weight out: rpam finds the weights. "
            "Or fix some tensors only, by filters. For a merge by hand there are "
            "merge_method: linear, task_arithmetic and ties."
        ]

    def fixes_all(self, layout: Layout | None = None) -> bool:
        """Tell whether `weight` fixes all tensors of the decoder layers."""
        from mergekit.parameter_resolver import resolve_parameter

        if layout is None:  # a name that no filter can be a part of
            weight = weight_parameter()
            values = [
                resolve_parameter(weight, settings, tensor_name="\0", t=0.0)
                for settings in self.weight_settings
            ]
            return all(value is not None for value in values)
        fixed = self.fixed_weights(layout)
        return all(
            self.models.entry(number, info.name) in fixed
            for number in range(len(self.models.others))
            for layer in layout.layers
            for info in layer
        )

    def fixed_notes(self, layout: Layout) -> list[str]:
        """Return notes on the layers in which `weight` leaves little to solve."""
        fixed, notes = self.fixed_weights(layout), []
        for number, model in enumerate(self.models.others):
            entries = [
                [self.models.entry(number, info.name) in fixed for info in layer]
                for layer in layout.layers
            ]
            whole = [str(i) for i, layer in enumerate(entries) if all(layer)]
            some = sum(sum(layer) for layer in entries if not all(layer))
            if len(whole) == len(entries):
                notes.append(
                    f"weight: all weights of {model} are fixed, none is solved"
                )
            elif whole:
                notes.append(
                    f"weight: of {model}, all weights are fixed in the layers "
                    f"{', '.join(whole)}: nothing is solved there"
                )
            if some:
                of = sum(len(layer) for layer in entries)
                notes.append(
                    f"weight: of {model}, {some} further of {of} weights are fixed"
                    if whole
                    else f"weight: of {model}, {some} of {of} weights are fixed"
                )
        return notes
