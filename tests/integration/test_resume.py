"""A pre-pass that ends too early loses nothing: kills, full disks, two at once."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

from helpers.commands import run, start, wait_for
from helpers.merged import COEFFICIENTS, solved
from helpers.models import merge_config
from helpers.paths import SCRIPTS

SLOWLY = {"epochs": 100}


def command(folder: Path, pair: Path, **changes) -> list[str]:
    path = folder / "rpam.yml"
    path.write_text(yaml.safe_dump(merge_config(pair, **changes)))
    return ["mergekit-yaml", str(path), str(folder / "out")]


def written(folder: Path) -> list[bytes]:
    paths = sorted((folder / "out").glob("*.safetensors"))
    return [p.read_bytes() for p in [*paths, folder / "out" / COEFFICIENTS]]


@pytest.fixture(scope="module")
def uninterrupted(pair, tmp_path_factory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    process = run(command(folder, pair, parameters=SLOWLY))
    assert process.returncode == 0, process.stderr
    left = {path.name for path in (folder / "out" / "rpam").iterdir()}
    assert left == {COEFFICIENTS.name, f".{COEFFICIENTS.name}.lock"}
    return written(folder)


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    pair, tmp_path, uninterrupted
):
    arguments = command(tmp_path, pair, parameters=SLOWLY)
    for count in (1, 2):
        process = start(arguments)
        wait_for(lambda count=count: len(solved(tmp_path)) == count, process)
        os.killpg(process.pid, signal.SIGKILL)
        said = process.communicate()[1]
        assert ("going on behind them" in said) == (count == 2)
        assert not (tmp_path / "out" / COEFFICIENTS).exists()
    process = run(arguments)
    assert process.returncode == 0, process.stderr
    assert "2 of 3 layers were solved by a run that did not end" in process.stderr
    assert written(tmp_path) == uninterrupted
    assert not solved(tmp_path)


KILLED_BEFORE_IT_TIDIES = """
import os, signal, sys
from mergekit.scripts.run_yaml import main
from rpam_mergekit.formats.solved_layers import SolvedLayers
from rpam_mergekit.merging.hooks import activate
SolvedLayers.remove = lambda self: os.kill(os.getpid(), signal.SIGKILL)
activate()
main(sys.argv[1:])
"""


def test_what_a_run_killed_behind_its_last_write_leaves_goes_with_the_next(
    pair, tmp_path
):
    _, *arguments = command(tmp_path, pair, parameters={"epochs": 2})
    killed = run(["python", "-c", KILLED_BEFORE_IT_TIDIES, *arguments])
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "out" / COEFFICIENTS).exists()
    assert solved(tmp_path)
    begun = (pair / "long" / "model.safetensors").read_bytes()[:1000]
    left = [tmp_path / "out" / name for name in (".tmpaB3dE9", ".tmp000000")]
    users = tmp_path / "out" / ".tmpNotes1"
    users.write_text("notes")
    for path, content in zip(left, (begun, bytes(100)), strict=True):
        path.write_bytes(content)
    process = run(["mergekit-yaml", *arguments])
    assert process.returncode == 0, process.stderr
    assert "coefficients reused" in process.stderr
    rpam = {path.name for path in (tmp_path / "out" / "rpam").iterdir()}
    assert rpam == {COEFFICIENTS.name, f".{COEFFICIENTS.name}.lock"}
    assert not any(path.exists() for path in left)
    assert users.read_text() == "notes"


def test_a_killed_runs_layers_are_not_those_of_other_settings(pair, tmp_path):
    arguments = command(tmp_path, pair, parameters=SLOWLY)
    process = start(arguments)
    wait_for(lambda: solved(tmp_path), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    kept = solved(tmp_path)
    other = run(command(tmp_path, pair, parameters={"epochs": 2}))
    assert other.returncode == 0, other.stderr
    assert "going on" not in other.stderr
    assert solved(tmp_path) == kept
    (tmp_path / "plain").mkdir()
    plain = run(command(tmp_path / "plain", pair, parameters={"epochs": 2}))
    assert plain.returncode == 0, plain.stderr
    assert written(tmp_path) == written(tmp_path / "plain")


def largest_file(size: int):
    """A disk that is full: no file can grow beyond `size` bytes."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


@pytest.mark.parametrize(
    ("share", "layers", "said"),
    [(0.02, 0, "0 solved layers are safe"), (0.6, 3, "All layers are solved and safe")],
)
def test_a_full_disk_loses_nothing(pair, tmp_path, uninterrupted, share, layers, said):
    arguments = command(tmp_path, pair, parameters=SLOWLY)
    size = int(share * len(uninterrupted[-1]))
    process = subprocess.Popen(
        [str(SCRIPTS / arguments[0]), *arguments[1:]],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        preexec_fn=largest_file(size),
    )
    message = process.communicate(timeout=600)[1]
    assert process.returncode == 1
    assert said in message
    assert "Traceback" not in message
    assert len(solved(tmp_path)) == layers
    assert not list((tmp_path / "out").rglob("*.partial"))
    again = run(arguments)
    assert again.returncode == 0, again.stderr
    assert written(tmp_path) == uninterrupted


def test_a_place_that_cannot_be_written_is_found_before_the_pre_pass(pair, tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "coefficients.safetensors"
    process = run(command(tmp_path, pair, parameters={"coefficients": str(path)}))
    assert process.returncode == 1
    assert f"parameters.coefficients: {path} cannot be written" in process.stderr
    assert "pre-pass" not in process.stderr
    assert "Traceback" not in process.stderr


def test_two_runs_at_once_make_one_file(pair, tmp_path):
    shared = tmp_path / "shared.safetensors"
    parameters = {"epochs": 250, "coefficients": str(shared)}
    running = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        arguments = command(tmp_path / name, pair, parameters=parameters)
        running.append(start(arguments))
        if name == "first":
            wait_for(lambda: list(tmp_path.glob("*.unfinished/*/*")), running[0])
    said = [process.communicate(timeout=600)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert "waiting for another run" in said[1]
    assert "coefficients reused" in said[1]
    weights = [
        (tmp_path / name / "out" / "model.safetensors").read_bytes()
        for name in ("first", "second")
    ]
    assert weights[0] == weights[1]
    assert not list(tmp_path.glob("*.unfinished"))
