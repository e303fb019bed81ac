"""`mergekit-rpam check` finds planted faults, all at once; no false alarms."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM
from transformers.utils import logging

from helpers.architectures import MERGED, REFUSED
from helpers.checking import edit, found, noted, sound
from helpers.commands import run
from helpers.hub_server import Hub, add_repository, serving
from helpers.models import (
    merge_config,
    qwen2_config,
    save_experts,
    save_pair,
    tiny_config,
    write_calibration,
)
from helpers.paths import QUICKSTART, ROOT
from rpam_mergekit.cli.main import main
from rpam_mergekit.formats.coefficients import write_coefficients


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


@pytest.fixture
def own(pair, tmp_path) -> Path:
    """A copy of the pair that a test may spoil."""
    return shutil.copytree(pair, tmp_path / "own")


def test_a_sound_config_gets_a_summary(check, pair):
    result = check(merge_config(pair))
    sound(result)
    for part in ("base, long", "other, short", "float32", "8 long", "epochs 3"):
        assert part in result.stdout


# The text


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "there is no config in it"),
        ("- 1\n- 2\n", "the config is a list of 2, expected a mapping"),
        ("models: [1,\nb: 2\n", "rpam.yml:3:1: not YAML: "),
        ("models:\n\t- x\n", "rpam.yml:2:1: not YAML: "),
        ("dtype: float32\ndtype: float16\n", "dtype: given twice, in lines 1 and 2."),
    ],
    ids=["empty", "a list", "broken", "tab", "repeated key"],
)
def test_text_that_is_no_config(check, text, problem):
    found(check(text), problem)


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "rpam.yml"
    path.write_bytes(b"merge_method: \xff\n")
    found(CliRunner().invoke(main, ["check", str(path)]), "not UTF-8 text")


# Keys and values

Z = {"kind": "zero", "x": 1}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"paramters": {}}, "paramters: unknown key. Did you mean 'parameters'?"),
        (
            {"models": [{"modl": "x"}]},
            "models[0].modl: unknown key. Did you mean 'model'?",
        ),
        ({"models": [{"modl": "x"}]}, "models[0].model: missing."),
        ({"models": "x"}, "models: found 'x'. Expected a list."),
        ({"models": [{"model": 5}]}, "models[0].model: found 5. Expected the name of"),
        ({"models": [{"model": "a@b@c"}]}, "models[0].model: found 'a@b@c'. Invalid"),
        ({"models": None}, "found none of them, expected exactly one."),
        ({"slices": [{"sources": []}]}, "found models and slices, expected exactly"),
        (
            {
                "models": None,
                "slices": [{"sources": [{"model": "x", "layer_rang": 1}]}],
            },
            "slices[0].sources[0].layer_rang: unknown key. Did you mean 'layer_range'?",
        ),
        (
            {"models": None, "slices": [{"source": []}]},
            "slices[0].source: unknown key. Did you mean 'sources'?",
        ),
        (
            {"models": None, "modules": {"text": {"model": []}}},
            "modules.text.model: unknown key. Did you mean 'models'?",
        ),
        ({"tokenizer": {"sourc": "base"}}, "tokenizer.sourc: unknown key. Did you"),
        (
            {"tokenizer": {"tokens": {"a": {"source": Z}}}},
            "tokenizer.tokens.a.source.x: unknown key.",
        ),
        ({"tokenizer": "union"}, "tokenizer: found 'union'. Expected a mapping."),
        ({"merge_method": None}, "merge_method: missing. Write merge_method: rpam."),
        ({"merge_method": "rpm"}, "found 'rpm'. Did you mean 'rpam'?"),
        ({"merge_method": "RPAM"}, "found 'RPAM'. Did you mean 'rpam'?"),
        ({"merge_method": "ties"}, "found 'ties'. 'mergekit-rpam check' knows 'rpam'"),
        ({"dtype": 3}, "dtype: found 3. Expected text."),
        ({"dtype": "float31"}, "dtype: Unimplemented dtype"),
        ({"parameters": {"rank": None}}, "parameters.rank: found nothing. Expected"),
        ({"parameters": {"epochs": 0}}, "parameters.epochs: found 0."),
        ({"parameters": {"granularty": 1}}, "Did you mean 'granularity'?"),
        ({"parameters": {"rank": [1, 2]}}, "rank: found a list or filter"),
        ({"parameters": {"solver": "lbfgs"}}, "parameters.solver: 'lbfgs' needs few"),
        ({"parameters": {"calibration": "no.jsonl"}}, "calibration: no file no.jsonl"),
        ({"parameters": {"max_tokens": 1}}, "parameters.max_tokens: every '"),
        ({"parameters": {"weight": "much"}}, "weight: "),
        ({"base_model": None}, "base_model: missing."),
        (
            {"chat_template": "nonsense"},
            "chat_template: found 'nonsense', which is neither",
        ),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:40],
)
def test_a_wrong_key_or_value(check, pair, changes, problem):
    found(check(merge_config(pair, **copy.deepcopy(changes))), problem)


def test_a_config_that_mergekit_cannot_read_is_looked_at_further(check, pair):
    parameters = {"epochs": 0, "calibration": "no.jsonl"}
    config = merge_config(pair, dtype=3, parameters=parameters, modls=[])
    found(
        check(config),
        "4 problems:",
        "modls: unknown key.",
        "dtype: found 3.",
        "parameters.epochs: found 0.",
        "no file no.jsonl",
    )


@pytest.mark.parametrize(
    ("options", "problem"),
    [(["--device", "cudax"], "--device: found 'cudax', which cannot be used: ")],
)
def test_a_wrong_option(check, pair, options, problem):
    found(check(merge_config(pair), *options), problem)


# Calibration


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "the calibration file is empty"),
        ("{\n", ":1: not JSON"),
        ('{"prompt": "1+1=", "pattern": "long"}\n', "no query has the pattern 'short'"),
    ],
)
def test_a_bad_calibration_file(check, own, content, problem):
    (own / "calibration.jsonl").write_text(content)
    found(check(merge_config(own)), problem)


def test_queries_that_the_chat_template_refuses(check, own):
    template = "{{ raise_exception('no system role') }}"
    (own / "long" / "chat_template.jinja").write_text(template)
    found(check(merge_config(own)), ":1: the chat template refuses this query: no sys")


# Models


def edit_weights(folder: Path, change: Callable[[dict], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_model_that_is_not_there(check, pair):
    models = [{"model": "/nowhere/at/all"}]
    found(check(merge_config(pair, models=models)), "its config cannot be loaded")


def test_configs_that_differ(check, own):
    edit(own / "short" / "config.json", num_attention_heads=2, vocab_size=40)
    found(check(merge_config(own)), "num_attention_heads differs", "vocab_size differs")


def test_shapes_that_differ(check, own):
    def widen(weights):
        weights["model.norm.weight"] = torch.zeros(64)

    edit_weights(own / "short", widen)
    found(check(merge_config(own)), "model.norm.weight: shape (32,) in")


def test_a_tensor_that_one_model_lacks(check, own):
    edit_weights(own / "short", lambda weights: weights.pop("model.norm.weight"))
    found(check(merge_config(own)), "short: tensor model.norm.weight is missing")


def test_weights_that_cannot_be_read(check, own):
    (own / "short" / "model.safetensors").write_bytes(b"nothing")
    found(check(merge_config(own)), "short: its weights cannot be read")


def test_an_adapter_without_the_option(check, pair, tmp_path):
    models = [{"model": f"{pair / 'short'}+{tmp_path}"}]
    found(check(merge_config(pair, models=models)), "needs mergekit's option --lora-me")


def test_layers_that_the_models_do_not_have(check, pair):
    sources = [
        {"model": str(pair / name), "layer_range": [0, 9]} for name in ("long", "short")
    ]
    config = merge_config(pair, models=None, slices=[{"sources": sources}])
    found(check(config), "layer_range: found [0, 9], but the models have 3 layers")


def test_a_filter_that_matches_nothing_is_noted(check, pair):
    weight = [{"filter": "lm_haed", "value": 0.5}]
    models = [{"model": str(pair / "short"), "parameters": {"weight": weight}}]
    config = merge_config(pair, models=models)
    noted(check(config), "no tensor has 'lm_haed' in its name", "mean 'lm_head'?")


def test_a_head_that_servers_would_ignore_is_noted(check, tmp_path, tokenizer):
    config = qwen2_config(tokenizer, tie_word_embeddings=True)
    save_experts(tmp_path, config, tokenizer, ["long"])
    save_experts(tmp_path, qwen2_config(tokenizer), tokenizer, ["short"])
    write_calibration(tmp_path / "calibration.jsonl")
    result = check(merge_config(tmp_path, parameters={"outside_weight": 0.5}))
    noted(result, "says that it is not tied (tie_word_embeddings: false)")
    assert "vLLM" not in check(merge_config(tmp_path)).stdout


def test_several_faults_are_said_at_once_with_the_notes(check, own):
    edit(own / "short" / "config.json", intermediate_size=40)
    parameters = {"calibration": "no.jsonl", "epochs": -1, "rnak": 3}
    config = merge_config(own, dtype="x", parameters=parameters, modelss=[])
    result = check(config)
    found(
        result,
        "6 problems:",
        "rpam.yml:6: modelss: unknown key. Did you mean 'models'?",
        "rnak",
        "epochs",
        "no.jsonl",
        "dtype",
        "intermediate_size differs",
    )


def test_models_with_code_of_their_own(check, own_pair):
    found(check(merge_config(own_pair)), "allow it with --trust-remote-code")
    noted(check(merge_config(own_pair), "--trust-remote-code"), "OwnForCausalLM")


# Coefficients


@pytest.fixture
def coefficients(tmp_path) -> Callable[..., dict]:
    """Write a coefficients file; return the parameters that name it."""

    def call(patterns=("long", "short"), models=None, **settings) -> dict:
        path = tmp_path / "coefficients.safetensors"
        roles = ("base", "other") if len(patterns) == 2 else ("base", *patterns[1:])
        fingerprint = {**dict.fromkeys(roles, "0"), "patterns": list(patterns)}
        fingerprint |= {"settings": settings, "calibration": "0"}
        entries = {"model.norm.weight": {"scalar": torch.zeros(())}}
        metadata = {"fingerprint": fingerprint, "models": models or {}}
        write_coefficients(path, entries, metadata)
        return {"coefficients": str(path)}

    return call


def without_calibration(folder: Path, parameters: dict) -> dict:
    return {**merge_config(folder), "parameters": parameters}


def test_coefficients_that_are_not_there(check, pair):
    config = without_calibration(pair, {"coefficients": "nowhere.safetensors"})
    found(check(config), "nowhere.safetensors, and no parameters.calibration")


def test_a_file_that_has_no_coefficients(check, pair):
    path = str(pair / "long" / "model.safetensors")
    config = merge_config(pair, parameters={"coefficients": path})
    found(check(config), "coefficients: ", "not a coefficients file of rpam-mergekit")


def test_coefficients_of_other_patterns(check, pair, coefficients):
    config = merge_config(pair, parameters=coefficients(("long", "short", "code")))
    found(check(config), "made for the patterns long, short, code, the config has long")


def test_coefficients_of_models_with_other_tensors(check, pair, coefficients):
    config = without_calibration(pair, coefficients())
    found(check(config), "has no coefficients for lm_head.weight and 37 more")


def test_coefficients_that_will_be_made_anew_are_noted(check, pair, coefficients):
    parameters = coefficients(granularity="row", models={"base": "someone"})
    noted(
        check(merge_config(pair, parameters=parameters)),
        "will be made anew: it has granularity row (the config: low_rank)",
        "another calibration file",
        "its base model was someone, the config has long",
    )


# mergekit-multi


def several(*documents: dict) -> str:
    return "---\n".join(yaml.safe_dump(document) for document in documents)


def test_every_config_of_a_file_is_checked_by_its_name(check, pair):
    one = {**merge_config(pair, epohcs=1), "name": "one"}
    two = {**merge_config(pair, base_model="one", dtype="x"), "name": "two"}
    other = {"merge_method": "linear", "models": [{"model": "two"}]}
    result = check(several(one, two, other))
    found(
        result, "1. one: ", "rpam.yml:3: epohcs: unknown key.", "2. two: ", ": dtype: "
    )
    assert "two: one is the output of another merge of this file" in result.stdout
    assert "the config without a name: not of rpam, not checked" in result.stdout


def test_names_that_two_configs_have(check, pair):
    one = {**merge_config(pair), "name": "one"}
    found(check(several(one, one)), "name: 'one' is had by 2 configs")


def test_names_of_models_that_mergekit_multi_cannot_pass_on(check, own):
    (own / "short").rename(own / "sh ort")
    models = [{"model": str(own / "sh ort")}]
    config = {**merge_config(own, models=models), "name": "one"}
    found(check(several(config)), "sh ort: mergekit-multi cannot pass on this name")


def test_texts_that_are_no_models_may_hold_anything(check, own):
    """mergekit-multi exclusive would take them for models, and end."""
    path = own / "a+b+c@d@e.jsonl"
    (own / "calibration.jsonl").rename(path)
    config = {**merge_config(own, parameters={"calibration": str(path)}), "name": "one"}
    assert "no problems found" in check(several(config)).stdout


def test_no_config_of_rpam(check):
    found(check("merge_method: a\n---\nmerge_method: b\n"), "none of its configs is of")


# The Hub


@pytest.fixture
def hub(pair, tmp_path) -> Hub:
    add_repository(tmp_path / "hub", "models", "org/long", pair / "long")
    add_repository(tmp_path / "hub", "models", "org/short", pair / "short")
    return Hub(tmp_path / "hub")


def on_hub(pair: Path, hub: Hub, home: Path, *command: str):
    """Run a command on a config of the hub's models, nothing being cached."""
    models = [{"model": "org/short"}]
    path = home / "hub.yml"
    path.write_text(
        yaml.safe_dump(merge_config(pair, base_model="org/long", models=models))
    )
    with serving(hub) as address:
        return run(
            [*command[:2], str(path), *command[2:]]
            if command[0] == "mergekit-rpam"
            else [command[0], str(path), *command[1:]],
            HF_ENDPOINT=address,
            HF_HUB_OFFLINE="0",
            HF_HOME=str(home / "home"),
        )


