"""Quantised checkpoints as the libraries write them, made of a plain tiny model.

The names, dtypes and configs are those that were found in what transformers 5.23,
bitsandbytes, compressed-tensors 0.20, optimum-quanto, hqq and torchao wrote of a Qwen2
model, and of GPTQ, AWQ, MXFP4, ModelOpt, MLX, AQLM, EXL2 those of the models that are
published. The numbers are zeros: only names, dtypes and shapes are looked at.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
I8, U8, I32, F8 = torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.float32).to(dtype)


def _with(**tensors: Callable[[int, int], torch.Tensor]):
    """Return what replaces a module's weight: by ending, of its rows and columns."""
    return lambda rows, columns: {
        name.replace("__", "."): make(rows, columns) for name, make in tensors.items()
    }


def _nf4(rows: int, columns: int) -> Tensors:
    n = rows * columns
    return {
        "weight": _zeros(n // 2, 1, dtype=U8),
        "weight.absmax": _zeros(n // 64, dtype=U8),
        "weight.nested_absmax": _zeros(1),
        "weight.nested_quant_map": _zeros(256),
        "weight.quant_map": _zeros(16),
        "weight.quant_state.bitsandbytes__nf4": _zeros(170, dtype=U8),
    }


# By kind: what stands in the place of a linear layer's weight; what config.json says;
# how the message names the format.
KINDS: dict[str, tuple[Callable[[int, int], Tensors], dict[str, Any], str]] = {
    "fp8 by block": (
        _with(
            weight=lambda r, c: _zeros(r, c, dtype=F8),
            weight_scale_inv=lambda r, c: _zeros(1, 1),
        ),
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 8]}},
        "FP8",
    ),
    "fp8 by tensor": (
        _with(
            weight=lambda r, c: _zeros(r, c, dtype=F8),
            weight_scale=lambda r, c: _zeros(1),
            input_scale=lambda r, c: _zeros(1),
        ),
        {"quantization_config": {"quant_method": "fp8", "activation_scheme": "static"}},
        "FP8",
    ),
    "fbgemm": (
        _with(
            weight=lambda r, c: _zeros(r, c, dtype=F8),
            weight_scale=lambda r, c: _zeros(r, 1),
        ),
        {"quantization_config": {"quant_method": "fbgemm_fp8"}},
        "FP8 of FBGEMM",
    ),
    "bitsandbytes 4": (
        _nf4,
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        "bitsandbytes",
    ),
    "bitsandbytes 8": (
        _with(
            weight=lambda r, c: _zeros(r, c, dtype=I8),
            SCB=lambda r, c: _zeros(r),
            weight_format=lambda r, c: torch.tensor(0, dtype=U8),
        ),
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        "bitsandbytes",
    ),
    "bitsandbytes of before quant_method": (
        _nf4,
        {"quantization_config": {"load_in_4bit": True}},
        "bitsandbytes",
    ),
    "gptq": (
        _with(
            qweight=lambda r, c: _zeros(c // 8, r, dtype=I32),
            qzeros=lambda r, c: _zeros(1, r // 8, dtype=I32),
            scales=lambda r, c: _zeros(1, r),
            g_idx=lambda r, c: _zeros(c, dtype=I32),
        ),
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "GPTQ",
    ),
    "awq": (
        _with(
            qweight=lambda r, c: _zeros(c, r // 8, dtype=I32),
            qzeros=lambda r, c: _zeros(1, r // 8, dtype=I32),
            scales=lambda r, c: _zeros(1, r),
        ),
        {"quantization_config": {"quant_method": "awq", "bits": 4}},
        "AWQ",
    ),
    "compressed-tensors, packed": (
        _with(
            weight_packed=lambda r, c: _zeros(r, c // 8, dtype=I32),
            weight_scale=lambda r, c: _zeros(r, 1),
            weight_shape=lambda r, c: torch.tensor([r, c]),
        ),
        {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"format": "pack-quantized"}},
            }
        },
        "compressed-tensors",
    ),
    "compressed-tensors of before quant_method": (
        _with(
            weight=lambda r, c: _zeros(r, c, dtype=I8),
            weight_scale=lambda r, c: _zeros(r, 1),
        ),
        {"compression_config": {"config_groups": {"group_0": {}}}},
        "compressed-tensors",
    ),
    "nvfp4": (
        _with(
            weight_packed=lambda r, c: _zeros(r, c // 2, dtype=U8),
            weight_scale=lambda r, c: _zeros(r, c // 16, dtype=F8),
            weight_global_scale=lambda r, c: _zeros(1),
        ),
        {"quantization_config": {"quant_method": "compressed-tensors"}},
        "compressed-tensors",
    ),
    "modelopt": (
        _with(
            weight=lambda r, c: _zeros(r, c // 2, dtype=U8),
            weight_scale=lambda r, c: _zeros(r, c // 16, dtype=F8),
            weight_scale_2=lambda r, c: torch.tensor(1.0),
        ),
        {"quantization_config": {"quant_algo": "NVFP4"}},
        "ModelOpt",
    ),
    "quanto": (
        _with(
            weight___data=lambda r, c: _zeros(r, c, dtype=I8),
            weight___scale=lambda r, c: _zeros(r, 1),
            input_scale=lambda r, c: torch.tensor(1.0),
        ),
        {},
        "Quanto",
    ),
    "hqq": (
        _with(
            W_q=lambda r, c: _zeros(r // 2, c, dtype=U8),
            scale=lambda r, c: _zeros(r, 1),
            zero=lambda r, c: _zeros(r, 1),
            nbits=lambda r, c: torch.tensor(4, dtype=I32),
        ),
        {},
        "HQQ",
    ),
    "torchao": (
        _with(
            _weight_qdata=lambda r, c: _zeros(r, c, dtype=I8),
            _weight_scale=lambda r, c: _zeros(r, 1),
        ),
        {"quantization_config": {"quant_method": "torchao"}},
        "torchao",
    ),
    "mlx": (
        _with(
            weight=lambda r, c: _zeros(r, c // 8, dtype=torch.uint32),
            scales=lambda r, c: _zeros(r, 1),
            biases=lambda r, c: _zeros(r, 1),
        ),
        {"quantization": {"group_size": 64, "bits": 4}},
        "MLX",
    ),
    "exl2": (
        _with(
            q_weight=lambda r, c: _zeros(c // 8, r, dtype=I32),
            q_scale=lambda r, c: _zeros(1, r, dtype=I32),
            q_groups=lambda r, c: _zeros(2, dtype=torch.int16),
        ),
        {"quantization_config": {"quant_method": "exl2"}},
        "EXL2",
    ),
    "aqlm": (
        _with(
            codes=lambda r, c: _zeros(r, c // 8, 1, dtype=I8),
            codebooks=lambda r, c: _zeros(1, 256, 1, 8),
            scales=lambda r, c: _zeros(r, 1, 1, 1),
        ),
        {"quantization_config": {"quant_method": "aqlm"}},
        "AQLM",
    ),
    "mxfp4": (
        _with(
            weight_blocks=lambda r, c: _zeros(r, 1, c // 2, dtype=U8),
            weight_scales=lambda r, c: _zeros(r, 1, dtype=U8),
        ),
        {"quantization_config": {"quant_method": "mxfp4"}},
        "MXFP4",
    ),
    "a method that is not known": (
        _with(weight=lambda r, c: _zeros(r, c, dtype=I8)),
        {"quantization_config": {"quant_method": "squeeze"}},
        "squeeze",
    ),
}


def quantise(model: Path, kind: str, claims: bool = True, names: bool = True) -> Path:
    """Put a quantised model into the place of a plain one; return its folder.

    claims, names: whether config.json says so, and whether the tensors do.
    """
    replace, claim, _ = KINDS[kind]
    if claims:
        say_quantised(model, claim)
    if not names:
        return model
    weights = load_file(model / "model.safetensors")
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        module, plain = name.removesuffix("weight"), weights.pop(name)
        weights |= {module + end: t for end, t in replace(*plain.shape).items()}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return model


def say_quantised(model: Path, claim: dict[str, Any]) -> None:
    """Add to a model's config.json."""
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **claim}))
