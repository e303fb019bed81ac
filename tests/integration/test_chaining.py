"""Merges of merges: mergekit-multi, other methods, adapters, mixtures, one process.

The configs are those of docs/chaining.md, with tiny models in place of its names.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.commands import merge_here, run, succeeded
from helpers.merged import COEFFICIENTS, shard_bytes, tensors
from helpers.models import (
    merge_config,
    qwen2_config,
    save_adapter,
    save_experts,
    write_calibration,
)
from helpers.paths import ROOT
from rpam_mergekit.chat.prompts import encode_calibration
from rpam_mergekit.errors import RpamError
from rpam_mergekit.formats.calibration import read_calibration
from rpam_mergekit.formats.coefficients import CoefficientsFile
from rpam_mergekit.merging.multimerge import patched_config
from rpam_mergekit.settings import RpamSettings

PAGE = ROOT / "docs" / "chaining.md"
# The names of models on the page, and the tiny ones that stand for them.
NAMES = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": "long",
    "Qwen/Qwen2.5-Math-1.5B": "short",
    "you/other-short": "third",
    "you/long-lora": "long-lora",
    "you/short-lora": "short-lora",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer) -> Path:
    """Three tiny fine-tunings, adapters of two, and `calibration.jsonl`."""
    folder = tmp_path_factory.mktemp("models")
    save_experts(folder, qwen2_config(tokenizer), tokenizer, ("long", "short", "third"))
    for seed, name in enumerate(("long", "short")):
        save_adapter(folder / name, folder / f"{name}-lora", seed)
    write_calibration(folder / "calibration.jsonl")
    return folder


@pytest.fixture
def here(models, tmp_path, monkeypatch) -> Path:
    """An empty working folder with a copy of the calibration file."""
    shutil.copy(models / "calibration.jsonl", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def example(name: str, models: Path) -> str:
    """Return a config of the page by its name there, with few steps."""
    page = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```yaml\n# (\S+)\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    text = dict(blocks)[name]
    for public, local in NAMES.items():
        text = text.replace(public, str(models / local))
    return text.replace("{calibration: ", "{steps: 10, calibration: ")


def documents(text: str) -> list[dict]:
    return list(yaml.safe_load_all(text))


def multi(text: str | list[dict], *options: str):
    """Run mergekit-multi in this process and folder, into `steps` and `out`."""
    from mergekit.scripts.multimerge import main

    if not isinstance(text, str):
        text = yaml.safe_dump_all(text, sort_keys=False)
    Path("multi.yml").write_text(text)
    LoaderCache.loaders.clear()
    command = ["multi.yml", "-I", "steps", "--out-path", "out", "--quiet", *options]
    return CliRunner().invoke(main, command)


def done(result) -> None:
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"


def refusal(result) -> str:
    """Return the message of a run that was refused; nothing but a message is shown."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    message = result.output[result.output.rindex("rpam: ") :]
    return " ".join(message.split())


def quick(folder: Path, /, **changes) -> dict:
    """Return the quickest config of a folder's models, of one number a layer."""
    parameters = {"granularity": "layer", "epochs": 1, **changes.pop("parameters", {})}
    return merge_config(folder, parameters=parameters, **changes)


def same_model(one: Path, other: Path) -> bool:
    return shard_bytes(one) == shard_bytes(other) != []


# Several merges in one file


def test_a_chain_is_its_merges_one_by_one(models, here):
    """Three stages with adapters on either expert, by the command of the page."""
    text = example("chain.yml", models)
    (here / "chain.yml").write_text(text)
    succeeded(run(shown("mergekit-multi").split(), cwd=here))
    for document in documents(text):
        out = here / "alone" / document.pop("name", "out")
        source = yaml.safe_dump(document)
        for name in ("adaptive", "concise"):
            source = re.sub(
                rf"model: {name}$", rf"model: {here}/alone/{name}", source, flags=re.M
            )
        merge_here(yaml.safe_load(source), out, lora_merge_cache="other-loras")
    pairs = {"steps/adaptive": "adaptive", "steps/concise": "concise", "out": "out"}
    for one, other in pairs.items():
        assert same_model(here / one, here / "alone" / other), one
    assert not same_model(here / "steps" / "adaptive", here / "steps" / "concise")
    dtypes = {value.dtype for value in tensors(here / "out").values()}
    assert dtypes == {torch.bfloat16}


