"""Quantised models are refused in one message, before anything is merged."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from mergekit.common import ModelReference
from safetensors.torch import load_file, save_file

from helpers.checking import found, noted
from helpers.commands import run
from helpers.hub_server import Hub, add_repository, serving
from helpers.merged import COEFFICIENTS, assert_merged_by_formula
from helpers.models import merge_config, save_adapter
from helpers.paths import ROOT
from helpers.quantised import KINDS, quantise, say_quantised
from rpam_mergekit.cli.main import main
from rpam_mergekit.models.headers import read_header
from rpam_mergekit.models.quantised import FORMATS, advice, quantised_finding


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


def test_it_is_refused_beside_weights_of_any_dtype(own):
    """torch has no dtype that holds both FP8 and bfloat16."""
    for name, dtype in (("long", torch.bfloat16), ("short", torch.float8_e4m3fn)):
        path = own / name / "model.safetensors"
        weights = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
        save_file(weights, path, metadata={"format": "pt"})
    found(check(own, dtype=None), f"{own / 'short'}: its weights are quantised: FP8")


def test_both_models_are_named(own):
    for name in ("long", "short"):
        quantise(own / name, "fp8 by block")
    found(check(own), "2 problems:", f"{own / 'long'}: its", f"{own / 'short'}: its")


def test_a_config_inside_the_config_says_it_too(own):
    """As of models whose text model is one of several parts."""
    claim = KINDS["gptq"][1]
    quantise(own / "short", "gptq", claims=False)
    say_quantised(own / "short", {"text_config": claim})
    found(check(own), "GPTQ (config.json: text_config.quantization_config.quant_method")


def test_scales_beside_plain_weights(own):
    """What dtypes do not tell: weights that were converted without their scales."""
    path = own / "short" / "model.safetensors"
    weights = load_file(path)
    scale = {"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1, 1)}
    save_file(weights | scale, path, metadata={"format": "pt"})
    found(check(own), "are quantised:", "up_proj.weight_scale_inv is F32")


def test_masks_of_whole_numbers_are_no_quantised_weights(own):
    """As GPT-2's checkpoints have them."""
    path = own / "short" / "model.safetensors"
    mask = {"model.layers.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8)}
    save_file(load_file(path) | mask, path, metadata={"format": "pt"})
    assert check(own).exit_code == 0


def test_pickled_weights_are_looked_at_too(own):
    quantise(own / "short", "bitsandbytes 8", claims=False)
    path = own / "short" / "model.safetensors"
    torch.save(load_file(path), own / "short" / "pytorch_model.bin")
    path.unlink()
    found(check(own), "bitsandbytes (pytorch_model.bin: model.layers.0.mlp.down_proj.w")


def test_weights_that_cannot_be_read_are_known_by_the_config(own):
    """Such as pickles of a library's own classes."""
    (own / "short" / "model.safetensors").unlink()
    torch.save({"x": object()}, own / "short" / "pytorch_model.bin")
    found(check(own), "its weights cannot be read")
    say_quantised(own / "short", KINDS["torchao"][1])
    found(check(own), "torchao (config.json: quantization_config.quant_method is")


def test_a_merge_is_refused_before_anything_is_written(own, mergekit_yaml, tmp_path):
    quantise(own / "long", "fp8 by block")
    process = mergekit_yaml(merge_config(own))
    assert process.returncode == 1
    assert f"rpam: {own / 'long'}: its weights are quantised: FP8" in process.stderr
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "out").exists()


def test_pickles_of_the_hub_are_looked_at_once_they_are_there(own, tmp_path):
    """Their headers cannot be read from afar; the pre-pass must not begin."""
    quantise(own / "short", "bitsandbytes 8", claims=False)
    path = own / "short" / "model.safetensors"
    torch.save(load_file(path), own / "short" / "pytorch_model.bin")
    path.unlink()
    add_repository(tmp_path / "hub", "models", "org/short", own / "short")
    path = tmp_path / "rpam.yml"
    models = [{"model": "org/short"}]
    path.write_text(yaml.safe_dump(merge_config(own, models=models)))
    with serving(Hub(tmp_path / "hub")) as address:
        process = run(
            ["mergekit-yaml", str(path), str(tmp_path / "out")],
            HF_ENDPOINT=address,
            HF_HUB_OFFLINE="0",
            HF_HOME=str(tmp_path / "home"),
        )
    assert process.returncode == 1
    assert "org/short: its weights are quantised: bitsandbytes (pyt" in process.stderr
    assert "activations of" not in process.stderr


def test_a_sweep_is_refused_too(own, tmp_path):
    quantise(own / "short", "gptq")
    check(own)  # writes the config
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "1+1=", "answer": "2"}\n')
    out = str(tmp_path / "sweep")
    arguments = [str(own / "rpam.yml"), "--dataset", str(data), "--out", out]
    result = CliRunner().invoke(main, ["sweep", *arguments])
    assert result.exit_code == 1
    assert "short: its weights are quantised: GPTQ" in result.output
    assert not Path(out).exists()


