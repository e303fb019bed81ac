"""Publishing a merge: what goes up, byte by byte, what does not, what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from helpers.commands import merge_here, run, succeeded
from helpers.hub_server import Hub, add_repository, serving, user
from helpers.models import merge_config
from rpam_mergekit.cli.main import main
from rpam_mergekit.errors import RpamError
from rpam_mergekit.formats.calibration import read_calibration
from rpam_mergekit.formats.coefficients import CoefficientsFile
from rpam_mergekit.outputs.card import END, START, complete, front_matter
from rpam_mergekit.outputs.publish import Request, make_plan
from rpam_mergekit.settings import RpamSettings

COEFFICIENTS = "rpam/coefficients.safetensors"
COMPARED = """queries: gsm8k (1319). Means; 95 % intervals by bootstrap.

|  | accuracy | mean tokens |
| --- | --- | --- |
| long | 80.0 % | 900.0 |
| merged | 79.0 % | 400.0 |
"""
NEVER = {
    ".cache.json": "hidden",
    "merge.log": "not a finished file",
    "results.json": "no part of the model",
    "calibration.jsonl": "no part of the model",
    "other.safetensors": "no part of the model",
    "rpam/.coefficients.safetensors.lock": "hidden",
    "rpam/coefficients.safetensors.partial": "not a finished file",
    "rpam/coefficients.safetensors.unfinished": "not a finished file",
}


def write_record(out: Path, pair: Path) -> None:
    """Write rpam.json as the end of a merge does."""
    content = (out / COEFFICIENTS).read_bytes()
    metadata = CoefficientsFile(out / COEFFICIENTS).metadata
    models = [("long", "long", "base"), ("short", "short", "other")]
    record = {
        "format": 1,
        "method": "rpam",
        "paper": "https://arxiv.org/abs/2601.03506",
        "versions": {"rpam_mergekit": "0", "mergekit": "0.1.5"},
        "models": [
            {"model": name, "pattern": pattern, "role": role, "content": "0" * 64}
            for name, pattern, role in models
        ],
        "calibration": {"digest": read_calibration(pair / "calibration.jsonl").digest},
        "settings": metadata["fingerprint"]["settings"],
        "dtype": "float32",
        "out_dtype": None,
        "coefficients": {
            "sha256": hashlib.sha256(content).hexdigest(),
            "bytes": len(content),
            "path": COEFFICIENTS,
        },
        "layers": metadata["layers"],
    }
    (out / "rpam.json").write_text(json.dumps(record, indent=2))


@pytest.fixture(scope="module")
def merged(pair, tmp_path_factory) -> Path:
    """A merge, with what else may lie in its folder."""
    folder = tmp_path_factory.mktemp("merged")
    (folder / "rpam.yml").write_text(yaml.safe_dump(merge_config(pair)))
    out = folder / "out"
    command = ["mergekit-yaml", str(folder / "rpam.yml"), str(out)]
    succeeded(run([*command, "--out-shard-size", "40k"]))
    assert len(list(out.glob("*.safetensors"))) > 1
    if not (out / "rpam.json").exists():
        write_record(out, pair)
    for name in NEVER:
        if name.endswith(".unfinished"):
            (out / name).mkdir()
        elif not (out / name).exists():
            (out / name).write_bytes(b"{}")
    return out


@pytest.fixture
def hub(tmp_path) -> Hub:
    tokens = {"write": user("me", "write", "org"), "read": user("me", "read")}
    (tmp_path / "hub").mkdir()
    return Hub(tmp_path / "hub", tokens)


@pytest.fixture
def push(hub, tmp_path) -> Iterator[Callable]:
    """Run `mergekit-rpam push` against the server of `hub`, by default to write."""
    with serving(hub) as address:

        def call(*arguments: object, token: str = "write", **environment: str):
            settings = {
                "HF_ENDPOINT": address,
                "HF_HUB_OFFLINE": "0",
                "HF_HUB_DISABLE_XET": "1",
                "HF_HOME": str(tmp_path / "home"),
                **({"HF_TOKEN": token} if token else {}),
                **environment,
            }
            return run(["mergekit-rpam", "push", *map(str, arguments)], **settings)

        yield call


@pytest.fixture
def named(pair) -> list[str]:
    """Hub names for the pair's folders."""
    names = [f"{pair / name}=org/{name}" for name in ("long", "short")]
    return [argument for name in names for argument in ("--model", name)]


def refusal(process) -> str:
    assert process.returncode == 1, process.stdout
    assert "Traceback" not in process.stderr
    return process.stderr


def refused(*arguments: object) -> str:
    """Return why the command, in this process, refuses what needs no server."""
    result = CliRunner().invoke(main, ["push", *(str(one) for one in arguments)])
    assert result.exit_code == 1, result.output
    return result.output


