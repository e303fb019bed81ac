"""Models that are more than a folder of safetensors, merged by the real commands."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from pathlib import Path

import peft
import pytest
import torch
import yaml
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.commands import run, succeeded
from helpers.hub_server import hub_handler
from helpers.merged import COEFFICIENTS, assert_merged_by_formula, shard_bytes
from helpers.models import (
    OWN_CODE,
    merge_config,
    qwen2_config,
    save_adapter,
    save_pair,
)
from rpam_mergekit.checks.examine import config_notes, examine_merge
from rpam_mergekit.errors import RpamError
from rpam_mergekit.models import patches
from rpam_mergekit.models.adapters import merge_adapters
from rpam_mergekit.models.headers import compare_shapes, read_header
from rpam_mergekit.models.layout import MergeModels
from rpam_mergekit.models.references import public_name, read_config
from rpam_mergekit.models.weights import content_digest


@pytest.fixture(scope="module")
def merged(pair, tmp_path_factory) -> Path:
    """The pair merged from its folders of safetensors."""
    folder = tmp_path_factory.mktemp("merged")
    (folder / "rpam.yml").write_text(yaml.safe_dump(merge_config(pair)))
    succeeded(run(["mergekit-yaml", str(folder / "rpam.yml"), str(folder / "out")]))
    return folder / "out"


def refusal(config: dict, **options) -> str:
    """Return the message with which a config is refused before any download."""
    with pytest.raises(RpamError) as error:
        examine_merge(
            MergeConfiguration.model_validate(config), MergeOptions(**options)
        )
    return str(error.value)


# LoRA adapters


@pytest.fixture
def adapters(pair, tmp_path) -> dict[str, Path]:
    """An adapter for each model of the pair."""
    return {
        name: save_adapter(pair / name, tmp_path / f"lora-{name}", seed)
        for seed, name in enumerate(("long", "short"))
    }


def adapted(pair: Path, adapters: dict[str, Path], name: str) -> ModelReference:
    return ModelReference.parse(f"{pair / name}+{adapters[name]}")


@pytest.fixture
def adapted_config(pair, adapters) -> dict:
    other = {"model": str(adapted(pair, adapters, "short"))}
    base = str(adapted(pair, adapters, "long"))
    return merge_config(pair, base_model=base, models=[other])


def test_adapters_are_merged_into_their_models_first(
    pair, adapters, adapted_config, tmp_path, mergekit_yaml
):
    cache = tmp_path / "cache"
    succeeded(mergekit_yaml(adapted_config, "--lora-merge-cache", str(cache)))
    for name, adapter in adapters.items():
        plain = AutoModelForCausalLM.from_pretrained(pair / name)
        both = peft.PeftModel.from_pretrained(plain, adapter).merge_and_unload()
        both.save_pretrained(tmp_path / "expected" / name)
    out = tmp_path / "out"
    assert_merged_by_formula(out, tmp_path / "expected", out / COEFFICIENTS)
    template = AutoTokenizer.from_pretrained(pair / "long").chat_template
    assert AutoTokenizer.from_pretrained(out).chat_template == template


def test_an_adapter_without_the_option_is_refused(
    adapted_config, tmp_path, mergekit_yaml
):
    process = mergekit_yaml(adapted_config)
    assert process.returncode == 1
    assert "an adapter needs mergekit's option --lora-merge-cache" in process.stderr
    assert "Traceback" not in process.stderr
    assert "Warmup" not in process.stderr
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_is_not_there(pair, tmp_path):
    other = [{"model": f"{pair / 'short'}+{tmp_path / 'nowhere'}"}]
    message = refusal(merge_config(pair, models=other), lora_merge_cache="cache")
    assert f"the adapter {tmp_path / 'nowhere'} is no folder, nor" in message


@pytest.mark.parametrize("lost", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_without_one_of_its_files(adapters, adapted_config, lost):
    (adapters["long"] / lost).unlink()
    message = refusal(adapted_config, lora_merge_cache="cache")
    assert f"no {lost}" in message
    assert str(adapters["long"]) in message


def test_an_adapter_that_does_not_fit_leaves_nothing_behind(
    pair, adapters, tmp_path, tokenizer
):
    wide, _ = save_pair(tmp_path, qwen2_config(tokenizer, hidden_size=64), tokenizer)
    model = ModelReference.parse(f"{wide}+{adapters['long']}")
    options = MergeOptions(lora_merge_cache=str(tmp_path / "cache"))
    with pytest.raises(RpamError, match="the adapter cannot be merged into the model"):
        merge_adapters([model], options)
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".lock"}


def test_what_an_adapter_was_merged_from_must_be_unchanged(
    pair, adapters, tmp_path, monkeypatch
):
    """mergekit would go on with the weights of the old adapter."""
    model = adapted(pair, adapters, "long")
    options = MergeOptions(lora_merge_cache=str(tmp_path / "cache"))

    def digest() -> str:
        read_config(model, options)
        merge_adapters([model], options)
        monkeypatch.setattr(LoaderCache, "loaders", {})
        LoaderCache().setup(options)
        return content_digest(model)

    first = digest()
    assert digest() == first
    path = adapters["long"] / "adapter_model.safetensors"
    save_file({name: 2 * value for name, value in load_file(path).items()}, path)
    with pytest.raises(RpamError, match=r"changed since: adapter\. Unless"):
        read_config(model, options)
    changed = options.model_copy(update={"lora_merge_dtype": "bfloat16"})
    with pytest.raises(RpamError, match="adapter, --lora-merge-dtype"):
        read_config(model, changed)
    shutil.rmtree(tmp_path / "cache")
    assert digest() != first


def test_an_adapter_newer_than_what_another_method_made_of_it(pair, adapters, tmp_path):
    model = adapted(pair, adapters, "long")
    options = MergeOptions(lora_merge_cache=str(tmp_path / "cache"))
    folder = Path(model.merged(options.lora_merge_cache).model.path)
    read_config(model, options)
    save_adapter(pair / "long", adapters["long"], seed=5)
    with pytest.raises(RpamError, match="the adapter is newer"):
        read_config(model, options)
    (folder / "model.safetensors").unlink()
    with pytest.raises(RpamError, match=r"it is incomplete \(Unable to"):
        read_config(model, options)


def test_an_adapter_trained_on_another_model_is_noted(pair, adapters):
    """Its model need not be there: the adapter is merged into the one before the +."""
    path = adapters["short"] / "adapter_config.json"
    config = {**json.loads(path.read_text()), "base_model_name_or_path": "org/else"}
    path.write_text(json.dumps(config))
    models = MergeModels(
        ModelReference.parse(str(pair / "long")), (adapted(pair, adapters, "short"),)
    )
    options = MergeOptions(lazy_unpickle=True)
    (note,) = config_notes(models, options)
    assert note.endswith("the adapter says it was trained on org/else")


def test_adapters_and_an_architecture_unknown_to_mergekit(adapters, adapted_config):
    """mergekit would end with a bare AssertionError."""
    base, adapter = adapted_config["base_model"].split("+")
    own = copy_with(Path(base), adapters["long"].parent / "own", "BitNetForCausalLM")
    adapted_config["base_model"] = f"{own}+{adapter}"
    message = refusal(adapted_config, lora_merge_cache="cache")
    assert "not for BitNetForCausalLM. Merge the adapter into a model folder" in message


def copy_with(model: Path, folder: Path, architecture: str) -> Path:
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = [architecture]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_public_names_are_without_folders(pair, adapters):
    assert public_name(adapted(pair, adapters, "long")) == "long+lora-long"
    assert public_name(ModelReference.parse("org/name@v1")) == "org/name@v1"


# Models of the Hub, in a cache


@pytest.fixture(scope="module")
def hub_cache(pair, tmp_path_factory) -> Path:
    """A cache as huggingface_hub keeps it: org/name@v1 is long, org/name is short."""
    repository = tmp_path_factory.mktemp("hub") / "models--org--name"
    for name, reference, commit in (
        ("long", "v1", "a" * 40),
        ("short", "main", "b" * 40),
    ):
        shutil.copytree(pair / name, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / reference).write_text(commit)
    return repository.parent


def hub_config(pair: Path) -> dict:
    models = [{"model": "org/name"}]
    return merge_config(pair, base_model="org/name@v1", models=models)


@pytest.fixture
def merge_revisions(pair, tmp_path) -> Callable:
    """Merge the two revisions of org/name into `tmp_path/out`, by default offline."""

    def call(*options: str, **environment: str):
        path = tmp_path / "rpam.yml"
        path.write_text(yaml.safe_dump(hub_config(pair)))
        command = ["mergekit-yaml", str(path), str(tmp_path / "out"), *options]
        environment = {"HF_HOME": str(tmp_path / "home"), **environment}
        return run(command, **environment)

    return call


def test_revisions_are_merged_from_the_cache(
    merged, hub_cache, tmp_path, merge_revisions
):
    succeeded(merge_revisions(HF_HUB_CACHE=str(hub_cache)))
    assert shard_bytes(tmp_path / "out") == shard_bytes(merged)


def test_the_cache_of_the_option_is_used_for_everything(
    merged, hub_cache, tmp_path, merge_revisions
):
    """Weights, config, tokenizer and chat template."""
    succeeded(merge_revisions("--transformers-cache", str(hub_cache)))
    assert shard_bytes(tmp_path / "out") == shard_bytes(merged)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (merged / name).read_bytes()
    assert "org/name@v1" in (tmp_path / "out" / "README.md").read_text()


def test_weights_that_are_not_in_the_cache(hub_cache, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cache = tmp_path / "cache"
    shutil.copytree(hub_cache, cache)
    next(cache.glob("*/snapshots/b*/model.safetensors")).unlink()
    options = MergeOptions(transformers_cache=str(cache))
    found = ModelReference.parse("org/name@v1")
    with patches.hub_cache(options):
        assert Path(found.local_path(str(cache))).name == "a" * 40
        with pytest.raises(RpamError, match=f"name: its weights are not in .* {cache}"):
            ModelReference.parse("org/name").local_path(str(cache))


def test_a_model_that_is_not_in_the_cache(pair, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refusal(hub_config(pair))
    assert "org/name@v1: its config cannot be loaded: " in message
    assert "org/name: its config cannot be loaded: " in message


def test_shapes_of_cached_models_are_compared_once_they_are_loaded(
    pair, hub_cache, tmp_path, tokenizer, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(LoaderCache, "loaders", {})
    wide, _ = save_pair(tmp_path, qwen2_config(tokenizer, hidden_size=64), tokenizer)
    models = [ModelReference.parse(name) for name in (str(wide), "org/name")]
    options = MergeOptions(transformers_cache=str(hub_cache))
    with patches.hub_cache(options):
        LoaderCache().setup(options)
        for model in models:
            LoaderCache().get(model)
        (mine, its) = (read_header(model) for model in models)
        finding = compare_shapes(models[0], mine, models[1], its)[0]
    assert finding.startswith("lm_head.weight: shape (21, 64) in ")


@pytest.fixture
def hub(hub_cache):
    """The address of a server that has what is in `hub_cache`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), hub_handler(hub_cache))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_download_goes_to_one_cache_with_the_chat_template(
    merged, hub, tmp_path, merge_revisions
):
    """mergekit downloads no chat template and puts configs into the default cache."""
    cache = tmp_path / "cache"
    options = ("--transformers-cache", str(cache))
    succeeded(merge_revisions(*options, HF_ENDPOINT=hub, HF_HUB_OFFLINE="0"))
    assert shard_bytes(tmp_path / "out") == shard_bytes(merged)
    name = "chat_template.jinja"
    assert (tmp_path / "out" / name).read_bytes() == (merged / name).read_bytes()
    assert not (tmp_path / "home" / "hub").exists()


