"""The merged model's small files are the base's own, and say what was written."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, LlamaConfig

from helpers.commands import merge_here
from helpers.exporting import quiet
from helpers.merged import tensors
from helpers.models import (
    TINY,
    merge_config,
    qwen2_config,
    save_adapter,
    save_pair,
    write_calibration,
)
from rpam_mergekit.folder.json_text import with_value

OTHER = "{{ messages[-1]['content'] }}"
QUICK = {"granularity": "layer", "epochs": 1}
# As transformers 4.57 writes it: the base's rope is in keys that version 5 does not
# write, and the dtype has its earlier name.
EARLIER = """{
    "_name_or_path": "somebody/base",
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "bos_token_id": 1, "eos_token_id": [2, 3], "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 64, "rope_type": "llama3"},
    "rope_theta": 500000.0,
    "tie_word_embeddings": false,
    "torch_dtype": "float32",
    "transformers_version": "4.57.6",
    "vocab_size": 21
}
"""
NAMED = "additional_chat_templates/tools.jinja"
PROCESSOR = '{"image_mean": [0.5]}\n'
GENERATION = {"eos_token_id": [3, 0], "temperature": 0.6, "do_sample": True}


@pytest.fixture(autouse=True)
def _quiet():
    with quiet():
        yield


@pytest.fixture
def earlier(tmp_path, tokenizer) -> Path:
    """A pair whose base has files as another version of transformers writes them."""
    config = LlamaConfig(**TINY, vocab_size=len(tokenizer), tie_word_embeddings=False)
    long, _ = save_pair(tmp_path, config, tokenizer)
    (long / "config.json").write_text(EARLIER)
    (long / "generation_config.json").write_text(json.dumps(GENERATION))
    (long / NAMED).parent.mkdir()
    (long / NAMED).write_text("tools: {{ messages[0].content }}")
    (long / "preprocessor_config.json").write_text(PROCESSOR)
    for path in long.rglob("*.json"):
        path.chmod(0o600)
    write_calibration(tmp_path / "calibration.jsonl")
    return tmp_path


def own_files(folder: Path) -> dict[str, bytes]:
    """Return all that a model's folder has besides its weights."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.suffix in (".json", ".jinja") and not path.name.startswith("rpam")
    }


def merged(folder: Path, out: str = "out", **changes) -> Path:
    parameters = {**QUICK, **changes.pop("parameters", {})}
    options = changes.pop("options", {})
    config = merge_config(folder, parameters=parameters, **changes)
    return merge_here(config, folder / out, **options)


def test_all_files_are_the_base_s_byte_for_byte(earlier):
    out = merged(earlier)
    assert own_files(out) == own_files(earlier / "long")
    assert GenerationConfig.from_pretrained(out).eos_token_id == [3, 0]


@pytest.mark.parametrize("key", ["chat_template", "tokenizer", "tokenizer_source"])
def test_they_are_so_too_where_the_tokenizer_is_written_anew(earlier, key):
    value = {"chat_template": OTHER, "tokenizer": {"source": "base"}}
    out = merged(earlier, **{key: value.get(key, "base")})
    found, expected = own_files(out), own_files(earlier / "long")
    if key == "chat_template":
        assert found.pop("chat_template.jinja").decode() == OTHER
        del expected["chat_template.jinja"]
    assert found == expected


@pytest.mark.parametrize("as_list", [True, False])
def test_a_template_in_the_tokenizer_s_config_is_replaced_there(earlier, as_list):
    """Of several the default one; the others stay."""
    long = earlier / "long"
    own = (long / "chat_template.jinja").read_text()
    (long / "chat_template.jinja").unlink()
    named = [{"name": "rag", "template": "r"}, {"name": "default", "template": own}]
    path = long / "tokenizer_config.json"
    before = path.read_text()
    path.write_text(with_value(before, ("chat_template",), named if as_list else own))
    out = merged(earlier, chat_template=OTHER)
    after = json.loads((out / "tokenizer_config.json").read_text())
    shutil.rmtree(out / "additional_chat_templates")
    found = AutoTokenizer.from_pretrained(out).chat_template
    named[1]["template"] = OTHER
    assert after.pop("chat_template") == (named if as_list else OTHER)
    assert after == json.loads(before)
    assert found == ({"rag": "r", "default": OTHER} if as_list else OTHER)
    assert not (out / "chat_template.jinja").exists()


def test_of_a_base_with_an_adapter_they_are_the_model_s(earlier):
    adapter = save_adapter(earlier / "long", earlier / "lora")
    out = merged(
        earlier,
        base_model=f"{earlier / 'long'}+{adapter}",
        options={"lora_merge_cache": str(earlier / "cache")},
    )
    assert own_files(out) == own_files(earlier / "long")


def test_without_the_tokenizer_the_generation_config_is_there(earlier):
    out = merged(earlier, options={"copy_tokenizer": False})
    expected = own_files(earlier / "long")
    kept = {"config.json", "generation_config.json", "preprocessor_config.json"}
    assert own_files(out) == {name: expected[name] for name in kept}