def downloaded(home: Path) -> list[str]:
    return [path.name for path in (home / "home").rglob("*.safetensors")]


def test_models_on_the_hub_are_compared_without_their_weights(pair, hub, tmp_path):
    process = on_hub(pair, hub, tmp_path, "mergekit-rpam", "check")
    assert process.returncode == 0, process.stderr
    assert "to download" in process.stdout
    assert "were not compared" not in process.stdout
    assert "estimate:\n  download" in process.stdout
    assert downloaded(tmp_path) == []


def test_shapes_on_the_hub_are_refused_before_a_merge_downloads(pair, hub, tmp_path):
    snapshot = next(hub.folder("models", "org/short").glob("snapshots/*"))

    def widen(weights):
        weights["model.norm.weight"] = torch.zeros(64)

    edit_weights(snapshot, widen)
    process = on_hub(pair, hub, tmp_path, "mergekit-yaml", str(tmp_path / "out"))
    assert process.returncode == 1
    assert "model.norm.weight: shape (32,) in org/long" in process.stderr
    assert downloaded(tmp_path) == []


def test_an_architecture_is_refused_before_a_merge_downloads(
    hub, pair, tmp_path, tokenizer
):
    changes = {"attention_bias": True, "model_type": "llama"}
    changes["architectures"] = ["LlamaForCausalLM"]
    for name in ("long", "short"):
        folder = next(hub.folder("models", f"org/{name}").glob("snapshots/*"))
        edit(folder / "config.json", **changes)
    process = on_hub(pair, hub, tmp_path, "mergekit-yaml", str(tmp_path / "out"))
    assert process.returncode == 1
    assert "does not fit transformers'" in process.stderr
    assert downloaded(tmp_path) == []


