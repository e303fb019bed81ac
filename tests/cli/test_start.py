"""Help and usage errors come at once: nothing heavy is imported for them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from rpam_mergekit.cli.main import main
from rpam_mergekit.folder.contents import STOCK_RECIPE as RECIPE

HEAVY = ("datasets", "matplotlib", "mergekit", "openai", "torch", "transformers")
# Runs the command as its console script does, and says which heavy packages were
# asked for: by their import, also of one that is not installed.
RUN = f"""
import sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in {HEAVY}:
            print("imported:", name)

sys.meta_path.insert(0, Watch())
from rpam_mergekit.cli.main import main
main(prog_name="mergekit-rpam")
"""
WRONG = {
    "sample": ["model", "--dataset", "gsm8k"],
    "sweep": ["rpam.yml", "--weights", "0:1:0.5"],
    "compare": ["--out", "report"],
}


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN, *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={**os.environ, "COLUMNS": "80"},
    )


def test_the_watch_sees_a_heavy_import(tmp_path):
    (tmp_path / "rpam.yml").write_text("merge_method: rpam\n")
    process = start("check", str(tmp_path / "rpam.yml"))
    assert process.returncode == 1
    assert "imported: mergekit" in process.stdout


@pytest.mark.parametrize("command", [(), *((name,) for name in main.commands)])
def test_help_imports_nothing_heavy(command):
    process = start(*command, "--help")
    assert process.returncode == 0, process.stderr
    assert "imported" not in process.stdout
    assert process.stdout.startswith(" ".join(["Usage: mergekit-rpam", *command]))
    assert "--help" in process.stdout.partition("Usage")[2]


@pytest.mark.parametrize("command", main.commands)
def test_a_usage_error_imports_nothing_heavy(command):
    process = start(command, *WRONG.get(command, ["--no-such-option"]))
    assert process.returncode == 2, process.stderr
    assert process.stdout == ""
    assert process.stderr.startswith(f"Usage: mergekit-rpam {command}")


def test_an_unknown_command_imports_nothing_heavy():
    process = start("checks")
    assert process.returncode == 2
    assert process.stdout == ""
    assert "No such command 'checks'" in process.stderr


def test_the_helps_defaults_are_those_there_are():
    (out,) = (p for p in main.commands["export"].params if p.name == "out")
    assert f"[default: {RECIPE} " in out.help
