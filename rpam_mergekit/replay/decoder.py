"""A causal language model's decoder without its weights: record calls, replay layers.

A skeleton is built on the meta device with real buffers. One pass of the model's own
code over a batch, in which every decoder layer hands its input on unchanged, records
the arguments that each layer is called with: masks and rotary pairs as this
architecture and version of transformers make them. Any layer can then be replayed
with any weights, in any order, and differentiated through.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, MutableMapping
from contextlib import suppress
from typing import Any

import torch
from accelerate import init_empty_weights
from torch.func import functional_call
from torch.utils._pytree import tree_map
from transformers import AutoModelForCausalLM, PretrainedConfig

from rpam_mergekit.errors import RpamError
from rpam_mergekit.replay.calls import (
    EXTRA_OUTPUTS,
    UNPACKING_ERRORS,
    AllLayersCalled,
    Call,
    Recording,
    Standing,
    WrongInput,
    refuse_layer,
)
from rpam_mergekit.replay.precision import AUTO, precision_on, tf32

NAMED = 4


class Decoder:
    """The decoder of the model that `config` describes, its weights in float32.

    Matrix products are computed in `compute_dtype` (`auto`: by the device), everything
    else in float32, as PyTorch's autocast chooses. Raises `RpamError` for models whose
    layers cannot be found or run one by one.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        device: torch.device | str = "cpu",
        trust_remote_code: bool = False,
        compute_dtype: str = AUTO,
    ) -> None:
        self.device = torch.device(device)
        self.compute_dtype = getattr(torch, precision_on(compute_dtype, self.device))
        with (
            torch.random.fork_rng(devices=[]),
            init_empty_weights(include_buffers=False),
        ):
            self.model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=trust_remote_code
            )
        self.model.eval().requires_grad_(False)
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self.device)
        self.path, self.layers = _find_layers(self.model, config)
        self._extra_outputs: int | None = None
        shared = getattr(config.get_text_config(), "num_kv_shared_layers", 0)
        if shared:
            refuse_layer(
                type(self.model).__name__,
                len(self.layers) - shared,
                "the keys and values of another layer",
            )

    def relative_name(self, index: int, tensor: str) -> str:
        """Return the name within layer `index` of the checkpoint's `tensor`.

        Only a layer's own code needs it. Checkpoints may lack the prefix of the modules
        around the list of layers.
        """
        marker = f"{self.path.rpartition('.')[2]}.{index}."
        _, found, name = tensor.partition(marker)
        if not found:
            raise RpamError(
                f"tensor {tensor} does not belong to decoder layer {index} "
                f"({self.path}.{index}): this architecture is not supported."
            )
        return name

    def module(self, index: int, tensor: str) -> str:
        """Return the module of layer `index` that has the checkpoint's `tensor`."""
        return self.relative_name(index, tensor).partition(".")[0]

    def check_names(self, index: int, tensors: Iterable[str]) -> None:
        """Raise `RpamError` unless `tensors` are exactly the weights of a layer."""
        names = {self.relative_name(index, tensor) for tensor in tensors}
        needed = {name for name, _ in self.layers[index].named_parameters()}
        buffers = {name for name, _ in self.layers[index].named_buffers()}
        lacking, unknown = needed - names, names - needed - buffers
        if lacking or unknown:
            raise RpamError(
                f"decoder layer {index}: mergekit's definition of this architecture "
                f"does not fit transformers' (missing: {_named(lacking)}; unknown: "
                f"{_named(unknown)}). It cannot be merged with rpam."
            )

    def check_outside(self, names: set[str]) -> None:
        """Raise `RpamError` unless `names` have all weights outside the layers."""
        lacking = {
            name
            for name, _ in self.model.named_parameters()
            if not name.startswith(f"{self.path}.")
            and name not in self.model.all_tied_weights_keys
            and not any(_is_named(name, given) for given in names)
        }
        if lacking:
            raise RpamError(
                f"{type(self.model).__name__}: mergekit's definition of this "
                f"architecture lacks weights outside the decoder layers "
                f"({_named(lacking)}). It cannot be merged with rpam."
            )

    def record(
        self,
        outside: Mapping[str, torch.Tensor],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
    ) -> tuple[torch.Tensor, list[Call]]:
        """Return what enters the first layer, and the call of every layer.

        `outside` holds the weights outside the layers by checkpoint name, float32 on
        this device. Hidden states are float32 (queries, tokens, width).
        """
        problem: Exception | None = None
        for extra_outputs in dict.fromkeys((self._extra_outputs, *EXTRA_OUTPUTS)):
            self._extra_outputs = extra_outputs
            try:
                return self._record(outside, input_ids, attention_mask)
            except UNPACKING_ERRORS as error:
                problem = problem or error
        raise RpamError(
            f"{type(self.model).__name__}: a decoder layer's first argument is not "
            "the output of the layer before it, so that its layers cannot be "
            f"optimised one by one ({problem})."
        ) from problem

    @torch.enable_grad()
    def _record(
        self,
        outside: Mapping[str, torch.Tensor],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
    ) -> tuple[torch.Tensor, list[Call]]:
        arguments = {
            "input_ids": input_ids.to(self.device),
            "attention_mask": attention_mask.to(self.device),
            "use_cache": False,
        }
        weights = self._outside_by_module(outside)
        name = type(self.model).__name__
        with (
            Recording(name, self.layers, self._extra_outputs) as found,
            suppress(AllLayersCalled),
        ):
            functional_call(self.model, weights, (), arguments)
        if len(found.calls) != len(self.layers) or found.entering is None:
            raise WrongInput(
                f"{len(found.calls)} of {len(self.layers)} layers were called"
            )
        if found.entering.is_meta:
            raise RpamError(
                f"{name}: mergekit's definition of this architecture lacks a weight "
                "that is used before the decoder layers. It cannot be merged with rpam."
            )
        return found.entering.detach(), found.calls

    def replay(
        self,
        index: int,
        weights: Mapping[str, torch.Tensor],
        hidden: torch.Tensor,
        call: Call,
    ) -> torch.Tensor:
        """Return what layer `index` makes of `hidden` with `weights`.

        `weights` are by the checkpoint's names; all of the layer must be given.
        """
        layer = self.layers[index]
        named = {self.relative_name(index, n): value for n, value in weights.items()}
        given = {**dict(layer.named_buffers()), **named}
        args, kwargs = tree_map(_own, (call.args, call.kwargs))
        autocast = torch.autocast(
            self.device.type,
            self.compute_dtype,
            enabled=self.compute_dtype != torch.float32,
        )
        with tf32(self.device), autocast:
            output = functional_call(layer, given, (hidden, *args), kwargs, strict=True)
        states: torch.Tensor = (
            output[0] if isinstance(output, (tuple, list)) else output
        )
        return states.to(hidden.dtype)

    def logits(
        self, outside: Mapping[str, torch.Tensor], hidden: torch.Tensor
    ) -> torch.Tensor:
        """Return the float32 logits (tokens, vocabulary) of a decoder's output.

        hidden: (tokens, width), what the last layer returned, of any queries: what
        follows the layers (final norm, head) looks at single tokens. outside: as for
        `record`, with the weights after the layers. Differentiable in `hidden`. A batch
        must have been recorded before.
        """
        weights = self._outside_by_module(outside, tracked=False)
        for tied, source in self.model.all_tied_weights_keys.items():
            if tied not in weights and source in weights:
                weights[tied] = weights[source]
        tokens = torch.zeros(1, len(hidden), dtype=torch.long, device=self.device)
        arguments = {
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "use_cache": False,
        }
        with Standing(self.layers, hidden[None], self._extra_outputs):
            output = functional_call(
                self.model, weights, (), arguments, tie_weights=False
            )
        logits: torch.Tensor = output.logits[0]
        return logits.float()

    def _outside_by_module(
        self, outside: Mapping[str, torch.Tensor], tracked: bool = True
    ) -> dict[str, torch.Tensor]:
        """Return `outside` under the model's own names, which may have a prefix.

        They track gradients, which tells what is made from them; unless not `tracked`.
        """
        own = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        own |= {name for name, _ in self.model.named_buffers()}
        named = {}
        for name, value in outside.items():
            matches = [o for o in own if _is_named(o, name)]
            if len(matches) == 1:
                value = value.detach()
                floating = value.is_floating_point()
                named[matches[0]] = value.requires_grad_(tracked and floating)
        return named


def _is_named(own: str, given: str) -> bool:
    """Tell whether a checkpoint's name is the model's own, perhaps without prefix."""
    return own == given or own.endswith(f".{given}")


def _own(value: Any) -> Any:
    """Return `value`, a copy if a layer could leave something in it for another."""
    return copy.copy(value) if isinstance(value, MutableMapping) else value


def _named(names: set[str]) -> str:
    """Return the first names as a list, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{sorted(names)[:NAMED]}{more}"


def _find_layers(
    model: torch.nn.Module, config: PretrainedConfig
) -> tuple[str, torch.nn.ModuleList]:
    count = config.get_text_config().num_hidden_layers
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == count
    ]
    found = [f for f in found if not any(f[0].startswith(o[0] + ".") for o in found)]
    if len(found) != 1:
        raise RpamError(
            f"{type(model).__name__}: expected one list of {count} decoder layers, "
            f"found {[name for name, _ in found]}. This architecture is not supported."
        )
    return found[0]
