"""Several processes solve what one does, and stop when one of them is killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from helpers.commands import run, wait_for
from helpers.merged import COEFFICIENTS, solved
from helpers.models import merge_config, write_calibration
from rpam_mergekit.formats.coefficients import CoefficientsFile

# Largest difference from the numbers of one process, after a few epochs.
TOLERANCE = 5e-3


def write_config(folder: Path, pair: Path, **parameters) -> Path:
    path = folder / "rpam.yml"
    path.write_text(yaml.safe_dump(merge_config(pair, parameters=parameters)))
    return path


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def fit_command(config: Path, out: Path) -> list[str]:
    """The pre-pass of a merge into the folder `out`."""
    return ["fit", str(config), "--out", str(out / COEFFICIENTS)]


def start_all(count: int, config: Path, out: Path) -> list[subprocess.Popen]:
    """Start `count` processes as a launcher does."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, "-m", "rpam_mergekit.cli", *fit_command(config, out)],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": str(count),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
            },
        )
        for rank in range(count)
    ]


def finish(processes: list[subprocess.Popen]) -> list[tuple[str, str]]:
    said = [process.communicate(timeout=300) for process in processes]
    codes = [process.returncode for process in processes]
    assert not any(codes), "\n".join(stderr for _, stderr in said)
    return said


def difference(one: Path, two: Path) -> float:
    first, second = (load_file(path / COEFFICIENTS) for path in (one, two))
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def gaps(out: Path) -> list[float]:
    layers = CoefficientsFile(out / COEFFICIENTS).metadata["layers"]
    return [layer["gap_after"] for layer in layers]


def alone(config: Path, out: Path) -> None:
    process = run(["mergekit-rpam", *fit_command(config, out)])
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == str(out / COEFFICIENTS)


@pytest.mark.parametrize(
    ("count", "parameters"),
    [
        (2, {}),
        (3, {"granularity": "tensor", "solver": "lbfgs"}),
        # 16 queries in batches of 5: the last one has fewer queries than processes.
        (3, {"preset": "paper", "epochs": 3, "batch_size": 5, "regularization": 0.1}),
    ],
    ids=["low_rank", "lbfgs", "paper"],
)
def test_processes_together_solve_what_one_does(pair, tmp_path, count, parameters):
    config = write_config(tmp_path, pair, **parameters)
    alone(config, tmp_path / "alone")
    said = finish(start_all(count, config, tmp_path / "together"))
    assert difference(tmp_path / "alone", tmp_path / "together") < TOLERANCE
    assert f"{count} processes" in said[0][1]
    assert said[0][0].strip() == str(tmp_path / "together" / COEFFICIENTS)
    assert all(stdout == "" for stdout, _ in said[1:])
    assert "pre-pass" not in said[1][1]  # one progress bar is enough


def test_processes_together_measure_what_one_does(tmp_path, pair):
    """Batches of one or two queries: some processes have none of their own."""
    calibration = write_calibration(tmp_path / "c.jsonl", count=130)
    parameters = {"calibration": str(calibration), "epochs": 1, "batch_tokens": 48}
    config = write_config(tmp_path, pair, **parameters)
    alone(config, tmp_path / "alone")
    finish(start_all(3, config, tmp_path / "together"))
    one, other = (
        CoefficientsFile(tmp_path / name / COEFFICIENTS).metadata["operating_point"]
        for name in ("alone", "together")
    )
    assert one["held_out"]["patterns"]["long"]["queries"] == 16
    assert one["scale"] == other["scale"]
    for which in ("held_out", "solved"):
        assert one[which]["area"] == pytest.approx(other[which]["area"], abs=0.02)
        for pattern, figures in one[which]["patterns"].items():
            found = other[which]["patterns"][pattern]
            assert found["queries"] == figures["queries"]
            for name in ("first", "closing", "end", "body"):
                expected = figures[name]
                if expected is not None:
                    expected = pytest.approx(expected, abs=0.02)
                assert found[name] == expected


def test_one_of_three_is_killed_the_rest_stop_and_the_run_goes_on(pair, tmp_path):
    config = write_config(tmp_path, pair, epochs=40)
    processes = start_all(3, config, tmp_path / "out")
    wait_for(lambda: len(solved(tmp_path)) == 1, processes[0])
    processes[1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    for process in (processes[0], processes[2]):
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 1
        assert "another process of this run has ended" in stderr
        assert "start all processes again with the same command" in stderr
        assert "Traceback" not in stderr
    assert time.monotonic() - began < 60
    assert not (tmp_path / "out" / COEFFICIENTS).exists()
    before = solved(tmp_path)
    assert before
    said = finish(start_all(3, config, tmp_path / "out"))
    assert f"{len(before)} of 3 layers were solved" in said[0][1]
    finish(start_all(3, config, tmp_path / "whole"))
    resumed, whole = (tmp_path / name / COEFFICIENTS for name in ("out", "whole"))
    assert resumed.read_bytes() == whole.read_bytes()
    # Over hundreds of steps fields drift apart, at the same distance from the experts.
    alone(config, tmp_path / "alone")
    for one, two in zip(
        gaps(tmp_path / "alone"), gaps(tmp_path / "whole"), strict=True
    ):
        assert abs(one - two) < 1e-3


def test_torchrun_and_then_the_merge(pair, tmp_path):
    config = write_config(tmp_path, pair)
    out = tmp_path / "out"
    process = run(
        [
            *("torchrun", "--nproc-per-node", "2", "--master-port", str(free_port())),
            *("-m", "rpam_mergekit.cli", *fit_command(config, out)),
        ]
    )
    assert process.returncode == 0, process.stderr
    process = run(["mergekit-yaml", str(config), str(out)])
    assert process.returncode == 0, process.stderr
    assert "coefficients reused" in process.stderr
    assert torch.isfinite(
        load_file(next(out.glob("*.safetensors")))["lm_head.weight"]
    ).all()


def test_fit_is_the_pre_pass_of_the_merge(pair, tmp_path):
    config = write_config(tmp_path, pair)
    alone(config, tmp_path / "fit")
    assert not list((tmp_path / "fit").glob("*.safetensors"))
    process = run(["mergekit-yaml", str(config), str(tmp_path / "merge")])
    assert process.returncode == 0, process.stderr
    one, two = ((tmp_path / n / COEFFICIENTS).read_bytes() for n in ("fit", "merge"))
    assert one == two


def test_fit_refuses_other_methods_and_bad_configs(pair, tmp_path):
    config = write_config(tmp_path, pair, epochss=3)
    process = run(["mergekit-rpam", *fit_command(config, tmp_path / "out")])
    assert process.returncode == 1
    assert "parameters.epochss: unknown parameter. Did you mean" in process.stderr
    config.write_text(
        yaml.safe_dump(merge_config(pair, merge_method="slerp", parameters={"t": 0.5}))
    )
    process = run(["mergekit-rpam", *fit_command(config, tmp_path / "out")])
    assert process.returncode == 1
    assert "merge_method: found 'slerp'" in process.stderr
    assert "Traceback" not in process.stderr


def test_the_file_is_named_by_the_option_or_the_config(pair, tmp_path):
    config = write_config(tmp_path, pair)
    process = run(["mergekit-rpam", "fit", str(config)], cwd=tmp_path)
    assert process.returncode == 1
    assert "give --out, or name it in parameters.coefficients" in process.stderr
    config = write_config(tmp_path, pair, coefficients="mine.safetensors")
    process = run(["mergekit-rpam", "fit", str(config)], cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == "mine.safetensors"
    assert (tmp_path / "mine.safetensors").exists()
