"""The pre-pass on models in memory: their state dicts, without mergekit.

experts = StateDictExperts(config, long.state_dict(), [short.state_dict()])
solution = PrePass(experts, make_batches(queries, settings), settings).run()
merged = merge_state_dicts(experts, solution)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from transformers import PretrainedConfig

from rpam_mergekit.errors import RpamError
from rpam_mergekit.formats.coefficients import entry_name, scaled
from rpam_mergekit.formats.solved_layers import Solution
from rpam_mergekit.replay.decoder import Decoder
from rpam_mergekit.replay.experts import Experts
from rpam_mergekit.replay.layer_weights import LayerMerge, Weights
from rpam_mergekit.replay.precision import AUTO


class StateDictExperts:
    """The `Experts` of models whose weights are in memory.

    config: the transformers config that all of them have. base, others: their tensors
    by name, as `state_dict()` returns them, of one shape and on any device. patterns:
    which pattern each model stands for, the base's first. Merged tensors get the dtype
    of the experts'. Raises `RpamError` where names or shapes differ.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        base: Mapping[str, torch.Tensor],
        others: Sequence[Mapping[str, torch.Tensor]],
        *,
        patterns: Sequence[str] = ("long", "short"),
        device: str = "cpu",
        compute_dtype: str = AUTO,
        trust_remote_code: bool = False,
    ) -> None:
        if len(patterns) != 1 + len(others):
            raise RpamError(
                f"patterns: found {len(patterns)} for {1 + len(others)} models."
            )
        self.decoder = Decoder(config, device, trust_remote_code, compute_dtype)
        self._models = (base, *others)
        self._patterns = tuple(patterns)
        _check_same(self._models)
        tied = self.decoder.model.all_tied_weights_keys
        names = [name for name in base if name not in tied]
        prefix = f"{self.decoder.path}."
        self._outside = [name for name in names if not name.startswith(prefix)]
        head = _head_of(self.decoder.model)
        self._embeddings = [name for name in self._outside if name not in head]
        self._layers: list[list[str]] = [[] for _ in self.decoder.layers]
        for name in names:
            if name.startswith(prefix):
                index = int(name.removeprefix(prefix).partition(".")[0])
                if index >= len(self._layers):
                    raise RpamError(
                        f"{name}: the config has {len(self._layers)} decoder layers."
                    )
                self._layers[index].append(name)
        if not any(self._layers):
            raise RpamError(
                f"no tensor is called {prefix}...: give the state dicts of "
                f"{type(self.decoder.model).__name__}."
            )
        self.decoder.check_outside(set(self._outside))
        for index, layer in enumerate(self._layers):
            self.decoder.check_names(index, layer)

    @property
    def patterns(self) -> tuple[str, ...]:
        """The models' patterns, the base's first."""
        return self._patterns

    @property
    def layers(self) -> int:
        """The number of decoder layers."""
        return len(self._layers)

    @property
    def outside(self) -> Sequence[str]:
        """The tensors outside the layers, by name."""
        return self._outside

    @property
    def embeddings(self) -> Sequence[str]:
        """Those of `outside` that come before the layers."""
        return self._embeddings

    def entry(self, number: int, tensor: str) -> str:
        """Return the name of a tensor's coefficient for the `number`th other model."""
        return entry_name(self._patterns[1 + number], tensor, len(self._models) - 1)

    def load(self, expert: int, names: Sequence[str]) -> Weights:
        """Return tensors outside the layers of one model; 0 is the base."""
        model, device = self._models[expert], self.decoder.device
        return {name: model[name].detach().to(device) for name in names}

    def layer(self, index: int) -> list[Weights]:
        """Return all models' weights of a layer."""
        models = range(len(self._models))
        return [self.layer_of(index, number) for number in models]

    def layer_of(self, index: int, expert: int) -> Weights:
        """Return one model's weights of a layer."""
        return self.load(expert, self._layers[index])

    def merging(self, experts: Sequence[Weights]) -> LayerMerge:
        """Return what a merge needs of all models' weights, which are emptied."""
        return LayerMerge.of(experts, dict.fromkeys(experts[0]), self.entry)


def merge_state_dicts(
    experts: Experts, solution: Solution, fixed: Collection[str] = ()
) -> dict[str, torch.Tensor]:
    """Return the merged model's tensors by name, in the experts' dtype.

    The layers' coefficients are scaled to the operating point that the solution's
    held-out queries chose, but for the entries in `fixed`, the weights that a user set.
    """
    entries, scale = solution.entries, solution.operating_point.scale
    merged: Weights = {}
    for name in experts.outside:
        weights = [experts.load(n, [name]) for n in range(len(experts.patterns))]
        merged |= _merged(experts, weights, entries)
    of_layers = {
        name: parts if name in fixed else scaled(parts, scale)
        for name, parts in entries.items()
    }
    for index in range(experts.layers):
        merged |= _merged(experts, experts.layer(index), of_layers)
    return merged


def _merged(
    experts: Experts, weights: Sequence[Weights], entries: Mapping[str, Weights]
) -> Weights:
    """Return tensors merged by their entries, in the dtype they are written in."""
    merging = experts.merging(weights)
    return {
        name: value.to(merging.dtypes.get(name, value.dtype))
        for name, value in merging.written(entries).items()
    }


def _check_same(models: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Raise `RpamError` unless all models have the same tensors in the same shapes."""
    base = models[0]
    for number, other in enumerate(models[1:], 1):
        differing = sorted(base.keys() ^ other.keys())
        if differing:
            raise RpamError(
                f"{differing[0]}: only some of the models have this tensor."
            )
        for name, value in base.items():
            if value.shape != other[name].shape:
                raise RpamError(
                    f"{name}: shape {tuple(value.shape)} in the base, "
                    f"{tuple(other[name].shape)} in model {number}."
                )


def _head_of(model: torch.nn.Module) -> set[str]:
    """Return the names of the weights of a model's head."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if not isinstance(head, torch.nn.Module):
        return set()
    (path,) = (path for path, module in model.named_modules() if module is head)
    return {f"{path}.{name}" for name, _ in head.named_parameters()}