def test_a_dry_run_says_everything_and_changes_nothing(
    merged, hub, push, named, tmp_path
):
    (tmp_path / "compare.md").write_text(COMPARED)
    comparison = ("--comparison", tmp_path)
    process = push(merged, "me/merge", *named, *comparison)
    succeeded(process)
    for name, reason in NEVER.items():
        assert f"  {name}: {reason}\n" in process.stdout
    for name in ("model-00001-of-", "README.md", "rpam.yml", COEFFICIENTS, "total"):
        assert f"B  {name}" in process.stdout
    assert "/me/merge (new), branch main:" in process.stdout
    assert "+| merged | 79.0 % | 400.0 |" in process.stdout
    assert process.stdout.endswith("nothing was sent; --upload does it\n")
    assert list(hub.cache.iterdir()) == []
    assert not [r for r in hub.requests if r.startswith(("POST", "PUT"))]


def test_an_upload_puts_up_the_same_bytes_and_a_valid_card(merged, hub, push, named):
    succeeded(push(merged, "org/merge", *named, "--upload", "--private"))
    there = hub.files("models", "org/merge")
    assert "org/merge" in hub.private
    assert not set(there) & set(NEVER)
    made = {"README.md", "rpam.json", "rpam.yml", "rpam/report.html", "rpam/report.png"}
    for name in there.keys() - made:
        assert there[name] == (merged / name).read_bytes(), name
    shards = {path.name for path in merged.glob("model-*.safetensors")}
    assert made | shards | {COEFFICIENTS, "tokenizer.json", "config.json"} < set(there)
    card = there["README.md"].decode()
    matter = front_matter(card)
    assert {"rpam", "reasoning", "merge", "mergekit"} <= set(matter["tags"])
    assert matter["base_model"] == ["org/long", "org/short"]
    assert "[org/long](https://huggingface.co/org/long) | long: reasons" in card
    assert json.loads(there["rpam.json"])["models"][1]["model"] == "org/short"
    recipe = yaml.safe_load(there["rpam.yml"])
    assert recipe["base_model"] == "org/long"
    assert recipe["parameters"]["coefficients"] == f"hf://org/merge/{COEFFICIENTS}"
    assert "calibration" not in recipe["parameters"]
    assert b"<svg" in there["rpam/report.html"]


def test_what_is_up_is_not_sent_again(merged, hub, push, named):
    arguments = (merged, "me/merge", *named, "--upload", "--revision", "v1")
    succeeded(push(*arguments))
    commits = len(list(hub.cache.glob("*/snapshots/*")))
    hub.requests.clear()
    process = push(*arguments)
    succeeded(process)
    assert "note: me/merge holds this merge by rpam" in process.stdout
    assert not [r for r in hub.requests if r.startswith("PUT")]
    assert len(list(hub.cache.glob("*/snapshots/*"))) == commits


def test_without_weights_others_get_what_repeats_the_merge(
    merged, hub, push, named, pair, tmp_path
):
    """Its config has names of the Hub alone, and no calibration data."""
    arguments = (merged, "me/recipe", "--without-weights", "--revision", "v1")
    message = refused(*arguments)
    assert f"--model {pair / 'long'}=owner/name" in message
    succeeded(push(*arguments, *named, "--upload"))
    there = hub.files("models", "me/recipe", "v1")
    assert set(there) == {"README.md", "rpam.json", "rpam.yml", COEFFICIENTS}
    for name, content in there.items():
        assert str(pair).encode() not in content, name
    recipe = yaml.safe_load(there["rpam.yml"])
    reference = f"hf://me/recipe@v1/{COEFFICIENTS}"
    assert recipe["parameters"]["coefficients"] == reference
    assert [one["model"] for one in recipe["models"]] == ["org/short"]
    assert there["README.md"].decode().count("merge_method: rpam") == 1


def test_the_card_says_that_there_is_a_model_only_if_there_is(merged):
    record = json.loads((merged / "rpam.json").read_text())
    assert "This model was made by [RPAM" in complete("", record)
    assert "The model of this recipe is made" in complete("", record, weights=False)


def test_a_folder_is_refused_that_is_no_whole_merge(merged, tmp_path):
    assert "OUT: no folder" in refused(tmp_path / "none", "me/merge")
    out = tmp_path / "out"
    shutil.copytree(merged, out)
    shard = sorted(out.glob("model-*.safetensors"))[0]
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    assert f"OUT: {shard.name} cannot be read" in refused(out, "me/merge")
    shard.unlink()
    assert f"{shard.name} is missing" in refused(out, "me/merge")
    shard.write_bytes(content)
    (out / "config.json").unlink()
    assert "has no config.json" in refused(out, "me/merge")
    (out / "rpam.json").unlink()
    assert "has no rpam.json" in refused(out, "me/merge")


def test_weights_that_the_merge_did_not_write_are_refused(pair, tmp_path):
    """Without weights they do not matter; records of before do not know them."""
    config = merge_config(pair, parameters={"granularity": "layer", "epochs": 1})
    out = merge_here(config, tmp_path / "out")
    request = Request(out, "me/merge")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    assert "model.safetensors" in make_plan(request, scratch).files
    shard = out / "model.safetensors"
    before = shard.read_bytes()
    shard.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    message = refused(out, "me/merge")
    assert "the SHA-256 of model.safetensors is not in rpam.json" in message
    hub = {str(pair / name): f"org/{name}" for name in ("long", "short")}
    make_plan(replace(request, weights=False, named=hub), scratch)
    record = json.loads((out / "rpam.json").read_text())
    del record["weights"]
    (out / "rpam.json").write_text(json.dumps(record))
    assert "no digests of the weights" in "\n".join(make_plan(request, scratch).notes)


