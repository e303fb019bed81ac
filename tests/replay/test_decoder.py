"""The decoder replays layers bit-exactly on every architecture tried."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.models import TINY
from rpam_mergekit.errors import RpamError
from rpam_mergekit.replay.decoder import Decoder

COMMON = {**TINY, "num_hidden_layers": 4, "vocab_size": 64, "pad_token_id": 0}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ARCHITECTURES = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 4},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4},
    "phi3": {},
    "mistral": {"sliding_window": 4},
    "mixtral": EXPERTS,
    "olmo2": {},
    "olmo3": {"sliding_window": 4},
    "gpt_neox": {},
    "gpt2": {},
}


def build(name: str, **changes) -> AutoModelForCausalLM:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**COMMON, **ARCHITECTURES[name], **changes})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Return three prompts of unequal length, padded on the right."""
    torch.manual_seed(1)
    ids = torch.randint(1, 64, (3, 11))
    mask = torch.ones_like(ids)
    for row, length in enumerate((11, 7, 4)):
        ids[row, length:] = 0
        mask[row, length:] = 0
    return ids, mask


def layer_outputs(model, layers, ids, mask) -> list[torch.Tensor]:
    """Return every layer's output in an ordinary forward pass."""
    outputs = []

    def keep(_module, _args, output):
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(keep) for layer in layers]
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_replay_equals_the_ordinary_forward_bit_for_bit(name):
    model = build(name)
    decoder = Decoder(model.config)
    ids, mask = inputs()
    layers = model.get_submodule(decoder.path)
    expected = layer_outputs(model, layers, ids, mask)
    outside = {
        key: value
        for key, value in model.named_parameters()
        if not key.startswith(decoder.path + ".")
    }
    hidden, calls = decoder.record(outside, ids, mask)
    assert len(calls) == len(layers)
    for index, layer in enumerate(layers):
        weights = {
            f"{decoder.path}.{index}.{n}": p for n, p in layer.named_parameters()
        }
        hidden = decoder.replay(index, weights, hidden, calls[index])
        assert torch.equal(hidden, expected[index]), f"layer {index}"


def test_replay_gradient_equals_finite_differences():
    model = build("qwen3")
    decoder = Decoder(model.config)
    ids, mask = inputs()
    outside = {
        key: value.detach()
        for key, value in model.named_parameters()
        if not key.startswith(decoder.path + ".")
    }
    hidden, calls = decoder.record(outside, ids, mask)
    layer = decoder.layers[1]
    weights = {
        f"{decoder.path}.1.{key}": torch.randn(value.shape, dtype=torch.float64) * 0.2
        for key, value in layer.named_parameters()
    }
    vectors = {key: torch.randn_like(value) * 0.1 for key, value in weights.items()}
    call = calls[1].to(torch.float64)

    def value(coefficient: torch.Tensor) -> torch.Tensor:
        merged = {key: weights[key] + coefficient * vectors[key] for key in weights}
        return decoder.replay(1, merged, hidden.double(), call).square().sum()

    point = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(value(point), point)
    step = 1e-3  # RMSNorm computes in float32: smaller steps drown in its rounding
    difference = (value(point + step) - value(point - step)) / (2 * step)
    torch.testing.assert_close(gradient, difference, rtol=1e-3, atol=1e-3)


def test_building_and_recording_leave_the_global_generator_alone():
    model = build("llama")
    ids, mask = inputs()
    before = torch.get_rng_state()
    decoder = Decoder(model.config)
    decoder.record(dict(model.named_parameters()), ids, mask)
    assert torch.equal(before, torch.get_rng_state())


def test_recording_leaves_the_layers_as_they_were():
    model = build("llama")
    decoder = Decoder(model.config)
    decoder.record(dict(model.named_parameters()), *inputs())
    assert all("forward" not in vars(layer) for layer in decoder.layers)


def test_no_weight_of_the_skeleton_takes_memory():
    decoder = Decoder(build("llama").config)
    assert all(parameter.is_meta for parameter in decoder.model.parameters())
    assert not any(buffer.is_meta for buffer in decoder.model.buffers())


def test_a_layer_that_does_not_get_the_previous_output_is_refused(monkeypatch):
    model = build("llama")
    decoder = Decoder(model.config)
    outside = dict(model.named_parameters())
    original = type(decoder.layers[0]).__call__

    def scaled(self, hidden, *args, **kwargs):
        return original(self, hidden * 2, *args, **kwargs)

    monkeypatch.setattr(type(decoder.layers[0]), "__call__", scaled)
    with pytest.raises(RpamError, match="not the output of the layer before"):
        decoder.record(outside, *inputs())


def test_weights_that_do_not_fit_the_layer_are_named():
    decoder = Decoder(build("llama").config)
    layer = "model.layers.0."
    names = {layer + name for name, _ in decoder.layers[0].named_parameters()}
    decoder.check_names(0, names)
    with pytest.raises(RpamError, match=r"missing: \['mlp.up_proj.weight'\]"):
        decoder.check_names(0, names - {f"{layer}mlp.up_proj.weight"})
    with pytest.raises(RpamError, match=r"unknown: \['mlp.extra'\]"):
        decoder.check_names(0, names | {f"{layer}mlp.extra"})
    with pytest.raises(RpamError, match=r"does not belong to decoder layer 0"):
        decoder.check_names(0, names | {"model.layers.1.mlp.up_proj.weight"})
