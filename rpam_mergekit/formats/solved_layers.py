"""What the pre-pass has solved, a layer at a time; on disk, so that nothing is lost.

While it runs, each solved layer is a coefficients file of its own, written whole or
not at all, with its report and the state of the random generator after it. A killed
run goes on behind the last of them and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from rpam_mergekit.errors import RpamError
from rpam_mergekit.formats.coefficients import CoefficientsFile, write_coefficients
from rpam_mergekit.formats.operating_point import OperatingPoint

Entries = dict[str, dict[str, torch.Tensor]]
OUTSIDE = -1  # embeddings, final norm, head


@dataclass(frozen=True)
class LayerReport:
    """One solved layer: the relative gap to the positive expert, and its coefficients.

    The gap is the alignment term: 0 at the positive expert, 1 as far from it as the
    negative one; `gap_before` is that of the initial coefficients. `divergence`: how
    far apart the experts are, see `prepass.measures`; `optimised`: false where the
    coefficients kept their initial values; `heaviest_token`: see there.
    """

    layer: int
    gap_before: float
    gap_after: float
    mean_coefficient: float
    divergence: float
    optimised: bool
    heaviest_token: float = 0.0


@dataclass(frozen=True)
class LayerSolution:
    """The coefficient parts of a layer's tensors; None for what is no layer's report.

    entries: tensor name -> part -> float32 tensor. generator: the random generator's
    state when the layer was solved.
    """

    entries: Entries
    report: LayerReport | None
    generator: bytes


@dataclass(frozen=True)
class Solution:
    """All of a pre-pass: `count` layers and what is outside them.

    opens: the probability that the model that thinks opens its thinking by itself,
    None where it was not measured.
    """

    solved: MutableMapping[int, LayerSolution]
    count: int
    operating_point: OperatingPoint = field(default_factory=OperatingPoint)
    opens: float | None = None

    @property
    def entries(self) -> dict[str, dict[str, torch.Tensor]]:
        """Coefficient parts of every merged tensor; memory-mapped if on disk."""
        every = [self.solved[index].entries for index in (OUTSIDE, *range(self.count))]
        return {name: parts for entries in every for name, parts in entries.items()}

    @property
    def layers(self) -> list[LayerReport]:
        """Every layer's report, in order."""
        reports = [self.solved[index].report for index in range(self.count)]
        return [report for report in reports if report is not None]


class SolvedLayers(MutableMapping[int, LayerSolution]):
    """Solved layers in a folder, by index. Raises `RpamError` where it cannot write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, index: int) -> Path:
        name = "outside" if index == OUTSIDE else f"layer-{index:04d}"
        return self.folder / f"{name}.safetensors"

    def __getitem__(self, index: int) -> LayerSolution:
        if not self._path(index).exists():
            raise KeyError(index)
        file = CoefficientsFile(self._path(index))
        report = file.metadata["report"]
        return LayerSolution(
            {name: file.parts(name) for name in file.names},
            LayerReport(**report) if report else None,
            bytes.fromhex(file.metadata["generator"]),
        )

    def __setitem__(self, index: int, solution: LayerSolution) -> None:
        report = solution.report
        metadata: dict[str, Any] = {
            "report": asdict(report) if report else None,
            "generator": solution.generator.hex(),
        }
        try:
            write_coefficients(self._path(index), solution.entries, metadata)
        except OSError as error:
            raise RpamError(
                f"{self._path(index)} cannot be written: {error}. {len(self)} solved "
                f"layers are safe in {self.folder}. Make room, and run the same "
                "command again: it goes on behind them."
            ) from error

    def __delitem__(self, index: int) -> None:
        self._path(index).unlink()

    def __iter__(self) -> Iterator[int]:
        for path in sorted(self.folder.glob("layer-*.safetensors")):
            yield int(path.stem.partition("-")[2])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def remove(self) -> None:
        """Delete the folder if there is one, and its parent if that is empty then."""
        with suppress(FileNotFoundError):
            shutil.rmtree(self.folder)
        with suppress(OSError):
            self.folder.parent.rmdir()


class SolvedByFirst(SolvedLayers):
    """The layers of a run as its other processes see them: the first one writes."""

    def __setitem__(self, index: int, solution: LayerSolution) -> None:
        """Leave it to the first process."""


def folder_of(fingerprint: Mapping[str, Any]) -> str:
    """Return the name of the folder for runs on these inputs and no others."""
    content = json.dumps(fingerprint, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()[:16]
