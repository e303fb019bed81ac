"""The command `check` in this process."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import yaml
from click.testing import CliRunner, Result

from rpam_mergekit.cli.main import main


@pytest.fixture
def check(tmp_path) -> Callable[..., Result]:
    """Check a config, given as a mapping or as text, in this process."""

    def call(config: dict | str, *options: str) -> Result:
        path = tmp_path / "rpam.yml"
        text = config if isinstance(config, str) else yaml.safe_dump(config)
        path.write_text(text, encoding="utf-8")
        arguments = ["check", str(path), "--no-estimate", *options]
        return CliRunner().invoke(main, arguments)

    return call
