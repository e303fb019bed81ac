"""Optional dependencies: what to install when one is missing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rpam_mergekit.errors import RpamError


@contextlib.contextmanager
def needs(extra: str) -> Iterator[None]:
    """Turn a failed import inside into an `RpamError` that names the extra."""
    try:
        yield
    except ImportError as error:
        raise RpamError(
            f"this needs {error.name or error}, which is not installed: "
            f"pip install 'rpam-mergekit[{extra}]'"
        ) from None
