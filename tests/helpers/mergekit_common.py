"""What mergekit's own tests import from `tests.common`, which its sdist lacks.

`tests/mergekit_suite.py` lays it beside them. Written anew for this project: tiny
models of random weights, and a merge that is run and looked at.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from os import PathLike
from pathlib import Path

from mergekit.architecture import arch_info_for_config, get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.io import LazyTensorLoader
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def make_picollama(path: str | PathLike[str], vocab_size: int = 64) -> str:
    """Write a tiny Llama and return its folder."""
    return _saved(LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **TINY)), path)


def make_picogranite(path: str | PathLike[str], vocab_size: int = 64) -> str:
    """Write a tiny Granite and return its folder."""
    config = GraniteConfig(vocab_size=vocab_size, **TINY)
    return _saved(GraniteForCausalLM(config), path)


def make_gpt2size(path: str | PathLike[str], vocab_size: int = 64) -> str:
    """Write a narrow GPT-2 with the twelve layers of the smallest one."""
    config = GPT2Config(
        vocab_size=vocab_size, n_embd=32, n_head=4, n_layer=12, n_positions=64
    )
    return _saved(GPT2LMHeadModel(config), path)


def make_picoLlaVa(path: str | PathLike[str], vocab_size: int = 64) -> str:  # noqa: N802
    """Write a tiny LLaVA, an architecture that mergekit has to infer."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            projection_dim=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        ),
        text_config=LlamaConfig(vocab_size=vocab_size, **TINY),
        image_token_index=vocab_size - 1,
    )
    return _saved(LlavaForConditionalGeneration(config), path)


def run_and_check_merge(
    config: MergeConfiguration,
    validate: Callable[[str], None] | None = None,
    auto_arch: bool = False,
) -> None:
    """Merge; check that no tensor is missing or not finite, then `validate` the folder.

    `auto_arch` says that mergekit has no definition of the architecture.
    """
    options = MergeOptions(quiet=True)
    with tempfile.TemporaryDirectory() as folder:
        run_merge(config, folder, options)
        assert (Path(folder) / "config.json").exists()
        out_config = AutoConfig.from_pretrained(folder)
        assert (arch_info_for_config(out_config) is None) == auto_arch
        loader = LazyTensorLoader.from_disk(folder)
        names = set(loader.index.tensor_paths)
        assert names
        for weight in get_architecture_info(config, options).all_weights(out_config):
            known_as = {
                weight.name,
                *(weight.aliases or ()),
                *(weight.tied_names or ()),
            }
            assert weight.optional or known_as & names, f"no tensor {weight.name}"
        for name in names:
            assert loader.get_tensor(name).isfinite().all(), f"{name} is not finite"
        if validate is not None:
            validate(folder)


def _saved(model: PreTrainedModel, path: str | PathLike[str]) -> str:
    model.save_pretrained(path)
    return str(path)
