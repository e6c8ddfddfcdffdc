"""Which slot each row of a batch belongs to: set before the forward, read by every layer that holds slots."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from perce_lite.model.compat import write_count

BARE = -1
"""The slot of a row that sees the base alone."""


class _SharedCopy(torch.autograd.Function):
    """A copy of `x` in another dtype, made before; the gradient goes to `x` in its own dtype, as if it were alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype), None


class Route:
    """Which slot each row of the batch in flight belongs to; all layers of a model read the same one.

    size: rows of the batch, 0 for any number; None where no route is open, and then every row sees the bare base
    slots: (G,) the slots that take part, one a group of rows
    all_slots: whether `slots` are all slots, in their order
    active: (N,) the rows that have a slot, group after group of N / G; None: all of them
    homes: which parent each slot has, with cores; -1: none yet
    parents: (G,) the parents of the slots that take part
    """

    def __init__(self, slots: int, device: torch.device) -> None:
        self._count, self._device = slots, device
        self.homes = [-1] * slots
        self._close()

    def _close(self) -> None:
        self.size: int | None = None
        self.slots: Tensor | None = None
        self.parents: Tensor | None = None
        self.active: Tensor | None = None
        self.all_slots = False
        self._read: tuple[Tensor, tuple[int, torch.dtype], Tensor] | None = None

    def rows_of(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows of `x` (B, T, in) that have a slot, in `dtype`: (N, T, in).

        Layers that read the same `x` one after another, as q, k and v do, share one copy of it, and so what is saved.
        """
        if self.active is not None:
            return x[self.active].to(dtype)
        if x.dtype == dtype:
            return x
        same = (write_count(x), dtype)
        if self._read is None or self._read[0] is not x or self._read[1] != same:
            self._read = x, same, x.detach().to(dtype)
        shared: Tensor = _SharedCopy.apply(x, self._read[2])
        return shared

    @contextmanager
    def of(self, rows: Sequence[int]) -> Iterator[None]:
        """Routes the rows of a batch, given the slot of each (`BARE` for the base alone).

        Open it before the forward and keep it open until the backward is done: gradient checkpointing runs the
        forward again. Rows of one slot that lie together, in equal number, share a product.
        """
        if self.size is not None:
            raise RuntimeError("A route is open already: its backward is not done")
        wrong = [slot for slot in rows if not BARE <= slot < self._count]
        if wrong:
            raise IndexError(f"There are slots 0 to {self._count - 1}, and {BARE} for the bare base; not {wrong[0]}")
        routed = [slot for slot in rows if slot != BARE]
        runs = [(slot, len(list(run))) for slot, run in itertools.groupby(routed)]
        together = len({slot for slot, _ in runs}) == len(runs) and len({length for _, length in runs}) == 1
        heads = [slot for slot, _ in runs] if together else routed
        self.size = len(rows)
        if routed:
            self._take(heads)
            self.all_slots = heads == list(range(self._count))
        if len(routed) < len(rows):
            places = [place for place, slot in enumerate(rows) if slot != BARE]
            self.active = torch.tensor(places, device=self._device, dtype=torch.long)
        try:
            yield
        finally:
            self._close()

    @contextmanager
    def bare(self) -> Iterator[None]:
        """Every row sees the base alone, whatever is routed around it: to encode KV prefixes for activated LoRA."""
        kept = self.size, self.slots, self.parents, self.active, self.all_slots
        self._close()
        try:
            yield
        finally:
            self.size, self.slots, self.parents, self.active, self.all_slots = kept

    @contextmanager
    def everything_to(self, slot: int) -> Iterator[None]:
        """Every row of every batch belongs to `slot`: to score with one adapter on."""
        if self.size is not None:
            raise RuntimeError("A route is open already: its backward is not done")
        self.size = 0
        self._take([slot])
        try:
            yield
        finally:
            self._close()

    def _take(self, slots: Sequence[int]) -> None:
        self.slots = torch.tensor(slots, device=self._device)
        self.parents = torch.tensor([self.homes[slot] for slot in slots], device=self._device)
