"""The public names, the page that describes them, and its examples."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import chains
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import rpam_mergekit
from helpers.commands import run
from helpers.merged import shard_bytes, tensors
from helpers.models import merge_config
from rpam_mergekit.chat.prompts import encode_calibration, make_batches
from rpam_mergekit.formats.coefficients import CoefficientsFile
from rpam_mergekit.parameters import parse_settings
from rpam_mergekit.prepass.run import PrePass
from rpam_mergekit.prepass.state_dicts import StateDictExperts, merge_state_dicts

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "python-api.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def test_the_page_describes_every_public_name():
    headings = re.findall(r"^### `(\w+)`", PAGE, re.MULTILINE)
    assert sorted(headings) == sorted(rpam_mergekit.__all__)
    for name in rpam_mergekit.__all__:
        assert getattr(rpam_mergekit, name).__doc__, name
        assert f"`{name}`" in PAGE.partition("\n## ")[0], name


def test_the_public_names_are_listed_once_and_in_order():
    assert rpam_mergekit.__all__ == sorted(rpam_mergekit.__all__)
    assert set(rpam_mergekit.__all__) == set(rpam_mergekit._PUBLIC)
    assert set(rpam_mergekit.__all__) <= set(dir(rpam_mergekit))
    with pytest.raises(AttributeError, match="no attribute 'merges'"):
        _ = rpam_mergekit.merges


def test_an_import_of_the_package_brings_nothing_heavy():
    code = (
        "import sys, rpam_mergekit, rpam_mergekit.errors\n"
        "heavy = {'torch', 'transformers', 'mergekit', 'click', 'pydantic'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert process.stdout.strip() == "[]"


def test_the_examples_of_the_page_run(tmp_path):
    """One after the other in one Python, in a folder with the quickstart's pair."""
    quickstart = ROOT / "examples" / "quickstart"
    for name in ("long", "short"):
        shutil.copytree(quickstart / name, tmp_path / name)
    rows = [
        {
            "question": query,
            "answer": chains.answer(query),
            "operations": chains.operations(query),
        }
        for query in chains.queries(64, "train", 1, mix=(1,) * 8)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "questions.jsonl").write_text(lines, encoding="utf-8")
    blocks = BLOCK.findall(PAGE)
    assert len(blocks) > 5
    code = "\n".join(blocks).replace('"steps": 40', '"steps": 4')
    (tmp_path / "page.py").write_text(code, encoding="utf-8")
    process = run(["python", "page.py"], tmp_path)
    assert process.returncode == 0, process.stderr
    assert "queries are labelled" in process.stdout
    assert "calibraton: unknown" in process.stdout
    assert (tmp_path / "merged" / "rpam.json").exists()


def test_merge_writes_what_mergekit_yaml_writes(pair, tmp_path):
    config = merge_config(pair)
    path = tmp_path / "rpam.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    out = rpam_mergekit.merge(config, tmp_path / "by-api", quiet=True)
    process = run(["mergekit-yaml", str(path), str(tmp_path / "by-command")])
    assert process.returncode == 0, process.stderr
    assert shard_bytes(out) == shard_bytes(tmp_path / "by-command")


def test_check_finds_what_is_wrong(pair):
    config = merge_config(pair)
    assert rpam_mergekit.check(config).findings == []
    config["parameters"]["learning_rate"] = -1
    (finding,) = rpam_mergekit.check(config).findings
    assert finding.startswith("parameters.learning_rate:")


def test_a_file_and_its_content_have_the_same_findings(pair, tmp_path):
    config = {**merge_config(pair), "dtyp": "float32"}
    config["parameters"]["stepz"] = 3
    path = tmp_path / "rpam.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    of_file = rpam_mergekit.check(path).findings
    of_content = rpam_mergekit.check(config).findings
    assert len(of_file) == len(of_content) == 2
    for one, other in zip(of_file, of_content, strict=True):
        assert one.startswith(f"{path}:")
        assert one.endswith(other)


def test_a_config_in_python_may_hold_paths(pair):
    config = merge_config(pair)
    config["base_model"] = Path(config["base_model"])
    config["parameters"]["calibration"] = Path(config["parameters"]["calibration"])
    assert rpam_mergekit.check(config).findings == []
    with pytest.raises(rpam_mergekit.RpamError, match="the config: not YAML"):
        rpam_mergekit.check({**config, "dtype": object()})
    with pytest.raises(rpam_mergekit.RpamError, match="expected a mapping"):
        rpam_mergekit.check(3)


