"""Where things are: the repository, the example that tests use, the commands."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
QUICKSTART = ROOT / "examples" / "quickstart"
SCRIPTS = Path(sys.executable).parent
