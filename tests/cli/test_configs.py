"""Every command that takes a config answers what is none with one message."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from rpam_mergekit.cli.main import main

ARGUMENTS = {
    "check": [],
    "fit": [],
    "merge": ["out"],
    "export": ["coefficients.safetensors"],
    "sweep": ["--out", "sweep", "--dataset", "questions.jsonl"],
}
WRONG = {
    "broken YAML": (b"models: [1,\nb: 2\n", "rpam.yml:3:1: not YAML"),
    "a list": (b"- 1\n- 2\n", "rpam.yml:1: the config is a list of 2"),
    "models: 3": (
        b"merge_method: rpam\nmodels: 3\n",
        "rpam.yml:2: models: found 3. Expected a list.",
    ),
    "empty": (b"", "rpam.yml:1: there is no config in it"),
    "binary": (b"a: 1\n\x80\xff\x00", "rpam.yml:2: not UTF-8 text"),
    "missing": (None, "rpam.yml: cannot be read: No such file"),
    "a folder": (None, "rpam.yml: cannot be read: Is a directory"),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("command", ARGUMENTS)
def test_what_is_no_config_gets_one_message(tmp_path, monkeypatch, command, what):
    content, message = WRONG[what]
    monkeypatch.chdir(tmp_path)
    if what == "a folder":
        (tmp_path / "rpam.yml").mkdir()
    elif content is not None:
        (tmp_path / "rpam.yml").write_bytes(content)
    result = CliRunner().invoke(main, [command, "rpam.yml", *ARGUMENTS[command]])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), result.exception
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert lines[0].startswith("rpam: "), lines
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
