"""Sharing a merge, end to end: real commands, and a Hub on this machine."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.commands import run, succeeded
from helpers.hub_server import Hub, add_repository, serving, user
from helpers.merged import COEFFICIENTS, shard_bytes
from helpers.models import merge_config
from helpers.pages import BLOCK
from helpers.paths import ROOT, SCRIPTS
from rpam_mergekit.outputs.public_names import public_config

LONG = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
SHORT = "Qwen/Qwen2.5-Math-1.5B"
NOWHERE = "http://127.0.0.1:9"
PAGE = (ROOT / "docs" / "sharing.md").read_text(encoding="utf-8")
# Commands one after the other in one process; each one's status and output as JSON.
COMMANDS = """
import json, shlex, sys
from click.testing import CliRunner
from rpam_mergekit.cli.main import main
for line in sys.argv[1:]:
    program, *arguments = shlex.split(line, comments=True)
    if program == "mergekit-yaml":
        arguments.insert(0, "merge")
    result = CliRunner().invoke(main, arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    print(json.dumps([result.exit_code, result.output]))
"""


@dataclass
class Side:
    """Who uses the Hub: a folder to work in and a home with a cache of its own."""

    folder: Path
    address: str
    token: str = ""

    def environment(self, **changes: str) -> dict[str, str]:
        """Return the variables of a process on this side."""
        found = {
            "HF_ENDPOINT": self.address,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(self.folder.absolute() / "home"),
            **({"HF_TOKEN": self.token} if self.token else {}),
        }
        return found | changes

    def run(self, line: str, **changes: str):
        """Run one command in a process of its own."""
        self.folder.mkdir(exist_ok=True)
        environment = self.environment(**changes)
        return run(shlex.split(line), cwd=self.folder, **environment)

    def commands(self, *lines: str, **changes: str) -> list[tuple[int, str]]:
        """Run commands in one process; return the status and output of each."""
        self.folder.mkdir(exist_ok=True)
        command = ["python", "-c", COMMANDS, *lines]
        process = run(command, cwd=self.folder, **self.environment(**changes))
        succeeded(process)
        found = [line for line in process.stdout.splitlines() if line[:1] == "["]
        return [tuple(json.loads(line)) for line in found]


@dataclass
class Published:
    """A Hub with two models and the recipe me/recipe; the merge it was made of."""

    hub: Hub
    address: str
    out: Path

    def side(self, folder: Path, token: str = "") -> Side:
        return Side(folder, self.address, token)


@pytest.fixture(scope="module")
def published(pair, tmp_path_factory) -> Iterator[Published]:
    """A merge of local folders, published as config and coefficients only."""
    folder = tmp_path_factory.mktemp("published")
    (folder / "rpam.yml").write_text(yaml.safe_dump(merge_config(pair)))
    (folder / "hub").mkdir()
    hub = Hub(folder / "hub", {"mine": user("me", "write", "owner")})
    add_repository(hub.cache, "models", LONG, pair / "long")
    add_repository(hub.cache, "models", SHORT, pair / "short")
    with serving(hub) as address:
        here = Side(folder, address, "mine")
        succeeded(here.run("mergekit-yaml rpam.yml out --out-shard-size 40k"))
        named = f"--model {pair / 'long'}={LONG} --model {pair / 'short'}={SHORT}"
        push = "mergekit-rpam push out me/recipe --without-weights --upload"
        succeeded(here.run(f"{push} {named}"))
        yield Published(hub, address, folder / "out")


def test_config_and_coefficients_give_the_same_bytes_elsewhere(published, tmp_path):
    """In an empty folder with an empty cache: no calibration file, no pre-pass."""
    there = published.side(tmp_path / "there")
    merge = "mergekit-rpam merge hf://me/recipe/rpam.yml out --out-shard-size 40k"
    process = there.run(merge)
    succeeded(process)
    out = there.folder / "out"
    assert shard_bytes(out) == shard_bytes(published.out)
    assert len(shard_bytes(out)) > 1
    taken = f"coefficients taken from hf://me/recipe/{COEFFICIENTS.as_posix()}"
    assert taken in process.stderr
    assert "queries" not in process.stderr
    assert sorted(path.name for path in there.folder.iterdir()) == ["home", "out"]
    # And on from there: it is published by the names of the Hub, without --model.
    assert [m["model"] for m in record(out)["models"]] == [LONG, SHORT]
    assert record(out)["coefficients"] == {
        **record(published.out)["coefficients"],
        "path": f"hf://me/recipe/{COEFFICIENTS.as_posix()}",
    }
    lines = ["mergekit-rpam push out me/again", merge.replace(" out ", " offline ")]
    (status, shown), (again, _) = there.commands(*lines, HF_HUB_OFFLINE="1")
    assert status == again == 0
    assert "B  rpam.yml\n" in shown
    assert "are no names of Hub models" not in shown
    assert shard_bytes(there.folder / "offline") == shard_bytes(out)


def record(out: Path) -> dict[str, Any]:
    return json.loads((out / "rpam.json").read_text())


def test_what_the_hub_refuses_is_said_with_the_next_step(published, pair, tmp_path):
    """Config and coefficients: a wrong revision, a private repository, no server.

    The models are folders: huggingface_hub asks for minutes where no server is.
    """
    hub, there = published.hub, published.side(tmp_path / "there")
    (tmp_path / "closed").mkdir()
    for name, content in hub.files("models", "me/recipe").items():
        path = tmp_path / "closed" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    text = (tmp_path / "closed" / "rpam.yml").read_text()
    for name, folder in ((LONG, "long"), (SHORT, "short")):
        text = text.replace(name, str(pair / folder))
    text = text.replace("hf://me/recipe", "hf://me/closed")
    (tmp_path / "closed" / "rpam.yml").write_text(text)
    add_repository(hub.cache, "models", "me/closed", tmp_path / "closed")
    hub.private.add("me/closed")
    there.folder.mkdir()
    recipe = yaml.safe_load(text)
    for name, repository in (("wrong", "me/recipe@v2"), ("shut", "me/closed")):
        reference = f"hf://{repository}/{COEFFICIENTS.as_posix()}"
        recipe["parameters"]["coefficients"] = reference
        (there.folder / f"{name}.yml").write_text(yaml.safe_dump(recipe))

    merge = "mergekit-rpam merge hf://me/closed/rpam.yml {} --out-shard-size 40k"
    shut = there.folder / "shut.yml"
    cold = [Side(tmp_path / name, NOWHERE) for name in ("cold", "colder")]
    asked = [merge.format("out"), f"mergekit-rpam check {shut}"]
    lines = ["hf://me/recipe@v2/rpam.yml", "wrong.yml"]
    lines += ["hf://me/closed/rpam.yml", "shut.yml"]
    with ThreadPoolExecutor(2) as beside:  # they wait for a server most of the time
        refused = beside.map(Side.commands, cold, asked)
        found = there.commands(*(f"mergekit-rpam check {line}" for line in lines))
        succeeded(published.side(there.folder, "mine").run(merge.format("allowed")))
        succeeded(there.run(merge.format("down"), HF_ENDPOINT=NOWHERE))
    for name in ("allowed", "down"):
        assert shard_bytes(there.folder / name) == shard_bytes(published.out), name

    assert [status for status, _ in found] == [1] * 4
    one, two, three, four = (text for _, text in found)
    no_revision = "the model repository me/recipe has no revision 'v2'. Known: main."
    assert f"CONFIG: hf://me/recipe@v2/rpam.yml: {no_revision}" in one
    assert f"parameters.coefficients: hf://me/recipe@v2/{COEFFICIENTS}: the" in two
    assert no_revision in two
    hidden = "has no model repository me/closed, or it is private. Log in: hf auth"
    assert all(hidden in text for text in (three, four))
    assert "CONFIG: " in three
    assert "parameters.coefficients: " in four
    for ((status, text),) in refused:
        assert status == 1
        assert f"{NOWHERE} did not give it: " in text
        assert "Try again, or give a local file." in text
    assert not (cold[0].folder / "out").exists()


@pytest.mark.parametrize("module", [False, True])
def test_models_named_in_slices_get_their_names_of_the_hub(module):
    """Else the published recipe would name folders of another machine.

    PyYAML writes what stands in several places once, with an anchor.
    """
    sources = [{"model": name, "layer_range": [0, 2]} for name in ("./long", "./short")]
    slices = [{"sources": sources}, {"sources": sources, "base_model": "./long"}]
    config = {"base_model": "./long", "slices": slices}
    if module:
        config = {"base_model": "./long", "modules": {"default": {"slices": slices}}}
    found = {"models": [{"model": "long"}, {"model": "short"}]}
    named = {"./long": LONG, "./short": SHORT}
    text = yaml.safe_dump(config)
    assert "&id001" in text
    recipe, models, local = public_config(text, found, named, "hf://me/x/y")
    assert (models, local) == ([LONG, SHORT], [])
    assert recipe is not None
    assert "./" not in recipe.replace("out/", "")
    assert public_config(text, found, {}, "hf://me/x/y")[2] == ["./long", "./short"]


class Held(dict[str, bytes]):
    """What a server has stored; from the second object on it waits, then refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.one_is_there, self.killed = threading.Event(), threading.Event()

    def __setitem__(self, oid: str, content: bytes) -> None:
        if self and not self.killed.is_set():
            self.one_is_there.set()
            self.killed.wait(60)
            raise ConnectionAbortedError
        super().__setitem__(oid, content)


def test_a_killed_upload_is_finished_by_the_same_command(published, tmp_path):
    """Killed between two shards: nothing is visible; then all is, each sent once."""
    tokens = {"mine": user("me")}
    (tmp_path / "hub").mkdir()
    objects = Held()
    hub = Hub(tmp_path / "hub", tokens, objects=objects)
    with serving(hub) as address:
        here = Side(tmp_path, address, "mine")
        line = f"mergekit-rpam push {published.out} me/merge --upload"
        program, *arguments = shlex.split(line)
        process = subprocess.Popen(
            [str(SCRIPTS / program), *arguments],
            env={**os.environ, **here.environment()},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        assert objects.one_is_there.wait(120)
        process.kill()
        process.wait()
        objects.killed.set()
        assert hub.files("models", "me/merge") == {}
        (sent,) = objects
        hub.requests.clear()
        succeeded(here.run(line))
    assert f"PUT /lfs/{sent}" not in hub.requests
    there = hub.files("models", "me/merge")
    shards = [path.name for path in published.out.glob("model-*.safetensors")]
    assert len(shards) > 1
    for name in (*shards, COEFFICIENTS.as_posix(), "tokenizer.json", "config.json"):
        assert there[name] == (published.out / name).read_bytes(), name


# The page


def test_the_examples_of_the_page_run(published, pair, tmp_path):
    """All of them, one after the other, on models and an account of their names."""
    here = published.side(tmp_path / "page", "mine")
    here.folder.mkdir()
    (config,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    (here.folder / "theirs.yml").write_text(config)
    own = merge_config(pair, base_model=LONG, models=[{"model": SHORT}])
    (here.folder / "rpam.yml").write_text(yaml.safe_dump(own))
    own["base_model"] = "./my-long"
    own["parameters"]["coefficients"] = "out/rpam/coefficients.safetensors"
    (here.folder / "tuned.yml").write_text(yaml.safe_dump(own))
    shutil.copytree(pair / "long", here.folder / "my-long")
    (here.folder / "report").mkdir()
    (here.folder / "report" / "compare.md").write_text("queries: gsm8k (2).\n\n| x |\n")
    blocks = "\n".join(BLOCK.findall(PAGE)).replace("\\\n", " ")
    lines = [line for line in blocks.splitlines() if line.startswith("mergekit-")]
    assert len(lines) > 8
    prepared = ["merge rpam.yml out --quiet", "merge tuned.yml tuned --quiet"]
    lines = [*(f"mergekit-rpam {line}" for line in prepared), *lines]
    found = here.commands(*lines)
    for line, (status, output) in zip(lines, found, strict=True):
        assert status == 0, f"{line}\n{output}"
    merged = shard_bytes(here.folder / "out")
    assert shard_bytes(here.folder / "merged") == merged
    assert shard_bytes(here.folder / "again") == merged
    assert "owner/name" in published.hub.private


def test_the_page_quotes_the_computed_sizes(monkeypatch):
    """As benchmarks/performance/coefficient_size.py computes them from shapes."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "performance"))
    from coefficient_size import file_bytes, largest_rank, parameters, shapes_of
    from coefficient_size import published as configs

    for name, config in list(configs().items())[:3]:
        shapes = shapes_of(config)
        whole = 2 * parameters(shapes)
        shares = [100 * file_bytes(shapes, rank) / whole for rank in (0, 4, 8, 16)]
        cells = [f"{share:.2f} %" for share in shares]
        cells += [str(largest_rank(shapes, 2))]
        assert f"| {name} | {' | '.join(cells)} |" in PAGE, cells
