"""Fields of `PerCEConfig` that take one of a few words; apart from it, so that a recipe is checked without torch."""

from typing import Any, Literal

Estimator = Literal["base", "mixed", "bootstrap", "uniform", "shuffled"]
Normalization = Literal["none", "mean"]
TrainOn = Literal["factual", "counterfactual"]
WeightingKind = Literal["clip", "additive"]
ProfilePass = Literal["full", "frozen"]

CHOICES: dict[str, Any] = {
    "estimator": Estimator,
    "weighting": WeightingKind,
    "normalize_weights": Normalization,
    "train_on": TrainOn,
    "profile_pass": ProfilePass,
}
"""Fields of `PerCEConfig` that take one of a few words, with the `Literal` of their values."""
