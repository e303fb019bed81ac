"""Where a merge rounds: the dtypes of its inputs, and the one it is written in.

A stock recipe computes in float32 (`dtype`) and writes all tensors in one dtype
(`out_dtype`). A merge by `rpam` that rounds elsewhere cannot be said in one.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference, dtype_from_name

from rpam_mergekit.errors import RpamError
from rpam_mergekit.models.headers import DTYPES, read_header
from rpam_mergekit.models.layout import Layout, MergeModels

FLOATS = {name: dtype for dtype, name in DTYPES.items() if dtype.is_floating_point}
WIDE = (torch.float32, torch.float64)  # what loading in them changes float32 does not
AGAIN = (
    "Set dtype: float32 and out_dtype: {} in the config, and make the coefficients anew"
)


def out_dtype_of(config: Any, models: MergeModels, layout: Layout) -> str:
    """Return the dtype in which all tensors of a merge are written, such as `bfloat16`.

    `config` has `dtype` and `out_dtype` as in a merge config. Raises `RpamError` with
    the reason if there are several, or if inputs are rounded when they are loaded.
    """
    infos = [*layout.outside, *(info for layer in layout.layers for info in layer)]
    forced = [info for info in infos if info.force_dtype]
    if forced:
        raise RpamError(
            f"{forced[0].name} is always {forced[0].force_dtype} by mergekit's "
            "definition of this architecture, and a stock recipe computes in float32."
        )
    inputs = {model: _input_dtypes(model, infos) for model in models.every}
    loaded, chosen = (
        _floating(key, getattr(config, key)) for key in ("dtype", "out_dtype")
    )
    if loaded is not None and loaded not in WIDE:
        _refuse_rounded_inputs(loaded, inputs)
    if chosen or loaded:
        return _name(chosen or loaded)
    return _name(_common(inputs, infos))


def _floating(key: str, name: str | None) -> torch.dtype | None:
    dtype: torch.dtype | None = dtype_from_name(name)
    if dtype is not None and not dtype.is_floating_point:
        raise RpamError(f"{key}: found {name}; a stock recipe writes floating point.")
    return dtype


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _refuse_rounded_inputs(
    loaded: torch.dtype, inputs: Mapping[ModelReference, Mapping[str, torch.dtype]]
) -> None:
    for model, dtypes in inputs.items():
        rounded = [name for name, dtype in dtypes.items() if dtype != loaded]
        if rounded:
            raise RpamError(
                f"dtype: {_name(loaded)} rounds {rounded[0]} of {model} "
                f"({_name(dtypes[rounded[0]])}) before it is merged in float32. A "
                "stock recipe has one dtype for loading and computing. "
                f"{AGAIN.format(_name(loaded))}."
            )


def _common(
    inputs: Mapping[ModelReference, Mapping[str, torch.dtype]],
    infos: Sequence[WeightInfo],
) -> torch.dtype:
    """Return the dtype of all merged tensors where the config says none."""
    first: dict[torch.dtype, str] = {}
    for info in infos:
        dtypes = (dtypes[info.name] for dtypes in inputs.values())
        merged = functools.reduce(torch.promote_types, dtypes)
        first.setdefault(merged, info.name)
    if len(first) == 1:
        return next(iter(first))
    found = " and ".join(f"{_name(d)} ({name})" for d, name in first.items())
    raise RpamError(
        "the config has no out_dtype, so that every tensor is written in its inputs' "
        f"dtype: {found}. A stock recipe has one out_dtype. "
        f"{AGAIN.format(_name(next(iter(first))))}."
    )


def _input_dtypes(
    model: ModelReference, infos: Sequence[WeightInfo]
) -> dict[str, torch.dtype]:
    """Return the dtype of every tensor in a model's files.

    Those that mergekit converts from tensors of other names (fused experts) have the
    dtype of what no tensor of its own name or alias takes.
    """
    stored = stored_dtypes(model)
    found: dict[str, torch.dtype | str] = {}
    converted = []
    for info in infos:
        names = [info.name, *(info.aliases or ()), *(info.tied_names or ())]
        taken = next((name for name in names if name in stored), None)
        if taken is None:
            converted.append(info.name)
        else:
            found[info.name] = stored[taken]
    if converted:
        sources = {d for name, d in stored.items() if name not in found}
        if len(sources) != 1:
            raise RpamError(
                f"{model}: mergekit makes {converted[0]} from tensors of several "
                "dtypes, whose result is not known here."
            )
        found |= dict.fromkeys(converted, sources.pop())
    for name, dtype in found.items():
        if dtype not in FLOATS.values():
            raise RpamError(
                f"{model}: {name} is {dtype}. A stock recipe would read it as float32."
            )
    return {n: d for n, d in found.items() if isinstance(d, torch.dtype)}


def stored_dtypes(model: ModelReference) -> dict[str, torch.dtype | str]:
    """Return the dtypes of all tensors in a model's files, read from their headers.

    Of dtypes that models are not merged in, the name in the file.
    """
    tensors = read_header(model).tensors
    return {name: FLOATS.get(t.dtype, t.dtype) for name, t in tensors.items()}
