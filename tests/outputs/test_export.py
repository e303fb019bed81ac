"""Exported recipes: stock mergekit, without the plugin, writes the same shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from helpers.architectures import MERGED
from helpers.benchmarks import benchmark, number
from helpers.benchmarks import tables as printed
from helpers.commands import run, succeeded
from helpers.exporting import (
    assert_same_bytes,
    comments,
    config_of,
    finer_merge,
    merge,
    quiet,
    recipe,
    refusal,
)
from helpers.merged import COEFFICIENTS, shard_bytes, tensors
from helpers.models import qwen2_config, save_pair, tiny_config
from rpam_mergekit.cli.main import main
from rpam_mergekit.folder.contents import STOCK_RECIPE as RECIPE
from rpam_mergekit.formats.coefficients import CoefficientsFile, write_coefficients
from rpam_mergekit.settings import SCALAR_GRANULARITIES

ARCHITECTURES = [
    entry
    for entry in MERGED
    if entry.name in ("llama (tied)", "qwen2", "qwen3", "gemma2", "mixtral", "gpt2")
]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda entry: entry.name)
def test_a_recipe_writes_the_same_bytes(architecture, dtype, tmp_path, tokenizer):
    save_pair(tmp_path, tiny_config(architecture, tokenizer), tokenizer, dtype)
    for granularity in SCALAR_GRANULARITIES:
        folder = tmp_path / granularity
        folder.mkdir()
        config = config_of(
            tmp_path, granularity, parameters={"outside_weight": 0.3}, dtype=None
        )
        found = assert_same_bytes(config, folder)
        assert found["out_dtype"] == str(dtype).removeprefix("torch.")
    written = {value.dtype for value in tensors(folder / "plain").values()}
    assert written == {dtype}


@pytest.mark.parametrize("granularity", ["layer", "tensor"])
def test_it_needs_no_plugin(granularity, tmp_path, tokenizer):
    """In processes that do not know `rpam`, on twelve layers."""
    config = qwen2_config(tokenizer, num_hidden_layers=12)
    save_pair(tmp_path, config, tokenizer, torch.bfloat16)
    config = config_of(tmp_path, granularity, dtype="float32", out_dtype="bfloat16")
    ours = merge(config, tmp_path / "ours")
    (tmp_path / "rpam.yml").write_text(yaml.safe_dump(config))
    process = run(
        ["mergekit-rpam", "export", "rpam.yml", str(ours / COEFFICIENTS)], cwd=tmp_path
    )
    succeeded(process)
    path = Path(process.stdout.strip())
    assert path == (ours / COEFFICIENTS).with_name(RECIPE)
    assert f"mergekit-yaml {path} OUT" in process.stderr
    off = {"RPAM_MERGEKIT_AUTOLOAD": "0"}
    unknown = run(["mergekit-yaml", "rpam.yml", "x"], cwd=tmp_path, **off)
    assert unknown.returncode != 0
    plain = tmp_path / "plain"
    succeeded(run(["mergekit-yaml", str(path), str(plain)], **off))
    assert shard_bytes(plain) == shard_bytes(ours)


def test_several_shards_are_the_same(tmp_path, tokenizer):
    save_pair(tmp_path, qwen2_config(tokenizer), tokenizer)
    config = config_of(tmp_path)
    config["models"].insert(0, {"model": config["base_model"]})
    found = assert_same_bytes(config, tmp_path, out_shard_size=20_000)
    assert len(shard_bytes(tmp_path / "plain")) > 1
    assert found["models"][0] == {"model": config["base_model"]}


def test_a_tied_base_with_an_untied_model(tmp_path, tokenizer):
    tied = qwen2_config(tokenizer, tie_word_embeddings=True)
    save_pair(tmp_path / "tied", tied, tokenizer)
    save_pair(tmp_path, qwen2_config(tokenizer), tokenizer)
    config = config_of(tmp_path, parameters={"outside_weight": 0.25})
    config["base_model"] = str(tmp_path / "tied" / "long")
    assert_same_bytes(config, tmp_path, untied=True)
    assert "lm_head.weight" in tensors(tmp_path / "plain")


def test_models_of_three_patterns(tmp_path, tokenizer):
    save_pair(tmp_path, qwen2_config(tokenizer), tokenizer)
    code, _ = save_pair(tmp_path / "code", qwen2_config(tokenizer), tokenizer)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(code)
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
        model.save_pretrained(code)
    models = [
        {"model": str(tmp_path / "short"), "parameters": {"pattern": "short"}},
        {"model": str(code), "parameters": {"pattern": "code"}},
    ]
    config = config_of(tmp_path, models=models)
    path = tmp_path / "calibration.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines[::3]:
        line["pattern"] = "code"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = assert_same_bytes(config, tmp_path)
    first, second = (m["parameters"]["weight"] for m in found["models"])
    assert [f["filter"] for f in first] == [f["filter"] for f in second]
    assert first != second


def test_a_users_weight_wins_as_in_the_merge(tmp_path, tokenizer):
    """Also one that the coefficients were not made with."""
    save_pair(tmp_path, qwen2_config(tokenizer), tokenizer)
    weight = [{"filter": "lm_head", "value": 0.1}, {"filter": "1.mlp", "value": 1.0}]
    config = config_of(tmp_path, parameters={"weight": weight})
    found = assert_same_bytes(config, tmp_path)
    filters = found["models"][0]["parameters"]["weight"]
    assert {"filter": "lm_head.weight", "value": float(torch.tensor(0.1))} in filters
    assert {"filter": "model.layers.1.mlp.", "value": 1.0} in filters
    later = config_of(tmp_path, parameters={"weight": 0.125})
    del later["parameters"]["calibration"]
    later["parameters"]["coefficients"] = str(tmp_path / "ours" / COEFFICIENTS)
    again = merge(later, tmp_path / "later")
    found = recipe(later, tmp_path / "ours")
    assert shard_bytes(merge(found, tmp_path / "x")) == shard_bytes(again)


def test_an_operating_point_is_in_the_numbers(tmp_path, tokenizer):
    """The merge multiplies what was solved by the scale; the recipe has the product."""
    save_pair(tmp_path, qwen2_config(tokenizer), tokenizer)
    config = config_of(tmp_path, parameters={"reasoning": 0.25})
    out = merge(config, tmp_path / "out")
    stock = merge(recipe(config, out), tmp_path / "stock")
    assert shard_bytes(stock) == shard_bytes(out)
    plain = merge(config_of(tmp_path), tmp_path / "plain")
    assert shard_bytes(plain) != shard_bytes(out)


def test_a_chat_template_is_carried_over(tmp_path, tokenizer):
    save_pair(tmp_path, qwen2_config(tokenizer), tokenizer)
    template = "{% for m in messages %}{{ m['content'] }}\n# {% endfor %}"
    config = config_of(tmp_path, chat_template=template)
    found = assert_same_bytes(config, tmp_path)
    assert found["chat_template"] == template


def test_provenance_is_in_the_comments(tmp_path, tokenizer):
    save_pair(tmp_path, qwen2_config(tokenizer), tokenizer)
    config = config_of(tmp_path)
    out = merge(config, tmp_path / "out")
    recipe(config, out)
    found = comments(out)
    metadata = CoefficientsFile(out / COEFFICIENTS).metadata
    made_from = metadata["fingerprint"]
    assert found["paper"] == "https://arxiv.org/abs/2601.03506"
    assert found["models"]["other"] == {
        "name": "short",
        "pattern": "short",
        "content": made_from["other"],
    }
    assert found["calibration"] == made_from["calibration"]
    assert found["settings"] == made_from["settings"]
    gaps = [layer["gap_after"] for layer in found["layers"]]
    assert gaps == [round(layer["gap_after"], 6) for layer in metadata["layers"]]


@pytest.fixture(scope="module")
def finer(tmp_path_factory, tokenizer) -> Path:
    return finer_merge(tmp_path_factory.mktemp("finer"), tokenizer)


@pytest.mark.parametrize("key", ["slices", "modules"])
def test_what_is_not_carried_over_is_refused(key, finer):
    config = config_of(finer)
    config["models"].append({"model": config["base_model"]})
    models = config.pop("models")
    slices = [{"sources": [{**model, "layer_range": [0, 3]} for model in models]}]
    config[key] = slices if key == "slices" else {"default": {"models": models}}
    message = refusal(config, finer / "out")
    assert f"{key}: a stock recipe is exported for whole models" in message


def test_more_models_than_are_added_in_order_are_refused(finer):
    config = config_of(finer)
    (short,) = config["models"]
    config["models"] = []
    for pattern in ("short", "code", "maths", "prose", "law"):
        other = finer / pattern
        if not other.exists():
            shutil.copytree(short["model"], other)
        model = {"model": str(other), "parameters": {"pattern": pattern}}
        config["models"].append(model)
    message = refusal(config, finer / "out")
    assert "models: 5 besides base_model. mergekit adds up more than 4" in message


def test_coefficients_of_other_models_are_refused(finer, tmp_path, tokenizer):
    save_pair(tmp_path, qwen2_config(tokenizer, hidden_size=16), tokenizer)
    config = config_of(tmp_path)
    (tmp_path / "out" / COEFFICIENTS).parent.mkdir(parents=True)
    file = CoefficientsFile(finer / "out" / COEFFICIENTS)
    entries = {name: file.parts(name) for name in file.names}
    write_coefficients(tmp_path / "out" / COEFFICIENTS, entries, file.metadata)
    assert "belongs to other models" in refusal(config, tmp_path / "out")


def test_an_export_needs_no_calibration_data(tmp_path, tokenizer):
    save_pair(tmp_path, qwen2_config(tokenizer), tokenizer)
    config = config_of(tmp_path)
    out = merge(config, tmp_path / "out")
    (tmp_path / "calibration.jsonl").unlink()
    recipe(config, out)


def test_an_output_folder_means_its_coefficients(finer):
    config = config_of(finer, "low_rank", parameters={"weight": 0.5})
    path = finer / "rpam.yml"
    path.write_text(yaml.safe_dump(config))
    out = finer / "elsewhere" / "recipe.yml"
    command = [str(path), str(finer / "out"), "--out", str(out), "--quiet"]
    result = CliRunner().invoke(main, ["export", *command])
    assert result.output == f"{out}\n"
    assert yaml.safe_load(out.read_text())["merge_method"] == "task_arithmetic"


def test_files_that_are_no_recipes_are_not_overwritten(tmp_path, tokenizer):
    save_pair(tmp_path, qwen2_config(tokenizer), tokenizer)
    config = config_of(tmp_path)
    out = merge(config, tmp_path / "out")
    recipe(config, out)
    recipe(config, out)  # an exported recipe is written again
    path = tmp_path / "rpam.yml"
    path.write_text("mine")
    message = refusal(config, out, "--out", str(path))
    assert f"{path} exists and is no exported recipe" in message
    assert path.read_text() == "mine"


def test_other_methods_are_refused(finer):
    config = {**config_of(finer), "merge_method": "linear"}
    assert "merge_method: found 'linear'" in refusal(config, finer / "out")


def test_the_size_of_coefficients_is_measured_and_computed():
    """The shares that the documentation quotes: under 2 % from some rank down."""
    process = benchmark("performance/coefficient_size", "--quick")
    (measured,), computed = printed(process)
    assert abs(number(measured["computed, % off"])) < 1
    for row in computed:
        shares = [number(row[f"rank {rank}"]) for rank in (0, 4, 8, 16)]
        assert shares == sorted(shares)
        assert shares[2] < 2
        within = int(row["largest rank under 2 %"]) >= 16
        assert within is (shares[3] < 2)
