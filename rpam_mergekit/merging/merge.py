"""A merge under way: one object that every step of it is handed.

The wrapper of mergekit's `run_merge` and the commands `fit` and `export` make a `Merge`
of an examined config, load its models, and pass it on: to the pre-pass (`fit`), to
mergekit (`kernel_config`), to the record.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from mergekit.architecture import (
    ConfiguredModuleArchitecture,
    ModelArchitecture,
    WeightInfo,
    get_architecture_info,
)
from mergekit.config import ConditionalParameter, MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from rpam_mergekit.chat.prompts import EncodedQuery
from rpam_mergekit.checks.examine import Examination, config_notes
from rpam_mergekit.checks.fingerprint import fingerprint_of
from rpam_mergekit.checks.inputs import with_one_spelling
from rpam_mergekit.checks.models import late_findings
from rpam_mergekit.errors import refuse
from rpam_mergekit.formats.hub_path import local_path
from rpam_mergekit.models.adapters import merge_adapters
from rpam_mergekit.models.layout import Layout, plan_layout
from rpam_mergekit.models.patches import output_config
from rpam_mergekit.processes import Processes, local_device
from rpam_mergekit.replay.precision import precision_on


class Merge:
    """An examined config, and once they are loaded the tensors of its models.

    config: the user's config, a copy, as mergekit's planner rewrites the one it gets.
    compute_dtype: of the pre-pass's matrix products, by the first process's device.
    layout: the tensors of the merge. fixed: the weights that the user set, by entry.
    Both are there after `load`.
    """

    layout: Layout
    fixed: dict[str, float]

    def __init__(
        self,
        config: MergeConfiguration,
        options: MergeOptions,
        examination: Examination,
        processes: Processes | None = None,
    ) -> None:
        assert examination.request is not None  # its findings have been refused
        self.config = with_one_spelling(config.model_copy(deep=True))
        self.options = options
        self.request = examination.request
        self.notes = examination.notes
        self._matched = examination.matched
        self.models = self.request.models
        self.processes = processes or Processes()
        self.compute_dtype: str = self.processes.broadcast(
            precision_on(
                self.request.settings.compute_dtype,
                local_device(options.device or "cpu"),
            )
        )

    def load(self) -> None:
        """Merge adapters, download what lies on the Hub, and plan the tensors.

        Of several processes the first merges and downloads. Raises `RpamError` for
        models that mergekit can read but rpam cannot merge.
        """
        options, models = self.options, self.models
        LoaderCache().setup(options=options)
        if self.processes.rank == 0:
            merge_adapters(models.every, options)
            for model in self.config.referenced_models():
                LoaderCache().get(model)
        self.processes.broadcast(None)
        refuse(late_findings(self._matched))
        self.architecture = get_architecture_info(self.config, options)
        trusted = options.trust_remote_code
        self._out_config = output_config(self.config, self.architecture, trusted)
        # Of the models as they are: slices may have other layers.
        self.configs = {m: m.config(trust_remote_code=trusted) for m in models.every}
        self.base_config = self.configs[models.base]
        self.layout = plan_layout(self.architecture, self.base_config, models.every)
        self.fixed = self.request.fixed_weights(self.layout)

    def coefficients(self, default: Path) -> Path:
        """Return the place of the coefficients file, `default` if it has no name."""
        named = self.request.settings.coefficients
        return local_path(named, "parameters.coefficients") if named else default

    def fingerprint(self, queries: Sequence[EncodedQuery] = ()) -> dict[str, Any]:
        """Return what the coefficients are made from, `queries` among it."""
        return fingerprint_of(
            self.request,
            self.fixed,
            self.config,
            queries,
            self.configs,
            self.compute_dtype,
        )

    def kernel_config(self, coefficients: Path) -> MergeConfiguration:
        """Return the config for mergekit: the user's, and what the kernel is told.

        The kernel sees single tensors. It gets the path of the coefficients file; the
        dtype to round to; and where slices renumber the layers, every tensor's name in
        the input models, by which mergekit resolves an input's parameters. Of filters
        the first that is a part of the name wins: longest names first.
        """
        config = self.config.model_copy(deep=True)
        out_dtype = ConditionalParameter(value=config.out_dtype or "")
        told: dict[str, Any] = {
            "coefficients": str(coefficients.absolute()),
            "written_dtype": [*self._forced_dtypes(), out_dtype],
        }
        if not config.models:
            told["tensor"] = [
                ConditionalParameter(filter=info.name, value=info.name)
                for info in _longest_first(self.layout.weights)
            ]
        config.parameters = {**(config.parameters or {}), **told}
        return config

    def _forced_dtypes(self) -> list[ConditionalParameter]:
        """Return a filter for every output tensor whose dtype its model prescribes."""
        weights = output_weights(self.architecture, self._out_config)
        return [
            ConditionalParameter(filter=info.name, value=info.force_dtype)
            for info in _longest_first(weights)
            if info.force_dtype
        ]

    def say(self, text: str) -> None:
        """Tell the user something; only the first process does."""
        if not self.options.quiet and self.processes.rank == 0:
            click.echo(text, err=True)

    def say_notes(self) -> None:
        """Tell the notes: what does not stop the merge but may surprise."""
        notes = [*self.notes, *config_notes(self.models, self.options)]
        if self.request.calibration is not None:
            notes += self.request.fixed_notes(self.layout)
        for note in notes:
            self.say(f"rpam: {note}")


def output_weights(architecture: ModelArchitecture, config: Any) -> list[WeightInfo]:
    """Return the tensors of a merge's output; `config` is its transformers config."""
    return [
        info
        for module in architecture.modules.values()
        for info in ConfiguredModuleArchitecture(
            info=module.architecture, config=config, weight_prefix=module.weight_prefix
        ).all_weights()
    ]


def _longest_first(weights: Any) -> list[WeightInfo]:
    return sorted(weights, key=lambda info: -len(info.name))
