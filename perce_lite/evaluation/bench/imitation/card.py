"""What the machine pretends to have, and what was counted on it."""

import sys
import traceback
import weakref
from collections import Counter
from pathlib import Path

import torch

GIB = 2**30

_BLOCK = 512
"""Bytes to which torch's CUDA allocator rounds up."""


class Card:
    """An imitated GPU.

    capability: compute capability; memory: bytes; triton: whether Triton is installed, which it is not on Windows
    shapes: whether floating tensors have shapes alone
    counts: launches, copies, synchronisations by kind, attention kernels by name
    places: of each synchronisation, "what @ file:line < file:line"
    allocated, peak: live bytes of the card's storages; managed: bytes of bitsandbytes' paged optimizer state
    """

    def __init__(
        self,
        capability: tuple[int, int] = (8, 6),
        memory: int = 12 * GIB,
        shapes: bool = False,
        triton: bool = True,
    ) -> None:
        self.capability, self.memory, self.shapes, self.triton = capability, memory, shapes, triton
        self.name = f"imitated GPU of compute capability {capability[0]}.{capability[1]}"
        self.counts: Counter[str] = Counter()
        self.places: Counter[str] = Counter()
        self.allocated = self.peak = self.managed = 0
        self._live: dict[int, int] = {}
        self._addresses: dict[int, int] = {}
        self._next_address = _BLOCK

    def hold(self, tensor: torch.Tensor) -> None:
        """Counts the storage of `tensor`, once, until it is freed.

        Raises:
            torch.OutOfMemoryError: the card is full.
        """
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        size = -(-storage.nbytes() // _BLOCK) * _BLOCK
        self._require(size)
        self._live[key] = size
        self._addresses[key] = self._next_address
        self._next_address += max(size, _BLOCK)
        self.allocated += size
        self.peak = max(self.peak, self.allocated)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.allocated -= self._live.pop(key, 0)
        self._addresses.pop(key, None)

    def address(self, storage: torch.UntypedStorage) -> int:
        """Where a storage begins; none overlaps another, and none takes the place of one that was freed."""
        return self._addresses[storage._cdata]

    def take_for_a_moment(self, size: int) -> None:
        """Bytes that a kernel takes and gives back.

        Raises:
            torch.OutOfMemoryError: the card is full.
        """
        self._require(size)
        self.peak = max(self.peak, self.allocated + size)

    def _require(self, size: int) -> None:
        if self.allocated + size > self.memory:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size / 2**20:.2f} MiB. GPU 0 has a total capacity of "
                f"{self.memory / GIB:.2f} GiB of which {(self.memory - self.allocated) / 2**20:.2f} MiB is free."
            )

    def synchronise(self, what: str) -> None:
        """Counts a wait of the host for the card."""
        self.counts["synchronisations"] += 1
        self.places[f"{what} @ {place_in_code()}"] += 1

    def attention_kernels(self) -> dict[str, int]:
        """How often each attention kernel ran, by name."""
        return attention_kernels(self.counts)


def attention_kernels(counts: Counter[str]) -> dict[str, int]:
    """Of the `counts` of a card, how often each attention kernel ran, by name."""
    return {key.partition(": ")[2]: count for key, count in counts.items() if key.startswith("attention: ")}


_OWN_FILES = {str(path) for path in Path(__file__).parent.glob("*.py") if not path.name.startswith("test_")}

_current = Card()


def current() -> Card:
    """The card that is imitated now."""
    return _current


def put_in(card: Card) -> None:
    """Makes `card` the one that is imitated."""
    global _current
    _current = card


def place_in_code() -> str:
    """The two innermost frames outside of torch and this package."""
    frames: list[str] = []
    for frame, line in traceback.walk_stack(sys._getframe()):
        name = frame.f_code.co_filename
        if "/torch/" in name or "contextlib" in name or name in _OWN_FILES:
            continue
        frames.append(f"{name.split('site-packages/')[-1]}:{line}")
        if len(frames) == 2:
            break
    return " < ".join(frames)
