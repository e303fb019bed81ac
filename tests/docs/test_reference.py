"""The reference pages are the code's: settings, presets, commands, words."""

from __future__ import annotations

import re

from helpers.paths import ROOT
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
    assert "`qa-merging`, after the paper's second version, is `paper` with" in section
    assert "`layers: 0.3`" in section
