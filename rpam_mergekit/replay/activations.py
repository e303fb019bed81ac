"""Where the activations of the calibration set lie: device, host memory or a file.

They are what grows with the calibration set; weights never do. Whoever needs one gets
it on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_map

from rpam_mergekit.replay.calls import Call

# Smaller tensors (rotary pairs, positions) stay on the device.
WORTH_MOVING = 1 << 16


class Kept(Protocol):
    """A tensor that lies somewhere."""

    def get(self) -> torch.Tensor:
        """Return it on the device; not to be changed in place."""

    def put(self, tensor: torch.Tensor) -> None:
        """Replace it by another of its shape and dtype."""


@dataclass
class _OnDevice:
    tensor: torch.Tensor

    def get(self) -> torch.Tensor:
        return self.tensor

    def put(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


@dataclass
class _Elsewhere:
    """In `place`, a tensor in host memory or of a memory-mapped file."""

    place: torch.Tensor
    device: torch.device

    def get(self) -> torch.Tensor:
        return self.place.to(self.device, non_blocking=self.place.is_pinned())

    def put(self, tensor: torch.Tensor) -> None:
        self.place.copy_(tensor)


@dataclass
class Shelf:
    """Keeps tensors in one place: `device`, `host`, or `disk` (files in `folder`).

    Files are made anew, one for each tensor, and are the caller's to delete.
    """

    place: str = "device"
    device: torch.device | str = "cpu"
    folder: Path | None = None
    _files: int = field(default=0, init=False)

    def keep(self, tensor: torch.Tensor) -> Kept:
        """Put a tensor of the device on the shelf."""
        device = torch.device(self.device)
        in_host = self.place == "host"
        if self.place == "device" or (in_host and device.type == "cpu"):
            return _OnDevice(tensor)
        if in_host:
            cuda = device.type == "cuda"
            room = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=cuda)
        else:
            room = self._mapped(tensor.shape, tensor.dtype)
        room.copy_(tensor)
        return _Elsewhere(room, device)

    def _mapped(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self._files:06d}"
        self._files += 1
        path.unlink(missing_ok=True)
        flat = torch.from_file(str(path), shared=True, size=shape.numel(), dtype=dtype)
        return flat.view(shape)


class PlacedCalls(Sequence[Call]):
    """Calls whose large tensors lie on a shelf, each once; items are on the device."""

    def __init__(self, calls: Sequence[Call], shelf: Shelf) -> None:
        known: dict[int, Any] = {}  # the tensors live as long as `calls`

        def place(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or not _worth_moving(value):
                return value
            if id(value) not in known:
                known[id(value)] = shelf.keep(value)
            return known[id(value)]

        self._calls = [_mapped(call, place) for call in calls]

    def __len__(self) -> int:
        return len(self._calls)

    def __getitem__(self, index: Any) -> Any:
        return _mapped(
            self._calls[index],
            lambda v: v.get() if isinstance(v, (_OnDevice, _Elsewhere)) else v,
        )


def _worth_moving(tensor: torch.Tensor) -> bool:
    # An expanded tensor takes less room than its own shape would.
    return tensor.is_contiguous() and tensor.nbytes >= WORTH_MOVING


def _mapped(call: Call, function: Callable[[Any], Any]) -> Call:
    return Call(tree_map(function, call.args), tree_map(function, call.kwargs))


class OnShelf:
    """An attribute whose tensor lies on its object's `shelf`."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = f"_{name}"

    def __get__(self, holder: Any, owner: type | None = None) -> torch.Tensor:
        kept: Kept = getattr(holder, self.name)
        return kept.get()

    def __set__(self, holder: Any, tensor: torch.Tensor) -> None:
        kept = getattr(holder, self.name, None)
        if kept is None:
            setattr(holder, self.name, holder.shelf.keep(tensor))
        else:
            kept.put(tensor)


class ShelvedList(Sequence[torch.Tensor]):
    """Tensors on a shelf, each to be had and replaced by its number."""

    def __init__(self, tensors: Sequence[torch.Tensor], shelf: Shelf) -> None:
        self._kept = [shelf.keep(tensor) for tensor in tensors]

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, number: Any) -> Any:
        return self._kept[number].get()

    def __setitem__(self, number: int, tensor: torch.Tensor) -> None:
        self._kept[number].put(tensor)
