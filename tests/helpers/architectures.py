"""The architecture matrix: what rpam merges and what it refuses, as tiny configs.

tests/integration/test_architectures.py merges or refuses every entry end to end. Run
as a program,

    python tests/helpers/architectures.py

prints the tables of docs/architectures.md; a test holds the page to them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}

DENSE = "dense"
EXPERTS = "mixture of experts"
RECURRENT = "state space, recurrent, or hybrid with attention"
KINDS = (DENSE, EXPERTS, RECURRENT)
SLIDING = "sliding-window layers"
TIED = "tied embedding and head"
BIASES = "biases"
PARALLEL = "parallel residual"
CONV1D = "Conv1D weights"
FEATURES = (SLIDING, TIED, BIASES, PARALLEL, CONV1D)


@dataclass(frozen=True)
class Architecture:
    """A model type with its tiny config, without the vocabulary's size.

    `note` tells several entries of one model type apart. `features` are among those of
    the table: `test_a_feature_that_the_table_names_is_there` looks for most of them.
    """

    model_type: str
    kind: str
    features: tuple[str, ...]
    config: dict[str, Any]
    note: str = ""

    @property
    def name(self) -> str:
        """The model type and the note, which no two entries share."""
        return f"{self.model_type} {self.note}".strip()


@dataclass(frozen=True)
class Refusal:
    """Why `architectures` are refused, and what the message says."""

    reason: str
    message: str
    architectures: tuple[Architecture, ...] = field(default=())


def _tiny(kind: str, model_type: str, *features: str, **config: Any) -> Architecture:
    note = config.pop("note", "")
    without = config.pop("without", ())
    tied = {"tie_word_embeddings": True} if TIED in features else {}
    whole = {**TINY, **tied, **config}
    kept = {key: value for key, value in whole.items() if key not in without}
    return Architecture(model_type, kind, features, kept, note)


def _dense(model_type: str, *features: str, **config: Any) -> Architecture:
    return _tiny(DENSE, model_type, *features, **config)


def _experts(model_type: str, *features: str, **config: Any) -> Architecture:
    """Four experts of which two are used, under the names that configs have for it."""
    common = {
        "num_local_experts": 4,
        "num_experts": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    }
    return _tiny(EXPERTS, model_type, *features, **{**common, **config})


def _recurrent(model_type: str, *features: str, **config: Any) -> Architecture:
    return _tiny(RECURRENT, model_type, *features, **config)


SLIDES = {"sliding_window": 4}
HEADS = {"head_dim": 8}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "num_key_value_heads": 4,
}
MAMBA2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
LINEAR_ATTENTION = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
GEMMA4 = {
    **HEADS,
    **SLIDES,
    "global_head_dim": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
}
GROUPS = {"n_group": 1, "topk_group": 1, "n_shared_experts": 1}

MERGED = (
    _dense("apertus"),
    _dense("arcee"),
    _dense("biogpt", TIED, BIASES),
    _dense("bitnet"),
    _dense("bloom", TIED, BIASES),
    _dense("codegen", BIASES, PARALLEL, n_embd=32, n_head=4, rotary_dim=4),
    _dense("cohere", TIED, PARALLEL, use_qk_norm=True),
    _dense("cohere2", TIED, PARALLEL, SLIDING, **SLIDES, sliding_window_pattern=2),
    _dense("ctrl", BIASES),
    _dense("cwm", SLIDING, **SLIDES),
    _dense("diffllama"),
    _dense("doge"),
    _dense("ernie4_5"),
    _dense("exaone4", SLIDING, **SLIDES, sliding_window_pattern=2),
    _dense(
        "falcon",
        PARALLEL,
        note="(new_decoder_architecture)",
        new_decoder_architecture=True,
        num_kv_heads=2,
    ),
    _dense("gemma", TIED, **HEADS),
    _dense("gemma2", TIED, SLIDING, **HEADS, **SLIDES),
    _dense("gemma3_text", TIED, SLIDING, **HEADS, **SLIDES, sliding_window_pattern=2),
    _dense("gemma4_text", TIED, SLIDING, **GEMMA4),
    _dense("glm", **HEADS),
    _dense("glm4", **HEADS),
    _dense("gpt2", TIED, BIASES, CONV1D),
    _dense("gpt_bigcode", TIED, BIASES),
    _dense(
        "gpt_neo",
        TIED,
        BIASES,
        SLIDING,
        num_layers=4,
        num_heads=4,
        attention_types=[[["global", "local"], 2]],
        window_size=4,
        without=["intermediate_size"],
    ),
    _dense("gpt_neox_japanese"),
    _dense("gptj", BIASES, PARALLEL, rotary_dim=4),
    _dense("granite"),
    _dense("helium", **HEADS),
    _dense("hunyuan_v1_dense", **HEADS),
    _dense("jais2", BIASES, **HEADS),
    _dense("llama"),
    _dense("llama", TIED, note="(tied)"),
    _dense("minicpm3", **LATENT),
    _dense("ministral", SLIDING, **HEADS, **SLIDES),
    _dense("ministral3"),
    _dense("mistral", SLIDING, **SLIDES),
    _dense("mpt", TIED),
    _dense("nanochat"),
    _dense("nemotron"),
    _dense("olmo"),
    _dense("olmo2"),
    _dense("olmo3", SLIDING, **SLIDES),
    _dense("openai-gpt", TIED, BIASES, CONV1D),
    _dense("opt", TIED, BIASES, ffn_dim=48, word_embed_proj_dim=32),
    _dense("persimmon", BIASES),
    _dense("phi", BIASES, PARALLEL),
    _dense("phi3"),
    _dense("qwen2", BIASES),
    _dense("qwen2", BIASES, TIED, note="(tied)"),
    _dense(
        "qwen2",
        BIASES,
        SLIDING,
        note="(sliding)",
        use_sliding_window=True,
        max_window_layers=2,
        **SLIDES,
    ),
    _dense("qwen3", **HEADS),
    _dense("seed_oss", BIASES, **HEADS),
    _dense("smollm3", TIED),
    _dense("stablelm"),
    _dense("starcoder2", TIED, BIASES),
    _dense("vaultgemma", TIED, SLIDING, **HEADS, **SLIDES),
    _dense("xglm", TIED, BIASES, d_model=32, ffn_dim=48, attention_heads=4),
    _dense("youtu", **LATENT),
    _experts("flex_olmo"),
    _experts("glm4_moe", first_k_dense_replace=1, **HEADS, **GROUPS),
    _experts("gpt_oss", SLIDING, BIASES, **HEADS, **SLIDES),
    _experts("granitemoe", TIED),
    _experts("granitemoeshared", TIED, shared_intermediate_size=16),
    _experts("hunyuan_v1_moe", **HEADS, moe_topk=2),
    _experts("jetmoe", kv_channels=8),
    _experts("llama4_text", intermediate_size_mlp=48, **HEADS),
    _experts("minimax_m2", **HEADS),
    _experts("mixtral"),
    _experts("olmoe"),
    _experts("phimoe", BIASES, attention_bias=True),
    _experts("qwen2_moe", BIASES, shared_expert_intermediate_size=16),
    _experts("qwen3_moe", **HEADS),
    _experts("solar_open", **HEADS, **GROUPS),
    _recurrent("bamba", attn_layer_indices=[1, 3], **MAMBA2),
    _recurrent("falcon_h1", mamba_d_ssm=64, **HEADS, **MAMBA2),
    _recurrent("falcon_mamba", TIED, state_size=4),
    _recurrent(
        "lfm2", TIED, layer_types=["conv", "full_attention"] * 2, block_ff_dim=48
    ),
    _recurrent("mamba", TIED, state_size=4),
    _recurrent(
        "mamba2", num_heads=4, head_dim=16, state_size=8, n_groups=1, chunk_size=16
    ),
    _recurrent("minimax", num_local_experts=4, num_experts_per_tok=2, **HEADS),
    _recurrent("qwen3_5_text", **HEADS, **LINEAR_ATTENTION),
    _recurrent(
        "qwen3_next",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        **HEADS,
        **LINEAR_ATTENTION,
    ),
    _recurrent("recurrent_gemma", TIED, SLIDING, lru_width=32, attention_window_size=4),
    _recurrent("xlstm", num_heads=4, chunk_size=16, without=["num_key_value_heads"]),
)

REFUSED = (
    Refusal(
        "mergekit leaves out the experts of layers where not all layers have them",
        "mergekit's definition of this architecture does not fit transformers'",
        (
            _experts("deepseek_v2", first_k_dense_replace=1, **LATENT, **GROUPS),
            _experts("deepseek_v3", first_k_dense_replace=1, **LATENT, **GROUPS),
            _experts("dots1", first_k_dense_replace=1, **HEADS, **GROUPS),
            _experts("ernie4_5_moe", moe_num_experts=4),
            _experts("exaone_moe", **HEADS, **GROUPS),
            _experts("glm4_moe_lite", **LATENT, **GROUPS),
            _experts(
                "jamba",
                mamba_d_state=4,
                mamba_dt_rank=4,
                attn_layer_period=2,
                attn_layer_offset=1,
                expert_layer_period=2,
                expert_layer_offset=1,
                use_mamba_kernels=False,
            ),
            _experts(
                "lfm2_moe",
                num_dense_layers=1,
                layer_types=["conv", "full_attention"] * 2,
            ),
            _experts("qwen2_moe", note="(mlp_only_layers)", mlp_only_layers=[1]),
        ),
    ),
    Refusal(
        "mergekit's definition lacks weights outside the layers",
        "lacks weights outside the decoder layers",
        (_dense("gemma", note="(untied)", **HEADS),),
    ),
    Refusal(
        "mergekit's definition lacks weights of a layer, or has other names for them",
        "mergekit's definition of this architecture does not fit transformers'",
        (
            _experts("afmoe", **HEADS),
            _experts(
                "granitemoehybrid",
                shared_intermediate_size=16,
                layer_types=["mamba", "attention"] * 2,
                **MAMBA2,
            ),
            _recurrent(
                "kimi_linear", num_experts=4, moe_intermediate_size=16, **LATENT
            ),
            _dense("llama", note="(attention_bias)", attention_bias=True),
            _recurrent(
                "nemotron_h",
                layers_block_type=["mamba", "attention", "mlp", "mamba"],
                mamba_num_heads=4,
                mamba_head_dim=16,
                ssm_state_size=8,
                n_groups=1,
                chunk_size=16,
            ),
            _recurrent("olmo_hybrid", **HEADS, **LINEAR_ATTENTION),
        ),
    ),
    Refusal(
        "mergekit's definition requires weights that these models do not have",
        "which mergekit's definition of",
        (
            _dense("cohere", note="(without qk-norm)"),
            _dense(
                "falcon",
                note="(7B)",
                without=["num_key_value_heads", "intermediate_size"],
            ),
            _dense("gpt_neox"),
            _recurrent(
                "granitemoehybrid",
                note="(no experts)",
                num_local_experts=0,
                shared_intermediate_size=48,
                layer_types=["mamba", "attention"] * 2,
                **MAMBA2,
            ),
            _experts("qwen3_moe", note="(mlp_only_layers)", mlp_only_layers=[1]),
        ),
    ),
    Refusal(
        "a layer takes keys and values from another layer",
        "is given the keys and values of another layer",
        (
            _dense(
                "gemma4_text",
                note="(num_kv_shared_layers)",
                **{**GEMMA4, "num_kv_shared_layers": 2},
            ),
        ),
    ),
    Refusal(
        "a layer gets inputs made by weights outside it besides the hidden states",
        "is given an input that depends on weights besides its own",
        (
            _dense(
                "gemma4_text",
                note="(per-layer inputs)",
                vocab_size_per_layer_input=64,
                **{**GEMMA4, "hidden_size_per_layer_input": 8},
            ),
            _recurrent(
                "zamba",
                attention_hidden_size=64,
                attention_head_dim=16,
                mamba_d_state=4,
                mamba_dt_rank=4,
                n_mamba_heads=2,
                use_mamba_kernels=False,
            ),
            _recurrent(
                "zamba2",
                layer_types=["mamba", "hybrid"] * 2,
                mamba_d_state=8,
                mamba_ngroups=1,
                n_mamba_heads=4,
                mamba_headdim=16,
                chunk_size=16,
                num_mem_blocks=1,
                attention_head_dim=16,
                use_mamba_kernels=False,
            ),
        ),
    ),
    Refusal(
        "a layer gets more from the layer before than hidden states",
        "is given what the layer before returned besides hidden states",
        (
            _recurrent(
                "rwkv",
                attention_hidden_size=32,
                context_length=256,
                without=["num_attention_heads", "num_key_value_heads"],
            ),
            _experts("zaya", num_experts_per_tok=1, **HEADS),
        ),
    ),
    Refusal(
        "several lists of layers, as of vision towers, encoders or loops",
        "models of several modules are not supported",
        (
            _dense(
                "gemma3n_text",
                hidden_size_per_layer_input=8,
                vocab_size_per_layer_input=64,
                num_kv_shared_layers=2,
                laurel_rank=4,
                altup_num_inputs=2,
                activation_sparsity_pattern=[0.0] * 4,
                layer_types=["sliding_attention", "full_attention"] * 2,
                **HEADS,
                **SLIDES,
            ),
            _dense(
                "gemma3",
                text_config={**TINY, **HEADS, "vocab_size": 64},
                vision_config={
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "image_size": 28,
                },
                mm_tokens_per_image=4,
            ),
            _dense("hrm_text"),
            _dense("t5", d_model=32, d_kv=8, d_ff=48, num_layers=4, num_heads=4),
        ),
    ),
)


def _listed(architectures: Iterable[Architecture]) -> str:
    """Return the model types, each once, with the notes of those that have one."""
    notes: dict[str, list[str]] = {}
    for entry in architectures:
        notes.setdefault(entry.model_type, []).append(entry.note)
    return ", ".join(
        f"`{model_type}`" if "" in of_type else f"`{model_type}` {' '.join(of_type)}"
        for model_type, of_type in notes.items()
    )


def table() -> str:
    """Return the matrix as the two tables of docs/architectures.md, in Markdown."""
    types = {entry.model_type for entry in MERGED}
    lines = [f"| merged ({len(types)} model types) | |", "|---|---|"]
    for kind in KINDS:
        lines.append(f"| {kind} | {_listed(e for e in MERGED if e.kind == kind)} |")
    for feature in FEATURES:
        having = _listed(e for e in MERGED if feature in e.features)
        lines.append(f"| with {feature} | {having} |")
    lines += ["", "| refused, because | |", "|---|---|"]
    lines += [f"| {r.reason} | {_listed(r.architectures)} |" for r in REFUSED]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