def test_every_stage_says_how_it_was_made(models, here):
    """mergekit-multi alone stores the config as mergekit planned it."""
    first, second, _ = documents(example("chain.yml", models))
    first["parameters"]["granularity"] = "layer"
    second["base_model"] = "adaptive"
    done(multi([first, second], "--lora-merge-cache", "loras"))
    for document in (first, second):
        out = here / "steps" / document["name"]
        config = yaml.safe_load((out / "mergekit_config.yml").read_text())
        expected = {k: v for k, v in document.items() if k != "name"}
        if document is second:
            expected["base_model"] = "steps/adaptive"
        assert config == expected
        assert json.loads((out / "rpam.json").read_text())["method"] == "rpam"
        card = (out / "README.md").read_text()
        assert card.count("### Reasoning pattern alignment") == 1
        assert (out / "rpam_recipe.yml").exists()
        assert (out / COEFFICIENTS).exists()
    assert not (here / "out").exists()
    again = merge_here(config, here / "again", lora_merge_cache="loras")
    assert same_model(again, out)


def test_an_earlier_merge_may_be_the_other_model_and_have_an_adapter(models, here):
    stages = [
        {"name": "first", **quick(models)},
        {
            "name": "second",
            **quick(models, models=[{"model": f"first+{models / 'long-lora'}"}]),
        },
    ]
    done(multi(stages, "--lora-merge-cache", "loras"))
    record = json.loads((here / "steps/second/rpam.json").read_text())
    assert [m["model"] for m in record["models"]] == ["long", "first+long-lora"]
    stages[0]["parameters"]["epochs"] = 3
    again = multi(stages, "--lora-merge-cache", "loras", "--no-lazy")
    assert "the merged model in loras/" in refusal(again)
    shutil.rmtree("loras")
    done(multi(stages, "--lora-merge-cache", "loras", "--no-lazy"))


def test_texts_that_are_no_models_are_left_alone(models, here):
    """mergekit would put a folder where a text is a merge's name, or crash."""
    template = "{{ '@' + messages[0]['content'] + '@' + '>' }}"
    shutil.copy("calibration.jsonl", "a@b@c+d+e.jsonl")
    shutil.copy("calibration.jsonl", "float32")
    named = {
        "chat_template": template,
        "parameters": {"calibration": "a@b@c+d+e.jsonl"},
    }
    stages = [
        {"name": "rpam", **quick(models, **named)},
        {"name": "layer", **quick(models, parameters={"calibration": "float32"})},
        {"name": "float32", **quick(models, base_model="rpam")},
    ]
    done(multi(stages))
    for stage in stages:
        name = stage.pop("name")
        if stage["base_model"] == "rpam":
            stage["base_model"] = "steps/rpam"
        out = merge_here(stage, here / f"alone-{name}")
        assert same_model(out, here / "steps" / name)
    assert AutoTokenizer.from_pretrained("steps/rpam").chat_template == template


def test_names_are_replaced_wherever_models_are_named(models):
    source = {"model": "first+lora", "layer_range": [0, 2]}
    config = MergeConfiguration.model_validate(
        {
            "merge_method": "rpam",
            "base_model": "second@main",
            "slices": [{"sources": [source, {**source, "model": "org/first"}]}],
            "tokenizer": {"source": "first"},
            "parameters": {"calibration": "hf://first/second@v1/a.jsonl"},
        }
    )
    found, used = patched_config(None, config, {"first", "second", None}, "steps")
    assert used == {"first", "second"}
    assert str(found.base_model) == "steps/second@main"
    assert [str(s.model) for s in found.slices[0].sources] == [
        "steps/first+lora",
        "org/first",
    ]
    assert found.parameters == config.parameters
    assert str(found.tokenizer.source) == "steps/first"
    assert MergeConfiguration.model_validate(yaml.safe_load(found.to_yaml())) == found


def test_all_configs_are_checked_before_the_first_merge(models, here):
    stages = [
        {"name": "first", **quick(models)},
        {"name": "second", **quick(models, parameters={"epochs": 0})},
        quick(
            models,
            base_model="first",
            models=[{"model": "second"}],
            parameters={"calibration": "nowhere.jsonl"},
        ),
    ]
    message = refusal(multi(stages))
    assert "2 problems:" in message
    assert "second: parameters.epochs: found 0" in message
    assert "parameters.calibration: no file nowhere.jsonl" in message
    assert list((here / "steps").iterdir()) == []


