"""How much memory and disk a pre-pass needs, how much there is, and where things go."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch

from rpam_mergekit.chat.prompts import Batch
from rpam_mergekit.errors import RpamError
from rpam_mergekit.prepass.fields import count_numbers
from rpam_mergekit.replay.activations import TensorStore
from rpam_mergekit.replay.decoder import Decoder
from rpam_mergekit.settings import RpamSettings

# Of the free memory; the rest is for a layer's weights, gradients and activations.
SHARE_OF_DEVICE = 0.4
SHARE_OF_HOST = 0.5
# mallopt's number for the size from which memory is mapped, and unmapped when freed.
M_MMAP_THRESHOLD = -3
LARGE = 1 << 22
CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


def return_freed_memory() -> None:
    """Let this process give the memory of freed large tensors back at once.

    glibc keeps ever larger pieces for later otherwise, which doubles the peak. Of the
    whole process and for good; does nothing where the C library is another one.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)


def activation_bytes(batches: Sequence[Batch], width: int, experts: int = 2) -> int:
    """Return what the calibration set's hidden states and masks take, in bytes.

    Hidden states are those of the experts and of the merged model.
    """
    total = 0
    for batch in batches:
        queries, tokens = batch.input_ids.shape
        total += queries * tokens * ((experts + 1) * 4 * width + tokens)
    return total


def coefficient_bytes(decoder: Decoder, settings: RpamSettings, others: int = 1) -> int:
    """Return what the coefficients of all decoder layers take in their file, in bytes.

    While a layer is solved, its coefficients are in float32.
    """
    numbers = sum(
        count_numbers(weight.shape, settings.granularity, settings.rank)
        for layer in decoder.layers
        for weight in layer.parameters()
    )
    return numbers * others * (2 if settings.coefficient_dtype == "float16" else 4)


def choose_store(
    place: str, needed: int, device: torch.device | str, folder: Path
) -> TensorStore:
    """Return a store for `needed` bytes, in `place` or, if `auto`, where there is room.

    Raises `RpamError` if the disk is needed and too small.
    """
    device = torch.device(device)
    if place == "auto":
        place = _roomiest(needed, device)
    if place == "disk":
        check_disk(folder, needed, "the activations (parameters.activations: disk)")
    return TensorStore(place, device, folder)


def _roomiest(needed: int, device: torch.device) -> str:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if needed <= SHARE_OF_DEVICE * free:
            return "device"
    return "host" if needed <= SHARE_OF_HOST * free_host_memory() else "disk"


def free_host_memory() -> int:
    """Return the memory that this process may still take, in bytes."""
    free: int = psutil.virtual_memory().available
    for limit, usage in CGROUPS:
        try:
            most, used = Path(limit).read_text(), Path(usage).read_text()
        except OSError:
            continue
        if most.strip() != "max":
            free = min(free, int(most) - int(used))
    return max(free, 0)


def check_disk(folder: Path, needed: int, what: str) -> None:
    """Raise `RpamError` if `folder`'s disk has less than `needed` bytes free."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RpamError(
            f"{folder}: {readable(free)} free, but {what} need {readable(needed)}. "
            "Make room, or name a file on another disk in parameters.coefficients."
        )


def readable(size: float) -> str:
    """Return a number of bytes as people write it, such as ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


@contextmanager
def explain_out_of_memory(settings: RpamSettings, store: TensorStore) -> Iterator[None]:
    """Turn running out of memory into an `RpamError` that names what to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        raise RpamError(
            f"out of memory on {store.device}: {str(error).splitlines()[0]} "
            f"{_advice(settings, store)} Solved layers are safe: with the same "
            "settings the run goes on behind them, with others it begins anew "
            "(parameters.activations may be changed on the way)."
        ) from error


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    said = str(error)
    return "can't allocate memory" in said or "out of memory" in said


def _advice(settings: RpamSettings, store: TensorStore) -> str:
    """Return what to try next, the knob that costs least first."""
    tries = []
    if store.place == "device" and torch.device(store.device).type != "cpu":
        tries.append("parameters.activations: host")
    elif store.place != "disk":
        tries.append("parameters.activations: disk")
    if settings.batch_size is not None and settings.batch_size > 1:
        half = settings.batch_size // 2
        tries.append(f"parameters.batch_size: {half} (now {settings.batch_size})")
    elif settings.batch_size != 1:
        half = (settings.batch_tokens or settings.max_tokens) // 2
        tries.append(f"parameters.batch_tokens: {half} (now {settings.batch_tokens})")
    tries.append(
        f"parameters.max_tokens: {max(settings.max_tokens // 2, 1)} "
        f"(now {settings.max_tokens})"
    )
    if settings.granularity == "element":
        tries.append("parameters.granularity: low_rank (now element)")
    return f"Try, in this order: {'; '.join(tries)}."
