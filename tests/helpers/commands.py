"""Real commands, in processes of their own, and merges in this one."""

from __future__ import annotations

import functools
import importlib
import logging
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
import warnings
from importlib.metadata import entry_points
from pathlib import Path
from tempfile import TemporaryDirectory

import huggingface_hub.constants
import torch
import yaml

from helpers.paths import SCRIPTS

TIMEOUT = 900  # seconds, of one command


def merge_here(config: dict, out: Path, **options) -> Path:
    """Merge in this process, as mergekit-yaml does; return the folder."""
    # Imported here: the package is armed by the environment's start-up file.
    import mergekit.merge
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.options import MergeOptions

    from rpam_mergekit.merging.hooks import activate

    activate()
    LoaderCache().loaders.clear()
    mergekit.merge.run_merge(
        MergeConfiguration.model_validate(config),
        str(out),
        MergeOptions(**{"quiet": True, **options}),
        yaml.safe_dump(config, sort_keys=False),
    )
    return out


def run(
    command: list[str], cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run one of the environment's commands in a process of its own; never raises.

    A command of mergekit or ours is forked from this process, where the libraries are
    imported already, unless it is given an environment, which they read when they are
    imported. On machines with a GPU nothing is forked: CUDA does not survive it.
    """
    if not environment and not torch.cuda.is_available():
        for script in entry_points(group="console_scripts", name=command[0]):
            return _forked(script, command, cwd)
    return run_fresh(command, cwd, **environment)


def run_fresh(
    command: list[str], cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run one of the environment's commands with one thread; never raises."""
    return subprocess.run(
        [str(SCRIPTS / command[0]), *command[1:]],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        cwd=cwd,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            **environment,
        },
        check=False,
    )


@functools.cache
def _preload() -> None:
    """Import what the forked commands would import each for itself."""
    for name in (
        "mergekit.scripts.run_yaml",
        "mergekit.scripts.multimerge",
        "rpam_mergekit.merging.hooks",
        "transformers.models.qwen2.modeling_qwen2",
        "transformers.models.llama.modeling_llama",
    ):
        importlib.import_module(name)


def _forked(
    script, command: list[str], cwd: Path | None
) -> subprocess.CompletedProcess[str]:
    _preload()
    with TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        context = multiprocessing.get_context("fork")
        process = context.Process(target=_be, args=(script, command, cwd, files))
        process.start()
        process.join(TIMEOUT)
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"{command} did not end")
        out, err = (file.read_text(encoding="utf-8") for file in files)
    return subprocess.CompletedProcess(command, process.exitcode, out, err)


def _be(script, command: list[str], cwd: Path | None, files: list[Path]) -> None:
    """Be a console script in a forked process, with none of pytest's state."""
    # PyTorch makes its threads anew after a fork; two threads at once must not try.
    torch.set_num_threads(1)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    logging.getLogger().handlers.clear()
    warnings.showwarning = warnings._showwarning_orig  # type: ignore[attr-defined]
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.chdir(cwd or os.getcwd())
    sys.argv = list(command)
    sys.modules["__main__"].__package__ = None  # click takes its own name from there
    status: object = 1
    try:
        status = script.load()()
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        if isinstance(status, str):
            print(status, file=sys.stderr)
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else int(status is not None))


def succeeded(process) -> None:
    assert process.returncode == 0, process.stderr


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
