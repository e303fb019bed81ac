"""Configs as people write them for mergekit's other methods, taken over for rpam."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from helpers.checking import found, noted
from helpers.merged import shard_bytes
from helpers.models import merge_config
from rpam_mergekit.checks.examine import examine_merge
from rpam_mergekit.checks.inputs import with_one_spelling
from rpam_mergekit.errors import RpamError
from rpam_mergekit.evaluate.sweep import interpolation
from rpam_mergekit.models.references import same_model

# A weight that leaves nothing to solve

NOTHING = "every weight of every decoder layer is fixed"


def weighted(pair: Path, weight: object) -> list[dict]:
    return [{"model": str(pair / "short"), "parameters": {"weight": weight}}]


@pytest.mark.parametrize(
    "weight",
    [
        1.0,
        [0.0, 0.5, 1.0],
        [{"filter": "mlp", "value": 0.5}, {"value": 1.0}],
        [
            {"filter": name, "value": 0.5}
            for name in ("self_attn", "mlp", "input_layernorm", "post_attention")
        ],
    ],
    ids=["number", "gradient", "default behind filters", "filters for all"],
)
def test_a_weight_that_fixes_everything(check, pair, weight):
    found(check(merge_config(pair, models=weighted(pair, weight))), NOTHING)
    found(check(merge_config(pair, parameters={"weight": weight})), NOTHING)


def test_such_a_merge_runs_no_pre_pass(pair, tmp_path, mergekit_yaml):
    config = merge_config(pair, models=weighted(pair, 1.0))
    process = mergekit_yaml(config)
    assert process.returncode == 1
    assert f"rpam: weight: {NOTHING}" in process.stderr
    assert "merge_method: linear" in process.stderr
    assert not (tmp_path / "out").exists()


def test_filters_for_all_are_found_before_the_pre_pass(pair, tmp_path, mergekit_yaml):
    weight = [{"filter": ".layers.", "value": 0.5}]
    process = mergekit_yaml(merge_config(pair, models=weighted(pair, weight)))
    assert process.returncode == 1
    assert f"rpam: weight: {NOTHING}" in process.stderr
    assert "activations of" not in process.stderr


def test_layers_that_are_fixed_are_named(check, pair, mergekit_yaml):
    weight = [
        {"filter": "layers.0.", "value": 0.5},
        {"filter": "layers.2.", "value": [0.0, 1.0]},
        {"filter": "layers.1.mlp", "value": 0.5},
    ]
    config = merge_config(pair, models=weighted(pair, weight))
    notes = (
        f"of {pair / 'short'}, all weights are fixed in the layers 0, 2: nothing is",
        f"of {pair / 'short'}, 3 further of 36 weights are fixed",
    )
    noted(check(config), *notes)
    process = mergekit_yaml(config)
    assert process.returncode == 0, process.stderr
    assert all(note in process.stderr for note in notes)


def test_a_weight_outside_the_layers_is_not_noted(check, pair):
    weight = [{"filter": "lm_head", "value": 0.5}]
    result = check(merge_config(pair, models=weighted(pair, weight)))
    assert result.exit_code == 0
    assert "fixed" not in result.stdout


# The base, written otherwise


@pytest.fixture
def spellings(pair, tmp_path, monkeypatch) -> list[str]:
    """Paths that lead to the base."""
    monkeypatch.chdir(pair)
    (tmp_path / "link").symlink_to(pair / "long")
    relative = os.path.relpath(pair / "long")
    up = f"{pair}/short/../long"
    return [f"{pair / 'long'}/", relative, f"./{relative}", up, str(tmp_path / "link")]


def test_the_base_listed_under_another_spelling(check, pair, spellings):
    for spelling in spellings:
        models = [{"model": spelling}, {"model": str(pair / "short")}]
        result = check(merge_config(pair, models=models))
        assert result.exit_code == 0, (spelling, result.output)
        assert "base, long" in result.stdout


def test_the_base_in_slices_under_another_spelling(check, pair, spellings):
    for spelling in spellings:
        slices = [
            {
                "sources": [
                    {"model": name, "layer_range": layers}
                    for name in (spelling, str(pair / "short"))
                ]
            }
            for layers in ([0, 1], [1, 3])
        ]
        result = check(merge_config(pair, models=None, slices=slices))
        assert result.exit_code == 0, (spelling, result.output)


def test_a_merge_takes_it_for_the_base(pair, tmp_path, mergekit_yaml):
    models = [{"model": f"{pair / 'long'}/"}, {"model": str(pair / "short")}]
    config = merge_config(pair, models=models)
    assert mergekit_yaml(config, out=tmp_path / "a").returncode == 0
    assert mergekit_yaml(merge_config(pair), out=tmp_path / "b").returncode == 0
    assert shard_bytes(tmp_path / "a") == shard_bytes(tmp_path / "b")


def test_the_other_model_listed_twice_under_two_spellings(check, pair):
    models = [{"model": str(pair / "short")}, {"model": f"{pair / 'short'}/"}]
    found(check(merge_config(pair, models=models)), "models[1]: ", "is listed twice")


def test_a_copy_of_the_base_is_another_model(check, pair, tmp_path):
    shutil.copytree(pair / "long", tmp_path / "copy")
    models = [{"model": str(tmp_path / "copy")}, {"model": str(pair / "short")}]
    found(check(merge_config(pair, models=models)), "pattern: missing")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Org/Model", "org/model", True),
        ("org/model", "org/model/", True),
        ("org/model", "org/model@main", True),
        ("org/model", "org/model@v1", False),
        ("org/model@v1", "ORG/model@v1", True),
        ("org/model+org/lora", "org/model+Org/Lora", True),
        ("org/model+org/lora", "org/model", False),
        ("org/model", "org/model-2", False),
    ],
)
def test_names_of_the_hub(one, other, same):
    assert same_model(ModelReference.parse(one), ModelReference.parse(other)) is same


def test_a_sweep_knows_the_base_too(pair):
    models = [{"model": f"{pair / 'long'}/"}, {"model": str(pair / "short")}]
    recipe = interpolation(merge_config(pair, models=models), 1)
    assert [one["model"] for one in recipe["models"]] == [str(pair / "short")]


def test_one_spelling_is_left_alone(pair):
    config = MergeConfiguration.model_validate(merge_config(pair))
    assert with_one_spelling(config) == config


# Keys that belong elsewhere

TOP = "It belongs to the top level of the config, beside merge_method."
WHOLE = "It is the whole merge's: write {} under the top-level parameters."


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"calibration": "x"}, f"calibration: unknown key. {WHOLE}"),
        ({"granularity": "row"}, f"granularity: unknown key. {WHOLE}"),
        ({"weight": 0.5}, "weight: unknown key. Write it under the parameters of a"),
        ({"density": 0.5}, "density: unknown key. It is a parameter of breadcrumbs,"),
        (
            {"models": [{"model": "SHORT", "weight": 0.5}]},
            "models[0].weight: unknown key. It is a parameter: write it under "
            "models[0].parameters.",
        ),
        (
            {"models": [{"model": "SHORT", "pattern": "short"}]},
            "models[0].pattern: unknown key. It is a parameter: write it under models",
        ),
        (
            {"models": [{"model": "SHORT", "calibration": "x"}]},
            f"models[0].calibration: unknown key. {WHOLE}",
        ),
        (
            {"models": [{"model": "SHORT", "layer_range": [0, 3]}]},
            "models[0].layer_range: unknown key. Only the sources of slices have it.",
        ),
        (
            {"models": [{"model": "SHORT", "dtype": "float32"}]},
            f"models[0].dtype: unknown key. {TOP}",
        ),
        (
            {"models": [{"model": "SHORT", "parameters": {"calibration": "x"}}]},
            f"models[0].parameters.calibration: unknown parameter. {WHOLE}",
        ),
        (
            {"models": [{"model": "SHORT", "parameters": {"density": 0.5}}]},
            "models[0].parameters.density: unknown parameter. It is a parameter of",
        ),
        ({"parameters": {"dtype": "float32"}}, f"parameters.dtype: unknown par… {TOP}"),
        ({"parameters": {"base_model": "x"}}, f"parameters.base_model: unknown… {TOP}"),
        ({"parameters": {"tokenizer_source": "x"}}, f"parameters.tokenizer_so… {TOP}"),
        (
            {"parameters": {"pattern": "short"}},
            "parameters.pattern: unknown parameter. Write it under the parameters of a",
        ),
        ({"parameters": {"t": 0.5}}, "parameters.t: unknown parameter. It is a param"),
        (
            {"parameters": {"normalize": True, "int8_mask": True}},
            "parameters.int8_mask: unknown parameter. It is a parameter of breadcrumbs,"
            " breadcrumbs_ties, dare_linear and others. rpam has none of the kind, as "
            "it finds the weights itself: leave it out.",
        ),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:30],
)
def test_a_key_that_belongs_elsewhere(check, pair, changes, problem):
    changes = copy.deepcopy(changes)
    for entry in changes.get("models", ()):
        entry["model"] = str(pair / "short")
    place = problem.partition(":")[0].rpartition(".")[2]
    parts = problem.replace("{}", place).split("… ")
    found(check(merge_config(pair, **changes)), *parts)


# Published configs, with the name of the method changed

PUBLISHED = {
    "linear": (
        """
        models:
          - {model: LONG, parameters: {weight: 0.5}}
          - {model: SHORT, parameters: {weight: 0.5}}
        parameters: {normalize: true}
        """,
        ("base_model: missing.", "parameters.normalize: unknown parameter. It is"),
    ),
    "slerp": (
        """
        slices:
          - sources:
              - {model: LONG, layer_range: [0, 3]}
              - {model: SHORT, layer_range: [0, 3]}
        base_model: LONG/
        parameters:
          t:
            - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
            - {value: 0.5}
        """,
        ("parameters.t: unknown parameter. It is", "parameters.calibration: missing."),
    ),
    "ties": (
        """
        models:
          - {model: LONG}
          - {model: SHORT, parameters: {density: 0.5, weight: 0.5}}
        base_model: LONG
        parameters: {int8_mask: true}
        """,
        (
            "models[1].parameters.density: unknown parameter. It is a parameter of",
            "parameters.int8_mask: unknown parameter. It is a parameter of",
            "parameters.calibration: missing.",
        ),
    ),
    "task_arithmetic": (
        """
        models:
          - {model: SHORT, parameters: {weight: 0.3}}
        base_model: LONG
        parameters: {calibration: CALIBRATION, lambda: 1.0}
        """,
        ("parameters.lambda: unknown parameter. It is a parameter of", NOTHING),
    ),
    "dare_ties, whose base is neither": (
        """
        models:
          - {model: LONG, parameters: {density: 0.53, weight: 0.4}}
          - {model: SHORT, parameters: {density: 0.53, weight: 0.3}}
        base_model: BASE
        parameters: {calibration: CALIBRATION}
        """,
        ("models[0].parameters.density: unknown", "models[0].parameters.pattern: miss"),
    ),
    "model_stock": (
        """
        models:
          - {model: SHORT}
        base_model: LONG
        parameters: {calibration: CALIBRATION, filter_wise: false}
        """,
        (
            "parameters.filter_wise: unknown parameter. It is a parameter of "
            "model_stock",
        ),
    ),
    "passthrough": (
        """
        slices:
          - sources: [{model: LONG, layer_range: [0, 2]}]
          - sources: [{model: SHORT, layer_range: [1, 3]}]
        base_model: LONG
        parameters: {calibration: CALIBRATION}
        """,
        ("slices[1].sources: the models, their order or their parameters are not",),
    ),
}


@pytest.mark.parametrize("method", PUBLISHED)
def test_a_published_config_of_another_method(check, pair, method):
    text, problems = PUBLISHED[method]
    text = text.replace("LONG", str(pair / "long")).replace(
        "SHORT", str(pair / "short")
    )
    text = text.replace("CALIBRATION", str(pair / "calibration.jsonl"))
    config = yaml.safe_load(text.replace("BASE", str(pair / "base")))
    found(check({"merge_method": "rpam", "dtype": "bfloat16", **config}), *problems)


# Devices, places


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("option", ["multi_gpu", "gpu_rich"])
def test_several_gpus_where_there_is_none(pair, option):
    config = MergeConfiguration.model_validate(merge_config(pair))
    with pytest.raises(RpamError, match="--multi-gpu: torch finds no GPU"):
        examine_merge(config, MergeOptions(**{option: True}))


def test_a_finding_on_a_model_has_its_line(check, pair):
    text = (
        f"# a merge\nmerge_method: rpam\nbase_model: {pair / 'long'}\nmodels:\n"
        "  - model: ./nowhere\n"
        f"parameters:\n  calibration: {pair / 'calibration.jsonl'}"
    )
    found(check(text), "rpam.yml:5: ./nowhere: its config cannot be loaded")
    found(check(text.replace(str(pair / "long"), "x/y")), "rpam.yml:3: x/y: its conf")


def test_a_missing_base_has_a_line(check, pair):
    config = merge_config(pair, base_model=None)
    text = yaml.safe_dump(config, sort_keys=False)
    found(check(f"# a merge\n{text}"), "rpam.yml:2: base_model: missing.")
    found(check(f"{text}base_model:\n"), "base_model: missing.", "rpam.yml:")
