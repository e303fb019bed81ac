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
from importlib.metadata import EntryPoints, entry_points
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
    imported already, unless it is given an environment other than huggingface_hub's,
    which may be read when they are imported. On machines with a GPU nothing is forked:
    CUDA does not survive it.
    """
    if _forkable(command, environment):
        process = Forked(command, cwd, environment)
        try:
            said = process.communicate()
        finally:
            process.kill()
        return subprocess.CompletedProcess(command, process.returncode, *said)
    return run_fresh(command, cwd, **environment)


def start(command: list[str]) -> Forked | subprocess.Popen[str]:
    """Start one of the environment's commands in a session of its own."""
    if _forkable(command, {}):
        return Forked(command, None, {}, session=True)
    return subprocess.Popen(
        [str(SCRIPTS / command[0]), *command[1:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        start_new_session=True,
    )


def _forkable(command: list[str], environment: dict[str, str]) -> bool:
    """Tell whether a command may run in a fork of this process.

    Not those that ask a server: what libraries hold of the Hub would be this process's.
    """
    of_hub = all(name.startswith("HF_") for name in environment)
    asks = "HF_ENDPOINT" in environment
    known = bool(_scripts(command))
    return known and of_hub and not asks and not torch.cuda.is_available()


def _scripts(command: list[str]) -> EntryPoints:
    return entry_points(group="console_scripts", name=command[0])


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


class Forked:
    """A command of mergekit or ours in a forked process, with what `Popen` has."""

    def __init__(
        self,
        command: list[str],
        cwd: Path | None,
        environment: dict[str, str],
        session: bool = False,
    ) -> None:
        _preload()
        self._folder = TemporaryDirectory()
        self._files = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        (script,) = _scripts(command)
        self._process = multiprocessing.get_context("fork").Process(
            target=_be,
            args=(script, command, cwd, self._files, environment, session),
        )
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        return self._process.exitcode

    def communicate(self, timeout: float | None = TIMEOUT) -> tuple[str, str]:
        if self.wait(timeout) is None:
            raise TimeoutError(f"process {self.pid} did not end")
        out, err = (file.read_text(encoding="utf-8") for file in self._files)
        return out, err


def _be(
    script,
    command: list[str],
    cwd: Path | None,
    files: list[Path],
    environment: dict[str, str],
    session: bool,
) -> None:
    """Be a console script in a forked process, with none of pytest's state."""
    if session:
        os.setsid()
    # PyTorch makes its threads anew after a fork; two threads at once must not try.
    torch.set_num_threads(1)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    logging.getLogger().handlers.clear()
    warnings.showwarning = warnings._showwarning_orig  # type: ignore[attr-defined]
    _read_anew({"HF_HUB_OFFLINE": "1", **environment})
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


def _read_anew(environment: dict[str, str]) -> None:
    """Give this process an environment that huggingface_hub has read on its import.

    What has been copied from its constants into other modules is found by its value.
    """
    os.environ.update(environment)
    constants, seen = huggingface_hub.constants, {}
    for name, value in vars(constants).items():
        if name.isupper() and isinstance(value, (str, bool, type(None))):
            seen[name] = value
    importlib.reload(constants)
    changed = {n: v for n, v in seen.items() if vars(constants).get(n) != v}
    home, new_home = seen["HF_HOME"], constants.HF_HOME
    for module in [*sys.modules.values()]:
        for name, value in [*getattr(module, "__dict__", {}).items()]:
            if name in changed and value == changed[name]:
                setattr(module, name, getattr(constants, name))
            elif isinstance(value, (str, Path)) and str(value).startswith(home):
                moved = str(value).replace(home, new_home, 1)
                setattr(module, name, type(value)(moved))
    huggingface_hub.hf_api.api.endpoint = constants.ENDPOINT
    huggingface_hub.close_session()


def succeeded(process) -> None:
    assert process.returncode == 0, process.stderr


def wait_for(condition, process: Forked | subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
