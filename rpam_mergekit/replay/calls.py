"""Recording how a model's own code calls its decoder layers.

Every layer is replaced by a stub that keeps its arguments and returns its input
unchanged, so that one pass through the model captures all calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch.utils._pytree import tree_flatten_with_path, tree_map
from transformers import Cache

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


class AllLayersCalled(Exception):
    """Ends the recording pass before the final norm, whose weights are not loaded."""


class WrongInput(Exception):
    """A layer's first argument is not the output of the layer before it."""


class _ExtraOutput:
    """Stands for what a layer returns besides the hidden states."""


# What a layer may return: hidden states, or a tuple of them and of so much else. A
# model's code that unpacks something else fails with one of the errors.
EXTRA_OUTPUTS = (None, 0, 1, 2)
UNPACKING_ERRORS = (WrongInput, AttributeError, IndexError, TypeError, ValueError)


class Recording:
    """Records the calls of `layers` while it is entered; `model` names the class.

    entering: what enters the first layer. calls: one per layer, in order.
    extra_outputs: how many values a layer returns after the hidden states; None if it
    returns the tensor itself.
    """

    def __init__(
        self, model: str, layers: torch.nn.ModuleList, extra_outputs: int | None
    ) -> None:
        self.model = model
        self.layers = layers
        self.extra_outputs = extra_outputs
        self.entering: torch.Tensor | None = None
        self.calls: list[Call] = []

    def __enter__(self) -> Recording:
        for index, layer in enumerate(self.layers):
            layer.forward = self._stand_in(index)
        return self

    def __exit__(self, *_: object) -> None:
        for layer in self.layers:
            del layer.forward

    def _stand_in(self, index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not args or not isinstance(args[0], torch.Tensor):
                raise WrongInput(f"layer {index} has no positional input")
            if index and args[0] is not self.entering:
                raise WrongInput(f"layer {index}")
            self._check_alone(index, args[1:], kwargs)
            self.entering = args[0]
            self.calls.append(Call(args[1:], kwargs))
            if index == len(self.layers) - 1:
                raise AllLayersCalled
            if self.extra_outputs is None:
                return args[0]
            return (args[0], *(_ExtraOutput() for _ in range(self.extra_outputs)))

        return forward

    def _check_alone(self, index: int, args: Any, kwargs: Any) -> None:
        """Refuse a layer that is given what other layers or weights have made."""
        leaves, _ = tree_flatten_with_path((args, kwargs))
        for path, value in leaves:
            if isinstance(value, _ExtraOutput):
                refuse_layer(
                    self.model,
                    index,
                    "what the layer before returned besides hidden states",
                )
            if isinstance(value, Cache):
                refuse_layer(self.model, index, "a cache")
            if not isinstance(value, torch.Tensor):
                continue
            if value.requires_grad or value.is_meta:
                name = str(path[1]).strip("[]")
                refuse_layer(
                    self.model,
                    index,
                    f"an input that depends on weights besides its own ({name})",
                )


class Standing:
    """Lets all `layers` return `hidden` while it is entered, whatever they are given.

    `extra_outputs` as in `Recording`.
    """

    def __init__(
        self,
        layers: torch.nn.ModuleList,
        hidden: torch.Tensor,
        extra_outputs: int | None,
    ) -> None:
        self.layers = layers
        self.hidden = hidden
        self.extra_outputs = extra_outputs

    def __enter__(self) -> Standing:
        for layer in self.layers:
            layer.forward = self._forward
        return self

    def __exit__(self, *_: object) -> None:
        for layer in self.layers:
            del layer.forward

    def _forward(self, *_args: Any, **_kwargs: Any) -> Any:
        if self.extra_outputs is None:
            return self.hidden
        return (self.hidden, *(_ExtraOutput() for _ in range(self.extra_outputs)))


def refuse_layer(model: str, index: int, given: str) -> NoReturn:
    """Raise `RpamError`: a layer depends on more than hidden states."""
    raise RpamError(
        f"{model}: decoder layer {index} is given {given}, so that its layers cannot "
        "be optimised one by one."
    )