def test_a_hub_that_is_down_is_asked_once_and_the_cache_is_used(
    merged, hub_cache, tmp_path, merge_revisions
):
    """huggingface_hub alone would try again for minutes."""
    nobody = "http://127.0.0.1:9"
    environment = {"HF_ENDPOINT": nobody, "HF_HUB_OFFLINE": "0"}
    process = merge_revisions(HF_HUB_CACHE=str(hub_cache), **environment)
    succeeded(process)
    assert process.stderr.count(f"rpam: {nobody} cannot be reached") == 1
    assert shard_bytes(tmp_path / "out") == shard_bytes(merged)


# Code of the model's own


def test_models_with_code_of_their_own(own_pair, tmp_path):
    """mergekit infers their architecture; the output carries the code."""
    path, out = tmp_path / "rpam.yml", tmp_path / "out"
    path.write_text(yaml.safe_dump(merge_config(own_pair)))
    command = ["mergekit-yaml", str(path), str(out), "--trust-remote-code"]
    succeeded(run(command, HF_HOME=str(tmp_path / "home")))
    assert_merged_by_formula(out, own_pair, out / COEFFICIENTS)
    assert (out / "own.py").read_text() == OWN_CODE


def test_code_that_is_not_trusted(own_pair):
    message = refusal(merge_config(own_pair))
    assert "contains custom code which must be executed" in message
    assert "Read that code, then allow it with --trust-remote-code." in message


