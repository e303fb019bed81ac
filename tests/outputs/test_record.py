"""What an output folder says of its merge, and when it says it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from mergekit.config import MergeConfiguration

from helpers.commands import merge_here
from helpers.exporting import quiet
from helpers.merged import COEFFICIENTS, shard_bytes
from helpers.models import merge_config, save_adapter
from helpers.paths import SCRIPTS
from rpam_mergekit import __version__
from rpam_mergekit.checks.fingerprint import ALGORITHM
from rpam_mergekit.errors import RpamError
from rpam_mergekit.folder.contents import RECORD
from rpam_mergekit.formats.coefficients import CoefficientsFile
from rpam_mergekit.outputs.record import output_settings
from rpam_mergekit.parameters import parse_settings

RECIPE = "rpam_recipe.yml"
TEMPLATE = "{{ messages[-1]['content'] }}"


@pytest.fixture(autouse=True)
def _quiet():
    with quiet():
        yield


def config_of(pair: Path, **parameters) -> dict:
    parameters = {"granularity": "layer", "epochs": 1, **parameters}
    return merge_config(pair, parameters=parameters)


@pytest.fixture(scope="module")
def merged(pair, tmp_path_factory) -> Path:
    """A merge by one number a layer."""
    with quiet():
        return merge_here(config_of(pair), tmp_path_factory.mktemp("merged") / "out")


@pytest.fixture
def out(merged, tmp_path) -> Path:
    """A copy of that merge's folder, to be merged into again."""
    return Path(shutil.copytree(merged, tmp_path / "out"))


def record_in(folder: Path) -> dict:
    return json.loads((folder / RECORD).read_text(encoding="utf-8"))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def digest_of(model: Path) -> str:
    """Return a model's digest as the documentation of `checkpoint.digest` says."""
    shards = [sha256(content) for content in shard_bytes(model)]
    return sha256("".join(f"{one}\n" for one in shards).encode())


def test_the_record_says_what_a_merge_was_made_of_and_by(pair, merged):
    """Every digest is that of the files themselves."""
    record = record_in(merged)
    calibration = (pair / "calibration.jsonl").read_bytes()
    coefficients = merged / COEFFICIENTS
    config = config_of(pair)
    assert record.pop("versions") == {
        "rpam_mergekit": __version__,
        **{name: version(name) for name in ("mergekit", "torch", "transformers")},
    }
    file = CoefficientsFile(coefficients)
    assert record.pop("layers") == file.metadata["layers"]
    assert record.pop("operating_point") == file.metadata["operating_point"]
    assert record == {
        "format": 1,
        "method": "rpam",
        "algorithm": ALGORITHM,
        "paper": "https://arxiv.org/abs/2601.03506",
        "models": [
            {
                "model": name,
                "pattern": name,
                "role": role,
                "content": digest_of(pair / name),
            }
            for name, role in (("long", "base"), ("short", "other"))
        ],
        "calibration": {
            "digest": sha256(calibration),
            "queries": {
                name: calibration.decode().count(f'"pattern": "{name}"')
                for name in ("long", "short")
            },
        },
        "settings": {
            **parse_settings(config["parameters"]).cache_key(),
            "compute_dtype": "float32",  # of `auto`, on a CPU
        },
        "dtype": "float32",
        "out_dtype": None,
        "scale": 1.0,
        "reasoning": 0.0,
        "weight": [None, None],
        "layer_ranges": [],
        "chat_template": None,
        "tokenizer": None,
        "thinking": {
            "mode": "model",
            "opening": "",
            "removed_from_template": False,
            "open": "<think>",
            "close": "</think>",
            "opens_by_itself": None,
        },
        "coefficients": {
            "path": COEFFICIENTS.as_posix(),
            "sha256": sha256(coefficients.read_bytes()),
            "bytes": coefficients.stat().st_size,
        },
        "weights": {
            "model.safetensors": sha256((merged / "model.safetensors").read_bytes())
        },
        "base_files": {
            path.name: sha256(path.read_bytes())
            for path in sorted((pair / "long").iterdir())
            if path.name != "model.safetensors"
        },
    }


def test_nothing_in_it_depends_on_time_or_place(pair, merged, tmp_path):
    """Models of other folders with the same names, another output folder."""
    moved = shutil.copytree(pair, tmp_path / "moved")
    again = merge_here(config_of(moved), tmp_path / "again")
    assert (again / RECORD).read_bytes() == (merged / RECORD).read_bytes()
    assert str(tmp_path) not in (again / RECORD).read_text()


def test_what_the_config_sets_by_hand_is_recorded(pair, tmp_path):
    own = [{"filter": "mlp", "value": 0.25}]
    whole = [{"filter": "lm_head", "value": 0.5}, {"filter": "attn", "value": 0.125}]
    config = config_of(pair, weight=whole)
    config["models"][0]["parameters"] = {"weight": own}
    config["chat_template"] = TEMPLATE
    record = record_in(merge_here(config, tmp_path / "out"))
    assert record["weight"] == [own, whole]
    assert record["chat_template"] == TEMPLATE
    config["tokenizer"] = {"source": str(pair / "long"), "pad_to_multiple_of": 8}
    found = output_settings(MergeConfiguration.model_validate(config))
    assert found.pop("tokenizer") == {"pad_to_multiple_of": 8}
    assert found == {name: record[name] for name in found}


