"""Where every other model has a `weight`, the method needs no planner and no file."""

from __future__ import annotations

import click
import pytest
import torch
import yaml
from mergekit.merge_methods import merge_state_dicts, merge_tensors
from safetensors.torch import load_file

from helpers.commands import run
from rpam_mergekit.errors import RpamError
from rpam_mergekit.formats.coefficients import write_coefficients
from rpam_mergekit.merging.method import METHOD


@pytest.fixture
def models():
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (5, 3), "bias": (4,), "one": ()}
    return {
        name: {
            tensor: torch.randn(shape, generator=generator)
            for tensor, shape in shapes.items()
        }
        for name in ("long", "short", "third")
    }


def by_hand(models, weights, tensor):
    base = models["long"][tensor].double()
    terms = (w * (models[name][tensor].double() - base) for name, w in weights.items())
    return (base + sum(terms)).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dicts_are_merged_in_memory(models, dtype):
    models = {
        name: {tensor: value.to(dtype) for tensor, value in model.items()}
        for name, model in models.items()
    }
    weights = {"short": 0.25, "third": -0.5}
    merged = merge_state_dicts(
        models, METHOD, base="long", parameters={"weight": weights}
    )
    assert set(merged) == set(models["long"])
    for tensor, value in merged.items():
        assert value.dtype == dtype
        torch.testing.assert_close(value, by_hand(models, weights, tensor).to(dtype))


def test_one_tensor_without_a_name_is_merged_and_has_gradients(models):
    pair = [models[name]["matrix"].requires_grad_() for name in ("short", "long")]
    parameters = {"weight": 0.25}
    merged = merge_tensors(pair, METHOD, base_index=1, parameters=parameters)
    torch.testing.assert_close(merged, by_hand(models, {"short": 0.25}, "matrix"))
    merged.sum().backward()
    for tensor, expected in zip(pair, (0.25, 0.75), strict=True):
        torch.testing.assert_close(tensor.grad, torch.full_like(tensor, expected))


@pytest.mark.parametrize("parameters", [{}, {"weight": {"short": 0.25, "third": None}}])
def test_a_model_without_weight_is_refused(models, parameters):
    with pytest.raises(RpamError) as refusal:
        merge_state_dicts(models, METHOD, base="long", parameters=parameters)
    assert "no planner, so that the pre-pass cannot run" in str(refusal.value)
    assert "give every other model a `weight`: matrix has none" in str(refusal.value)


@pytest.mark.parametrize(
    ("file", "said"),
    [("nowhere.safetensors", "no coefficients file"), ("other", "no coefficients for")],
)
def test_a_coefficients_file_that_does_not_fit_is_refused(models, tmp_path, file, said):
    path = tmp_path / file
    if file == "other":
        part = {"another": {"scalar": torch.tensor(0.5)}}
        write_coefficients(path, part, {}, torch.float32)
    parameters = {"coefficients": str(path)}
    two = {name: models[name] for name in ("long", "short")}
    with pytest.raises(click.ClickException) as refusal:
        merge_state_dicts(two, METHOD, base="long", parameters=parameters)
    assert isinstance(refusal.value, RpamError)
    assert str(refusal.value).startswith(
        f"rpam: {said}" if file != "other" else "rpam: "
    )
    assert said in str(refusal.value)


def test_without_a_base_model_the_message_says_so(models):
    with pytest.raises(RpamError, match="base_model: missing"):
        merge_state_dicts(models, METHOD, parameters={"weight": 0.5})


def test_mergekit_pytorch_merges_by_weights(pair, tmp_path):
    shards = [str(pair / n / "model.safetensors") for n in ("long", "short")]
    config = {
        "merge_method": "rpam",
        "base_model": shards[0],
        "models": [{"model": shards[1], "parameters": {"weight": 0.25}}],
    }
    path = tmp_path / "raw.yml"
    path.write_text(yaml.safe_dump(config))
    process = run(["mergekit-pytorch", str(path), str(tmp_path / "out")])
    assert process.returncode == 0, process.stderr
    long, short = map(load_file, shards)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert set(merged) == set(long)
    for name, value in merged.items():
        expected = by_hand({"long": long, "short": short}, {"short": 0.25}, name)
        torch.testing.assert_close(value, expected.to(value.dtype))
