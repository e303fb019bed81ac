"""The command `mergekit-rpam export`: a merge as a recipe for stock mergekit."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from rpam_mergekit.checks.config_file import read_config
from rpam_mergekit.checks.examine import NAME, check_merge
from rpam_mergekit.checks.reuse import fingerprint_of, reusable
from rpam_mergekit.errors import RpamError
from rpam_mergekit.formats.coefficients import CoefficientsFile
from rpam_mergekit.formats.hub_path import local_path
from rpam_mergekit.merging.planned import Planned, make_room, plan
from rpam_mergekit.models.references import reachable
from rpam_mergekit.outputs.folder import IN_OUTPUT
from rpam_mergekit.outputs.nearest import Nearest, nearest
from rpam_mergekit.outputs.rounding import out_dtype_of
from rpam_mergekit.outputs.stock_recipe import (
    RECIPE,
    SAME_BYTES,
    entries_of,
    numbers_text,
    provenance,
    recipe_text,
    refuse_unsayable,
    write_recipe,
)
from rpam_mergekit.prepass.measure import as_entries, gap_table, layer_gaps
from rpam_mergekit.settings import SCALAR_GRANULARITIES

# mergekit's options that a merge by the recipe needs as the export did.
PASSED_ON = (
    "transformers_cache",
    "lora_merge_cache",
    "lora_merge_dtype",
    "trust_remote_code",
)


@click.command("export", cls=PrettyPrintHelp)
@click.argument("config_file", type=click.Path())
@click.argument("coefficients")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help=f"The recipe to write. [default: {RECIPE} beside the coefficients file; "
    "here, if that is of the Hub]",
)
@click.option(
    "--nearest",
    "granularity",
    type=click.Choice(SCALAR_GRANULARITIES),
    help="Where coefficients are finer than a number per tensor: export the nearest "
    "numbers, which make another model. With parameters.calibration in the config, "
    "what that costs is measured.",
)
@add_merge_options
def export_command(
    merge_options: MergeOptions,
    config_file: str,
    coefficients: str,
    out: Path | None,
    granularity: str | None,
) -> None:
    """Write the merge by CONFIG_FILE and COEFFICIENTS as a stock mergekit recipe.

    COEFFICIENTS is the merge's coefficients file, or its output folder. The recipe
    merges without this package, to the same bytes, where there is one coefficient
    per tensor: with the granularities layer, module and tensor.

    \b
      mergekit-rpam export rpam.yml out/rpam/coefficients.safetensors
      mergekit-yaml out/rpam/rpam_recipe.yml merged/
    """
    merge_options.apply_global_options()
    document = read_config(config_file)
    config = document.config
    assert config is not None
    if config.merge_method != NAME:
        raise RpamError(
            f"merge_method: found '{config.merge_method}'. 'export' writes merges by "
            f"'{NAME}' as recipes; others are recipes already."
        )
    if Path(coefficients).is_dir():
        coefficients = str(Path(coefficients) / IN_OUTPUT)
    parameters = {**(config.parameters or {}), "coefficients": coefficients}
    if granularity is None:
        parameters.pop("calibration", None)  # not needed, and perhaps not here
    config.parameters = parameters
    with reachable(merge_options):
        examined = check_merge(config, merge_options, document.text)
        assert examined.request is not None
        refuse_unsayable(config, examined.request.models)
        config = examined.request.template.named_in(config)
        path = local_path(coefficients, "COEFFICIENTS")
        if out is None:
            out = Path(RECIPE) if _in_cache(path) else path.with_name(RECIPE)
        export = _Export(plan(config, merge_options, examined), path)
        write_recipe(out, export.nearest(granularity, out) if granularity else export())
    command = ["mergekit-yaml", str(out), "OUT", *_passed_on(merge_options)]
    export.say(f"rpam: the recipe merges without this package: {shlex.join(command)}")
    click.echo(str(out))


def _in_cache(path: Path) -> bool:
    """Tell whether a file lies in a cache of huggingface_hub: nothing is written there.

    `mergekit-rpam` gives `export` files of the Hub by their places in the cache.
    """
    of_cache = (p for p in path.absolute().parents if p.name == "snapshots")
    return any(p.parent.name.startswith(("models--", "datasets--")) for p in of_cache)


class _Export:
    """A merge that has been checked, its models loaded as mergekit loads them."""

    def __init__(self, planned: Planned, path: Path) -> None:
        self.planned = planned
        self.config, self.request = planned.config, planned.request
        self.layout, self.fixed = planned.layout, planned.fixed
        self.say = planned.say
        self.file = CoefficientsFile(path, self.request.settings.reasoning)
        asked = dataclasses.replace(self.request, calibration=None)
        made_from = fingerprint_of(asked, self.fixed, self.config, [])
        reusable(path, made_from, asked, self.layout)

    def __call__(self) -> str:
        """Return the recipe that gives the same bytes. Raises `RpamError`."""
        return recipe_text(self.config, self.request, self.layout, self.file)

    def nearest(self, granularity: str, out: Path) -> str:
        """Return the recipe of the nearest numbers, and say what they lose."""
        models = self.request.models
        out_dtype_of(self.config, models, self.layout)  # refuses
        found = nearest(
            models,
            self.layout,
            self.file,
            granularity,
            dtype=self.config.dtype,
            fixed=self.fixed,
        )
        lost: dict[str, Any] = {
            "numbers per": granularity,
            "lost": round(found.lost, 6),
        }
        prose: tuple[str, ...] = SAME_BYTES
        if not found.same:
            lost |= self._measured(found, granularity, out)
            prose = _another_model(self.file, granularity)
            self.say(f"rpam: {' '.join(prose)}")
        return numbers_text(
            self.config,
            models,
            self.layout,
            found.numbers,
            {**provenance(self.file), "nearest": lost},
            prose,
        )

    def _measured(
        self, found: Nearest, granularity: str, out: Path
    ) -> Mapping[str, Any]:
        """Return both gaps by layer on the config's calibration set, if it has one."""
        calibration = self.request.calibration
        if calibration is None:
            self.say(
                "rpam: what this costs in alignment is not measured: the config names "
                "no parameters.calibration. Name the file, and run the same again."
            )
            return {"gaps": None}
        before, after = self._gaps(found, out.absolute().parent)
        self.say(gap_table(before, after, granularity))
        return {
            "calibration": calibration.digest,
            "gaps": [
                {"layer": index, "file": round(one, 6), "nearest": round(other, 6)}
                for index, (one, other) in enumerate(zip(before, after, strict=True))
            ],
        }

    def _gaps(self, found: Nearest, folder: Path) -> list[list[float]]:
        prepass = self.planned.prepass(self.planned.queries())
        entries = entries_of(self.request.models, self.layout)
        numbers = as_entries(found.numbers)
        own = {entry: self.file.parts(entry) for entry in entries}
        own |= {entry: numbers[entry] for entry in self.fixed}
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".rpam-", dir=folder) as scratch:
            self.say(f"rpam: {make_room(prepass, Path(scratch))}")
            return [layer_gaps(prepass, of) for of in (own, numbers)]


def _another_model(file: CoefficientsFile, granularity: str) -> tuple[str, ...]:
    of = file.metadata["fingerprint"]["settings"]["granularity"]
    return (
        f"This recipe is ANOTHER MODEL than the merge by rpam: its {of} coefficients",
        f"are replaced by the nearest numbers per {granularity}.",
    )


def _passed_on(options: MergeOptions) -> list[str]:
    """Return the options of this export that a merge by the recipe needs too."""
    found = []
    for name in PASSED_ON:
        value = getattr(options, name)
        if value:
            found.append("--" + name.replace("_", "-"))
            found += [] if value is True else [str(value)]
    return found