def test_an_adapter_is_recorded_by_its_own_files(pair, tmp_path):
    adapter = save_adapter(pair / "short", tmp_path / "lora")
    config = config_of(pair)
    config["models"] = [{"model": f"{pair / 'short'}+{adapter}"}]
    cache = tmp_path / "cache"
    record = record_in(
        merge_here(config, tmp_path / "out", lora_merge_cache=str(cache))
    )
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    files = ("adapter_config.json", "adapter_model.safetensors")
    digests = [sha256((adapter / name).read_bytes()) for name in files]
    assert record["models"][1] == {
        "model": "short+lora",
        "pattern": "short",
        "role": "other",
        "content": digest_of(folder),
        "merged_from": {
            "adapter": sha256("".join(f"{one}\n" for one in digests).encode()),
            "model": digest_of(pair / "short"),
            "--lora-merge-dtype": None,
        },
    }


def test_a_merge_by_coefficients_alone_says_what_they_were_made_from(
    pair, merged, tmp_path
):
    path = shutil.copy(merged / COEFFICIENTS, tmp_path / "c.safetensors")
    config = {**config_of(pair), "parameters": {"coefficients": str(path)}}
    record, first = record_in(merge_here(config, tmp_path / "out")), record_in(merged)
    assert record["calibration"] == {"digest": first["calibration"]["digest"]}
    assert record["coefficients"].pop("path") == str(path)
    for name in ("models", "settings", "layers", "versions"):
        assert record[name] == first[name], name


def test_the_record_is_written_last(merged):
    written = (merged / RECORD).stat().st_mtime_ns
    files = [path for path in merged.rglob("*") if path.is_file()]
    assert max(path.stat().st_mtime_ns for path in files) == written
    assert not list(merged.glob("*.partial"))


def test_a_merge_that_is_refused_leaves_a_finished_one_alone(pair, out):
    """The folder's coefficients are of other models, which only a merge finds out."""
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    config = config_of(pair)
    models = [str(pair / "short"), str(pair / "long")]
    config |= {"base_model": models[0], "models": [{"model": models[1]}]}
    with pytest.raises(RpamError, match="belongs to other models"):
        merge_here(config, out)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_a_config_that_is_refused_leaves_a_finished_merge_alone(pair, out):
    before = (out / RECORD).read_bytes()
    with pytest.raises(RpamError, match="epochs"):
        merge_here(config_of(pair, epochs=0), out)
    assert (out / RECORD).read_bytes() == before
    assert (out / RECIPE).exists()


def test_a_pre_pass_that_is_killed_leaves_a_finished_merge_alone(pair, out, tmp_path):
    before = shard_bytes(out), (out / RECORD).read_bytes()
    config = tmp_path / "rpam.yml"
    config.write_text(yaml.safe_dump(config_of(pair, epochs=300)))
    process = subprocess.Popen(
        [SCRIPTS / "mergekit-yaml", str(config), str(out)],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    try:
        until = time.monotonic() + 300
        while not list(out.glob("rpam/*.unfinished/*/layer-*")):
            assert time.monotonic() < until
            time.sleep(0.05)
            assert process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (shard_bytes(out), (out / RECORD).read_bytes()) == before
    merge_here(config_of(pair, seed=1), out)
    assert record_in(out)["settings"]["seed"] == 1


def test_another_method_s_merge_takes_the_record_back(pair, out):
    models = [{"model": str(pair / name)} for name in ("long", "short")]
    config = {"merge_method": "linear", "models": models, "dtype": "float32"}
    merge_here({**config, "parameters": {"weight": 0.5}}, out)
    assert not (out / RECORD).exists()
    assert not (out / RECIPE).exists()


def test_the_recipe_is_there_for_scalars_only(pair, out):
    recipe = yaml.safe_load((out / RECIPE).read_text())
    assert recipe["merge_method"] == "task_arithmetic"
    before = shard_bytes(out)
    merge_here(config_of(pair, granularity="row"), out)
    assert not (out / RECIPE).exists()
    merge_here(recipe, out)
    assert shard_bytes(out) == before


def test_the_card_has_the_section_once(pair, out):
    merge_here(config_of(pair, granularity="module"), out)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert card.count("<!-- rpam -->") == card.count("<!-- /rpam -->") == 1
    assert record_in(out)["coefficients"]["sha256"] in card


def test_without_a_card_there_is_still_the_record(pair, merged, out, tmp_path):
    """mergekit's option --no-write-model-card; an older card told of other models."""
    new = merge_here(config_of(pair), tmp_path / "new", write_model_card=False)
    assert (new / RECORD).read_bytes() == (merged / RECORD).read_bytes()
    assert (new / RECIPE).exists()
    assert not (new / "README.md").exists()
    assert not (new / "mergekit_config.yml").exists()
    assert (out / "README.md").exists()
    merge_here(config_of(pair, epochs=2), out, write_model_card=False)
    assert not (out / "README.md").exists()
    assert record_in(out)["settings"]["epochs"] == 2
