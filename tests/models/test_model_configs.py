"""What differs in the models' configs: said, and known to the coefficients."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mergekit.common import ModelReference
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig, Qwen2Config

from helpers.checking import edit
from helpers.commands import merge_here
from helpers.exporting import quiet
from helpers.merged import COEFFICIENTS, shard_bytes, tensors
from helpers.models import (
    TINY,
    merge_config,
    qwen2_config,
    save_pair,
    write_calibration,
)
from rpam_mergekit.formats.coefficients import METADATA_KEY, CoefficientsFile
from rpam_mergekit.models.configs import (
    changed_values,
    computed_with,
    generation_notes,
    spelling_notes,
    taken_notes,
)
from rpam_mergekit.models.layout import MergeModels

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}


@pytest.fixture(autouse=True)
def _quiet():
    with quiet():
        yield


@pytest.fixture
def own(tmp_path, tokenizer) -> Path:
    """A pair that may be changed."""
    save_pair(tmp_path, qwen2_config(tokenizer), tokenizer)
    write_calibration(tmp_path / "calibration.jsonl")
    return tmp_path


def llama(**changes) -> LlamaConfig:
    return LlamaConfig(**{**TINY, "vocab_size": 21, **changes})


def merge_quickly(folder: Path, out: str = "out", **changes) -> Path:
    parameters = {"granularity": "layer", "epochs": 1, **changes}
    config = merge_config(folder, parameters=parameters)
    return merge_here(config, folder / out, quiet=False)


def notes_on(first, second) -> list[str]:
    base, other = (ModelReference.parse(name) for name in ("A", "B"))
    return taken_notes(MergeModels(base, (other,)), {base: first, other: second})


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps differs: 1e-06 in A, 1e-05 in B"),
        ({"hidden_act": "gelu"}, "hidden_act differs: silu in A, gelu in B"),
        ({"attention_bias": True}, "attention_bias differs: False in A, True in B"),
        ({"rope_parameters": LLAMA3}, "make B the base_model"),
        (
            {"max_position_embeddings": 131072},
            "max_position_embeddings differs: 256 in A, 131072 in B; the merged model "
            "has the base's: servers end prompt and response at 256 tokens. For "
            "131072, make B the base_model, or set max_position_embeddings",
        ),
        ({"max_position_embeddings": 128}, "256 in A, 128 in B"),
    ],
)
def test_what_is_taken_from_the_base_is_said(changes, note):
    (found,) = notes_on(llama(), llama(**changes))
    assert note in found


def test_sliding_windows_and_layer_types_are_said():
    types = ["full_attention", "sliding_attention", "full_attention"]
    sliding = {"use_sliding_window": True, "sliding_window": 8, "layer_types": types}
    first, second = (Qwen2Config(**TINY, **c) for c in ({}, sliding))
    keys = {note.partition(" ")[0] for note in notes_on(first, second)}
    assert keys == set(sliding)


def test_what_no_forward_pass_uses_is_not_said():
    other = llama(attention_dropout=0.5, use_cache=False, initializer_range=1.0)
    other.architectures = ["Other"]
    assert notes_on(llama(), other) == []


def test_the_context_counts_where_rope_depends_on_it():
    """By yarn it does, by Llama 3's rope it has its own original length."""
    for rope, counts in ((LLAMA3, False), (YARN, True), (None, False)):
        values = computed_with(llama(rope_parameters=rope))
        assert ("max_position_embeddings" in values) is counts


def test_the_two_spellings_of_rope_are_one(tmp_path):
    """Version 4 of transformers wrote other keys."""
    edit_free = llama(rope_parameters={**LLAMA3, "rope_theta": 500000.0})
    edit_free.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    rope = content.pop("rope_parameters")
    content |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    path.write_text(json.dumps(content))
    earlier = AutoConfig.from_pretrained(tmp_path)
    assert changed_values(computed_with(edit_free), computed_with(earlier)) == {}


def test_keys_of_another_version_of_transformers_do_not_count():
    assert changed_values({"a": 1, "b": 2}, {"a": 1, "c": 3}) == {}
    assert changed_values({"a": 1}, {"a": 2}) == {"a": (1, 2)}


def test_other_ways_of_drawing_responses_are_said(own):
    base, other = (ModelReference.parse(str(own / n)) for n in ("long", "short"))
    models = MergeModels(base, (other,))
    assert generation_notes(models) == []
    path = own / "short" / "generation_config.json"
    edit(path, temperature=0.7, do_sample=True)
    (note,) = generation_notes(models)
    assert "do_sample" in note
    assert "temperature" in note
    assert "the merged model has the base's" in note
    path.unlink()
    (note,) = generation_notes(models)
    assert f"only {base} has a generation_config.json; the merged model has it" in note