def test_weights_that_are_no_safetensors_are_not_compared(pair, hub, tmp_path):
    for name in ("long", "short"):
        folder = next(hub.folder("models", f"org/{name}").glob("snapshots/*"))
        torch.save(
            load_file(folder / "model.safetensors"), folder / "pytorch_model.bin"
        )
        (folder / "model.safetensors").unlink()
    process = on_hub(pair, hub, tmp_path, "mergekit-rpam", "check")
    assert process.returncode == 0, process.stderr
    assert "org/long: the shapes of its tensors were not compared: it has no safe" in (
        process.stdout
    )


# No false alarms


def test_the_quickstart_passes():
    process = run(["mergekit-rpam", "check", str(QUICKSTART / "rpam.yml")], cwd=ROOT)
    assert process.returncode == 0, process.stderr
    assert "pre-pass" in process.stdout
    assert process.stdout.endswith("no problems found\n")


def checked(check, architecture, folder, tokenizer, monkeypatch) -> Result:
    config = tiny_config(architecture, tokenizer)
    if config.is_encoder_decoder:
        monkeypatch.setattr(
            "helpers.models.AutoModelForCausalLM", AutoModelForSeq2SeqLM
        )
    save_pair(folder, config, tokenizer)
    write_calibration(folder / "calibration.jsonl", 6)
    return check(merge_config(folder))


@pytest.mark.parametrize("architecture", MERGED, ids=lambda entry: entry.name)
def test_an_architecture_that_is_merged_passes(
    architecture, check, tmp_path, tokenizer, monkeypatch
):
    result = checked(check, architecture, tmp_path, tokenizer, monkeypatch)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("refusal", "architecture"),
    [(refusal, entry) for refusal in REFUSED for entry in refusal.architectures],
    ids=lambda value: getattr(value, "name", ""),
)
def test_an_architecture_that_is_refused_is_refused_here(
    refusal, architecture, check, tmp_path, tokenizer, monkeypatch
):
    result = checked(check, architecture, tmp_path, tokenizer, monkeypatch)
    found(result, refusal.message)
