"""Merging coefficients: the merge formula, coefficient fields, and their file.

The formula, elementwise in float32: ``merged = base + c * (other - base)``. `c` is the
share of the model that is not the base (paper eq. 4 writes it w). For a weight of
shape (..., rows, columns) `c` is the sum of whichever parts exist:

    scalar  ()                  one number
    element (..., rows, columns)
    row     (..., rows)         the same along a row
    column  (..., columns)
    left    (..., rows, rank) @ right (..., rank, columns)

Leading axes are experts of a fused mixture-of-experts weight. The file is safetensors
with one entry ``tensor name/part`` each and one metadata key, a JSON object.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rpam_mergekit.errors import RpamError

FORMAT = 1
METADATA_KEY = "rpam_mergekit"
BLOCK = 1 << 17  # elements
PARTS = ("scalar", "element", "row", "column", "left", "right")


def task_vector(base: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return ``other - base`` in float32; both have the weight's shape."""
    return other.float() - base.float()


def add_task_vector(
    base: torch.Tensor, vector: torch.Tensor, coefficient: torch.Tensor
) -> torch.Tensor:
    """Return ``base + coefficient * vector``; `coefficient` is broadcast."""
    return base + coefficient * vector


def merge(
    base: torch.Tensor, other: torch.Tensor, coefficient: torch.Tensor
) -> torch.Tensor:
    """Return the merged weight in float32: the merge formula."""
    return add_task_vector(base.float(), task_vector(base, other), coefficient)


def written(
    base: torch.Tensor,
    other: torch.Tensor,
    parts: Mapping[str, torch.Tensor],
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Return the merged weight as it is written, rounded once.

    By a coefficient's `parts`; to `dtype` (the config's `out_dtype`), or to the inputs'
    common dtype. On a CPU it is made in blocks that stay in its cache.
    """
    dtype = dtype or torch.promote_types(base.dtype, other.dtype)
    if base.dim() == 0 or base.device.type != "cpu":
        return merge(base, other, coefficient(parts)).to(dtype)
    result = torch.empty(base.shape, dtype=dtype)
    rows = max(1, BLOCK * base.shape[0] // max(base.numel(), 1))
    for start in range(0, base.shape[0], rows):
        block = slice(start, start + rows)
        part = coefficient(_block(parts, block, base.dim()))
        result[block] = merge(base[block], other[block], part)
    return result


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


class LayerCoefficients:
    """The coefficients of one decoder layer, as leaves that a solver can move.

    `shapes` maps each of the layer's weights to its shape; the names are relative to
    the layer. `fixed` weights keep the number the user set. All start at `initial`.
    """

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        *,
        granularity: str,
        rank: int = 0,
        initial: float = 0.5,
        fixed: Mapping[str, float] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        generator: torch.Generator | None = None,
    ) -> None:
        self.initial = initial
        self.parts: dict[str, dict[str, torch.Tensor]] = {}
        shared: dict[str, torch.Tensor] = {}
        self.leaves: list[torch.Tensor] = []

        def leaf(value: torch.Tensor) -> torch.Tensor:
            # Drawn on the CPU, so that every device starts from the same numbers.
            value = value.to(device=device, dtype=dtype).requires_grad_()
            self.leaves.append(value)
            return value

        for name, shape in shapes.items():
            if fixed is not None and name in fixed:
                number = torch.tensor(fixed[name], dtype=dtype, device=device)
                self.parts[name] = {"scalar": number}
            elif granularity in ("layer", "module", "tensor"):
                group = _group(name, granularity)
                if group not in shared:
                    shared[group] = leaf(torch.tensor(initial))
                self.parts[name] = {"scalar": shared[group]}
            elif granularity == "element" or len(shape) < 2:
                self.parts[name] = {"element": leaf(torch.full(shape, initial))}
            elif granularity == "row":
                self.parts[name] = {"row": leaf(torch.full(shape[:-1], initial))}
            else:
                *experts, rows, columns = shape
                field = {
                    "row": leaf(torch.full((*experts, rows), initial)),
                    "column": leaf(torch.zeros(*experts, columns)),
                }
                if rank:
                    noise = torch.randn(*experts, rows, rank, generator=generator)
                    field["left"] = leaf(0.01 * noise)
                    field["right"] = leaf(torch.zeros(*experts, rank, columns))
                self.parts[name] = field

    def coefficient(self, name: str) -> torch.Tensor:
        """Return the coefficient of one weight, broadcastable to it."""
        return coefficient(self.parts[name])

    def penalty(self) -> torch.Tensor:
        """Return the mean over weights of the mean squared departure from `initial`."""
        departures = [
            (coefficient(parts) - self.initial).square().mean()
            for parts in self.parts.values()
            if any(value.requires_grad for value in parts.values())
        ]
        return torch.stack(departures).mean()

    def solved(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return every weight's parts, detached, in the float32 of the file."""
        return {
            name: {part: value.detach().float() for part, value in parts.items()}
            for name, parts in self.parts.items()
        }


def count_numbers(shape: torch.Size, granularity: str, rank: int) -> int:
    """Return how many numbers the file has for a weight of `shape`."""
    if granularity in ("layer", "module", "tensor"):
        return 1
    if granularity == "element" or len(shape) < 2:
        return shape.numel()
    rows = shape[:-1].numel()
    if granularity == "row":
        return rows
    experts = shape[:-2].numel()
    return (rows + experts * shape[-1]) * (1 + rank)


def _group(name: str, granularity: str) -> str:
    """Return what shares a scalar with `name`: its layer, its module, or nothing."""
    if granularity == "layer":
        return ""
    return name.split(".")[0] if granularity == "module" else name


def write_coefficients(
    path: str | Path,
    entries: Mapping[str, Mapping[str, torch.Tensor]],
    metadata: Mapping[str, Any],
) -> None:
    """Write a coefficients file whole or not at all; the same inputs, the same bytes.

    `entries`: tensor name -> part -> float32 tensor. `metadata` must be JSON. It is on
    disk when this returns. One writer at a time. Raises `OSError`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{name}/{part}": value.contiguous().cpu()
        for name, parts in entries.items()
        for part, value in parts.items()
    }
    # Scalars of one module are one tensor: safetensors refuses shared storage.
    tensors = {n: v if v.dim() else v.clone() for n, v in tensors.items()}
    content = json.dumps({"format": FORMAT, **metadata}, sort_keys=True)
    partial = path.with_name(path.name + ".partial")
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


class CoefficientsFile:
    """A coefficients file opened for reading, one tensor at a time.

    Reading is safe from several threads. Raises `RpamError` if the file is missing,
    not a coefficients file, or of a later format.
    """

    def __init__(self, path: str | Path) -> None:
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
        if name not in self._parts:
            raise RpamError(f"{self.path}: no coefficients for tensor {name}")
        return {
            part: self._file.get_tensor(f"{name}/{part}")
            for part in sorted(self._parts[name], key=PARTS.index)
        }

    def coefficient(self, name: str, device: torch.device | str) -> torch.Tensor:
        """Return one tensor's coefficient on `device`, broadcastable to it."""
        return coefficient(
            {part: value.to(device) for part, value in self.parts(name).items()}
        )


def open_coefficients(path: str | Path) -> CoefficientsFile:
    """Return the file, opened once for as long as it is not replaced."""
    stat = os.stat(path)
    return _open(str(path), stat.st_mtime_ns, stat.st_size, stat.st_ino)


_open: Callable[..., CoefficientsFile] = lru_cache(maxsize=4)(
    lambda path, *_identity: CoefficientsFile(path)
)
