"""Merging coefficients: the merge formula, coefficient fields, and their file.

The formula, elementwise in float32: ``merged = base + c * (other - base)``. `c` is the
share of the model that is not the base (paper eq. 4 writes it w). Of several other
models the products ``c * (other - base)`` are summed in their order, then added. For a
weight of shape (..., rows, columns) `c` is the sum of whichever parts exist:

    scalar  ()                  one number
    element (..., rows, columns)
    row     (..., rows)         the same along a row
    column  (..., columns)
    left    (..., rows, rank) @ right (..., rank, columns)

Leading axes are experts of a fused mixture-of-experts weight. The file is safetensors
with one entry ``tensor name/part`` each, of several other models
``pattern/tensor name/part``, and one metadata key, a JSON object.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rpam_mergekit.errors import RpamError
from rpam_mergekit.formats.operating_point import scale_of

FORMAT = 1
METADATA_KEY = "rpam_mergekit"
BLOCK = 1 << 17  # elements
_OF_A_LAYER = re.compile(r"\.\d+\.")
PARTS = ("scalar", "element", "row", "column", "left", "right")


def task_vector(base: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return ``other - base`` in float32; both have the weight's shape."""
    return other.float() - base.float()


def add_task_vectors(
    base: torch.Tensor, terms: Iterable[tuple[torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    """Return the merge formula's sum of `base` and ``coefficient * vector``.

    `terms`: a coefficient, which is broadcast, and a task vector of every other model.
    """
    products = (coefficient * vector for coefficient, vector in terms)
    return base + functools.reduce(torch.add, products)


def merge(
    base: torch.Tensor, terms: Iterable[tuple[torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    """Return the merged weight in float32: the merge formula.

    `terms`: a coefficient and the weight of every other model.
    """
    return add_task_vectors(
        base.float(), ((c, task_vector(base, other)) for c, other in terms)
    )


def written(
    base: torch.Tensor,
    others: Sequence[torch.Tensor],
    parts: Sequence[Mapping[str, torch.Tensor]],
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Return the merged weight as it is written, rounded once.

    By the `parts` of every other model's coefficient; to `dtype` (the config's
    `out_dtype`), or to the inputs' common dtype. No zero is negative, as in mergekit's
    own methods. On a CPU it is made in blocks that stay in its cache.
    """
    dtype = dtype or common_dtype(base, *others)
    if base.dim() == 0 or base.device.type != "cpu":
        whole = zip(map(coefficient, parts), others, strict=True)
        return merge(base, whole).add_(0.0).to(dtype)
    result = torch.empty(base.shape, dtype=dtype)
    rows = max(1, BLOCK * base.shape[0] // max(base.numel(), 1))
    for start in range(0, base.shape[0], rows):
        block = slice(start, start + rows)
        coefficients = (coefficient(_block(p, block, base.dim())) for p in parts)
        terms = zip(coefficients, (other[block] for other in others), strict=True)
        result[block] = merge(base[block], terms).add_(0.0)
    return result


def common_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """Return the dtype to which all of the tensors' dtypes are promoted."""
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors))


def _block(
    parts: Mapping[str, torch.Tensor], block: slice, dimensions: int
) -> dict[str, torch.Tensor]:
    """Return the parts for a block of a weight along its first axis."""
    whole = ("scalar",) if dimensions > 2 else ("scalar", "column", "right")
    return {
        part: value if part in whole else value[block] for part, value in parts.items()
    }


def coefficient(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the coefficient of a weight, broadcastable to it, from its parts."""
    terms = []
    for part, value in parts.items():
        if part in ("scalar", "element"):
            terms.append(value)
        elif part == "row":
            terms.append(value.unsqueeze(-1))
        elif part == "column":
            terms.append(value.unsqueeze(-2))
        elif part == "left":
            terms.append(value @ parts["right"])
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def scaled(parts: Mapping[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """Return the parts of the coefficient that is `scale` times that of `parts`."""
    if scale == 1:
        return dict(parts)
    return {
        part: value if part == "right" else value * scale
        for part, value in parts.items()
    }


def in_file(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a part as the file has it: fields in `dtype`, scalars in float32."""
    return value.to(dtype) if value.dim() else value


def write_coefficients(
    path: str | Path,
    entries: Mapping[str, Mapping[str, torch.Tensor]],
    metadata: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    workshop: Path | None = None,
) -> None:
    """Write a coefficients file whole or not at all; the same inputs, the same bytes.

    `entries`: tensor name -> part -> float32 tensor, of which fields are written in
    `dtype`. `metadata` must be JSON. It is on disk when this returns. One writer at a
    time. `workshop`: the folder, on the same disk, where it becomes whole and where a
    killed writer leaves files, safetensors' own of random names among them; None: that
    of `path`. Raises `OSError`.
    """
    path = Path(path)
    for folder in {path.parent, workshop or path.parent}:
        folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{name}/{part}": in_file(value, dtype).contiguous().cpu()
        for name, parts in entries.items()
        for part, value in parts.items()
    }
    # Scalars of one module are one tensor: safetensors refuses shared storage.
    tensors = {n: v if v.dim() else v.clone() for n, v in tensors.items()}
    content = json.dumps({"format": FORMAT, **metadata}, sort_keys=True)
    partial = (workshop or path.parent) / f"{path.name}.partial"
    try:
        save_file(tensors, partial, metadata={METADATA_KEY: content})
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(partial, 0o666 & ~umask)
        os.replace(partial, path)
    except SafetensorError as error:
        partial.unlink(missing_ok=True)
        raise OSError(str(error)) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def entry_name(pattern: str | None, tensor: str, others: int) -> str:
    """Return the name of a tensor's coefficient for one of `others` models."""
    return tensor if others == 1 else f"{pattern}/{tensor}"


class CoefficientsFile:
    """A coefficients file opened for reading, one tensor at a time.

    The file holds the coefficients as they were solved; what is read is scaled to the
    operating point that the pre-pass chose, shifted by the setting `reasoning`. Reading
    is safe from several threads. Raises `RpamError` if the file is missing, not a
    coefficients file, or of a later format.
    """

    def __init__(self, path: str | Path, reasoning: float = 0.0) -> None:
        self.path = str(path)
        try:
            self._file = safe_open(self.path, framework="pt")
            content = (self._file.metadata() or {}).get(METADATA_KEY)
        except FileNotFoundError:
            raise RpamError(f"no coefficients file {self.path}") from None
        except (OSError, SafetensorError) as error:
            raise RpamError(f"{self.path}: not a safetensors file: {error}") from None
        if content is None:
            raise RpamError(
                f"{self.path}: not a coefficients file of rpam-mergekit (no metadata "
                f"'{METADATA_KEY}'). Name another file."
            )
        self.metadata: dict[str, Any] = json.loads(content)
        if self.metadata["format"] > FORMAT:
            raise RpamError(
                f"{self.path}: format {self.metadata['format']}, but this version "
                f"reads up to {FORMAT}. Upgrade rpam-mergekit."
            )
        self.scale = scale_of(self.metadata.get("operating_point"), reasoning)
        fixed = self.metadata.get("fingerprint", {}).get("fixed", {})
        self._unscaled = {*fixed, *self.metadata.get("unscaled", [])}
        self._parts: dict[str, list[str]] = {}
        for key in self._file.keys():
            name, _, part = key.rpartition("/")
            self._parts.setdefault(name, []).append(part)

    @property
    def names(self) -> list[str]:
        """The names of the tensors that the file has coefficients for."""
        return sorted(self._parts)

    def parts(self, name: str) -> dict[str, torch.Tensor]:
        """Return the parts of one tensor's coefficient, in float32 on the CPU."""
        # Files of before do not say what is outside the layers; their names do.
        kept = name in self._unscaled or not _OF_A_LAYER.search(name)
        return scaled(self.solved(name), 1 if kept else self.scale)

    def solved(self, name: str) -> dict[str, torch.Tensor]:
        """Return the parts as they were solved, not scaled."""
        if name not in self._parts:
            raise RpamError(f"{self.path}: no coefficients for tensor {name}")
        return {
            part: self._file.get_tensor(f"{name}/{part}").float()
            for part in sorted(self._parts[name], key=PARTS.index)
        }

    def coefficient(self, name: str, device: torch.device | str) -> torch.Tensor:
        """Return one tensor's coefficient on `device`, broadcastable to it."""
        return coefficient(
            {part: value.to(device) for part, value in self.parts(name).items()}
        )


def open_coefficients(path: str | Path, reasoning: float = 0.0) -> CoefficientsFile:
    """Return the file, opened once for as long as it is not replaced."""
    stat = os.stat(path)
    return _open(str(path), reasoning, stat.st_mtime_ns, stat.st_size, stat.st_ino)


_open: Callable[..., CoefficientsFile] = functools.lru_cache(maxsize=4)(
    lambda path, reasoning, *_identity: CoefficientsFile(path, reasoning)
)
