"""The reference pages are the code's: settings, presets, commands, words."""

from __future__ import annotations

import re

import click

from helpers.command_line import SHARED, options_of, tables
from helpers.paths import QUICKSTART, ROOT
from rpam_mergekit.cli.main import main
from rpam_mergekit.evaluate import routing_report
from rpam_mergekit.formats.operating_point import OperatingPoint, Routing
from rpam_mergekit.formats.solved_layers import LayerReport
from rpam_mergekit.merging.fit import layer_table
from rpam_mergekit.settings import PRESETS, RpamSettings, settings_table


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def test_the_settings_page_documents_every_setting():
    assert settings_table() in page("settings.md")


def test_the_settings_page_has_the_presets():
    section = page("settings.md").partition("\n## Presets\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| `(.+)` \|$", section, re.MULTILINE)
    assert [name for name, _, _ in rows] == list(PRESETS["paper"])
    for name, default, paper in rows:
        value = RpamSettings.model_fields[name].default
        assert default == ("" if value is None else f"`{value}`"), name
        assert paper == str(PRESETS["paper"][name]), name
    assert PRESETS["qa-merging"] == {**PRESETS["paper"], "layers": 0.3}
    words = " ".join(section.split())
    assert "`qa-merging`" in words
    assert "is `paper` with `layers: 0.3`." in words


def test_the_page_of_commands_has_each_with_its_options():
    text = page("command-line.md")
    sections = dict(
        re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    )
    commands = main.list_commands(click.Context(main))
    assert [*sections] == [*sorted(commands, key=[*sections].index), SHARED]
    listed = re.findall(r"\[`(\w+)`\]\(#\w+\)", text.partition("\n## ")[0])
    assert listed == [name for name in sections if name != SHARED]
    for name, table in tables().items():
        assert table in sections[name], name
    for name in commands:
        assert f"mergekit-rpam {name} " in sections[name]
    shown = {name for name in commands if "#options-of-several" in sections[name]}
    taking = {n for n in commands if "think_open" in {o.name for o in options_of(n)}}
    assert shown == taking == {"sample", "grade", "label", "compare"}


# What tables, messages and settings say without explaining it there.
WORDS = (
    "Expert",
    "Pattern",
    "Stream",
    "Gap",
    "Divergence",
    "Entry",
    "Field",
    "Fixed weight",
    "Held out",
    "Operating point",
    "Opening",
    "Probe",
    "Capped",
    "Heaviest token",
    "Routes",
    "Departure",
    "Area under the curve",
)


def test_the_glossary_has_the_words_of_tables_and_settings():
    entries = {}
    for paragraph in page("glossary.md").split("\n\n"):
        if head := re.match(r"\*\*([^*]+)\*\*", paragraph):
            entries[head[1]] = paragraph
    for word in WORDS:
        assert re.findall(r"`(\w+/\w+\.py)`", entries[word]), word


def test_the_glossary_names_files_that_there_are():
    named = re.findall(r"`(\w+/\w+\.py)`", page("glossary.md"))
    assert len(named) > 40
    assert [
        file for file in named if not (ROOT / "rpam_mergekit" / file).exists()
    ] == []


def test_the_tutorial_shows_the_tables_as_they_are():
    shown = [line.split() for line in page("tutorial.md").splitlines()]
    report = LayerReport(0, 0.5, 0.25, 0.5, 0.5, True, 0.05)
    assert layer_table([report]).splitlines()[0].split() in shown
    assert " ".join(routing_report.table({})[0]).split() in shown
    point = OperatingPoint(held_out=Routing({}, 0.95)).record()
    assert routing_report.operating_point(point).split() in shown


def test_the_tutorial_shows_the_quickstarts_config():
    config = (QUICKSTART / "rpam.yml").read_text(encoding="utf-8")
    lines = [line for line in config.splitlines() if not line.startswith("#")]
    assert "\n".join(lines) in page("tutorial.md")
