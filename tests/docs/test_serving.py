"""The page on serving: every command is run, or marked as not run here."""

from __future__ import annotations

import json
import re
import shutil

from click.testing import CliRunner

from helpers.engines import Engine, serving, sglang
from helpers.pages import shell_lines
from helpers.paths import QUICKSTART, ROOT
from rpam_mergekit.cli.main import main
from rpam_mergekit.formats.samples import SampleReader

PAGE = ROOT / "docs" / "serving.md"
MARKED = re.compile(r"^\*(Run|Not run)\b[^\n]*(?:\n[^\n]+)*\*\n\n```sh$", re.MULTILINE)


def test_every_block_says_whether_it_was_run():
    page = PAGE.read_text("utf-8")
    assert page.count("```sh\n") == len(MARKED.findall(page)) == 6
    assert MARKED.findall(page).count("Run") == 2


def test_the_command_that_shows_the_share_that_thinks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(QUICKSTART / "long", "out")
    rows = [{"question": f"7+5*{n}=", "answer": "-"} for n in range(4)]
    with open("queries.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    (line,) = [x for x in shell_lines(PAGE) if x.startswith("mergekit-rpam ")]
    engine = Engine(
        texts=["<think>7+5=2</think>2", "2"], form=sglang, models=["merged"]
    )
    with serving(engine):
        words = line.replace("http://localhost:8000/v1", engine.url).split()[1:]
        result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert "thinking          50.0%" in result.output
    assert "2 responses came as reasoning without content" in result.output
    states = [
        r.thinking for q in SampleReader("merged.samples.jsonl") for r in q.responses
    ]
    assert sorted(states) == ["closed", "closed", "none", "none"]


def test_the_note_that_the_page_quotes_is_one_there_is():
    (quoted,) = re.findall(r'"(came as reasoning[^"]*)"', PAGE.read_text("utf-8"))
    source = (ROOT / "rpam_mergekit" / "sampling" / "turns.py").read_text("utf-8")
    assert quoted in source
