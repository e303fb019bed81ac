"""Whole merges by the stock `mergekit-yaml`, in real processes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.commands import run, succeeded
from helpers.merged import COEFFICIENTS, assert_merged_by_formula, shard_bytes, tensors
from helpers.models import merge_config, qwen2_config, save_pair, write_calibration
from helpers.prepass import GRANULARITIES, build
from rpam_mergekit.chat.prompts import encode_calibration
from rpam_mergekit.formats.calibration import read_calibration
from rpam_mergekit.formats.coefficients import CoefficientsFile
from rpam_mergekit.settings import RpamSettings


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_model_on_disk_is_the_model_that_was_optimised(
    pair, tmp_path, mergekit_yaml, granularity
):
    """Its hidden states on the calibration set equal the pre-pass's merged stream."""
    parameters = {"granularity": granularity, "epochs": 4}
    succeeded(mergekit_yaml(merge_config(pair, parameters=parameters)))
    out = tmp_path / "out"
    prepass = build(pair, dtype="float32", **parameters)
    prepass.run()
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    last = []
    model.model.layers[-1].register_forward_hook(lambda *call: last.append(call[2]))
    for batch, stream in zip(prepass.batches, prepass.streams, strict=True):
        with torch.no_grad():
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        hidden = last.pop()[batch.attention_mask.bool()]
        difference = (hidden - stream.merged[stream.is_token]).norm() / hidden.norm()
        assert difference < 1e-4
    assert_merged_by_formula(out, pair, out / COEFFICIENTS)


@pytest.fixture(scope="module")
def merged(pair, tmp_path_factory) -> Path:
    """One default merge, and the command's messages in `stderr`."""
    folder = tmp_path_factory.mktemp("merged")
    (folder / "rpam.yml").write_text(json.dumps(merge_config(pair)))
    process = run(["mergekit-yaml", str(folder / "rpam.yml"), str(folder / "out")])
    succeeded(process)
    (folder / "stderr").write_text(process.stderr)
    return folder


def test_a_second_run_gives_the_same_bytes(pair, merged, tmp_path, mergekit_yaml):
    succeeded(mergekit_yaml(merge_config(pair)))
    assert shard_bytes(tmp_path / "out") == shard_bytes(merged / "out")
    first, second = (f / "out" / COEFFICIENTS for f in (tmp_path, merged))
    assert first.read_bytes() == second.read_bytes()


def test_progress_and_a_table_are_shown(merged):
    messages = (merged / "stderr").read_text()
    assert "rpam pre-pass: 100%" in messages
    assert "layer  divergence  gap before  gap after  mean coefficient" in messages


def test_the_output_keeps_the_users_config(merged):
    config = json.loads((merged / "out" / "mergekit_config.yml").read_text())
    assert set(config["parameters"]) == {"calibration", "epochs", "batch_size"}
    card = (merged / "out" / "README.md").read_text()
    assert "[RPAM (Reasoning Pattern Alignment Merging)]" in card


def test_quiet_is_quiet(pair, tmp_path, mergekit_yaml):
    process = mergekit_yaml(merge_config(pair), "--quiet")
    succeeded(process)
    assert "pre-pass" not in process.stderr
    assert "layer" not in process.stderr


