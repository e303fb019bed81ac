"""Shared pieces: tiny models made on the spot, and real mergekit processes."""

from __future__ import annotations

import copy
import functools
import importlib
import json
import logging
import multiprocessing
import os
import random
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from tempfile import TemporaryDirectory

import huggingface_hub.constants
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen2Config

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "examples" / "quickstart"
SCRIPTS = Path(sys.executable).parent
TIMEOUT = 900  # seconds, of one command
sys.path.insert(0, str(QUICKSTART))

import chains  # noqa: E402

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tiny tensors are slower on several threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    return chains.build_tokenizer()


def qwen2_config(tokenizer, **changes) -> Qwen2Config:
    return Qwen2Config(
        **{
            **TINY,
            "vocab_size": len(tokenizer),
            "tie_word_embeddings": False,
            **changes,
        }
    )


def save_pair(
    folder: Path, config: PretrainedConfig, tokenizer, dtype=torch.float32
) -> tuple[Path, Path]:
    """Write two models of `config` that differ a little, like two fine-tunings."""
    first, second = save_experts(folder, config, tokenizer, ("long", "short"), dtype)
    return first, second


def save_experts(
    folder: Path,
    config: PretrainedConfig,
    tokenizer,
    names: Sequence[str],
    dtype=torch.float32,
) -> list[Path]:
    """Write models of `config` that differ a little, in folders of these names."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    folders = []
    for name in names:
        expert = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        expert.to(dtype).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        folders.append(folder / name)
    return folders


def write_calibration(path: Path, count: int = 16) -> Path:
    """Write queries of 1 to 8 operations, odd ones `long`, with their responses."""
    rng = random.Random(0)
    lines = []
    for number in range(count):
        query = chains.draw(1 + number % 8, rng)
        long = number % 2
        respond = chains.long_response if long else chains.short_response
        lines.append(
            {
                "prompt": query,
                "pattern": "long" if long else "short",
                "response": respond(query),
            }
        )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="session")
def pair(tmp_path_factory, tokenizer) -> Path:
    """A folder with tiny Qwen2 models `long` and `short`, and `calibration.jsonl`."""
    folder = tmp_path_factory.mktemp("pair")
    save_pair(folder, qwen2_config(tokenizer), tokenizer)
    write_calibration(folder / "calibration.jsonl")
    return folder


def merge_config(folder: Path, **changes) -> dict:
    """Return a config for the pair in `folder`; `parameters` are merged in."""
    parameters = {
        "calibration": str(folder / "calibration.jsonl"),
        "epochs": 3,
        "batch_size": 8,
        **changes.pop("parameters", {}),
    }
    config = {
        "merge_method": "rpam",
        "base_model": str(folder / "long"),
        "models": [{"model": str(folder / "short")}],
        "dtype": "float32",
        "parameters": parameters,
        **changes,
    }
    return {key: value for key, value in config.items() if value is not None}


def merge_here(config: dict, out: Path, **options) -> Path:
    """Merge in this process, as mergekit-yaml does; return the folder."""
    # Imported here: the package is armed by the environment's start-up file.
    import mergekit.merge
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.options import MergeOptions

    from rpam_mergekit.merging.method import activate

    activate()
    LoaderCache().loaders.clear()
    mergekit.merge.run_merge(
        MergeConfiguration.model_validate(config),
        str(out),
        MergeOptions(quiet=True, **options),
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
        "rpam_mergekit.merging.method",
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


@pytest.fixture
def mergekit_yaml(tmp_path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run stock mergekit-yaml on a config, by default into `tmp_path/out`."""

    def call(config: dict | str, *options: str, out: Path | None = None):
        path = tmp_path / "rpam.yml"
        text = config if isinstance(config, str) else yaml.safe_dump(config)
        path.write_text(text)
        out = out or tmp_path / "out"
        return run(["mergekit-yaml", str(path), str(out), *options])

    return call
