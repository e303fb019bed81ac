"""Tiny models made on the spot, their calibration file and config."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from pathlib import Path

import chains
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, Qwen2Config

from helpers.architectures import Architecture

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
# A model type that only code in its folder knows.
OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
AUTO_MAP = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}


def qwen2_config(tokenizer, **changes) -> Qwen2Config:
    return Qwen2Config(
        **{
            **TINY,
            "vocab_size": len(tokenizer),
            "tie_word_embeddings": False,
            **changes,
        }
    )


def save_pair(
    folder: Path, config: PretrainedConfig, tokenizer, dtype=torch.float32
) -> tuple[Path, Path]:
    """Write two models of `config` that differ a little, like two fine-tunings."""
    first, second = save_experts(folder, config, tokenizer, ("long", "short"), dtype)
    return first, second


def save_experts(
    folder: Path,
    config: PretrainedConfig,
    tokenizer,
    names: Sequence[str],
    dtype=torch.float32,
) -> list[Path]:
    """Write models of `config` that differ a little, in folders of these names."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    folders = []
    for name in names:
        expert = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        expert.to(dtype).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        folders.append(folder / name)
    return folders


def write_calibration(path: Path, count: int = 16) -> Path:
    """Write queries of 1 to 8 operations, odd ones `long`, with their responses."""
    rng = random.Random(0)
    lines = []
    for number in range(count):
        query = chains.draw(1 + number % 8, rng)
        long = number % 2
        respond = chains.long_response if long else chains.short_response
        lines.append(
            {
                "prompt": query,
                "pattern": "long" if long else "short",
                "response": respond(query),
            }
        )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def merge_config(folder: Path, **changes) -> dict:
    """Return a config for the pair in `folder`; `parameters` are merged in."""
    parameters = {
        "calibration": str(folder / "calibration.jsonl"),
        "epochs": 3,
        "batch_size": 8,
        **changes.pop("parameters", {}),
    }
    config = {
        "merge_method": "rpam",
        "base_model": str(folder / "long"),
        "models": [{"model": str(folder / "short")}],
        "dtype": "float32",
        "parameters": parameters,
        **changes,
    }
    return {key: value for key, value in config.items() if value is not None}


def save_adapter(model: Path, folder: Path, seed: int = 0) -> Path:
    import peft  # not at the top: it takes seconds, and few tests need it

    torch.manual_seed(seed)
    adapted = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(model),
        peft.LoraConfig(
            r=2,
            target_modules=["q_proj", "up_proj"],
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        ),
    )
    adapted.save_pretrained(folder)
    return folder


def tiny_config(architecture: Architecture, tokenizer):
    return AutoConfig.for_model(
        architecture.model_type, **architecture.config, vocab_size=len(tokenizer)
    )
