"""Recording: every decoder layer keeps the call it gets and hands its input on."""

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


class _Leftover:
    """Stands for what a layer returns besides the hidden states."""


# What a layer may return: hidden states, or a tuple of them and of so much else. A
# model's code that unpacks something else fails with one of the errors.
LEFTOVERS = (None, 0, 1, 2)
UNPACKING_ERRORS = (WrongInput, AttributeError, IndexError, TypeError, ValueError)


class Recording:
    """Records the calls of `layers` while it is entered; `model` names the class.

    entering: what enters the first layer. calls: one per layer, in order. `leftovers`
    is how much a layer returns besides the hidden states; None: it returns no tuple.
    """

    def __init__(
        self, model: str, layers: torch.nn.ModuleList, leftovers: int | None
    ) -> None:
        self.model = model
        self.layers = layers
        self.leftovers = leftovers
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
            if self.leftovers is None:
                return args[0]
            return (args[0], *(_Leftover() for _ in range(self.leftovers)))

        return forward

    def _check_alone(self, index: int, args: Any, kwargs: Any) -> None:
        """Refuse a layer that is given what other layers or weights have made."""
        leaves, _ = tree_flatten_with_path((args, kwargs))
        for path, value in leaves:
            if isinstance(value, _Leftover):
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

    `leftovers` as in `Recording`.
    """

    def __init__(
        self, layers: torch.nn.ModuleList, hidden: torch.Tensor, leftovers: int | None
    ) -> None:
        self.layers = layers
        self.hidden = hidden
        self.leftovers = leftovers

    def __enter__(self) -> Standing:
        for layer in self.layers:
            layer.forward = self._forward
        return self

    def __exit__(self, *_: object) -> None:
        for layer in self.layers:
            del layer.forward

    def _forward(self, *_args: Any, **_kwargs: Any) -> Any:
        if self.leftovers is None:
            return self.hidden
        return (self.hidden, *(_Leftover() for _ in range(self.leftovers)))


def refuse_layer(model: str, index: int, given: str) -> NoReturn:
    """Raise `RpamError`: a layer depends on more than hidden states."""
    raise RpamError(
        f"{model}: decoder layer {index} is given {given}, so that its layers cannot "
        "be optimised one by one."
    )
