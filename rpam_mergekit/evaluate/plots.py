"""How pictures are set up and saved, with matplotlib where it is installed.

Without pyplot: no window system is asked for, and no state of the process changes.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rpam_mergekit.errors import RpamError
from rpam_mergekit.extras import needs
from rpam_mergekit.formats.files import write_whole


def check_picture(path: Path | None = None) -> None:
    """Raise `RpamError` where no picture can be drawn, or none of the path's kind."""
    figure, _ = new_figure((1, 1))
    known = figure.canvas.get_supported_filetypes()
    if path is not None and _form(path) not in known:
        raise RpamError(
            f"{path}: a picture cannot be written as '{_form(path)}'. Name a file "
            f"that ends in {', '.join(f'.{form}' for form in sorted(known))}."
        )


def new_figure(
    size: tuple[float, float], rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Any, Any]:
    """Return a figure of `size` inches, and its axes, an array where it is several.

    options: of matplotlib's `Figure`. Raises `RpamError` without matplotlib.
    """
    with needs("plot"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=size, **options)
    return figure, figure.subplots(rows, columns)


def rendered(figure: Any, form: str) -> bytes:
    """Return a picture as a file has it, the same bytes every time."""
    import matplotlib

    content = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "rpam"}):
        figure.savefig(
            content, format=form, metadata={"Date": None} if form == "svg" else None
        )
    return content.getvalue()


def save(figure: Any, path: Path) -> None:
    """Write a picture whole or not at all. Raises `OSError`."""
    write_whole(path, rendered(figure, _form(path)))


def _form(path: Path) -> str:
    return path.suffix.lower().removeprefix(".") or "png"
