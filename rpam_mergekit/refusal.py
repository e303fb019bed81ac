"""An `RpamError` in a click command, shown as a message instead of a traceback.

mergekit's commands are click commands and so are ours. The library raises plain
exceptions; what click calls turns them into these.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import click

from rpam_mergekit.errors import RpamError


class Refusal(RpamError, click.ClickException):
    """An `RpamError` that click prints, and that ends the command with status 1."""

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the message as it is, without click's "Error: " before it."""
        click.echo(self.format_message(), file=file, err=file is None)


@contextmanager
def shown_by_click() -> Iterator[None]:
    """Turn an `RpamError` within into a `Refusal`."""
    try:
        yield
    except Refusal:
        raise
    except RpamError as error:
        raise Refusal(*error.findings) from error
