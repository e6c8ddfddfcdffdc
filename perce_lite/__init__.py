"""PerCE Lite: LoRA adapters that make a language model personal, on one GPU."""

import importlib
from typing import TYPE_CHECKING, Any

from perce_lite.errors import PerceLiteError

if TYPE_CHECKING:
    from perce_lite.config import PerCEConfig
    from perce_lite.recipe import Recipe, Template, load_recipe
    from perce_lite.training.trainer import PerCETrainer

__version__ = "0.1.0"
__all__ = ["PerCEConfig", "PerCETrainer", "PerceLiteError", "Recipe", "Template", "load_recipe"]

_ROOM_OF = {
    "PerCEConfig": "config",
    "PerCETrainer": "training.trainer",
    "Recipe": "recipe",
    "Template": "recipe",
    "load_recipe": "recipe",
}


def __getattr__(name: str) -> Any:
    # Torch is imported when a name that needs it is first used, so that `perce-lite --help` answers at once.
    if name in _ROOM_OF:
        return getattr(importlib.import_module(f"perce_lite.{_ROOM_OF[name]}"), name)
    raise AttributeError(f"module 'perce_lite' has no attribute {name!r}; it has {', '.join(__all__)}")
