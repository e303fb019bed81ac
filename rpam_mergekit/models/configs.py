"""The models' transformers configs: what of them decides what a model computes.

All models are run with the base's config, and the merged model gets it. So what differs
in another model's is said, with the value that is taken, and coefficients know by which
values they were solved.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from transformers import GenerationConfig, PretrainedConfig

from rpam_mergekit.models.headers import NAMES, Header, promoted
from rpam_mergekit.models.layout import MergeModels

CONTEXT = "max_position_embeddings"
ROPE = ("rope_parameters", "rope_scaling", "rope_theta")
# Of a loaded config, what changes nothing that a forward pass computes.
_NO_PART = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "problem_type",
    "quantization_config",
    "return_dict",
    "router_aux_loss_coef",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
_NO_PARTS = ("dropout", "pdrop", "initializer", "attn_implementation")  # of names
# By which the rotary embedding does not depend on the length of the context.
_FIXED_ROPE = {"default", "linear", "llama3"}
# Of a generation config, what says how responses are drawn.
_DRAWN = (
    "bos_token_id",
    "pad_token_id",
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "max_length",
    "max_new_tokens",
    "stop_strings",
)


def computed_with(config: PretrainedConfig) -> dict[str, Any]:
    """Return the values of a config on which hidden states depend, as JSON."""
    values = config.get_text_config().to_dict()
    found = {
        key: value
        for key, value in values.items()
        if key not in _NO_PART and not any(part in key for part in _NO_PARTS)
    }
    types = {one.get("rope_type") for one in _ropes(values.get("rope_parameters"))}
    if types and types <= _FIXED_ROPE:
        found.pop(CONTEXT, None)
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str, sort_keys=True))
    return plain


def _ropes(parameters: Any) -> list[Mapping[str, Any]]:
    """Return the rope parameters of a model, which may have them by layer type."""
    if not isinstance(parameters, Mapping):
        return []
    inner = [one for one in parameters.values() if isinstance(one, Mapping)]
    return inner or [parameters]


def changed_values(
    before: Mapping[str, Any], now: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Return what has another value now, by key; what only one has does not count.

    Another version of transformers has other keys.
    """
    return {
        key: (before[key], now[key])
        for key in sorted(before.keys() & now.keys())
        if before[key] != now[key]
    }


def taken_notes(
    models: MergeModels, configs: Mapping[ModelReference, PretrainedConfig]
) -> list[str]:
    """Return notes on what differs between configs and is taken from the base."""
    mine = configs[models.base].get_text_config()
    notes = []
    for model in models.others:
        its = configs[model].get_text_config()
        first, second = (
            {**computed_with(one), CONTEXT: value_of(one, CONTEXT)}
            for one in (mine, its)
        )
        for key, (value, other) in changed_values(first, second).items():
            notes.append(
                f"{key} differs: {value} in {models.base}, {other} in {model}; the "
                f"merged model has the base's{_consequence(key, value, other, model)}"
            )
    return notes


def _consequence(key: str, value: Any, other: Any, model: ModelReference) -> str:
    if key == CONTEXT and isinstance(value, int) and isinstance(other, int):
        if value > other:
            return ""
        return (
            f": servers end prompt and response at {value} tokens. For {other}, make "
            f"{model} the base_model, or set {key} (and rope, if it differs) in the "
            "base's config.json"
        )
    if key in ROPE:
        return (
            f", and all are run with it: beyond the base's context it may not hold. To "
            f"take the other one, make {model} the base_model"
        )
    return ", and all are run with it"


def spelling_notes(model: ModelReference, config: PretrainedConfig) -> list[str]:
    """Return a note if transformers before 5 read another rope of a base's config.

    They do not know `rope_parameters`; the merged model's `config.json` is the base's.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None)
    with suppress(Exception):  # of many kinds: the class has no defaults
        if rope == getattr(type(text)(), "rope_parameters", None):
            return []
    path = Path(model.model.path) / "config.json"
    if not path.is_file():
        found = try_to_load_from_cache(
            model.model.path, path.name, revision=model.model.revision
        )
        path = Path(found) if isinstance(found, str) else path
    try:
        content = json.loads(path.read_text("utf-8"))
        content = content.get("text_config", content)
        spelled = "rope_parameters" in content and "rope_theta" not in content
    except (OSError, ValueError, AttributeError, TypeError):
        return []
    if not spelled:
        return []
    return [
        f"{model}: its config.json has rope_parameters and no rope_theta: transformers "
        "before 5, and engines that read rope_theta and rope_scaling, take their "
        "defaults, of the base as of the merged model, which has the base's file. Add "
        "rope_theta (and rope_scaling) to it for them"
    ]


def value_of(config: PretrainedConfig, key: str) -> Any:
    """Return a config's value, None where it has none or one for each layer."""
    try:
        return getattr(config, key, None)
    except RuntimeError:  # by which transformers refuses one for all layers
        return None


def generation_notes(models: MergeModels) -> list[str]:
    """Return notes on how responses are drawn by default, where models differ.

    By their generation configs; the tokens that end a response are looked at elsewhere.
    """
    mine = generation_config(models.base)
    notes = []
    for model in models.others:
        its = generation_config(model)
        first, second = (
            {key: getattr(one, key, None) for key in _DRAWN} if one else {}
            for one in (mine, its)
        )
        if (mine is None) != (its is None):
            having = model if mine is None else models.base
            notes.append(
                f"of {models.base} and {model} only {having} has a "
                "generation_config.json; the merged model has "
                f"{'none, as its base' if mine is None else 'it'}"
            )
        elif differing := changed_values(first, second):
            named = ", ".join(f"{k} {a} and {b}" for k, (a, b) in differing.items())
            notes.append(
                f"generation_config.json differs between {models.base} and {model}: "
                f"{named}; the merged model has the base's"
            )
    return notes


def generation_config(model: ModelReference) -> GenerationConfig | None:
    """Return a model's generation config, None where it has no file of it."""
    with suppress(Exception):  # of many kinds: there is none, or it cannot be had
        return GenerationConfig.from_pretrained(
            model.model.path, revision=model.model.revision
        )
    return None


def dtype_notes(
    config: MergeConfiguration, headers: Mapping[ModelReference, Header]
) -> list[str]:
    """Return a note where what the output is written in follows from mixed inputs."""
    if config.dtype or config.out_dtype:
        return []
    known = {
        model: Counter(tensor.dtype for tensor in header.tensors.values())
        for model, header in headers.items()
        if header.tensors
    }
    most = {model: count.most_common(1)[0][0] for model, count in known.items()}
    if len(set(most.values())) < 2 or not set(most.values()) <= NAMES.keys():
        return []
    named = ", ".join(f"{NAMES[one]} in {model}" for model, one in most.items())
    return [
        f"the dtypes differ: {named}. Without dtype and out_dtype the merged model is "
        f"written in {NAMES[promoted(most.values())]}, which holds both; name the one "
        "that it is to have in out_dtype"
    ]
