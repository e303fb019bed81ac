"""Matrix products: in which numbers, by device; TF32 only while it is asked for."""

from __future__ import annotations

import pytest
import torch

from rpam_mergekit.replay.decoder import Decoder
from rpam_mergekit.replay.precision import precision_on, tf32

PRODUCTS = torch.backends.cuda.matmul


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_auto_is_float32_where_no_gpu_has_matrix_units(device):
    assert precision_on("auto", device) == "float32"


@pytest.mark.parametrize("named", ["float32", "bfloat16"])
def test_a_dtype_that_is_named_holds_on_every_device(named):
    assert {precision_on(named, d) for d in ("cpu", "cuda", "mps")} == {named}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_auto_on_a_gpu_goes_by_its_generation():
    modern = torch.cuda.get_device_capability()[0] >= 8
    assert precision_on("auto", "cuda") == ("bfloat16" if modern else "float32")


def test_a_decoder_takes_the_dtype_of_its_device(tokenizer):
    from helpers.models import qwen2_config

    assert Decoder(qwen2_config(tokenizer)).compute_dtype == torch.float32


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_is_allowed_on_a_gpu_for_as_long_as_it_is_asked(allowed):
    before = PRODUCTS.allow_tf32
    try:
        PRODUCTS.allow_tf32 = allowed
        with tf32(torch.device("cpu")):
            assert PRODUCTS.allow_tf32 == allowed
        with tf32(torch.device("cuda", 1)):
            assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        assert PRODUCTS.allow_tf32 == allowed
        with pytest.raises(KeyError), tf32(torch.device("cuda")):
            raise KeyError
        assert PRODUCTS.allow_tf32 == allowed
    finally:
        PRODUCTS.allow_tf32 = before
