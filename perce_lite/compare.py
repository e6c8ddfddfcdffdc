"""Arms against arms: one budget, seeds, data order and grid of rates; rates chosen on validation, judged on test."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perce_lite.files import safe_name
from perce_lite.recipe import Recipe


@dataclass(frozen=True)
class Arm:
    """One way to train: an estimator and, with it, fields of PerCEConfig that differ from the recipe's."""

    name: str
    options: dict[str, Any]

    def of(self, recipe: Recipe, rate: float, seed: int, root: Path) -> Recipe:
        """The recipe of one training of this arm, in a folder of its own under `root`."""
        folder = root / safe_name(self.name) / f"rate-{rate:g}-seed-{seed}"
        mine = {"learning_rate": rate, "seed": seed, "output_dir": str(folder), "save_total_limit": 1}
        return recipe.model_copy(update={"train": {**recipe.train, **self.options, **mine}})
