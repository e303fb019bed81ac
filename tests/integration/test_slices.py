"""`slices:` and `modules:`: as if the whole merged model had been cut into slices."""

from __future__ import annotations

import re

import pytest
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig

from helpers.commands import merge_here, run
from helpers.merged import tensors
from helpers.models import (
    TINY,
    merge_config,
    qwen2_config,
    save_pair,
    write_calibration,
)
from rpam_mergekit.errors import RpamError


@pytest.fixture(scope="module")
def llamas(tmp_path_factory, tokenizer):
    """A pair of an architecture that stock mergekit can slice."""
    folder = tmp_path_factory.mktemp("llamas")
    config = LlamaConfig(**TINY, vocab_size=len(tokenizer))
    save_pair(folder, config, tokenizer)
    write_calibration(folder / "calibration.jsonl")
    return folder


def sliced(pair, *ranges, names=("long", "short"), **changes):
    slices = [
        {
            "sources": [
                {"model": str(pair / name), "layer_range": list(layers)}
                for name in names
            ]
        }
        for layers in ranges
    ]
    return merge_config(pair, models=None, slices=slices, **changes)


@pytest.mark.parametrize(
    ("ranges", "parameters"),
    [
        (([0, 2], [1, 3]), {}),
        (
            ([0, 1], [2, 3]),
            {
                "granularity": "layer",
                "weight": [
                    {"filter": "layers.2.mlp", "value": 0.3},
                    {"filter": "lm_head", "value": 0.5},
                ],
            },
        ),
    ],
    ids=["more layers", "fewer layers"],
)
def test_a_layer_has_the_coefficients_of_its_input_layer(
    llamas, tmp_path, ranges, parameters
):
    """The same bytes as the whole merge, cut by mergekit's passthrough."""
    config = sliced(llamas, *ranges, parameters=parameters)
    merge_here(config, tmp_path / "sliced")
    whole = merge_config(llamas, parameters=parameters)
    merge_here(whole, tmp_path / "whole")
    cut = {
        "merge_method": "passthrough",
        "dtype": "float32",
        "slices": [
            {"sources": [{"model": str(tmp_path / "whole"), "layer_range": layers}]}
            for layers in ranges
        ],
    }
    merge_here(cut, tmp_path / "cut")
    found, expected = tensors(tmp_path / "sliced"), tensors(tmp_path / "cut")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].equal(value), name
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sliced")
    assert len(model.model.layers) == sum(end - start for start, end in ranges)


def test_layer_types_are_those_of_the_slices(tmp_path, tokenizer):
    """mergekit leaves the list at its length, by which transformers refuses it."""
    config = qwen2_config(
        tokenizer,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        use_sliding_window=True,
        sliding_window=8,
    )
    save_pair(tmp_path, config, tokenizer)
    write_calibration(tmp_path / "calibration.jsonl")
    merge_here(sliced(tmp_path, [0, 2], [1, 3]), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    types = [name.partition("_")[0] for name in model.config.layer_types]
    assert types == ["full", "sliding", "sliding", "full"]


def test_one_slice_of_all_layers_is_the_whole_merge(pair, tmp_path):
    merge_here(merge_config(pair), tmp_path / "whole")
    for number, config in enumerate(
        (
            sliced(pair, [0, 3]),
            merge_config(
                pair,
                models=None,
                modules={"default": {"models": [{"model": str(pair / "short")}]}},
            ),
        )
    ):
        out = tmp_path / str(number)
        merge_here(config, out)
        for shard in (tmp_path / "whole").glob("*.safetensors"):
            assert shard.read_bytes() == (out / shard.name).read_bytes()


def change(config, path, value):
    """Set what `path` (keys and numbers) names in a copy of a config."""
    config = yaml.safe_load(yaml.safe_dump(config))
    holder = config
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    return config


SOURCE = ("slices", 1, "sources", 1)


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        ((*SOURCE, "layer_range"), [0, 2], "slices[1].sources: layer_range differs"),
        ((*SOURCE, "model"), "other", "slices[1].sources: the models, their order"),
        (
            (*SOURCE, "parameters"),
            {"weight": 0.5},
            "slices[1].sources[1].parameters.weight: with slices, set weight in",
        ),
        (
            ("slices", 0, "parameters"),
            {"epochs": 3},
            "slices[0].parameters.epochs: rpam's parameters are the whole merge's",
        ),
        (("slices", 0, "base_model"), "other", "slices[0].base_model: found other"),
        (("slices", 0, "residual_weight"), 0.5, "slices[0].residual_weight"),
        (("parameters", "weight"), [0.0, 1.0], "parameters.weight: a gradient runs"),
        (
            ("parameters", "weight"),
            [{"filter": "mlp", "value": [0.0, 1.0]}],
            "parameters.weight: a gradient runs",
        ),
    ],
)
def test_slices_without_a_clear_meaning_are_refused(
    pair, tmp_path, path, value, problem
):
    with pytest.raises(RpamError, match=re.escape(problem)):
        merge_here(change(sliced(pair, [0, 2], [1, 3]), path, value), tmp_path)


def test_layers_that_the_models_do_not_have(pair, tmp_path):
    problem = r"layer_range: found \[2, 5\], but the models have 3 layers"
    with pytest.raises(RpamError, match=problem):
        merge_here(sliced(pair, [0, 2], [2, 5]), tmp_path)


def test_slices_need_the_base_among_their_sources(pair, mergekit_yaml):
    process = mergekit_yaml(sliced(pair, [0, 3], names=("short",)))
    assert process.returncode == 1
    assert "slices[0].sources: base_model" in process.stderr
    assert "is not among them" in process.stderr


def test_several_modules_are_refused(pair, tmp_path):
    models = [{"model": str(pair / "short")}]
    modules = {"text": {"models": models}, "vision": {"models": models}}
    (tmp_path / "c.yml").write_text(
        yaml.safe_dump(merge_config(pair, models=None, modules=modules))
    )
    process = run(["mergekit-yaml", str(tmp_path / "c.yml"), str(tmp_path / "out")])
    assert process.returncode == 1
    assert "modules: found text, vision." in process.stderr
