"""A recipe's filters, numbers and text, and the stock method that it relies on."""

from __future__ import annotations

import random
import re

import pytest
import torch
import yaml
from mergekit import merge_methods
from mergekit.config import MergeConfiguration, evaluate_setting
from mergekit.merge_methods.base import TensorGroup

from rpam_mergekit.errors import RpamError
from rpam_mergekit.formats.coefficients import written
from rpam_mergekit.outputs.filters import (
    MOST_OTHERS,
    as_written,
    first_match,
    layer_prefix,
    recipe_config,
    recipe_yaml,
    weight_filters,
)

WITHIN = (
    "self_attn.q_proj.weight",
    "self_attn.q_proj.bias",
    "self_attn.o_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
    "input_layernorm.weight",
)
OUTSIDE = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")


def layers_of(count: int, number) -> list[dict[str, float]]:
    """Return layers whose tensors have the numbers ``number(layer, name)``."""
    return [
        {f"model.layers.{i}.{name}": number(i, name) for name in WITHIN}
        for i in range(count)
    ]


def resolved(filters, name: str) -> float:
    """Return what mergekit makes of the filters, read from a recipe's text."""
    config = recipe_config("base", [("other", filters)], "float32")
    read = MergeConfiguration.model_validate(
        yaml.safe_load(recipe_yaml(config, [], {"method": "x"}))
    )
    assert read.models is not None
    setting = read.models[0].parameters["weight"]
    return evaluate_setting(name, setting, validate=float)


def assert_right(layers, outside, filters) -> None:
    for part in (*layers, outside):
        for name, value in part.items():
            assert first_match(filters, name) == value, name


@pytest.mark.parametrize(
    ("number", "lines"),
    [
        (lambda i, name: float(i), 12),
        (lambda i, name: i + len(name.split(".")[0]) / 32, 36),
        (lambda i, name: i + WITHIN.index(name) / 8, 72),
    ],
    ids=["layer", "module", "tensor"],
)
def test_layer_1_is_not_taken_for_layers_10_and_11(number, lines):
    layers, outside = layers_of(12, number), dict.fromkeys(OUTSIDE, 0.0)
    filters = weight_filters(layers, outside)
    assert len(filters) == lines + len(OUTSIDE)
    assert_right(layers, outside, filters)
    for name, value in (layers[1] | layers[10] | layers[11]).items():
        assert resolved(filters, name) == value


def test_a_single_tensor_that_differs_comes_before_its_layer():
    layers = layers_of(2, lambda i, name: 0.25 if "down" in name and i else 0.5)
    filters = weight_filters(layers, {})
    assert filters == [
        ("model.layers.0.", 0.5),
        ("model.layers.1.mlp.down_proj.weight", 0.25),
        ("model.layers.1.", 0.5),
    ]


@pytest.mark.parametrize(
    ("layers", "outside"),
    [
        # What is outside is part of what is inside, and the other way round.
        ([{"h.0.norm.weight": 1.0, "h.0.fc": 1.0}], {"norm.weight": 2.0}),
        ([{"norm.weight": 1.0}, {"h.norm.weight": 3.0}], {"norm.weight.x": 2.0}),
        # A prefix that is part of another layer's.
        ([{f"{i}.a.x": float(i), f"{i}.a.y": float(i)} for i in range(12)], {}),
        ([{"a": 1.0}, {"aa": 2.0}, {"aaa": 3.0}], {"aaaa": 4.0}),
    ],
)
def test_names_that_are_part_of_each_other_get_their_own_numbers(layers, outside):
    assert_right(layers, outside, weight_filters(layers, outside))


def test_any_numbers_are_given_to_the_right_tensors():
    rng = random.Random(0)
    for _ in range(50):
        layers = layers_of(rng.randint(1, 13), lambda i, name: float(rng.randint(0, 2)))
        outside = {name: float(rng.randint(0, 2)) for name in OUTSIDE}
        assert_right(layers, outside, weight_filters(layers, outside))


def test_a_layers_prefix_ends_behind_its_number():
    names = ["backbone.layers.3.mixer.a.weight", "backbone.layers.3.mixer.b"]
    assert layer_prefix(names, 3) == "backbone.layers.3."
    assert layer_prefix(["h.11.attn.w", "h.11.mlp.w"], 11) == "h.11."
    assert layer_prefix(["encoder.w", "decoder.w"], 0) == ""


def test_numbers_in_the_text_are_the_float32_of_the_merge():
    rng = random.Random(1)
    numbers = [rng.uniform(-2, 2) * 10.0 ** rng.randint(-12, 3) for _ in range(300)]
    numbers += [0.1, 1e-5, 1e-30, 16777217.0, 0.0, -1.0]
    outside = {f"t{n:03}": as_written(v, "") for n, v in enumerate(numbers)}
    filters = weight_filters([], outside)
    for n, number in enumerate(numbers):
        found = resolved(filters[n : n + 1], f"t{n:03}")
        assert isinstance(found, float)
        assert torch.tensor(found) == torch.tensor(number)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39])
def test_a_number_that_is_not_finite_is_refused(value):
    with pytest.raises(RpamError, match=r"lm_head: the coefficient is (nan|inf)"):
        as_written(value, "lm_head")


def test_comments_are_yaml_and_change_nothing():
    config = recipe_config("base", [("other", [("a.", 0.5)]), ("base", [])], "bfloat16")
    provenance = {"method": "RPAM", "models": {"base": {"name": "a: b # c"}}, "n": None}
    text = recipe_yaml(config, ["What it is: prose.", ""], provenance)
    assert yaml.safe_load(text) == config
    comments = re.findall(r"^#(.*)$", text, re.MULTILINE)
    assert yaml.safe_load("\n".join(comments)) == provenance


def stock(base: torch.Tensor, others, numbers) -> torch.Tensor:
    """Return what mergekit's task_arithmetic makes of float32 tensors."""
    group = TensorGroup.from_tensors([base, *others], base_index=0)
    parameters = {
        "weight": dict(enumerate(numbers, 1)),
        "normalize": False,
        "lambda": 1.0,
    }
    (merged,) = merge_methods.get("task_arithmetic")([group], parameters=parameters)
    return merged


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32)


@pytest.mark.parametrize("others", range(1, MOST_OTHERS + 1))
@pytest.mark.parametrize("shape", [(1,), (5,), (7, 5), (513, 1027), (4, 33, 65)])
def test_the_merge_formula_is_task_arithmetics_bit_for_bit(shape, others):
    generator = torch.Generator().manual_seed(0)
    base, *experts = (
        torch.randn(shape, generator=generator) for _ in range(others + 1)
    )
    numbers = [as_written(0.7 - 0.3 * n, "") for n in range(others)]
    parts = [{"scalar": torch.tensor(number)} for number in numbers]
    ours = written(base, experts, parts, torch.float32)
    assert torch.equal(bits(ours), bits(stock(base, experts, numbers)))


@pytest.mark.parametrize("others", [1, 2])
def test_a_negative_zero_is_written_as_task_arithmetic_writes_it(others):
    """It adds +0.0, which makes -0.0 a +0.0 where the task vectors add nothing."""
    base, experts = torch.full((4, 8), -0.0), [torch.full((4, 8), -1.0)] * others
    parts = [{"scalar": torch.tensor(0.0)}] * others
    ours = written(base, experts, parts, torch.float32)
    assert torch.equal(bits(ours), bits(stock(base, experts, [0.0] * others)))
