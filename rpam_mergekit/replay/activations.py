"""Storage for the hidden states of the calibration set.

A `TensorStore` keeps tensors on the device, in host memory or in memory-mapped files,
and copies them to the device when they are read. Hidden states are the only thing whose
size grows with the calibration set.
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


class StoredTensor(Protocol):
    """A tensor in a store."""

    def get(self) -> torch.Tensor:
        """Return the tensor on the device; it must not be changed in place."""

    def put(self, tensor: torch.Tensor) -> None:
        """Replace the tensor by another of its shape and dtype."""


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
class TensorStore:
    """Keeps tensors in one place: `device`, `host`, or `disk` (files in `folder`).

    Files are made anew, one for each tensor, and are the caller's to delete.
    """

    place: str = "device"
    device: torch.device | str = "cpu"
    folder: Path | None = None
    _files: int = field(default=0, init=False)

    def store(self, tensor: torch.Tensor) -> StoredTensor:
        """Keep a tensor that is on the device."""
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


class StoredCalls(Sequence[Call]):
    """Layer calls whose large tensors are in a store, each once.

    Items are read onto the device.
    """

    def __init__(self, calls: Sequence[Call], store: TensorStore) -> None:
        known: dict[int, Any] = {}  # the tensors live as long as `calls`

        def place(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or not _worth_moving(value):
                return value
            if id(value) not in known:
                known[id(value)] = store.store(value)
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


class Stored:
    """An attribute whose tensor is kept in its object's `store`."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = f"_{name}"

    def __get__(self, holder: Any, owner: type | None = None) -> torch.Tensor:
        kept: StoredTensor = getattr(holder, self.name)
        return kept.get()

    def __set__(self, holder: Any, tensor: torch.Tensor) -> None:
        kept = getattr(holder, self.name, None)
        if kept is None:
            setattr(holder, self.name, holder.store.store(tensor))
        else:
            kept.put(tensor)


class StoredList(Sequence[torch.Tensor]):
    """Tensors in a store; each is read and replaced by its number."""

    def __init__(self, tensors: Sequence[torch.Tensor], store: TensorStore) -> None:
        self._kept = [store.store(tensor) for tensor in tensors]

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, number: Any) -> Any:
        return self._kept[number].get()

    def __setitem__(self, number: int, tensor: torch.Tensor) -> None:
        self._kept[number].put(tensor)
