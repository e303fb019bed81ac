"""A merged model that lacks tensors is never left behind as if it were whole."""

from __future__ import annotations

import pytest
import torch
from mergekit.architecture import get_architecture_info
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from transformers import AutoConfig

from helpers.models import TINY, merge_config, qwen2_config, save_pair
from rpam_mergekit.errors import RpamError
from rpam_mergekit.formats.coefficients import write_coefficients
from rpam_mergekit.models.completeness import check_complete
from rpam_mergekit.models.layout import plan_layout
from rpam_mergekit.models.weights import content_digest

LOSSY = {
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "moe_intermediate_size": 16,
    "n_group": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "topk_group": 1,
    "v_head_dim": 8,
}


def shared_coefficients(folder) -> None:
    """Write a coefficients file for the pair as somebody else might share one."""
    LoaderCache().setup(MergeOptions())
    config = MergeConfiguration.model_validate(merge_config(folder))
    base, other = config.base_model, config.models[0].model
    architecture = get_architecture_info(config, MergeOptions())
    layout = plan_layout(architecture, base.config(), [base, other])
    infos = [*layout.outside, *(w for layer in layout.layers for w in layer)]
    metadata = {
        "models": {"base": "long", "other": "short"},
        "fingerprint": {
            "base": content_digest(base),
            "other": content_digest(other),
        },
    }
    entries = {w.name: {"scalar": torch.tensor(0.5)} for w in infos}
    write_coefficients(folder / "coefficients.safetensors", entries, metadata)


def test_a_merge_that_loses_tensors_fails_and_names_them(
    tmp_path, tokenizer, mergekit_yaml
):
    config = AutoConfig.for_model(
        "deepseek_v3", **{**TINY, **LOSSY, "vocab_size": len(tokenizer)}
    )
    save_pair(tmp_path, config, tokenizer)
    shared_coefficients(tmp_path)
    document = merge_config(tmp_path)
    path = tmp_path / "coefficients.safetensors"
    document["parameters"] = {"coefficients": str(path)}
    process = mergekit_yaml(document)
    assert process.returncode == 1
    assert "would lack" in process.stderr
    assert "mlp.experts" in process.stderr
    assert "'deepseek_v3' leaves them out" in process.stderr
    assert "Traceback" not in process.stderr
    left = {path.suffix for path in (tmp_path / "out").iterdir()}
    assert not left & {".safetensors", ".bin"}
    assert not list((tmp_path / "out").glob("*.index.json"))
    assert path.exists()


def test_what_the_base_lacks_itself_is_not_held_against_the_merge(tmp_path, tokenizer):
    """An untied base without a head; transformers makes one up for it and its merge."""
    from safetensors.torch import load_file, save_file

    long, short = save_pair(tmp_path, qwen2_config(tokenizer), tokenizer)
    for folder in (long, short):
        weights = load_file(folder / "model.safetensors")
        del weights["lm_head.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    LoaderCache().setup(MergeOptions())
    check_complete(short, ModelReference.parse(str(long)))
    assert (short / "model.safetensors").exists()


def test_a_tensor_of_another_shape_counts_as_lacking(tmp_path, tokenizer):
    long, _ = save_pair(tmp_path / "a", qwen2_config(tokenizer), tokenizer)
    _, short = save_pair(
        tmp_path / "b", qwen2_config(tokenizer, intermediate_size=40), tokenizer
    )
    (short / "config.json").write_text((long / "config.json").read_text())
    LoaderCache().setup(MergeOptions())
    with pytest.raises(RpamError, match=r"would lack 9 tensors .*mlp\.down_proj"):
        check_complete(short, ModelReference.parse(str(long)))
    assert not (short / "model.safetensors").exists()


def test_a_whole_model_is_left_alone(pair):
    LoaderCache().setup(MergeOptions())
    before = (pair / "short" / "model.safetensors").read_bytes()
    check_complete(pair / "short", ModelReference.parse(str(pair / "long")))
    assert (pair / "short" / "model.safetensors").read_bytes() == before