def test_models_that_are_not_there_yet_are_compared_when_they_are(
    models, here, tokenizer
):
    """And what is wrong with them then is said then, after what they need."""
    config = qwen2_config(tokenizer, intermediate_size=64)
    save_experts(here, config, tokenizer, ("wide",))
    wide = {
        "name": "copy",
        "merge_method": "passthrough",
        "models": [{"model": str(here / "wide")}],
        "dtype": "float32",
    }
    message = refusal(multi([wide, quick(models, base_model="copy")]))
    assert "intermediate_size differs: 64 in steps/copy, 48 in" in message


def test_a_merge_that_has_the_name_of_its_model(models, here):
    shutil.copytree(models / "long", "long")
    stage = {"name": "long", **quick(models, base_model="long")}
    message = refusal(multi([stage]))
    assert "write ./NAME for a folder called so" in message
    done(multi([{**stage, "base_model": "./long"}]))


@pytest.mark.parametrize("folder", ["with space", "a+b", "a@b"])
def test_folders_whose_names_mergekit_cannot_pass_on(models, here, folder):
    stages = [{"name": "first", **quick(models)}, quick(models, base_model="first")]
    message = refusal(multi(stages, "-I", folder))
    assert f"{folder}/first: mergekit-multi cannot pass on this name" in message
    assert list((here / folder).iterdir()) == []


# Which outputs are skipped


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory) -> Path:
    """A folder in which a chain of rpam and two other methods has been merged."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copy(models / "calibration.jsonl", folder)
    before = os.getcwd()
    os.chdir(folder)
    try:
        done(multi(stages_of(models), "--lora-merge-cache", "loras"))
    finally:
        os.chdir(before)
    return folder


def stages_of(models: Path) -> list[dict]:
    linear = {
        "merge_method": "linear",
        "parameters": {"weight": 0.5},
        "dtype": "float32",
    }
    adapted = f"{models / 'short'}+{models / 'short-lora'}"
    own = {"calibration": "calibration.jsonl"}
    return [
        {"name": "third", **linear, "models": [{"model": str(models / "third")}]},
        {
            "name": "first",
            **quick(
                models,
                base_model="third",
                models=[{"model": adapted}],
                parameters=own,
            ),
        },
        {"name": "second", **quick(models, base_model="first", parameters=own)},
        {"name": "mean", **linear, "models": [{"model": "second"}]},
        {**linear, "models": [{"model": "mean"}]},
    ]


@pytest.fixture
def again(finished, tmp_path, monkeypatch, models):
    """Run the chain again in a copy of its folder, with changed stages."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)

    def call(*options: str, change=lambda stages: None):
        stages = stages_of(models)
        change(stages)
        return multi(stages, "--lora-merge-cache", "loras", *options)

    return call


def times(folder: Path) -> dict[str, int]:
    """Return when the shards in the folders of a chain were written."""
    found = folder.glob("*/*.safetensors"), folder.glob("steps/*/*.safetensors")
    return {str(path): path.stat().st_mtime_ns for one in found for path in one}


def test_outputs_of_the_same_inputs_are_skipped(again, tmp_path):
    before = times(tmp_path)
    done(again())
    assert times(tmp_path) == before


def test_no_lazy_merges_everything_anew(again, tmp_path):
    before = times(tmp_path)
    done(again("--no-lazy"))
    after = times(tmp_path)
    assert before.keys() == after.keys()
    outputs = [path for path in after if "loras" not in path]
    assert all(after[path] > before[path] for path in outputs)


def test_no_lazy_merges_stages_behind_a_changed_one(again, models):
    """Their coefficients are of other models, which would be refused otherwise."""
    done(again("--no-lazy", change=parameter("epochs", 2)))
    settings = {
        name: json.loads(Path(f"steps/{name}/rpam.json").read_text())["settings"]
        for name in ("first", "second")
    }
    assert (settings["first"]["epochs"], settings["second"]["epochs"]) == (2, 1)
    alone = stages_of(models)[2]
    del alone["name"]
    alone["base_model"] = "steps/first"
    assert same_model(merge_here(alone, Path("alone")), Path("steps/second"))


def parameter(name, value):
    return lambda stages: stages[1]["parameters"].update({name: value})


def key(name, value):
    return lambda stages: stages[1].update({name: value})


