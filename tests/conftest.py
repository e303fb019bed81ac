"""Shared pieces: tiny models made on the spot, and real mergekit processes."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen2Config

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "examples" / "quickstart"
SCRIPTS = Path(sys.executable).parent
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
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    folders = []
    for name in ("long", "short"):
        expert = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        expert.to(dtype).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        folders.append(folder / name)
    return folders[0], folders[1]


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


def run(
    command: list[str], cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run one of the environment's commands with one thread; never raises."""
    return subprocess.run(
        [str(SCRIPTS / command[0]), *command[1:]],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=cwd,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            **environment,
        },
        check=False,
    )


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