def test_check_says_what_the_merge_will_say(own, capsys):
    from click.testing import CliRunner

    from rpam_mergekit.cli.main import main

    edit(own / "short" / "config.json", max_position_embeddings=131072)
    config = merge_config(own, parameters={"granularity": "layer", "epochs": 1})
    (own / "rpam.yml").write_text(json.dumps(config))
    result = CliRunner().invoke(main, ["check", str(own / "rpam.yml"), "--no-estimate"])
    expected = "max_position_embeddings differs: 256 in"
    assert expected in result.stdout
    merge_here(config, own / "out", quiet=False)
    assert expected in capsys.readouterr().err


def test_coefficients_are_solved_anew_when_a_config_changed(own, capsys):
    """And reused when what changed has no part in the computation."""
    out = merge_quickly(own)
    before = shard_bytes(out)
    edit(own / "long" / "config.json", rms_norm_eps=1e-3)
    merge_quickly(own)
    said = capsys.readouterr().err
    assert "solved anew; changed since: rms_norm_eps of the base model (1e-06, now" in (
        said
    )
    assert "coefficients reused" not in said
    assert shard_bytes(out) != before
    edit(own / "long" / "config.json", eos_token_id=[3, 0], max_position_embeddings=99)
    merge_quickly(own)
    assert "coefficients reused" in capsys.readouterr().err
    edit(own / "short" / "config.json", hidden_act="gelu")
    merge_quickly(own)
    assert "hidden_act of the other model (silu, now gelu)" in capsys.readouterr().err
    merge_quickly(own, seed=2)
    assert "changed since: seed (0, now 2)" in capsys.readouterr().err


def test_files_of_before_are_reused_though_they_know_no_configs(own, capsys):
    path = merge_quickly(own) / COEFFICIENTS
    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()[METADATA_KEY])
    assert set(content["fingerprint"].pop("configs")) == {"base", "other"}
    save_file(load_file(path), path, metadata={METADATA_KEY: json.dumps(content)})
    before = path.read_bytes()
    capsys.readouterr()
    merge_quickly(own)
    assert "coefficients reused" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert "configs" not in CoefficientsFile(path).metadata["fingerprint"]


def test_a_file_that_is_used_as_it_is_says_by_what_it_was_solved(own, capsys):
    path = merge_quickly(own) / COEFFICIENTS
    edit(own / "long" / "config.json", rms_norm_eps=1e-3)
    config = merge_config(own, parameters={"coefficients": str(path)})
    del config["parameters"]["calibration"]
    parameters = {"coefficients": config["parameters"]["coefficients"]}
    merge_here({**config, "parameters": parameters}, own / "again", quiet=False)
    said = capsys.readouterr().err
    assert (
        "solved with other values: rms_norm_eps of the base model (1e-06, now" in said
    )


def test_mixed_dtypes_are_said(own, tokenizer, capsys):
    import torch

    half = save_pair(own / "half", qwen2_config(tokenizer), tokenizer, torch.bfloat16)
    config = merge_config(own, parameters={"granularity": "layer", "epochs": 1})
    config |= {"models": [{"model": str(half[1])}]}
    del config["dtype"]
    merge_here(config, own / "out", quiet=False)
    said = capsys.readouterr().err
    assert "the merged model is written in float32, which holds both" in said


def test_rope_that_version_4_reads_otherwise_is_said(tmp_path):
    """Where it is not what the class has anyway."""
    path = tmp_path / "config.json"
    model = ModelReference.parse(str(tmp_path))

    def notes() -> list[str]:
        return spelling_notes(model, AutoConfig.from_pretrained(tmp_path))

    llama().save_pretrained(tmp_path)
    assert notes() == []
    llama(rope_parameters=LLAMA3).save_pretrained(tmp_path)
    (note,) = notes()
    assert "has rope_parameters and no rope_theta" in note
    edit(path, rope_theta=10000.0)
    assert notes() == []


def test_rows_that_the_tokenizer_cuts_are_said(tmp_path, tokenizer, capsys):
    config = qwen2_config(tokenizer, vocab_size=len(tokenizer) + 3)
    save_pair(tmp_path, config, tokenizer)
    write_calibration(tmp_path / "calibration.jsonl")
    parameters = {"granularity": "layer", "epochs": 1}
    merge = merge_config(tmp_path, parameters=parameters, tokenizer_source="base")
    out = merge_here(merge, tmp_path / "out", quiet=False)
    rows = len(tensors(out)["model.embed_tokens.weight"])
    assert rows < config.vocab_size
    said = capsys.readouterr().err
    assert f"head get {rows} rows instead of the {config.vocab_size}" in said
    own = json.loads((tmp_path / "long" / "config.json").read_text())
    found = json.loads((out / "config.json").read_text())
    assert found == {**own, "vocab_size": rows}