# GGUF


def test_a_folder_of_gguf_alone(own):
    """llama.cpp's converter writes one file and no config.json."""
    shutil.rmtree(own / "short")
    (own / "short").mkdir()
    (own / "short" / "Short-Q4_K_M.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    found(
        check(own), f"{own / 'short'}: its weights are in GGUF", "GgufConfig(dequanti"
    )
    models = [{"model": str(own / "short" / "Short-Q4_K_M.gguf")}]
    found(check(own, models=models), "its weights are in GGUF")


def test_gguf_beside_safetensors_does_no_harm(own):
    (own / "short" / "Short-Q4_K_M.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    assert check(own).exit_code == 0


# A config that says quantised, beside plain weights


def test_a_plain_model_whose_config_says_quantised_is_merged_as_plain(
    own, mergekit_yaml, tmp_path
):
    for name in ("long", "short"):
        say_quantised(own / name, KINDS["bitsandbytes 4"][1])
    noted(check(own), "but its tensors are plain, as of a model that was dequantised")
    process = mergekit_yaml(merge_config(own))
    assert process.returncode == 0, process.stderr
    assert "but its tensors are plain" in process.stderr
    out = tmp_path / "out"
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert_merged_by_formula(out, own, out / COEFFICIENTS)


def test_a_plain_model_that_quantises_itself_in_every_call(own):
    claim = {"quant_method": "bitnet", "quantization_mode": "online"}
    say_quantised(own / "long", {"quantization_config": claim})
    found(check(own), "its code quantises the weights in every call")


# Adapters


@pytest.fixture
def adapted(own, tmp_path) -> tuple[Path, dict]:
    """An adapter that was trained on a quantised model, and where it is named."""
    folder = save_adapter(own / "short", tmp_path / "lora")
    path = folder / "adapter_config.json"
    name = {"base_model_name_or_path": "unsloth/Short-unsloth-bnb-4bit"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **name}))
    models = [{"model": f"{own / 'short'}+{folder}"}]
    return own, {"models": models}


def test_an_adapter_that_was_trained_on_a_quantised_model(adapted, tmp_path):
    own, changes = adapted
    cache = ["--lora-merge-cache", str(tmp_path / "cache")]
    result = check(own, *cache, **changes)
    noted(result, "trained on unsloth/Short-unsloth-bnb-4bit, that is on this model, q")
    quantise(own / "short", "bitsandbytes 4")
    found(check(own, *cache, **changes), "its weights are quantised: bitsandbytes")


def test_an_adapter_of_a_plain_model_that_transformers_would_quantise(
    adapted, tmp_path
):
    own, changes = adapted
    say_quantised(own / "short", KINDS["bitsandbytes 4"][1])
    cache = ["--lora-merge-cache", str(tmp_path / "cache")]
    found(check(own, *cache, **changes), "would quantise them before the adapter is")


# What to do


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("Qwen/Qwen3-8B-FP8", "Qwen/Qwen3-8B"),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "Qwen/Qwen2.5-7B-Instruct"),
        ("Qwen/Qwen2.5-7B-Instruct-AWQ/", "Qwen/Qwen2.5-7B-Instruct"),
        ("unsloth/Qwen3-4B-unsloth-bnb-4bit", "unsloth/Qwen3-4B"),
        ("RedHatAI/Qwen3-8B-FP8-dynamic", "RedHatAI/Qwen3-8B"),
        ("RedHatAI/Qwen3-8B-quantized.w4a16", "RedHatAI/Qwen3-8B"),
        ("nvidia/Qwen3-8B-NVFP4", "nvidia/Qwen3-8B"),
        ("mlx-community/Qwen3-8B-4bit", "mlx-community/Qwen3-8B"),
        ("bartowski/Qwen_Qwen3-8B-GGUF", "bartowski/Qwen_Qwen3-8B"),
        ("deepseek-ai/DeepSeek-R1", None),
        ("openai/gpt-oss-20b", None),
        ("FP8", None),
    ],
)
def test_the_plain_model_is_named_where_the_name_tells_it(name, plain):
    text = advice(ModelReference.parse(name), "")
    assert ("by its name, " in text) == (plain is not None)
    if plain:
        assert f"(by its name, {plain})" in text


def test_the_page_has_every_format():
    rows = (ROOT / "docs" / "quantised.md").read_text("utf-8")
    for method, (name, way) in FORMATS.items():
        row = next(r for r in rows.splitlines() if r.startswith(f"| {name} |"))
        assert f"`{method}`" in row.replace("_", "-"), row
        if way:
            config = re.search(r"(\w+Config|dequantize\(\)|gptqmodel|mlx_lm)", way)
            assert config is not None
            assert config[1] in row