def test_slices_change_the_number_of_layers_alone(earlier):
    """Three layers are what the class has by default in no version."""
    sources = [
        {"model": str(earlier / name), "layer_range": [0, 2]}
        for name in ("long", "short")
    ]
    out = merged(earlier, models=None, slices=[{"sources": sources}])
    expected = EARLIER.replace('"num_hidden_layers": 3', '"num_hidden_layers": 2')
    assert (out / "config.json").read_text() == expected


def test_cut_layer_types_stand_where_they_stood(tmp_path, tokenizer):
    types = ["full_attention", "sliding_attention", "full_attention"]
    sliding = {"sliding_window": 4, "use_sliding_window": True}
    config = qwen2_config(tokenizer, layer_types=types, **sliding)
    long, _ = save_pair(tmp_path, config, tokenizer)
    write_calibration(tmp_path / "calibration.jsonl")
    sources = [
        {"model": str(tmp_path / name), "layer_range": [1, 3]}
        for name in ("long", "short")
    ]
    out = merged(tmp_path, models=None, slices=[{"sources": sources}])
    before = json.loads((long / "config.json").read_text())
    after = (out / "config.json").read_text()
    expected = {**before, "num_hidden_layers": 2, "layer_types": types[1:]}
    assert after == json.dumps(expected, indent=2) + "\n"


@pytest.mark.parametrize(
    ("dtypes", "config", "written"),
    [
        (("bfloat16", "float16"), {"dtype": None}, "float32"),
        (("bfloat16", "bfloat16"), {"dtype": None}, "bfloat16"),
        (("bfloat16", "float16"), {"dtype": "float16"}, "float16"),
        (("float16",) * 2, {"dtype": None, "out_dtype": "bfloat16"}, "bfloat16"),
        (("float32",) * 2, {"dtype": "float32", "out_dtype": "float16"}, "float16"),
    ],
)
def test_the_dtype_that_is_said_is_the_one_that_is_written(
    tmp_path, tokenizer, dtypes, config, written
):
    for name, dtype in zip(("long", "short"), dtypes, strict=True):
        folder = tmp_path / dtype / name
        save_pair(
            tmp_path / dtype, qwen2_config(tokenizer), tokenizer, getattr(torch, dtype)
        )
        if not (tmp_path / name).exists():
            shutil.copytree(folder, tmp_path / name)
    write_calibration(tmp_path / "calibration.jsonl")
    out = merged(tmp_path, **config)
    assert {str(t.dtype) for t in tensors(out).values()} == {f"torch.{written}"}
    assert json.loads((out / "config.json").read_text())["dtype"] == written


@pytest.mark.parametrize("weight", [None, 0.5])
def test_a_head_of_its_own_is_said_to_be_untied(tmp_path, tokenizer, weight):
    """The base's is tied; the other's is merged into it, or not."""
    tied = qwen2_config(tokenizer, tie_word_embeddings=True)
    save_pair(tmp_path / "tied", tied, tokenizer)
    save_pair(tmp_path, qwen2_config(tokenizer), tokenizer)
    shutil.rmtree(tmp_path / "long")
    shutil.copytree(tmp_path / "tied" / "long", tmp_path / "long")
    write_calibration(tmp_path / "calibration.jsonl")
    parameters = {} if weight is None else {"outside_weight": weight}
    out = merged(tmp_path, parameters=parameters)
    own = json.loads((tmp_path / "long" / "config.json").read_text())
    found = json.loads((out / "config.json").read_text())
    assert own.pop("tie_word_embeddings") is True
    assert found.pop("tie_word_embeddings") is (weight is None)
    assert found == own


def test_every_file_has_the_mode_of_an_ordinary_one(earlier):
    before = os.umask(0o027)
    try:
        out = merged(earlier)
    finally:
        os.umask(before)
    modes = {
        path.relative_to(out).as_posix(): stat.S_IMODE(path.stat().st_mode)
        for path in out.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }
    assert set(modes.values()) == {0o640}, modes


def test_a_value_is_replaced_and_every_other_byte_stays():
    text = '{"a" :1e-06,\n   "b": {"c": [1,\t2], "d": "\\u00e4"},\n   "e": null }\n'
    changed = with_value(text, ("b", "c", 1), 3)
    assert changed == text.replace("2]", "3]")
    added = with_value(text, ("b", "x"), True)
    assert added == text.replace('"\\u00e4"', '"\\u00e4","x": true')
    assert json.loads(with_value(text, ("f",), [1, 2])) == {
        **json.loads(text),
        "f": [1, 2],
    }
    assert with_value("{}", ("a",), "ä") == '{"a": "\\u00e4"}'
    with pytest.raises(KeyError):
        with_value(text, ("z", "c"), 1)


def test_version_5_reads_the_same_of_it_as_of_the_base(earlier):
    out = merged(earlier)
    found, own = (
        {**AutoConfig.from_pretrained(folder).to_dict(), "_name_or_path": None}
        for folder in (out, earlier / "long")
    )
    assert found == own