def test_coefficients_of_another_merge_are_refused(merged, tmp_path):
    other = tmp_path / "coefficients.safetensors"
    other.write_bytes((merged / COEFFICIENTS).read_bytes() + b" ")
    message = refused(merged, "me/merge", "--coefficients", other)
    assert f"--coefficients: {other} is not the file by which" in message


@pytest.mark.parametrize(
    ("arguments", "finding"),
    [
        (["merge"], "REPO: found 'merge', expected owner/name."),
        (["a/b/c"], "REPO: found 'a/b/c', expected owner/name."),
        (["me/m", "--model", "x=org/x"], "--model x=org/x: the merge has no model 'x'"),
        (["me/m", "--model", "=org/x"], "expected LOCAL=owner/name"),
        (["me/m", "--comparison", "none.md"], "--comparison: none.md cannot be read"),
        (["me/m", "--comparison", __file__], "is not a compare.md of"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(merged, arguments, finding):
    assert finding in refused(merged, *arguments)


@pytest.mark.parametrize(
    ("token", "repository", "finding"),
    [
        ("", "me/merge", "no token was found. Log in: hf auth login"),
        ("wrong", "me/merge", "the Hub does not accept your token"),
        ("read", "me/merge", "your token can only read"),
        ("write", "you/merge", "REPO: your account cannot write to 'you', only to me"),
    ],
)
def test_who_may_not_write_is_told_before_anything_is_sent(
    merged, hub, push, token, repository, finding
):
    assert finding in refusal(push(merged, repository, "--upload", token=token))
    assert not [r for r in hub.requests if r.startswith(("POST", "PUT"))]


def test_a_dry_run_needs_no_network(merged, push):
    process = push(merged, "me/merge", HF_HUB_OFFLINE="1")
    succeeded(process)
    assert "--upload would be refused: http://127.0.0.1" in process.stdout


def test_a_repository_that_holds_something_else(merged, hub, push, tmp_path):
    """Nothing in it is deleted; weights that would be loaded instead are refused."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "README.md").write_text("# Something else\n")
    (other / "notes.txt").write_text("keep me")
    add_repository(hub.cache, "models", "me/used", other)
    process = push(merged, "me/used", "--private")
    assert "me/used holds something that is not a merge by rpam" in process.stdout
    assert "note: replaced there: README.md\n" in process.stdout
    assert "note: stay there as they are: notes.txt\n" in process.stdout
    assert "refused: --private: me/used exists and is public." in process.stdout
    succeeded(push(merged, "me/used", "--upload"))
    there = hub.files("models", "me/used")
    assert there["notes.txt"] == b"keep me"
    assert b"org/long" not in there["README.md"]
    (other / "model.safetensors").write_bytes(b"old weights")
    add_repository(hub.cache, "models", "me/old", other)
    message = refusal(push(merged, "me/old", "--upload"))
    assert "may be loaded in their place: model.safetensors. Delete them" in message


def test_local_models_without_names_leave_the_readers_config_out(merged, push, pair):
    process = push(merged, "me/merge")
    succeeded(process)
    assert "note: rpam.yml, by which others repeat the merge, is left" in process.stdout
    assert "rpam.yml\n" not in process.stdout
    assert "mergekit_config.yml and README.md name folders of this" in process.stdout


# The card


def test_a_completed_card_is_completed_once(merged):
    record = json.loads((merged / "rpam.json").read_text())
    readme = (merged / "README.md").read_text()
    first = complete(readme, record)
    assert complete(first, record) == first
    compared = complete(first, record, comparison=COMPARED)
    assert compared.count(START) == compared.count(END) == 1
    assert "| merged | 79.0 % | 400.0 |" in compared
    assert complete(compared, record) == first
    assert first.index("### Merge Method") < first.index(START)
    assert first.index(END) < first.index("### Configuration")


def test_what_a_user_wrote_into_a_card_stays(merged):
    record = json.loads((merged / "rpam.json").read_text())
    readme = "---\nlicense: mit\ntags: [mine]\nlanguage: [de]\n---\n# Über\n\nText\n"
    card = complete(readme, record)
    assert "# Über\n\nText\n" in card
    assert front_matter(card) == {
        "license": "mit",
        "tags": ["mine", "rpam", "reasoning"],
        "language": ["de"],
    }
    with pytest.raises(RpamError, match="the front matter is not YAML"):
        complete("---\na: [\n---\n", record)


def test_a_card_names_settings_that_are_not_the_defaults(merged):
    record = json.loads((merged / "rpam.json").read_text())
    card = complete("", record)
    listed = "the defaults: `batch_size: 8`, `epochs: 3`.\n"
    assert f"Settings that differ from {listed}" in card
    record["settings"] = RpamSettings().cache_key()
    assert "Settings: the defaults." in complete("", record)
    assert card.count("| 0 | ") == 1
    assert record["calibration"]["digest"] in card
