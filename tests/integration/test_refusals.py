"""Bad input is refused by the real commands, in one message, before heavy work."""

from __future__ import annotations

import json

import pytest
import yaml
from transformers import LlamaConfig

from helpers.commands import run
from helpers.models import merge_config, qwen2_config, save_pair, write_calibration


@pytest.fixture
def refused(mergekit_yaml, tmp_path):
    """Run mergekit-yaml; return its message, seen to be the only thing it did."""

    def call(config: dict | str) -> str:
        process = mergekit_yaml(config)
        assert process.returncode == 1
        assert "rpam: " in process.stderr
        assert "Traceback" not in process.stderr
        assert "pre-pass" not in process.stderr
        assert not list((tmp_path / "out").glob("*.safetensors"))
        return process.stderr

    return call


def test_no_base_model(pair, refused):
    models = [{"model": str(pair / name)} for name in ("long", "short")]
    message = refused(merge_config(pair, base_model=None, models=models))
    assert "base_model: missing. Name the Long-CoT reasoning model" in message


def test_more_than_two_models_without_patterns(pair, refused):
    models = [{"model": str(pair / name)} for name in ("short", "third")]
    message = refused(merge_config(pair, models=models))
    assert "models[0].parameters.pattern: missing" in message
    assert "models[1].parameters.pattern: missing" in message


def test_a_model_listed_twice(pair, refused):
    models = [{"model": str(pair / "short")}] * 2
    message = refused(merge_config(pair, models=models))
    assert f"models[1]: {pair / 'short'} is listed twice." in message


def test_fewer_than_two_models(pair, refused):
    models = [{"model": str(pair / "long")}]
    message = refused(merge_config(pair, models=models))
    assert "models: found 0 besides base_model, expected one" in message


def test_no_calibration(pair, refused):
    config = merge_config(pair)
    del config["parameters"]["calibration"]
    assert "parameters.calibration: missing." in refused(config)


def test_a_calibration_file_that_is_not_there(pair, refused):
    message = refused(merge_config(pair, parameters={"calibration": "nowhere.jsonl"}))
    assert "no file nowhere.jsonl (looked for /" in message


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "the calibration file is empty"),
        ('{"prompt": "x", "pattern": "long"}\n', "no query has the pattern 'short'"),
        ('{"prompt": "x", "patern": "long"}\n', ":1: pattern: missing. Did you mean"),
        ("{\n", ":1: not JSON"),
    ],
    ids=["empty", "one pattern", "misspelt field", "malformed"],
)
def test_a_bad_calibration_file(pair, tmp_path, refused, content, problem):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    message = refused(merge_config(pair, parameters={"calibration": str(path)}))
    assert str(path) in message
    assert problem in message


def test_an_unknown_parameter(pair, refused):
    message = refused(merge_config(pair, parameters={"granularty": "row"}))
    assert "parameters.granularty: unknown parameter." in message
    assert "Did you mean 'granularity'?" in message


def test_an_unknown_top_level_key(pair, refused):
    message = refused(merge_config(pair, paramters={"epochs": 3}))
    assert "paramters: unknown key. Did you mean 'parameters'?" in message


def test_an_unknown_key_of_a_model(pair, refused):
    models = [{"model": str(pair / "short"), "parameter": {"weight": 0.5}}]
    message = refused(merge_config(pair, models=models))
    assert "models[0].parameter: unknown key. Did you mean 'parameters'?" in message


def test_an_unknown_parameter_of_a_model(pair, refused):
    models = [{"model": str(pair / "short"), "parameters": {"wieght": 0.5}}]
    message = refused(merge_config(pair, models=models))
    assert "models[0].parameters.wieght: unknown parameter." in message
    assert "Did you mean 'weight'?" in message


def test_a_weight_on_the_base_model(pair, refused):
    models = [
        {"model": str(pair / "long"), "parameters": {"weight": 0.5}},
        {"model": str(pair / "short")},
    ]
    message = refused(merge_config(pair, models=models))
    assert "models[0].parameters.weight: the base model has no weight" in message


def test_two_models_of_one_pattern(pair, refused):
    models = [
        {"model": str(pair / name), "parameters": {"pattern": "short"}}
        for name in ("long", "short")
    ]
    assert "both models have the pattern 'short'" in refused(
        merge_config(pair, models=models)
    )


def test_everything_wrong_is_said_at_once(pair, refused):
    config = merge_config(
        pair,
        base_model=None,
        dtype="float31",
        tokenizer_source=str(pair / "short"),
        parameters={"calibration": "nowhere.jsonl", "epochs": 0},
    )
    message = refused(config)
    assert "5 problems:" in message
    for part in (
        "base_model",
        "nowhere.jsonl",
        "epochs",
        "float31",
        "tokenizer_source",
    ):
        assert part in message


