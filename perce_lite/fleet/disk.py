"""How much disk a fleet's adapters and checkpoints take, before anything is trained."""

from dataclasses import dataclass

from perce_lite.model.footprint import adapter_bytes, trained_bytes
from perce_lite.planning.plan import MOST_USERS
from perce_lite.recipe import Recipe

_BESIDE = 2**15
"""Bytes at the most of what lies beside an adapter's numbers: headers, configuration, metadata, model card."""


@dataclass(frozen=True)
class DiskSize:
    """What the size of a fleet's adapters follows from.

    numbers: bytes of a whole adapter in float32; trained: of what a user trains, a core with `lora.core_only`
    halved: whether bfloat16 is stored; core: whether users have cores; slots: users in training at once, at the most
    """

    numbers: int
    trained: int
    halved: bool
    core: bool
    slots: int

    @classmethod
    def of(cls, recipe: Recipe) -> "DiskSize":
        """Raises as `footprint.adapter_bytes`."""
        slots = MOST_USERS if recipe.fleet.slots == "auto" else recipe.fleet.slots
        halved = recipe.fleet.adapter_dtype == "bfloat16"
        return cls(adapter_bytes(recipe), trained_bytes(recipe), halved, recipe.core_only, slots)

    @property
    def whole(self) -> int:
        """Bytes of a stored adapter that others start from."""
        return self._stored(self.numbers)

    @property
    def of_a_user(self) -> int:
        """Bytes of a user's stored adapter."""
        return self._stored(self.trained)

    def _stored(self, size: int) -> int:
        return size // (2 if self.halved else 1) + _BESIDE

    def need(self, parents: int, first: int, users: int) -> int:
        """Bytes at the most for `first` adapters that others start from and for users, of a fleet with `parents`.

        A checkpoint holds in float32 what is trained and two moments of the optimizer; there are two of each who is at
        work. One user after another, a core's holds its parent too. Beside the cores, each parent is kept once more.
        """
        stored = first * self.whole + users * self.of_a_user + (parents * self.whole if self.core else 0)
        at_once = min(users, self.slots)
        with_parent = 2 * self.numbers if self.core and at_once == 1 else 0
        return stored + max(6 * at_once * self.trained + with_parent, 6 * self.numbers if first else 0)
