"""The processes of one pre-pass: each has its share of every batch's queries.

Started by `torchrun` or `accelerate launch`, or alone. All of them make the same steps:
gradients, losses and distances are summed over the processes, so that coefficients are
those of one process up to the order of summation.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import distributed

from rpam_mergekit.errors import RpamError

T = TypeVar("T")


class Processes:
    """This process among those of the run; every method is called by all of them."""

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank = rank
        self.count = count

    def share(self, queries: int) -> slice:
        """Return which of a batch's queries are this process's; perhaps none."""
        starts = self._starts(queries)
        return slice(starts[self.rank], starts[self.rank + 1])

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over the processes, in place; return it."""
        if self.count > 1:
            with _others_alive(self.rank):
                distributed.all_reduce(tensor)
        return tensor

    def gather(self, rows: torch.Tensor, queries: int) -> torch.Tensor:
        """Return all `queries` rows of a batch, of which `rows` are this process's."""
        if self.count == 1:
            return rows
        starts = self._starts(queries)
        sizes = [end - start for start, end in pairwise(starts)]
        # bool is not among what every backend gathers
        sent = rows.new_zeros((max(sizes), *rows.shape[1:]), dtype=torch.float32)
        sent[: sizes[self.rank]] = rows[: sizes[self.rank]]
        received = [torch.empty_like(sent) for _ in sizes]
        with _others_alive(self.rank):
            distributed.all_gather(received, sent)
        kept = [r[:size] for r, size in zip(received, sizes, strict=True)]
        return torch.cat(kept).to(rows.dtype)

    def collect(self, values: Sequence[T]) -> list[T]:
        """Return what all processes passed, end to end in the order of their ranks."""
        if self.count == 1:
            return list(values)
        found: list[Any] = [None] * self.count
        with _others_alive(self.rank):
            distributed.all_gather_object(found, list(values))
        return [value for part in found for value in part]

    def broadcast(self, value: T) -> T:
        """Return what the first process passed as `value`."""
        if self.count == 1:
            return value
        told: list[T] = [value]
        with _others_alive(self.rank):
            distributed.broadcast_object_list(told)
        return told[0]

    def _starts(self, queries: int) -> Sequence[int]:
        return [queries * rank // self.count for rank in range(self.count + 1)]


@contextmanager
def joined(device: torch.device | str) -> Iterator[Processes]:
    """Join the processes that a launcher has started; alone without a launcher."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    cuda = torch.device(device).type == "cuda"
    if cuda and (rank := os.environ.get("LOCAL_RANK")) is not None:
        torch.cuda.set_device(int(rank))  # which collectives of objects go by
    distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Processes(distributed.get_rank(), count)
    finally:
        distributed.destroy_process_group()


def is_first() -> bool:
    """Tell whether this is the first of the processes that a launcher has started."""
    return os.environ.get("RANK", "0") == "0"


def local_device(device: str) -> str:
    """Return this process's own of several GPUs, by the launcher's LOCAL_RANK."""
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if device == "cuda" and rank is not None else device


@contextmanager
def _others_alive(rank: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RpamError(
            f"process {rank}: another process of this run has ended or cannot be "
            f"reached ({str(error).splitlines()[0]}). Its own message says why. Solved "
            "layers are safe: start all processes again with the same command."
        ) from error
