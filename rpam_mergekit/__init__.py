"""RPAM for mergekit: merging coefficients from a pattern-labelled calibration file.

Importing this package costs nothing: the start-up file does so in every Python of the
environment. The public names below are imported from their modules when they are asked
for; `docs/python-api.md` describes them. Everything else may change without notice.
"""

TYPE_CHECKING = False  # as of typing, which a start of Python need not import
if TYPE_CHECKING:
    from typing import Any

    from rpam_mergekit.api import check, export, fit, merge
    from rpam_mergekit.errors import RpamError
    from rpam_mergekit.formats.calibration import CalibrationSet, read_calibration
    from rpam_mergekit.formats.coefficients import CoefficientsFile
    from rpam_mergekit.formats.samples import SampleReader
    from rpam_mergekit.outputs.folder import read_record
    from rpam_mergekit.settings import RpamSettings

__version__ = "0.1.0"

_PUBLIC = {
    "CalibrationSet": "formats.calibration",
    "CoefficientsFile": "formats.coefficients",
    "RpamError": "errors",
    "RpamSettings": "settings",
    "SampleReader": "formats.samples",
    "check": "api",
    "export": "api",
    "fit": "api",
    "merge": "api",
    "read_calibration": "formats.calibration",
    "read_record": "outputs.folder",
}

__all__ = [
    "CalibrationSet",
    "CoefficientsFile",
    "RpamError",
    "RpamSettings",
    "SampleReader",
    "check",
    "export",
    "fit",
    "merge",
    "read_calibration",
    "read_record",
]


def __getattr__(name: str) -> "Any":
    """Import a public name from its module, once."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module = importlib.import_module(f"rpam_mergekit.{_PUBLIC[name]}")
    found = globals()[name] = getattr(module, name)
    return found


def __dir__() -> "list[str]":
    return sorted({*globals(), *_PUBLIC})
