"""A causal language model's decoder without its weights: record calls, replay layers.

A skeleton is built on the meta device with real buffers. One pass of the model's own
code over a batch, in which every decoder layer hands its input on unchanged, records
the arguments that each layer is called with: masks and rotary pairs as this
architecture and version of transformers make them. Any layer can then be replayed
with any weights, in any order, and differentiated through.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import init_empty_weights
from torch.func import functional_call
from torch.utils._pytree import tree_map
from transformers import AutoModelForCausalLM, Cache, PretrainedConfig

from rpam_mergekit.errors import RpamError


@dataclass(frozen=True)
class Call:
    """What one decoder layer is called with besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, dtype: torch.dtype) -> Call:
        """Return the call with its floating-point tensors in `dtype`."""

        def cast(value: Any) -> Any:
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                return value.to(dtype)
            return value

        return replace(
            self, args=tree_map(cast, self.args), kwargs=tree_map(cast, self.kwargs)
        )


class _AllLayersCalled(Exception):
    """Ends the recording pass before the final norm, whose weights are not loaded."""


class _WrongInput(Exception):
    """A layer's first argument is not the output of the layer before it."""


class Decoder:
    """The decoder of the model that `config` describes, computing in float32.

    Raises `RpamError` for models whose layers cannot be found or run one by one.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        device: torch.device | str = "cpu",
        trust_remote_code: bool = False,
    ) -> None:
        self.device = torch.device(device)
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
        self._tuples = False

    def relative_name(self, index: int, tensor: str) -> str:
        """Return the name within layer `index` of the checkpoint's `tensor`.

        Checkpoints may lack the prefix of the modules around the list of layers.
        """
        marker = f"{self.path.rpartition('.')[2]}.{index}."
        _, found, name = tensor.partition(marker)
        if not found:
            raise RpamError(
                f"tensor {tensor} does not belong to decoder layer {index} "
                f"({self.path}.{index}): this architecture is not supported."
            )
        return name

    def check_names(self, index: int, names: set[str]) -> None:
        """Raise `RpamError` unless `names` are exactly the weights of layer `index`."""
        needed = {name for name, _ in self.layers[index].named_parameters()}
        buffers = {name for name, _ in self.layers[index].named_buffers()}
        lacking, unknown = needed - names, names - needed - buffers
        if lacking or unknown:
            raise RpamError(
                f"decoder layer {index}: mergekit's definition of this architecture "
                f"does not fit transformers' (missing: {sorted(lacking)}; unknown: "
                f"{sorted(unknown)}). It cannot be merged with rpam."
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
        try:
            return self._record(outside, input_ids, attention_mask)
        except (_WrongInput, TypeError, AttributeError, IndexError):
            self._tuples = not self._tuples  # layers of this model return tuples
        try:
            return self._record(outside, input_ids, attention_mask)
        except (_WrongInput, TypeError, AttributeError, IndexError) as error:
            raise RpamError(
                f"{type(self.model).__name__}: a decoder layer's first argument is not "
                "the output of the layer before it, so that its layers cannot be "
                f"optimised one by one ({error})."
            ) from error

    @torch.no_grad()
    def _record(
        self,
        outside: Mapping[str, torch.Tensor],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
    ) -> tuple[torch.Tensor, list[Call]]:
        entering: list[torch.Tensor] = []
        calls: list[Call] = []
        with self._recording(entering, calls):
            arguments = {
                "input_ids": input_ids.to(self.device),
                "attention_mask": attention_mask.to(self.device),
                "use_cache": False,
            }
            weights = self._outside_by_module(outside)
            with suppress(_AllLayersCalled):
                functional_call(self.model, weights, (), arguments)
        if len(calls) != len(self.layers):
            raise _WrongInput(f"{len(calls)} of {len(self.layers)} layers were called")
        return entering[0], calls

    def replay(
        self,
        index: int,
        weights: Mapping[str, torch.Tensor],
        hidden: torch.Tensor,
        call: Call,
    ) -> torch.Tensor:
        """Return what layer `index` makes of `hidden` with `weights`.

        `weights` are by name within the layer; all of them must be given.
        """
        layer = self.layers[index]
        given = {**dict(layer.named_buffers()), **weights}
        output = functional_call(
            layer, given, (hidden, *call.args), call.kwargs, strict=True
        )
        return output[0] if isinstance(output, tuple) else output

    @contextmanager
    def _recording(
        self, entering: list[torch.Tensor], calls: list[Call]
    ) -> Iterator[None]:
        """Make every layer keep its arguments and hand its input on."""

        def stand_in(index: int):
            def forward(*args: Any, **kwargs: Any) -> Any:
                if not args or not isinstance(args[0], torch.Tensor):
                    raise _WrongInput(f"layer {index} has no positional input")
                if index and args[0] is not entering[0]:
                    raise _WrongInput(f"layer {index}")
                if any(isinstance(v, Cache) for v in (*args, *kwargs.values())):
                    raise _WrongInput(f"layer {index} is called with a cache")
                if not index:
                    entering.append(args[0])
                calls.append(Call(args[1:], kwargs))
                if index == len(self.layers) - 1:
                    raise _AllLayersCalled
                return (args[0],) if self._tuples else args[0]

            return forward

        for index, layer in enumerate(self.layers):
            layer.forward = stand_in(index)
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward

    def _outside_by_module(
        self, outside: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Return `outside` under the model's own names, which may have a prefix."""
        own = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        own |= {name for name, _ in self.model.named_buffers()}
        named = {}
        for name, value in outside.items():
            matches = [o for o in own if o == name or o.endswith("." + name)]
            if len(matches) == 1:
                named[matches[0]] = value
        return named


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
