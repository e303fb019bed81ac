"""Fixtures that tests of several folders use; what is no fixture is in `helpers`."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import chains
import pytest
import torch
import yaml
from transformers import LlamaConfig

pytest.register_assert_rewrite("helpers")  # before it is imported

from helpers.commands import run  # noqa: E402
from helpers.models import (  # noqa: E402
    AUTO_MAP,
    OWN_CODE,
    TINY,
    qwen2_config,
    save_pair,
    write_calibration,
)

# Files that merge whole models, start processes or serve: `-m "not slow"`.
SLOW = (
    "benchmarks/",
    "integration/",
    "chat/test_thinking.py",
    "cli/test_configs.py",
    "cli/test_start.py",
    "docs/test_examples.py",
    "docs/test_quickstart.py",
    "evaluate/test_compare.py",
    "formats/test_hub.py",
    "models/test_references.py",
    "outputs/test_export.py",
    "outputs/test_push.py",
    "prepass/test_massive_activations.py",
    "routing/test_probes.py",
    "sampling/test_requests.py",
    "sampling/test_servers.py",
    "sampling/test_turns.py",
    "test_api.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of slow files."""
    here = Path(__file__).parent
    for item in items:
        if item.path.relative_to(here).as_posix().startswith(SLOW):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tiny tensors are slower on several threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    return chains.build_tokenizer()


@pytest.fixture(scope="session")
def pair(tmp_path_factory, tokenizer) -> Path:
    """A folder with tiny Qwen2 models `long` and `short`, and `calibration.jsonl`."""
    folder = tmp_path_factory.mktemp("pair")
    save_pair(folder, qwen2_config(tokenizer), tokenizer)
    write_calibration(folder / "calibration.jsonl")
    return folder


@pytest.fixture(scope="module")
def own_pair(tmp_path_factory, tokenizer) -> Path:
    """A pair like `pair` whose model type is known only to code in its folders."""
    folder = tmp_path_factory.mktemp("own")
    config = LlamaConfig(**TINY, vocab_size=len(tokenizer), tie_word_embeddings=False)
    for model in save_pair(folder, config, tokenizer):
        (model / "own.py").write_text(OWN_CODE)
        path = model / "config.json"
        own = {"model_type": "own", "architectures": ["OwnForCausalLM"]}
        found = json.loads(path.read_text())
        path.write_text(json.dumps({**found, **own, "auto_map": AUTO_MAP}))
    write_calibration(folder / "calibration.jsonl")
    return folder


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
