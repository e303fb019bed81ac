"""The commands that README and docs show exist, with the options they show."""

from __future__ import annotations

import re
import shlex

import pytest

from helpers.pages import shell_lines
from helpers.paths import QUICKSTART, ROOT
from rpam_mergekit.cli.main import main

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [QUICKSTART / "README.md", ROOT / "examples" / "smollm2" / "README.md"]


def commands() -> list[tuple[str, str]]:
    return [
        (page.name, line)
        for page in PAGES
        for line in shell_lines(page)
        if line.startswith("mergekit-rpam ")
    ]


def test_the_pages_show_commands():
    shown = {line.split()[1] for _, line in commands()}
    assert {"sample", "label"} <= shown


@pytest.mark.parametrize(("page", "line"), commands())
def test_a_command_that_a_page_shows_parses(page, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "rpam").mkdir(parents=True)
    for file in ("rpam.yml", "out/rpam/coefficients.safetensors"):
        (tmp_path / file).touch()
    name, *arguments = shlex.split(line, comments=True)[1:]
    # The group makes local files of the Hub's, which would be looked for there.
    arguments = [re.sub(r"^hf://.*/", "", argument) for argument in arguments]
    command = main.get_command(None, name)
    assert command is not None, f"{page}: {name}"
    command.make_context(name, arguments)


def test_the_presets_that_the_docs_list_are_those_there_are():
    from rpam_mergekit.sampling.benchmarks import PRESETS

    page = (ROOT / "docs" / "calibration.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `([a-z0-9-]+)` \| (\S+/\S+)", page, re.MULTILINE))
    assert listed == {name: preset.path for name, preset in PRESETS.items()}
