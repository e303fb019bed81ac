"""The messages of docs/troubleshooting.md are the code's, and many are provoked."""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import save_file

from helpers.commands import run
from helpers.models import merge_config
from helpers.paths import ROOT
from rpam_mergekit.cli.main import main

PAGE = ROOT / "docs" / "troubleshooting.md"
GAP = "…"


def quoted() -> list[str]:
    """Return the messages that the page's tables quote."""
    return re.findall(r"^\| `(.*?)` \|", PAGE.read_text("utf-8"), re.MULTILINE)


def pattern(message: str) -> re.Pattern[str]:
    """Return what finds a message, anything standing in its gaps."""
    parts = [re.escape(part) for part in message.split(GAP)]
    return re.compile(".*?".join(parts), re.DOTALL)


def texts() -> Iterator[str]:
    """Yield all strings of the package's sources, values in them as a gap."""
    for path in sorted((ROOT / "rpam_mergekit").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(
                    str(part.value) if isinstance(part, ast.Constant) else GAP
                    for part in node.values
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


SOURCES = list(texts())


def test_the_page_quotes_every_kind_of_message():
    assert len(quoted()) > 50
    assert len(set(quoted())) == len(quoted())


@pytest.mark.parametrize("message", quoted())
def test_a_quoted_message_is_in_the_code(message):
    found = pattern(message)
    assert any(found.search(text) for text in SOURCES)


# Provoked: each maker changes the config of a sound merge, or what lies beside it,
# and returns the command that then refuses.

Maker = Callable[[Path, dict], str]
CHECK = "check rpam.yml --no-estimate"
PROVOKED: dict[str, Maker] = {}


def provokes(message: str) -> Callable[[Maker], Maker]:
    def remember(make: Maker) -> Maker:
        PROVOKED[message] = make
        return make

    return remember


def changed(message: str, command: str = CHECK, **changes) -> None:
    """Provoke a message by other keys of the config; None takes one out."""

    def make(folder: Path, config: dict) -> str:
        config["parameters"] |= changes.get("parameters", {})
        config |= {k: v for k, v in changes.items() if k != "parameters"}
        for values in (config, config["parameters"]):
            for key in [k for k, v in values.items() if v is None]:
                del values[key]
        return command

    PROVOKED[message] = make


def lines(message: str, *queries: object) -> None:
    """Provoke a message by the lines of the calibration file."""

    def make(folder: Path, config: dict) -> str:
        text = [q if isinstance(q, str) else json.dumps(q) for q in queries]
        (folder / "calibration.jsonl").write_text("\n".join(text))
        return CHECK

    PROVOKED[message] = make


SHORT = {"prompt": "1+1=", "pattern": "short"}
LONG = {"prompt": "1+1=", "pattern": "long"}

changed(f"parameters.{GAP}: unknown parameter.", parameters={"rnak": 4})
changed(f"{GAP}: unknown key.", basemodel="x")
changed(
    f"parameters.{GAP}: found a list or filter; it takes one value",
    parameters={"rank": [1, 2]},
)
changed("base_model: missing.", base_model=None)
changed(
    "parameters.solver: 'lbfgs' needs few coefficients",
    parameters={"solver": "lbfgs"},
)
changed(f"--device: found '{GAP}', which cannot be used:", f"{CHECK} --device nonsense")
changed("parameters.calibration: missing.", parameters={"calibration": None})
changed(
    f"parameters.calibration: no file {GAP} (looked for {GAP}",
    parameters={"calibration": "nowhere.jsonl"},
)
changed(
    f"parameters.coefficients: no file {GAP}, and no",
    parameters={"calibration": None, "coefficients": "nowhere.safetensors"},
)
changed(
    f"it is not in the cache {GAP}, and HF_HUB_OFFLINE forbids to download it.",
    parameters={"calibration": "hf://owner/name/calibration.jsonl"},
)
changed(f"{GAP}: its config cannot be loaded:", base_model="/nowhere")
changed(
    f"parameters.{GAP}: missing. {GAP} is of no known pair of brackets:",
    parameters={"think_open": "(thinks:"},
)
lines(
    f"no response of the pattern '{GAP}' thinks",
    {**LONG, "response": "2"},
    {**SHORT, "response": "2"},
)
lines("give exactly one of 'prompt' and 'messages'", {"pattern": "long"}, SHORT)
lines(f"not JSON: {GAP}", LONG, "{", SHORT)
lines(f"pattern: found {GAP}", LONG, {**SHORT, "pattern": "shrot"})
lines(f"no query has the pattern '{GAP}'", SHORT)


@provokes("models: found 0 besides base_model, expected one: the Short-CoT model.")
def _only_the_base(folder: Path, config: dict) -> str:
    config["models"] = [{"model": config["base_model"]}]
    return CHECK


@provokes(f"models: {GAP} models have the pattern '{GAP}'.")
def _both_long(folder: Path, config: dict) -> str:
    config["models"] = [
        {"model": str(folder / name), "parameters": {"pattern": "long"}}
        for name in ("long", "short")
    ]
    return CHECK


@provokes(f"{GAP}: the base model has no weight.")
def _a_weight_of_the_base(folder: Path, config: dict) -> str:
    base = {"model": config["base_model"], "parameters": {"weight": 1}}
    config["models"].append(base)
    return CHECK


@provokes(f"{GAP}: given twice, in lines {GAP} and {GAP}.")
def _a_key_twice(folder: Path, config: dict) -> str:
    text = f"dtype: float16\n{yaml.safe_dump(config)}"
    (folder / "twice.yml").write_text(text)
    return CHECK.replace("rpam.yml", "twice.yml")


@provokes(f"{GAP} differs: {GAP} in {GAP}, {GAP} in {GAP}.")
def _another_width(folder: Path, config: dict) -> str:
    path = folder / "short" / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "hidden_size": 64}))
    return CHECK


