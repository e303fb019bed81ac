"""Scalar coefficients as a stock mergekit recipe: the same bytes without the plugin.

mergekit's `task_arithmetic` in float32 computes ``base + sum_k c_k * (other_k - base)``
as the merge formula does, and its writer rounds once, to `out_dtype`. A model's numbers
are its `weight`, by filters on tensor names: a filter matches every name that contains
it, and the first match wins. Knows nothing of files and models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import yaml

from rpam_mergekit.errors import RpamError

STOCK_METHOD = "task_arithmetic"
# Of so many models `task_arithmetic` adds up the task vectors in their order; of more
# the order depends on a tensor's size and place.
MOST_OTHERS = 4
NEARLY_ALL = 0.75  # of the tensors under a prefix: those that differ are named before
TITLE = "## A stock mergekit recipe, exported by rpam-mergekit. It needs no plugin."

Filter = tuple[str, float]  # part of tensor names, and their coefficient


def as_written(value: float | torch.Tensor, name: str) -> float:
    """Return a coefficient as the float64 that its float32 is, which YAML keeps.

    Raises `RpamError` if it is not a finite number.
    """
    number = float(torch.as_tensor(value, dtype=torch.float32))
    if number - number != 0:
        raise RpamError(f"{name}: the coefficient is {number}, not a finite number.")
    return number


def first_match(filters: Iterable[Filter], name: str) -> float | None:
    """Return the coefficient that mergekit gives a tensor, None without any."""
    return next((value for part, value in filters if part in name), None)


def weight_filters(
    layers: Sequence[Mapping[str, float]], outside: Mapping[str, float]
) -> list[Filter]:
    """Return few filters that give every tensor its coefficient, checked on each.

    `layers` and `outside` (the layers) map tensor names to coefficients. The shortest
    filter of a layer is its prefix, that of a module the module's; single tensors
    that differ come before.
    """
    every = {name: value for part in (*layers, outside) for name, value in part.items()}
    compact = [f for i, layer in enumerate(layers) for f in _layer_filters(layer, i)]
    compact += outside.items()
    whole = list(every.items())
    for filters in (compact, _longest_first(compact), _longest_first(whole)):
        if all(first_match(filters, name) == every[name] for name in every):
            return filters
    raise AssertionError("names are unique, so that the last list is right")


def _longest_first(filters: Iterable[Filter]) -> list[Filter]:
    return sorted(filters, key=lambda item: -len(item[0]))


def _layer_filters(layer: Mapping[str, float], index: int) -> list[Filter]:
    prefix = layer_prefix(layer, index)
    common = _common(layer)
    if common is not None:
        return [*_others_than(layer, common), (prefix, common)]
    filters: list[Filter] = []
    for module, tensors in modules_of(layer, prefix).items():
        common = _common(tensors)
        if common is None or len(tensors) == 1:
            filters += tensors.items()
        else:
            filters += [*_others_than(tensors, common), (module, common)]
    return filters


def _common(tensors: Mapping[str, float]) -> float | None:
    """Return the coefficient of nearly all tensors, None if there is no such."""
    ((value, count),) = Counter(tensors.values()).most_common(1)
    return value if count >= NEARLY_ALL * len(tensors) else None


def _others_than(tensors: Mapping[str, float], common: float) -> list[Filter]:
    return [(name, value) for name, value in tensors.items() if value != common]


def layer_prefix(names: Iterable[str], index: int) -> str:
    """Return what the names of a layer's tensors begin with, such as `model.layers.3.`.

    With the dot at its end it is no part of the names of layer 30.
    """
    folders = [name.split(".")[:-1] for name in names]
    common = [parts[0] for parts in zip(*folders, strict=False) if len({*parts}) == 1]
    if str(index) in common:
        common = common[: common.index(str(index)) + 1]
    return "".join(f"{part}." for part in common)


def modules_of(layer: Mapping[str, float], prefix: str) -> dict[str, dict[str, float]]:
    """Return a layer's tensors by module: `prefix` and the next part of the name."""
    modules: dict[str, dict[str, float]] = {}
    for name, value in layer.items():
        module = prefix + name[len(prefix) :].split(".")[0] + "."
        modules.setdefault(module, {})[name] = value
    return modules


def recipe_config(
    base: Any,
    models: Sequence[tuple[Any, Sequence[Filter]]],
    out_dtype: str,
    chat_template: str | None = None,
) -> dict[str, Any]:
    """Return the recipe as mergekit reads it.

    base: the base model, as in a config. models: in the config's order each model with
    its filters, the base without, if it is listed. out_dtype: what is written.
    """
    listed = [
        {"model": model, "parameters": {"weight": _setting(filters)}}
        if filters
        else {"model": model}
        for model, filters in models
    ]
    template = {"chat_template": chat_template} if chat_template else {}
    return {
        "merge_method": STOCK_METHOD,
        "base_model": base,
        "models": listed,
        "parameters": {"normalize": False, "lambda": 1.0},
        "dtype": "float32",
        "out_dtype": out_dtype,
        **template,
    }


def _setting(filters: Sequence[Filter]) -> list[dict[str, Any]]:
    return [{"filter": part, "value": value} for part, value in filters]


def recipe_yaml(
    config: Mapping[str, Any], prose: Sequence[str], provenance: Mapping[str, Any]
) -> str:
    """Return the recipe's text, what it was made from in comments.

    Without the first `#` of every line the comments are YAML: `prose` lines are
    comments in it, `provenance` is its content.
    """
    comments = [TITLE, *(f"## {line}".rstrip() for line in prose)]
    comments += [f"# {line}" for line in _dump(provenance).splitlines()]
    return "\n".join([*comments, _dump(config)])


def _dump(content: Mapping[str, Any]) -> str:
    return yaml.safe_dump(
        dict(content),
        sort_keys=False,
        default_flow_style=None,
        allow_unicode=True,
        width=1000,
    )
