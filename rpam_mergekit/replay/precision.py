"""In which numbers the pre-pass computes matrix products, by device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

AUTO = "auto"


def precision_on(compute_dtype: str, device: torch.device | str) -> str:
    """Return the dtype of matrix products on a device: what `auto` stands for there.

    bfloat16 on GPUs with matrix units for it, float32 elsewhere. On CPUs, also those
    with instructions for bfloat16, it is float32: see
    `benchmarks/performance/compute_dtype.py`.
    """
    if compute_dtype != AUTO:
        return compute_dtype
    device = torch.device(device)
    if device.type == "cuda":
        amd = torch.version.hip is not None
        fast = amd or torch.cuda.get_device_capability(device)[0] >= 8  # from Ampere on
    else:
        fast = device.type == "xpu"
    return "bfloat16" if fast else "float32"


@contextmanager
def tf32(device: torch.device) -> Iterator[None]:
    """Let float32 matrix products on an NVIDIA GPU round their factors to TF32.

    Matrix units compute these, many times as fast, with bfloat16's exponents and three
    more bits behind the point than it has. What was allowed before holds afterwards.
    """
    if device.type != "cuda":
        yield
        return
    products = torch.backends.cuda.matmul
    # The older name is refused where anybody has used the newer one.
    newer = hasattr(products, "fp32_precision")
    name, value = ("fp32_precision", "tf32") if newer else ("allow_tf32", True)
    before = getattr(products, name)
    setattr(products, name, value)
    try:
        yield
    finally:
        setattr(products, name, before)