@pytest.mark.parametrize(
    "options",
    [
        ["--lazy-unpickle"],
        ["--async-write"],
        ["--low-cpu-memory"],
        ["--read-to-gpu", "--device", "cpu"],
        ["--out-shard-size", "20k"],
        ["--multi-gpu"],
    ],
    ids=lambda options: options[0],
)
def test_mergekits_options_work_as_for_any_method(
    pair, merged, tmp_path, mergekit_yaml, options
):
    if options == ["--multi-gpu"] and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    succeeded(mergekit_yaml(merge_config(pair), *options))
    expected = tensors(merged / "out")
    found = tensors(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    if "--out-shard-size" in options:
        assert len(shard_bytes(tmp_path / "out")) > 1


def test_the_route_without_start_up_file_gives_the_same_bytes(pair, merged, tmp_path):
    out = tmp_path / "out"
    command = ["mergekit-rpam", "merge", str(merged / "rpam.yml"), str(out)]
    succeeded(run(command, RPAM_MERGEKIT_AUTOLOAD="0"))
    assert shard_bytes(out) == shard_bytes(merged / "out")


def test_a_users_weight_filter_fixes_the_tensor_in_both(pair, tmp_path, mergekit_yaml):
    name = "model.layers.1.self_attn.q_proj.weight"
    weight = [{"filter": name, "value": 0.875}, {"filter": "lm_head", "value": 0.25}]
    models = [{"model": str(pair / "short"), "parameters": {"weight": weight}}]
    succeeded(mergekit_yaml(merge_config(pair, models=models)))
    out = tmp_path / "out"
    file = CoefficientsFile(out / COEFFICIENTS)
    assert file.coefficient(name, "cpu") == 0.875
    assert file.coefficient("lm_head.weight", "cpu") == 0.25
    assert_merged_by_formula(out, pair, out / COEFFICIENTS)


def test_a_global_weight_filter_does_the_same(pair, tmp_path, mergekit_yaml):
    weight = [{"filter": "self_attn", "value": 1.0}]
    succeeded(mergekit_yaml(merge_config(pair, parameters={"weight": weight})))
    merged, short = tensors(tmp_path / "out"), tensors(pair / "short")
    for name in merged:
        assert torch.allclose(merged[name], short[name]) is ("self_attn" in name), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_checkpoints_are_merged_in_float32_and_rounded_once(
    tmp_path, tokenizer, mergekit_yaml, dtype
):
    save_pair(tmp_path, qwen2_config(tokenizer), tokenizer, dtype)
    write_calibration(tmp_path / "calibration.jsonl")
    succeeded(mergekit_yaml(merge_config(tmp_path, dtype=None)))
    out = tmp_path / "out"
    assert {value.dtype for value in tensors(out).values()} == {dtype}
    assert_merged_by_formula(out, tmp_path, out / COEFFICIENTS)


def test_out_dtype_is_what_the_pre_pass_rounds_to(pair, tmp_path, mergekit_yaml):
    succeeded(mergekit_yaml(merge_config(pair, out_dtype="bfloat16")))
    out = tmp_path / "out"
    assert {value.dtype for value in tensors(out).values()} == {torch.bfloat16}
    prepass = build(pair, dtype="float32", out_dtype="bfloat16", epochs=3)
    prepass.run()
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    last = []
    model.model.layers[-1].register_forward_hook(lambda *call: last.append(call[2]))
    batch = prepass.batches[0]
    model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    hidden = last.pop()[batch.attention_mask.bool()]
    merged = prepass.streams[0].merged[batch.attention_mask.bool()]
    torch.testing.assert_close(hidden, merged, rtol=1e-4, atol=1e-5)


def test_a_coefficients_file_is_reused_until_an_input_changes(
    pair, tmp_path, mergekit_yaml
):
    calibration = write_calibration(tmp_path / "c.jsonl")
    path = tmp_path / "coefficients.safetensors"
    parameters = {"calibration": str(calibration), "coefficients": str(path)}
    reused = f"coefficients reused from {path}"

    def again(**changes) -> bool:
        config = merge_config(pair, parameters={**parameters, **changes})
        process = mergekit_yaml(config)
        succeeded(process)
        return reused in process.stderr

    assert not again()
    first = shard_bytes(tmp_path / "out")
    assert again()
    assert shard_bytes(tmp_path / "out") == first
    assert not again(epochs=2)
    write_calibration(calibration, count=18)
    assert not again(epochs=2)
    assert again(epochs=2)
    assert not again(epochs=2, compute_dtype="bfloat16")
    assert again(epochs=2)  # by `auto`: made on whatever device
    assert not again(epochs=2, compute_dtype="float32")


def test_long_responses_are_shortened(pair, merged, tmp_path):
    """What is left of them decides; a limit that none reaches changes nothing."""
    out = {}
    for limit in (16, 64):  # the longest response has 50 tokens
        config = merge_config(pair, parameters={"max_response_tokens": limit})
        (tmp_path / f"{limit}.yml").write_text(yaml.safe_dump(config))
        out[limit] = tmp_path / str(limit)
        process = run(["mergekit-yaml", f"{limit}.yml", str(limit)], cwd=tmp_path)
        succeeded(process)
        assert ("than max_response_tokens (16)" in process.stderr) == (limit == 16)
    assert shard_bytes(out[64]) == shard_bytes(merged / "out")
    assert shard_bytes(out[16]) != shard_bytes(merged / "out")
    assert_merged_by_formula(out[16], pair, out[16] / COEFFICIENTS)
    by_limit = {
        limit: CoefficientsFile(folder / COEFFICIENTS).metadata["fingerprint"]
        for limit, folder in {**out, 0: merged / "out"}.items()
    }
    assert by_limit[64]["queries"] == by_limit[0]["queries"] != by_limit[16]["queries"]
    assert by_limit[16]["settings"]["max_response_tokens"] == 16
    # As in files from before there was a limit, which are as good as ever.
    assert "max_response_tokens" not in by_limit[0]["settings"]
    tokenizer = AutoTokenizer.from_pretrained(pair / "long")
    calibration = read_calibration(pair / "calibration.jsonl")
    queries, _ = encode_calibration(
        calibration, tokenizer, len(tokenizer), RpamSettings()
    )
    fields = [(q.ids, q.prompt_tokens, q.pattern) for q in queries]
    marks = [(q.opening, q.closing, q.ended) for q in queries]
    known = [[*a, *b] for a, b in zip(fields, marks, strict=True)]
    digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()
    assert by_limit[0]["queries"] == digest


def test_coefficients_alone_reproduce_the_merge(pair, merged, tmp_path, mergekit_yaml):
    parameters = {
        "calibration": None,
        "coefficients": str(merged / "out" / COEFFICIENTS),
    }
    config = merge_config(pair)
    config["parameters"] = {k: v for k, v in parameters.items() if v}
    process = mergekit_yaml(config)
    succeeded(process)
    assert "pre-pass" not in process.stderr
    assert shard_bytes(tmp_path / "out") == shard_bytes(merged / "out")


def test_a_value_taken_from_the_base_is_reported(tmp_path, tokenizer, mergekit_yaml):
    save_pair(tmp_path, qwen2_config(tokenizer), tokenizer)
    write_calibration(tmp_path / "calibration.jsonl")
    path = tmp_path / "short" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 1e-5}))
    process = mergekit_yaml(merge_config(tmp_path))
    succeeded(process)
    assert "rms_norm_eps differs: 1e-06 in" in process.stderr


def test_two_settings_in_one_mergekit_multi_document(pair, tmp_path):
    documents = [
        {**merge_config(pair, parameters={"granularity": g}), "name": f"by-{g}"}
        for g in ("tensor", "row")
    ]
    path = tmp_path / "multi.yml"
    path.write_text("\n---\n".join(json.dumps(d) for d in documents))
    out = tmp_path / "steps"
    succeeded(run(["mergekit-multi", str(path), "-I", str(out)]))
    for name in ("by-tensor", "by-row"):
        assert_merged_by_formula(out / name, pair, out / name / COEFFICIENTS)


def test_other_methods_are_untouched(pair, tmp_path, mergekit_yaml):
    config = {
        "merge_method": "linear",
        "models": [
            {"model": str(pair / name), "parameters": {"weight": 0.5}}
            for name in ("long", "short")
        ],
        "dtype": "float32",
    }
    succeeded(mergekit_yaml(config))
    with_plugin = shard_bytes(tmp_path / "out")
    path = tmp_path / "rpam.yml"
    command = ["mergekit-yaml", str(path), str(tmp_path / "plain")]
    succeeded(run(command, RPAM_MERGEKIT_AUTOLOAD="0"))
    assert shard_bytes(tmp_path / "plain") == with_plugin
