"""Where a merge rounds: which dtypes a stock recipe can say, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.exporting import (
    assert_same_bytes,
    config_of,
    merge,
    quiet,
    recipe,
    refusal,
)
from helpers.merged import shard_bytes, tensors
from helpers.models import qwen2_config, save_pair


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet():
        yield


# Where the merge rounds. The pair's dtypes, the config's, and what is written.
@pytest.mark.parametrize(
    ("stored", "dtype", "out_dtype", "written"),
    [
        (("float16", "float16"), None, None, "float16"),
        (("bfloat16", "float32"), None, None, "float32"),
        (("bfloat16", "float16"), None, None, "float32"),
        (("bfloat16", "bfloat16"), "bfloat16", None, "bfloat16"),
        (("bfloat16", "bfloat16"), "bfloat16", "float32", "float32"),
        (("bfloat16", "bfloat16"), "float32", None, "float32"),
        (("float32", "bfloat16"), "float32", "float16", "float16"),
        (("float32", "float32"), "float64", "bfloat16", "bfloat16"),
    ],
    ids=str,
)
def test_dtypes_that_one_recipe_can_say(
    stored, dtype, out_dtype, written, tmp_path, tokenizer
):
    save_as(tmp_path, tokenizer, stored)
    config = config_of(tmp_path, "tensor", dtype=dtype, out_dtype=out_dtype)
    ours = merge(config, tmp_path / "ours")
    found = recipe(config, ours)
    assert (found["dtype"], found["out_dtype"]) == ("float32", written)
    assert shard_bytes(merge(found, tmp_path / "plain")) == shard_bytes(ours)
    dtypes = {value.dtype for value in tensors(ours).values()}
    assert dtypes == {getattr(torch, written)}


def save_as(folder: Path, tokenizer, stored: tuple[str, str]) -> None:
    save_pair(folder, qwen2_config(tokenizer), tokenizer)
    for name, dtype in zip(("long", "short"), stored, strict=True):
        cast(folder / name, lambda _, dtype=dtype: dtype)


def cast(folder: Path, dtype_of) -> None:
    """Store every tensor in the dtype that `dtype_of` names for it."""
    weights = load_file(folder / "model.safetensors")
    weights = {n: v.to(getattr(torch, dtype_of(n))) for n, v in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_inputs_that_are_rounded_on_loading_are_refused(tmp_path, tokenizer):
    save_as(tmp_path, tokenizer, ("bfloat16", "float32"))
    config = config_of(tmp_path, dtype="bfloat16")
    message = refusal(config, merge(config, tmp_path / "out"))
    assert "dtype: bfloat16 rounds model.embed_tokens.weight" in message
    assert "short (float32) before it is merged in float32" in message
    assert "Set dtype: float32 and out_dtype: bfloat16" in message


def test_tensors_of_several_dtypes_need_an_out_dtype(tmp_path, tokenizer):
    save_pair(tmp_path, qwen2_config(tokenizer), tokenizer)
    for name in ("long", "short"):
        kept = lambda name: "float32" if "norm" in name else "bfloat16"  # noqa: E731
        cast(tmp_path / name, kept)
    config = config_of(tmp_path, dtype=None)
    message = refusal(config, merge(config, tmp_path / "out"))
    assert "bfloat16 (model.embed_tokens.weight) and float32 (model.norm" in message
    assert "Set dtype: float32 and out_dtype: bfloat16" in message
    assert_same_bytes(config_of(tmp_path, dtype=None, out_dtype="float16"), tmp_path)