def test_two_folders_of_one_process_are_not_mixed_up(pair, tmp_path, monkeypatch):
    """Models are known by their relative paths; their weights are read anew."""
    files = []
    for name in ("one", "two"):
        folder = tmp_path / name
        shutil.copytree(pair, folder)
        files.append(folder / "coefficients.safetensors")
    weights = tmp_path / "two" / "short" / "model.safetensors"
    save_file({k: v * 1.5 for k, v in load_file(weights).items()}, weights)
    config = merge_config(Path("."))
    for name in ("one", "two"):
        monkeypatch.chdir(tmp_path / name)
        rpam_mergekit.fit(config, "coefficients.safetensors", quiet=True, num_threads=1)
    monkeypatch.chdir(tmp_path / "two")
    again = rpam_mergekit.fit(config, "again.safetensors", quiet=True)
    one, two, again = (load_file(path) for path in (*files, again))
    assert all(torch.equal(two[name], again[name]) for name in again)
    assert any(not torch.equal(one[name], two[name]) for name in one)


def test_options_and_methods_that_do_not_exist_are_refused(pair, tmp_path):
    config = merge_config(pair)
    with pytest.raises(rpam_mergekit.RpamError, match="Did you mean 'device'"):
        rpam_mergekit.merge(config, tmp_path / "out", devise="cpu")
    config["merge_method"] = "linear"
    for function in (rpam_mergekit.merge, rpam_mergekit.fit):
        with pytest.raises(rpam_mergekit.RpamError, match="found 'linear'"):
            function(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Models in memory


@pytest.fixture(scope="module")
def in_memory(pair):
    """Config, state dicts and encoded queries of the pair."""
    models = [
        AutoModelForCausalLM.from_pretrained(pair / name, dtype=torch.float32)
        for name in ("long", "short")
    ]
    return models[0].config, [model.state_dict() for model in models]


def test_state_dicts_get_the_coefficients_that_mergekit_gets(pair, in_memory, tmp_path):
    config = merge_config(pair)
    # One number per tensor begins without chance: by mergekit's order of the tensors
    # the others draw their beginnings in another order than by a state dict's.
    config["parameters"] |= {"held_out": 0, "granularity": "tensor"}
    config["parameters"]["coefficients"] = str(tmp_path / "coefficients.safetensors")
    out = rpam_mergekit.merge(config, tmp_path / "out", quiet=True)
    file = CoefficientsFile(tmp_path / "coefficients.safetensors")

    settings = parse_settings(config["parameters"])
    model, weights = in_memory
    queries, _ = encode_calibration(
        rpam_mergekit.read_calibration(settings.calibration),
        AutoTokenizer.from_pretrained(pair / "long"),
        model.vocab_size,
        settings,
    )
    experts = StateDictExperts(model, weights[0], weights[1:])
    batches = make_batches(queries, settings)
    solution = PrePass(experts, batches, settings, quiet=True).run()
    assert sorted(solution.entries) == file.names
    for name, parts in solution.entries.items():
        for part, value in parts.items():
            assert torch.equal(value, file.solved(name)[part]), name
    merged, on_disk = merge_state_dicts(experts, solution), tensors(out)
    assert merged.keys() >= on_disk.keys()
    assert all(torch.equal(merged[name], on_disk[name]) for name in on_disk)


def test_state_dicts_that_do_not_fit_are_refused(in_memory):
    config, (long, short) = in_memory
    name = "model.layers.1.mlp.up_proj.weight"
    lacking = {key: value for key, value in short.items() if key != name}
    with pytest.raises(rpam_mergekit.RpamError, match=re.escape(name)):
        StateDictExperts(config, long, [lacking])
    wide = {**short, name: torch.zeros(3, 3)}
    with pytest.raises(rpam_mergekit.RpamError, match=r"shape .* \(3, 3\) in model 1"):
        StateDictExperts(config, long, [wide])
    with pytest.raises(rpam_mergekit.RpamError, match="found 2 for 3 models"):
        StateDictExperts(config, long, [short, short])