# Pickled checkpoints


def pickled(model: Path, folder: Path, shards: int = 1) -> Path:
    """Write a model as pytorch_model.bin, or as shards of it with their index."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    weights = load_file(model / "model.safetensors")
    if shards == 1:
        torch.save(weights, folder / "pytorch_model.bin")
        return folder
    places = {
        name: f"pytorch_model-{1 + i % shards:05d}-of-{shards:05d}.bin"
        for i, name in enumerate(weights)
    }
    for place in set(places.values()):
        shard = {n: value for n, value in weights.items() if places[n] == place}
        torch.save(shard, folder / place)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    return folder


@pytest.mark.parametrize(
    ("mixed", "options"),
    [(False, []), (False, ["--lazy-unpickle"]), (True, [])],
    ids=["whole", "lazy", "mixed with safetensors"],
)
def test_pickled_checkpoints_give_the_same_bytes(
    pair, merged, tmp_path, mergekit_yaml, mixed, options
):
    base = pickled(pair / "long", tmp_path / "long", shards=3)
    short = pair / "short" if mixed else pickled(pair / "short", tmp_path / "short")
    models = [{"model": str(short)}]
    config = merge_config(pair, base_model=str(base), models=models)
    process = mergekit_yaml(config, *options)
    succeeded(process)
    assert shard_bytes(tmp_path / "out") == shard_bytes(merged)
    noted = ".bin shards are read into memory whole, one at a time" in process.stderr
    assert noted is not bool(options)


@pytest.mark.parametrize("shards", [1, 2])
def test_shapes_of_pickled_checkpoints_are_compared(pair, tmp_path, tokenizer, shards):
    wide = qwen2_config(tokenizer, vocab_size=40)
    other, _ = save_pair(tmp_path / "wide", wide, tokenizer)
    other = pickled(other, tmp_path / "other", shards)
    path = other / "config.json"
    config = {**json.loads(path.read_text()), "vocab_size": len(tokenizer)}
    path.write_text(json.dumps(config))
    message = refusal(merge_config(pair, models=[{"model": str(other)}]))
    assert "model.embed_tokens.weight: shape (21, 32)" in message
    assert "The vocabularies differ" in message


def test_weights_that_are_not_in_the_folder(pair, tmp_path):
    base = pickled(pair / "long", tmp_path / "long", shards=2)
    (base / "pytorch_model-00002-of-00002.bin").unlink()
    other = pickled(pair / "short", tmp_path / "short")
    (other / "pytorch_model.bin").unlink()
    models = [{"model": str(other)}]
    message = refusal(merge_config(pair, base_model=str(base), models=models))
    assert f"{other}: its weights cannot be read: Unable to find" in message
    assert f"{base}: its weights cannot be read: pytorch_model-00002-of" in message
