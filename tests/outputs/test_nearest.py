"""Finer coefficients: refused with their size, or the nearest numbers, measured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from helpers.exporting import (
    comments,
    config_of,
    exported,
    finer_merge,
    merge,
    quiet,
    recipe,
    refusal,
)
from helpers.merged import COEFFICIENTS, tensors
from helpers.models import qwen2_config, save_pair
from rpam_mergekit.formats.coefficients import CoefficientsFile
from rpam_mergekit.outputs.stock_recipe import RECIPE
from rpam_mergekit.settings import SCALAR_GRANULARITIES


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet():
        yield


@pytest.fixture(scope="module")
def finer(tmp_path_factory, tokenizer) -> Path:
    return finer_merge(tmp_path_factory.mktemp("finer"), tokenizer)


def test_finer_coefficients_are_refused_with_their_size(finer):
    message = refusal(config_of(finer, "low_rank"), finer / "out")
    size = (finer / "out" / COEFFICIENTS).stat().st_size
    whole = (finer / "long" / "model.safetensors").stat().st_size
    assert "36 of 39 coefficients are finer than one number per tensor" in message
    assert "(granularity low_rank; model.layers.0.input_layernorm.weight)" in message
    assert f"it is {size / 1024:.1f} KiB, {100 * size / whole:.1f} % of" in message
    assert "--nearest layer, module or tensor" in message


def test_a_finer_file_whose_tensors_are_all_fixed_is_exported(finer):
    config = config_of(finer, "low_rank", parameters={"weight": 0.7})
    filters = recipe(config, finer / "out")["models"][0]["parameters"]["weight"]
    assert {f["value"] for f in filters} == {float(torch.tensor(0.7))}


@pytest.mark.parametrize("granularity", SCALAR_GRANULARITIES)
def test_the_nearest_numbers_are_the_least_squares(finer, granularity):
    """Against the definition, in float64, for every tensor's group."""
    config = config_of(finer, "low_rank")
    found = recipe(config, finer / "out", "--nearest", granularity)
    filters = found["models"][0]["parameters"]["weight"]
    numbers = {
        name: next(f["value"] for f in filters if f["filter"] in name)
        for name in tensors(finer / "long")
    }
    file = CoefficientsFile(finer / "out" / COEFFICIENTS)
    long, short = tensors(finer / "long"), tensors(finer / "short")
    sums: dict[str, list[float]] = {}
    parts = {"layer": 3, "module": 4, "tensor": 9}[granularity]
    group = {name: ".".join(name.split(".")[:parts]) for name in long}
    for name in long:
        squares = (short[name] - long[name]).double().square()
        field = file.coefficient(name, "cpu").double().expand(squares.shape)
        upper, lower = sums.setdefault(group[name], [0.0, 0.0])
        upper, lower = upper + (field * squares).sum(), lower + squares.sum()
        sums[group[name]] = [upper, lower]
    left = whole = 0.0
    for name, number in numbers.items():
        upper, lower = sums[group[name]]
        assert number == pytest.approx(float(upper / lower), rel=1e-6)
        if ".layers." in name:
            vector = (short[name] - long[name]).double()
            field = file.coefficient(name, "cpu").double()
            left += float(((number - field) * vector).square().sum())
            whole += float((field * vector).square().sum())
    lost = comments(finer / "out")["nearest"]["lost"]
    assert lost == pytest.approx(left / whole, abs=2e-6)


def test_what_the_nearest_numbers_cost_is_measured(finer):
    config = config_of(finer, "low_rank")
    result = exported(config, finer / "out", "--nearest", "module")
    assert result.exit_code == 0, result.output
    assert "gap, by module" in result.output
    assert "ANOTHER MODEL than the merge by rpam" in result.output
    found = comments(finer / "out")
    assert 0 < found["nearest"]["lost"] < 1
    gaps = found["nearest"]["gaps"]
    # The file's own gaps are those that the pre-pass left on the same queries.
    left = [layer["gap_after"] for layer in found["layers"]]
    assert [layer["file"] for layer in gaps] == pytest.approx(left, abs=2e-6)
    assert all(layer["nearest"] > layer["file"] for layer in gaps)


def test_the_nearest_numbers_gap_is_that_of_a_merge_by_them(finer, tmp_path):
    """Numbers as `weight` settings of a merge leave the gap that was measured."""
    config = config_of(finer, "low_rank")
    found = recipe(config, finer / "out", "--nearest", "layer")
    measured = [
        layer["nearest"] for layer in comments(finer / "out")["nearest"]["gaps"]
    ]
    config["models"][0]["parameters"] = found["models"][0]["parameters"]
    again = merge(config, tmp_path / "again")
    layers = CoefficientsFile(again / COEFFICIENTS).metadata["layers"]
    assert [layer["gap_after"] for layer in layers] == pytest.approx(measured, abs=2e-6)


def test_without_calibration_nothing_is_measured_and_said(finer):
    config = config_of(finer, "low_rank")
    del config["parameters"]["calibration"]
    result = exported(config, finer / "out", "--nearest", "tensor")
    assert result.exit_code == 0, result.output
    assert "not measured: the config names no parameters.calibration" in result.output


@pytest.mark.parametrize("granularity", SCALAR_GRANULARITIES)
def test_the_nearest_of_numbers_are_the_numbers(granularity, tmp_path, tokenizer):
    save_pair(tmp_path, qwen2_config(tokenizer), tokenizer)
    config = config_of(tmp_path, granularity)
    out = merge(config, tmp_path / "out")
    exact = recipe(config, out)
    result = exported(config, out, "--nearest", granularity)
    assert "ANOTHER MODEL" not in result.output
    path = (out / COEFFICIENTS).with_name(RECIPE)
    assert yaml.safe_load(path.read_text()) == exact
    assert "byte for byte" in path.read_text()