@provokes("and no template can be made of it that renders the same but for that.")
def _an_opening_in_pieces(folder: Path, config: dict) -> str:
    config["chat_template"] = (
        "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<th' }}{{ 'ink>' }}{% endif %}"
    )
    return CHECK


@provokes(f"{GAP}: its weights cannot be read:")
def _no_weights(folder: Path, config: dict) -> str:
    (folder / "short" / "model.safetensors").unlink()
    return CHECK


@provokes("not a coefficients file of rpam-mergekit")
def _other_safetensors(folder: Path, config: dict) -> str:
    save_file({"x": torch.zeros(1)}, folder / "x.safetensors")
    config["parameters"]["coefficients"] = str(folder / "x.safetensors")
    return CHECK


@provokes(f"{GAP}: mergekit would align the vocabularies by token, but rpam merges by")
def _aligned(folder: Path, config: dict) -> str:
    config["tokenizer_source"] = "base"
    for path in (folder / "short").glob("*.json"):
        path.write_text(path.read_text().replace("<|user|>", "<|human|>"))
    return CHECK


@provokes("an adapter needs mergekit's option --lora-merge-cache FOLDER")
def _an_adapter(folder: Path, config: dict) -> str:
    config["models"] = [{"model": f"{folder / 'short'}+{folder / 'adapter'}"}]
    return CHECK


@provokes(f"parameters.max_tokens: every '{GAP}' prompt of {GAP} is longer than {GAP}")
def _too_short(folder: Path, config: dict) -> str:
    config["parameters"]["max_tokens"] = 1
    return f"fit rpam.yml --out {folder / 'x.safetensors'} --quiet"


@provokes(
    f"OUT: {GAP} has no {GAP}, which every merge by rpam writes when it has ended."
)
def _no_output(folder: Path, config: dict) -> str:
    return f"push {folder / 'long'} owner/name"


def test_a_merge_without_the_plugin_says_what_the_page_quotes(pair, tmp_path):
    """mergekit's own message: it is not in this package's sources."""
    (tmp_path / "rpam.yml").write_text(yaml.safe_dump(merge_config(pair)))
    command = ["mergekit-yaml", str(tmp_path / "rpam.yml"), str(tmp_path / "out")]
    process = run(command, RPAM_MERGEKIT_AUTOLOAD="0")
    assert process.returncode != 0
    (message,) = re.findall(r"^`([^`]+)` is mergekit's", PAGE.read_text(), re.MULTILINE)
    assert message in process.stderr


@pytest.mark.parametrize("message", PROVOKED)
def test_a_message_of_the_page_is_what_users_meet(message, pair, tmp_path, monkeypatch):
    assert any(message in one for one in quoted())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pair, tmp_path, dirs_exist_ok=True)
    config = merge_config(tmp_path)
    command = PROVOKED[message](tmp_path, config)
    (tmp_path / "rpam.yml").write_text(yaml.safe_dump(config))
    result = CliRunner().invoke(main, command.split())
    assert result.exit_code == 1, result.output
    assert pattern(message).search(result.output), result.output
