"""What `compare` is asked to set against each other: ways to train, and rates.

Without torch, so that a wrong name or number is told at once.
"""

from dataclasses import dataclass

from perce_lite.errors import RecipeError
from perce_lite.recipe import Recipe, train_defaults, with_train

ARMS = "uniform,shuffled,base,mixed,bootstrap"
"""What is compared where nothing else is asked for."""


@dataclass(frozen=True, eq=False)
class Arm:
    """One way to train: "base", or "base:clip_min=0.2:normalize_weights=mean" with other fields of PerCEConfig."""

    name: str
    recipe: Recipe

    @property
    def estimator(self) -> str:
        return self.name.partition(":")[0]

    @property
    def judged(self) -> str:
        """The profile that it is used with, and so judged with."""
        return "none" if self.recipe.train.get("train_on") == "counterfactual" else "own"


def arms_of(recipe: Recipe, spec: str) -> list[Arm]:
    """The arms of "uniform,base,base:clip_min=0.2".

    Raises:
        RecipeError: an unknown estimator or field, a combination that is refused, an arm named twice.
    """
    names = [name.strip() for name in spec.split(",") if name.strip()]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        raise RecipeError("--arms", [f"{', '.join(twice)}: named twice" if twice else f"name some, such as {ARMS}"])
    arms = []
    for name in names:
        estimator, *options = name.split(":")
        arms.append(Arm(name, with_train(recipe, f"--arms {name}", [f"estimator={estimator}", *options])))
    return arms


def grid(recipe: Recipe, spec: str | None) -> list[float]:
    """The rates of "1e-4,3e-4"; without a spec half, once and twice the recipe's.

    Raises:
        RecipeError: no number above 0.
    """
    if spec is None:
        middle = float(recipe.train.get("learning_rate", train_defaults(on_cpu=True)["learning_rate"]))
        return [middle / 2, middle, middle * 2]
    try:
        rates = [float(rate) for rate in spec.split(",")]
    except ValueError as error:
        raise RecipeError("--rates", [f"{spec}: write it as 1e-4,3e-4 ({error})"]) from error
    if not all(0 < rate < 1 for rate in rates) or len(set(rates)) < len(rates):
        raise RecipeError("--rates", [f"{spec}: each is above 0 and below 1, and stands there once"])
    return rates
