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
    from rpam_mergekit.evaluate.compare_files import CompareRequest, compare
    from rpam_mergekit.folder.contents import read_record
    from rpam_mergekit.formats.calibration import CalibrationSet, read_calibration
    from rpam_mergekit.formats.coefficients import CoefficientsFile
    from rpam_mergekit.formats.samples import SampleReader
    from rpam_mergekit.sampling.label_files import label
    from rpam_mergekit.sampling.request import GradeRequest, LabelRequest, SampleRequest
    from rpam_mergekit.sampling.sample import grade, sample
    from rpam_mergekit.settings import RpamSettings

__version__ = "0.1.0"

_PUBLIC = {
    "CalibrationSet": "formats.calibration",
    "CoefficientsFile": "formats.coefficients",
    "CompareRequest": "evaluate.compare_files",
    "GradeRequest": "sampling.request",
    "LabelRequest": "sampling.request",
    "RpamError": "errors",
    "RpamSettings": "settings",
    "SampleReader": "formats.samples",
    "SampleRequest": "sampling.request",
    "check": "api",
    "compare": "evaluate.compare_files",
    "export": "api",
    "fit": "api",
    "grade": "sampling.sample",
    "label": "sampling.label_files",
    "merge": "api",
    "read_calibration": "formats.calibration",
    "read_record": "folder.contents",
    "sample": "sampling.sample",
}

__all__ = [
    "CalibrationSet",
    "CoefficientsFile",
    "CompareRequest",
    "GradeRequest",
    "LabelRequest",
    "RpamError",
    "RpamSettings",
    "SampleReader",
    "SampleRequest",
    "check",
    "compare",
    "export",
    "fit",
    "grade",
    "label",
    "merge",
    "read_calibration",
    "read_record",
    "sample",
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
