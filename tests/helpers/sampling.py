"""Sampling by the real command, and a server to sample from."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from helpers.commands import run
from helpers.paths import ROOT

TASK = ["--temperature", "1", "--top-p", "1", "--max-tokens", "72"]


class Server:
    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}/v1"
        self.counts_url = f"http://127.0.0.1:{port}/counts"

    def counts(self) -> dict[str, int]:
        with urllib.request.urlopen(self.counts_url) as response:
            return json.load(response)


@contextmanager
def serving(*arguments: str) -> Iterator[Server]:
    """Run openai_server.py in a process of its own."""
    script = str(ROOT / "tests" / "helpers" / "openai_server.py")
    process = subprocess.Popen(
        [sys.executable, script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Server(process, int(process.stdout.readline().split()[1]))
    finally:
        process.kill()
        process.communicate()


def sample(model: str, questions: str, out: Path, *options: str, **environment: str):
    command = ["mergekit-rpam", "sample", model, "--dataset", questions]
    return run([*command, "--out", str(out), *TASK, *options], **environment)


def refused(process, *expected: str) -> None:
    assert process.returncode == 1, process.stderr
    assert "Traceback" not in process.stderr
    for text in expected:
        assert text in process.stderr, process.stderr
