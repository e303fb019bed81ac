"""The figures of a coefficients file: per layer, per tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from rpam_mergekit.formats.coefficients import CoefficientsFile, coefficient

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
MOST_VALUES = 2**22  # of one tensor; of larger fields every n-th row is read
OUTSIDE = "outside the layers"


@dataclass(frozen=True)
class TensorFigures:
    """The coefficients of one tensor: the share of the model that is not the base.

    layer: None outside the decoder layers; module: the name within its layer.
    departure: the mean distance from the initial weight.
    """

    name: str
    layer: int | None
    module: str
    mean: float
    departure: float
    quantiles: tuple[float, ...]


@dataclass(frozen=True)
class CoefficientReport:
    """All figures of a file; `layers` and `point` as the pre-pass reported them.

    point: the record of a `OperatingPoint`, empty in files of before.
    """

    path: str
    models: Mapping[str, str]
    settings: Mapping[str, Any]
    version: str
    layers: Sequence[Mapping[str, Any]]
    tensors: Sequence[TensorFigures]
    point: Mapping[str, Any] = field(default_factory=dict)

    @property
    def initial(self) -> float:
        """The coefficient from which the optimisation started."""
        return _initial(self.settings, self.models)

    @property
    def modules(self) -> list[str]:
        """The modules of the decoder layers, in the order of the file."""
        return list(
            dict.fromkeys(t.module for t in self.tensors if t.layer is not None)
        )

    def moved(self, layer: int) -> float:
        """Return the mean departure of a layer's tensors."""
        found = [t.departure for t in self.tensors if t.layer == layer]
        return sum(found) / len(found) if found else 0.0


def read_report(path: str | Path) -> CoefficientReport:
    """Return the figures of a coefficients file, or of a merge's output folder.

    Raises `RpamError` if there is none.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "rpam" / "coefficients.safetensors"
    file = CoefficientsFile(path)
    fingerprint = file.metadata.get("fingerprint", {})
    settings = fingerprint.get("settings", {})
    models = file.metadata.get("models", {})
    initial = _initial(settings, models)
    names = tqdm(file.names, desc="reading", unit="tensor", leave=False)
    tensors = [_figures(name, file.solved(name), initial) for name in names]
    tensors.sort(key=lambda t: (t.layer is None, t.layer or 0))
    return CoefficientReport(
        path=str(path),
        models=models,
        settings=settings,
        version=str(file.metadata.get("version", "")),
        layers=file.metadata.get("layers", []),
        tensors=tensors,
        point=file.metadata.get("operating_point") or {},
    )


def _figures(
    name: str, parts: dict[str, torch.Tensor], initial: float
) -> TensorFigures:
    values = coefficient(_thinned(parts)).flatten().double()
    layer, module = _place(name)
    some = values[:: -(-len(values) // 10**6)]  # torch.quantile takes no more
    return TensorFigures(
        name=name,
        layer=layer,
        module=module,
        mean=float(values.mean()),
        departure=float((values - initial).abs().mean()),
        quantiles=tuple(some.quantile(some.new_tensor(QUANTILES)).tolist()),
    )


def _initial(settings: Mapping[str, Any], models: Mapping[str, str]) -> float:
    return float(settings.get("initial_weight", 0.5)) / max(len(models) - 1, 1)


def _place(name: str) -> tuple[int | None, str]:
    pattern, _, tensor = name.rpartition("/")
    match = re.search(r"\.(\d+)\.(.+)$", tensor)
    if not match:
        return None, OUTSIDE
    return int(match[1]), f"{pattern}: {match[2]}" if pattern else match[2]


def _thinned(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the parts of every n-th row, so that the field stays within memory."""
    rows = {"row": -1, "left": -2, "element": -2}
    size = max(
        parts["left"][..., 0].numel() * parts["right"].shape[-1]
        if "left" in parts
        else 0,
        parts["row"].numel() * parts["column"].shape[-1] if "column" in parts else 0,
        *(value.numel() for value in parts.values()),
    )
    step = -(-size // MOST_VALUES)
    if step == 1:
        return parts
    thin = {}
    for part, value in parts.items():
        dim = rows.get(part)
        if dim is None or value.ndim < -dim:
            thin[part] = value
        else:
            index = torch.arange(0, value.shape[dim], step)
            thin[part] = value.index_select(dim, index)
    return thin
