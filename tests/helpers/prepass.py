"""The pre-pass of a tiny pair without mergekit's planner, and a stream by hand."""

from __future__ import annotations

import torch
from mergekit.architecture import arch_info_for_config
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from transformers import AutoTokenizer

from rpam_mergekit.chat.prompts import encode_calibration, make_batches
from rpam_mergekit.formats.calibration import read_calibration
from rpam_mergekit.models.layout import MergeModels, plan_layout
from rpam_mergekit.models.weights import ExpertWeights
from rpam_mergekit.parameters import parse_settings
from rpam_mergekit.prepass.run import PrePass
from rpam_mergekit.replay.decoder import Decoder
from rpam_mergekit.replay.streams import Stream

GRANULARITIES = ("low_rank", "element", "row", "tensor", "module", "layer")


def build(
    folder,
    fixed=None,
    dtype=None,
    out_dtype=None,
    patterns=None,
    device="cpu",
    **parameters,
):
    settings = parse_settings({"epochs": 4, "batch_size": 8, **parameters})
    base, other = (ModelReference.parse(str(folder / n)) for n in ("long", "short"))
    LoaderCache().setup(MergeOptions())
    config = base.config()
    layout = plan_layout(arch_info_for_config(config), config, [base, other])
    tokenizer = AutoTokenizer.from_pretrained(folder / "long")
    calibration = read_calibration(folder / "calibration.jsonl")
    queries, _ = encode_calibration(calibration, tokenizer, config.vocab_size, settings)
    experts = ExpertWeights(
        MergeModels(base, (other,), patterns or ("long", "short")),
        layout,
        Decoder(config, device, compute_dtype=settings.compute_dtype),
        dtype,
        out_dtype,
    )
    return PrePass(
        experts,
        make_batches(queries, settings),
        settings,
        fixed=fixed,
        quiet=True,
    )


def three_experts() -> Stream:
    """Two queries, of the experts 2 and 1."""
    torch.manual_seed(0)
    counted = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    return Stream(
        calls=[],
        experts=torch.randn(3, 2, 3, 4).unbind(),
        merged=torch.randn(2, 3, 4),
        is_token=counted,
        patterns=torch.tensor([2, 1]),
        token_weights=counted.float(),
        normalized_weights=counted / counted.sum(),
    )
