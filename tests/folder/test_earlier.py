"""A folder that is merged into: what is refused, what goes, what stays."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from transformers import AutoModelForCausalLM

from helpers.commands import merge_here
from helpers.exporting import quiet
from helpers.merged import COEFFICIENTS
from helpers.models import merge_config
from rpam_mergekit.errors import RpamError
from rpam_mergekit.folder.contents import RECORD
from rpam_mergekit.folder.earlier import MARKER, clear, refuse_folder


@pytest.fixture(autouse=True)
def _quiet():
    with quiet():
        yield


def config_of(pair: Path, **parameters) -> dict:
    return merge_config(
        pair, parameters={"granularity": "layer", "epochs": 1, **parameters}
    )


@pytest.fixture(scope="module")
def merged(pair, tmp_path_factory) -> Path:
    """A merge into several shards."""
    out = tmp_path_factory.mktemp("merged") / "out"
    with quiet():
        return merge_here(config_of(pair, seed=3), out, out_shard_size=40_000)


@pytest.fixture
def out(merged, tmp_path) -> Path:
    return Path(shutil.copytree(merged, tmp_path / "out"))


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


def refusal(out: Path, *models: object) -> str:
    named = [ModelReference.parse(str(model)) for model in models]
    with pytest.raises(RpamError) as refused:
        refuse_folder(out, named, MergeOptions())
    return str(refused.value)


def test_a_second_merge_leaves_nothing_of_the_first(pair, out, tmp_path):
    """Shards and their index, what a killed run had begun, and what tells of it."""
    assert (out / "model.safetensors.index.json").exists()
    for name in (
        "pytorch_model.bin",
        "pytorch_model-00001-of-00002.bin",
        "model-7.safetensors",
        "vocab.json",
        "merges.txt",
        "additional_chat_templates/old.jinja",
        "rpam/report.html",
        "rpam_recipe.yml",
        ".rpam.json.partial",
    ):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("{}")
    (out / ".tmpAb3dx9").write_bytes(bytes(100))
    alone = merge_here(config_of(pair), tmp_path / "alone" / "out")
    assert content(merge_here(config_of(pair), out)) == content(alone)
    AutoModelForCausalLM.from_pretrained(out)


def test_a_merge_of_one_shard_goes_when_the_next_has_several(pair, tmp_path, merged):
    out = merge_here(config_of(pair), tmp_path / "out")
    assert (out / "model.safetensors").exists()
    merge_here(config_of(pair, seed=3), out, out_shard_size=40_000)
    assert content(out) == content(merged)


def test_coefficients_that_lie_elsewhere_leave_none_in_the_folder(pair, out, tmp_path):
    config = config_of(pair, coefficients=str(tmp_path / "named.safetensors"))
    assert not (merge_here(config, out) / COEFFICIENTS).exists()
    assert (tmp_path / "named.safetensors").exists()


def test_a_killed_merge_has_a_mark_and_can_be_run_again(pair, out, monkeypatch):
    """Its folder holds weights without a record then."""
    clear(out, keep_coefficients=True)
    assert not (out / RECORD).exists()
    (out / "model-1.safetensors").write_bytes(b"begun")
    refuse_folder(out, [], MergeOptions())
    merge_here(config_of(pair), out)
    assert not (out / MARKER).exists()
    assert not (out / "model-1.safetensors").exists()


def test_what_a_user_put_beside_a_merge_stays_and_is_said(pair, out, capsys):
    (out / "notes.txt").write_text("mine")
    (out / "samples.jsonl").write_text("{}")
    merge_here(config_of(pair), out, quiet=False)
    assert "also holds what this merge did not make: notes.txt, samples.jsonl" in (
        capsys.readouterr().err
    )
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("model", ["long", "short"])
@pytest.mark.parametrize("spelling", ["plain", "dots", "relative", "link", "slash"])
def test_the_folder_of_an_input_is_refused(
    pair, tmp_path, monkeypatch, model, spelling
):
    copy = Path(shutil.copytree(pair, tmp_path / "pair"))
    before = content(copy)
    monkeypatch.chdir(copy)
    (tmp_path / "link").symlink_to(copy / model)
    out = {
        "plain": str(copy / model),
        "dots": f"./{model}/../{model}",
        "relative": model,
        "link": str(tmp_path / "link"),
        "slash": f"{copy / model}/",
    }[spelling]
    with pytest.raises(RpamError, match=f"the folder of .*{model}"):
        merge_here(config_of(copy), out)
    assert content(copy) == before


def test_the_folder_that_an_input_s_links_lead_to_is_refused(pair, tmp_path):
    """As an adapter's, and that of files behind links."""
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in (pair / "long").iterdir():
        (linked / path.name).symlink_to(path)
    assert "is the folder of" in refusal(pair / "long", linked)
    (tmp_path / "lora").mkdir()
    assert "is the folder of" in refusal(tmp_path / "lora", f"{linked}+{tmp_path}/lora")


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "x.safetensors", "pytorch_model.bin", "m.gguf", "README.md"],
)
def test_a_folder_that_no_merge_of_ours_wrote_is_refused(pair, tmp_path, name):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(RpamError, match=f"OUT: .* holds {name}, but no rpam.json"):
        merge_here(config_of(pair), out)
    assert content(out) == {name: b"mine"}


def test_a_merge_of_another_method_is_somebody_else_s(pair, tmp_path):
    models = [{"model": str(pair / name)} for name in ("long", "short")]
    config = {"merge_method": "linear", "models": models, "dtype": "float32"}
    out = merge_here({**config, "parameters": {"weight": 0.5}}, tmp_path / "out")
    assert "somebody else" in refusal(out)
    merge_here({**config, "parameters": {"weight": 0.5}}, out)  # as mergekit does


@pytest.mark.parametrize("name", ["adapter_config.json", "other.safetensors"])
def test_what_would_be_loaded_with_the_merge_is_refused(out, name):
    before = content(out)
    (out / name).write_text("{}")
    assert f"holds {name}, which the merged model would be loaded with" in refusal(out)
    (out / name).unlink()
    refuse_folder(out, [], MergeOptions())
    shutil.copy(out / COEFFICIENTS, out / "named.safetensors")  # ours, wherever it is
    refuse_folder(out, [], MergeOptions())
    (out / "named.safetensors").unlink()
    assert content(out) == before


def test_a_killed_merge_of_before_the_mark_is_known(out):
    """By the config beside it, or by its coefficients."""
    (out / RECORD).unlink()
    refuse_folder(out, [], MergeOptions())
    (out / "mergekit_config.yml").unlink()
    refuse_folder(out, [], MergeOptions())
    (out / COEFFICIENTS).unlink()
    assert "somebody else" in refusal(out)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").write_text("mine")
    assert "is a file" in refusal(tmp_path / "out")