@pytest.fixture
def other_pair(tmp_path, tokenizer):
    """Write a second pair of another config; return the path of its first model."""

    def call(config) -> str:
        return str(save_pair(tmp_path / "other", config, tokenizer)[0])

    return call


def against(pair, other: str) -> dict:
    return merge_config(pair, models=[{"model": other}])


def test_different_architectures(pair, other_pair, refused, tokenizer):
    config = LlamaConfig(**{**qwen2_config(tokenizer).to_dict(), "architectures": None})
    message = refused(against(pair, other_pair(config)))
    assert "the architectures differ" in message
    assert "Qwen2ForCausalLM" in message
    assert "LlamaForCausalLM" in message


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"num_hidden_layers": 2}, "num_hidden_layers differs: 3 in"),
        ({"intermediate_size": 64}, "intermediate_size differs: 48 in"),
        ({"vocab_size": 40}, "merged by token id and must have one size"),
    ],
    ids=["layers", "shapes", "vocabulary"],
)
def test_models_of_different_sizes(
    pair, other_pair, refused, tokenizer, changes, problem
):
    other = other_pair(qwen2_config(tokenizer, **changes))
    assert problem in refused(against(pair, other))


def test_shapes_that_the_configs_do_not_tell(pair, other_pair, refused, tokenizer):
    """The headers are read, not only the configs."""
    other = other_pair(qwen2_config(tokenizer, vocab_size=40))
    path = f"{other}/config.json"
    with open(path) as file:
        config = json.load(file)
    config["vocab_size"] = len(tokenizer)
    with open(path, "w") as file:
        json.dump(config, file)
    message = refused(against(pair, other))
    assert "model.embed_tokens.weight: shape (21, 32)" in message
    assert "(40, 32)" in message


def test_a_model_that_is_not_there(pair, refused):
    message = refused(against(pair, "/nowhere/at/all"))
    assert "/nowhere/at/all: its config cannot be loaded" in message


def test_a_coefficients_file_of_other_models(
    pair, tmp_path, tokenizer, mergekit_yaml, refused
):
    path = tmp_path / "coefficients.safetensors"
    parameters = {"coefficients": str(path), "granularity": "layer"}
    assert mergekit_yaml(merge_config(pair, parameters=parameters)).returncode == 0
    for shard in (tmp_path / "out").glob("*.safetensors"):
        shard.unlink()
    before = path.read_bytes()
    save_pair(tmp_path, qwen2_config(tokenizer, rope_theta=5e5), tokenizer)
    (tmp_path / "long" / "model.safetensors").write_bytes(
        (pair / "short" / "model.safetensors").read_bytes()
    )
    write_calibration(tmp_path / "calibration.jsonl")
    message = refused(merge_config(tmp_path, parameters=parameters))
    assert "belongs to other models: its base model was long" in message
    assert "Delete the file to make it anew" in message
    assert path.read_bytes() == before


def test_a_coefficients_file_that_is_something_else(pair, refused):
    other = str(pair / "long" / "model.safetensors")
    message = refused(merge_config(pair, parameters={"coefficients": other}))
    assert "not a coefficients file of rpam-mergekit" in message


def test_mergekit_pytorch(pair, tmp_path):
    shards = [str(pair / n / "model.safetensors") for n in ("long", "short")]
    config = {
        "merge_method": "rpam",
        "base_model": shards[0],
        "models": [{"model": shards[1]}],
    }
    path = tmp_path / "raw.yml"
    path.write_text(yaml.safe_dump(config))
    process = run(["mergekit-pytorch", str(path), str(tmp_path / "out")])
    assert process.returncode == 1
    assert "rpam: this command has no planner" in process.stderr
    assert (
        "Use mergekit-yaml, mergekit-multi or 'mergekit-rpam merge'" in process.stderr
    )
    assert "Traceback" not in process.stderr
    assert not list((tmp_path / "out").glob("*"))


def test_an_unknown_key_in_a_mergekit_multi_document(pair, tmp_path):
    document = {**merge_config(pair, paramters={}), "name": "step"}
    path = tmp_path / "multi.yml"
    path.write_text(yaml.safe_dump(document))
    process = run(["mergekit-multi", str(path), "-I", str(tmp_path / "steps")])
    assert process.returncode == 1
    assert "paramters: unknown key. Did you mean 'parameters'?" in process.stderr