def write_other_calibration(_):
    write_calibration(Path("calibration.jsonl"), count=12)


def lose_record(_):
    Path("steps/first/rpam.json").unlink()


def age_record(_):
    path = Path("steps/first/rpam.json")
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "algorithm": 0}))


WEIGHT = [{"filter": "mlp", "value": 0.25}]
CHANGES = {
    "data": (write_other_calibration, "the calibration file calibration.jsonl"),
    "setting": (parameter("epochs", 2), "parameters.epochs"),
    "preset": (parameter("preset", "qa-merging"), "parameters.alignment, "),
    "weight": (parameter("weight", WEIGHT), "parameters.weight or a model's weight"),
    "dtype": (key("dtype", "bfloat16"), "dtype"),
    "out_dtype": (key("out_dtype", "bfloat16"), "out_dtype"),
    "template": (key("chat_template", "chatml"), "chat_template"),
    "algorithm": (age_record, "the method (by another version of rpam-mergekit)"),
    "killed": (lose_record, "holds a model, but no rpam.json"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_has_changed_is_named(again, tmp_path, what):
    change, named = CHANGES[what]
    before = times(tmp_path)
    message = refusal(again(change=change))
    start = "steps/first "
    if what != "killed":
        start += "was merged from other inputs; changed since: "
    assert f"{start}{named}" in message
    assert "Delete the folder, or give --no-lazy, to merge it anew." in message
    assert times(tmp_path) == before


def test_other_weights_of_a_model_are_noticed(again, models, tmp_path):
    """Though they are older than the merge."""

    def other(stages):
        stages[2]["models"] = [{"model": str(models / "third")}]

    message = refusal(again(change=other))
    assert f"changed since: the model {models / 'third'}." in message


def test_another_adapter_is_noticed(again, models, tmp_path):
    """Without merging it: by its own files and those of its model."""

    def other(stages):
        adapted = f"{models / 'short'}+{models / 'long-lora'}"
        stages[1]["models"] = [{"model": adapted}]

    message = refusal(again(change=other))
    assert f"changed since: the model {models / 'short'}+" in message
    assert len(list(Path("loras").glob("short*"))) == 1


def test_other_slices_and_patterns_are_noticed(again, models):
    def sliced(stages):
        sources = [
            {"model": name, "layer_range": [0, 3]}
            for name in ("first", str(models / "short"))
        ]
        del stages[2]["models"]
        stages[2]["slices"] = [{"sources": sources}]

    assert "changed since: slices." in refusal(again(change=sliced))

    def swapped(stages):
        stages[2]["models"][0]["parameters"] = {"pattern": "long"}

    message = refusal(again(change=swapped))
    assert "changed since: the models' patterns." in message


def test_a_stage_merged_anew_is_noticed_by_those_behind_it(again, tmp_path):
    """Step by step, as the messages advise, up to the last method."""
    change = parameter("epochs", 2)
    shutil.rmtree("steps/first")
    message = refusal(again(change=change))
    assert "steps/second was merged from other inputs; changed since: " in message
    assert "the model steps/first." in message
    shutil.rmtree("steps/second")
    message = refusal(again(change=change))
    assert "steps/mean was merged from steps/second, which has been merged" in message
    shutil.rmtree("steps/mean")
    message = refusal(again(change=change))
    assert "out was merged from steps/second, which has been merged anew" in message
    shutil.rmtree("out")
    done(again(change=change))
    before = times(tmp_path)
    done(again(change=change))
    assert times(tmp_path) == before


def test_another_coefficients_file_is_noticed(models, here):
    merge_here(quick(models), here / "first")
    merge_here(quick(models, parameters={"epochs": 2}), here / "second")
    shutil.copy("first/rpam/coefficients.safetensors", "c.safetensors")
    parameters = {"coefficients": "c.safetensors"}
    stage = {"name": "step", **quick(models)}
    stage["parameters"] = parameters
    done(multi([stage]))
    done(multi([stage]))
    assert same_model(here / "steps/step", here / "first")
    shutil.copy("second/rpam/coefficients.safetensors", "c.safetensors")
    message = refusal(multi([stage]))
    assert "changed since: the coefficients file c.safetensors." in message
    done(multi([stage], "--no-lazy"))
    assert same_model(here / "steps/step", here / "second")


# Several merges in one process


def test_merges_of_one_process_do_not_know_of_each_other(models, here):
    """Other settings, formats and contents of the same folders."""
    short = here / "short"
    shutil.copytree(models / "short", short)
    configs = [
        quick(models, models=[{"model": str(short)}], parameters={"seed": seed, **p})
        for seed, p in enumerate(
            (
                {"granularity": "low_rank", "coefficients": "c.safetensors"},
                {"granularity": "module", "epochs": 2},
            )
        )
    ]
    alone = [merge_here(c, here / f"alone-{n}") for n, c in enumerate(configs)]
    LoaderCache().loaders.clear()
    for number, config in enumerate(configs):
        merge_again(config, here / f"{number}")
        assert same_model(here / f"{number}", alone[number])
    shutil.rmtree(short)
    shutil.copytree(models / "third", short)
    (short / "model.safetensors").unlink()
    third = AutoModelForCausalLM.from_pretrained(models / "third")
    third.save_pretrained(short, max_shard_size="40KB")  # of other files than before
    expected = quick(models, models=[{"model": str(models / "third")}])
    expected["parameters"] = configs[1]["parameters"]
    merge_again(configs[1], here / "anew")
    merge_again(expected, here / "expected")
    assert same_model(here / "anew", here / "expected")
    assert not same_model(here / "anew", alone[1])


def merge_again(config: dict, out: Path) -> None:
    """Merge with what earlier merges have left in this process."""
    import mergekit.merge

    mergekit.merge.run_merge(
        MergeConfiguration.model_validate(config), str(out), MergeOptions(quiet=True)
    )


# Other methods and commands


def test_outputs_feed_other_methods(models, here):
    """The page's chain; what SLERP and passthrough make of it is recomputed."""
    stages = documents(example("feeding.yml", models))
    stages[1]["parameters"]["t"] = 0.0
    done(multi(stages))
    merged, blend = (tensors(here / "steps" / name) for name in ("adaptive", "blend"))
    assert merged.keys() == blend.keys()
    for name, value in merged.items():
        assert torch.allclose(value, blend[name], atol=1e-6), name
    for name, value in tensors(here / "out").items():
        source = blend if "layers.2." in name else merged
        assert torch.equal(value, source[name]) or "layers" not in name


def test_the_pages_slices_are_layers_of_the_whole_merge(models, here):
    done(multi(example("slices.yml", models)))
    whole = documents(example("feeding.yml", models))[0]
    done(multi([whole]))
    sliced, merged = tensors(here / "out"), tensors(here / "steps" / "adaptive")
    for layer, source in enumerate((0, 1, 1, 2)):
        for part in ("mlp.up_proj.weight", "self_attn.q_proj.bias"):
            one = sliced[f"model.layers.{layer}.{part}"]
            assert torch.equal(one, merged[f"model.layers.{source}.{part}"])
    assert len(AutoModelForCausalLM.from_pretrained("out").model.layers) == 4


def shown(command: str) -> str:
    """Return a command that the page shows, whole."""
    page = PAGE.read_text(encoding="utf-8")
    (line,) = re.findall(rf"^{command} .*$", page, re.MULTILINE)
    return line


def extract(base: Path, rank: int) -> ModelReference:
    """Extract an adapter from the model in `out` by the page's command."""
    command = shown("mergekit-extract-lora").split()
    given = {"BASE": str(base), "adapter": f"rank-{rank}", "64": str(rank)}
    assert given.keys() <= set(command)
    succeeded(run([given.get(word, word) for word in command], cwd=Path.cwd()))
    return ModelReference.parse(f"{base}+{Path.cwd() / given['adapter']}")


def test_an_extracted_adapter_stands_for_the_merge(models, here):
    """Of full rank closely, of a lower one loosely; biases are left at the base's."""
    (config,) = documents(example("feeding.yml", models))[:1]
    assert "`weight: [{filter: .bias, value: 0.0}]`" in PAGE.read_text("utf-8")
    config["parameters"]["weight"] = [{"filter": ".bias", "value": 0.0}]
    out = merge_here({k: v for k, v in config.items() if k != "name"}, here / "out")
    base = models / "long"
    whole, start = tensors(out), tensors(base)
    distances = []
    for rank in (32, 8):
        adapted = extract(base, rank)
        merged = tensors(Path(adapted.merged("loras").model.path))
        distances.append(max((merged[n] - whole[n]).norm() for n in whole))
    apart = max((start[n] - whole[n]).norm() for n in whole)
    assert distances[0] < 1e-4 * apart
    assert 1e-3 * apart < distances[1] < 0.9 * apart
    config["base_model"] = str(adapted)
    merge_here(
        {k: v for k, v in config.items() if k != "name"},
        here / "again",
        lora_merge_cache="loras",
    )


def test_a_merged_model_is_an_expert_of_a_mixture(models, here):
    (stage, *_) = documents(example("feeding.yml", models))
    done(multi([stage]))
    (here / "moe.yml").write_text(example("moe.yml", models))
    succeeded(run(shown("mergekit-moe").split(), cwd=here))
    mixture, merged = tensors(here / "mixture"), tensors(here / "steps/adaptive")
    other = tensors(models / "third")
    for layer in range(3):
        start = f"model.layers.{layer}."
        experts = f"{start}mlp.experts."
        for number, expert in enumerate((merged, other)):
            found = mixture[f"{experts}{number}.up_proj.weight"]
            assert torch.equal(found, expert[f"{start}mlp.up_proj.weight"])
        name = f"{start}self_attn.q_proj.weight"
        assert torch.equal(mixture[name], merged[name])
    _, info = AutoModelForCausalLM.from_pretrained(
        here / "mixture", output_loading_info=True
    )
    assert not info["missing_keys"]


# Templates and dtypes

TEMPLATE = "{% for m in messages %}{{ m['content'] }}={% endfor %}"


@pytest.mark.parametrize("template", ["chatml", TEMPLATE], ids=["name", "Jinja"])
def test_a_template_is_that_of_the_output_and_of_the_queries(models, here, template):
    # `chatml` has characters that the tiny models' tokenizer reads as unknown.
    merge_here(quick(models, chat_template=template), here / "out")
    tokenizer = AutoTokenizer.from_pretrained("out")
    own = AutoTokenizer.from_pretrained(models / "long").chat_template
    assert tokenizer.chat_template != own
    if template == TEMPLATE:
        assert tokenizer.chat_template == template
    queries, _ = encode_calibration(
        read_calibration("calibration.jsonl"), tokenizer, len(tokenizer), RpamSettings()
    )
    made_from = CoefficientsFile(here / "out" / COEFFICIENTS).metadata["fingerprint"]
    # But for the last field, which is there where a response is cut.
    encoded = json.dumps([dataclasses.astuple(query)[:-1] for query in queries])
    assert made_from["queries"] == hashlib.sha256(encoded.encode()).hexdigest()


def test_a_template_that_mergekit_does_not_have(models, here):
    with pytest.raises(RpamError, match="chat_template: found 'chatmll', which is"):
        merge_here(quick(models, chat_template="chatmll"), here / "out")
    assert not (here / "out").exists()


def test_a_template_that_would_be_drawn_by_chance(models, here):
    """mergekit counts in the order of a set, which changes from run to run."""
    shutil.copytree(models / "short", "short")
    own = AutoTokenizer.from_pretrained(models / "short")
    own.chat_template = TEMPLATE
    own.save_pretrained("short")
    other = [{"model": str(here / "short")}]
    config = quick(models, models=other, chat_template="auto")
    with pytest.raises(RpamError, match="as many have another: it would be drawn"):
        merge_here(config, here / "out")
    merge_here(quick(models, chat_template="auto"), here / "out")


@pytest.mark.parametrize(
    ("dtype", "out_dtype", "written"),
    [
        (None, None, "bfloat16"),
        ("float32", None, "float32"),
        ("float32", "bfloat16", "bfloat16"),
        (None, "float16", "float16"),
        ("float16", "float32", "float32"),
    ],
)
def test_weights_are_written_in_the_dtype_that_the_page_says(
    halves, here, dtype, out_dtype, written
):
    config = quick(halves, dtype=dtype, out_dtype=out_dtype)
    out = merge_here(config, here / "out")
    found = {str(value.dtype).removeprefix("torch.") for value in tensors(out).values()}
    assert found == {written}
    config = json.loads((out / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == written


@pytest.fixture(scope="module")
def halves(tmp_path_factory, tokenizer) -> Path:
    """A pair in bfloat16."""
    folder = tmp_path_factory.mktemp("halves")
    names = ("long", "short")
    save_experts(folder, qwen2_config(tokenizer), tokenizer, names, torch.bfloat16)
    write_calibration(folder / "calibration.jsonl")
    return folder
