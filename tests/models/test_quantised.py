"""Quantised models are refused in one message, before anything is merged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from mergekit.common import ModelReference

from helpers.checking import found
from helpers.models import merge_config
from helpers.quantised import KINDS, quantise
from rpam_mergekit.cli.main import main
from rpam_mergekit.models.headers import read_header
from rpam_mergekit.models.quantised import quantised_finding


@pytest.fixture
def own(pair, tmp_path) -> Path:
    """A copy of the pair that a test may spoil."""
    return shutil.copytree(pair, tmp_path / "own")


def check(folder: Path, *options: str, **changes) -> Result:
    path = folder / "rpam.yml"
    path.write_text(yaml.safe_dump(merge_config(folder, **changes)))
    arguments = ["check", str(path), "--no-estimate", *options]
    return CliRunner().invoke(main, arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_is_refused_by_the_name_of_its_format(own, kind):
    quantise(own / "short", kind)
    result = check(own)
    found(result, f"{own / 'short'}: its weights are quantised: {KINDS[kind][2]} (")
    assert "problems:" not in result.stderr  # one message, nothing of its shapes
    assert "model.safetensors: model.layers.0.mlp.down_proj." in result.stderr
    assert "Name the unquantised model that it was made from, or dequ" in result.stderr


@pytest.mark.parametrize("kind", [k for k in KINDS if not k.startswith("a method")])
def test_names_and_dtypes_tell_without_the_config(own, kind):
    quantise(own / "short", kind, claims=False)
    model = ModelReference.parse(str(own / "short"))
    finding = quantised_finding(model, model.config(), read_header(model))
    assert finding is not None
    assert "config.json" not in finding
    method = KINDS[kind][2]
    # ModelOpt's and FBGEMM's FP8 look like others' without a config.
    assert method.partition(" ")[0] in finding or "before quant" in kind


def test_whole_numbers_of_an_unknown_origin(own):
    quantise(own / "short", "a method that is not known", claims=False)
    found(check(own), "its weights are quantised: in an unknown format (model.safet")


def test_both_models_are_named(own):
    for name in ("long", "short"):
        quantise(own / name, "fp8 by block")
    found(check(own), "2 problems:", f"{own / 'long'}: its", f"{own / 'short'}: its")
