"""Early stopping: validation rows are measured on the way, the best step is kept, and training ends when none comes.

The trainer and the slots of a fleet share `BestStep`, so they measure at the same steps and keep the same one. Its
state is saved with every checkpoint, so that a resumed training keeps and ends as one that was never stopped.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from perce_lite.config import PerCEConfig
from perce_lite.console import no_bars
from perce_lite.data.rows import Row, of_split
from perce_lite.errors import DataError
from perce_lite.model.prefix_cache import PrefixCache
from perce_lite.model.scoring import ScoringJob, cached_log_probs
from perce_lite.recipe import EarlyStopping, Recipe
from perce_lite.training.held_out import loss_of
from perce_lite.training.order import steps_of, steps_of_an_epoch

NEEDS = (
    "needs validation rows: rows with a profile that are held out of training, by split.validation, or that the data "
    "name so (split: validation)"
)


@dataclass
class BestStep:
    """The step with the lowest loss on validation rows so far.

    patience: measurements in a row without a better one after which training ends
    every: steps from one measurement to the next; total: steps of the whole training, the last is measured too
    losses: what was measured, nats a token, by step, in order
    weights: what is trained, as it was after the best step, on the CPU; empty as long as no loss was a number
    """

    patience: int
    every: int
    total: int
    losses: dict[int, float] = field(default_factory=dict)
    weights: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, stopping: EarlyStopping, args: PerCEConfig, rows: int, total: int | None = None) -> "BestStep":
        """For a training over so many rows; total: its steps, None: those of `args`. `stopping` has a patience."""
        assert stopping.patience is not None
        interval = stopping.every or steps_of_an_epoch(args, rows)
        return cls(stopping.patience, interval, steps_of(args, rows) if total is None else total)

    def is_due(self, step: int) -> bool:
        """Whether validation rows are to be measured after `step`, and were not yet."""
        return step > 0 and step not in self.losses and (step % self.every == 0 or step >= self.total)

    def add(self, step: int, loss: float, trained: Iterable[Tensor]) -> None:
        """Notes the loss after `step`; `trained`: what is trained, copied if the step is the best."""
        best = min(filter(math.isfinite, self.losses.values()), default=math.inf)
        self.losses[step] = loss
        if loss < best:
            self.weights = [tensor.detach().cpu().clone() for tensor in trained]

    @property
    def kept(self) -> int | None:
        """The step of `weights`, the first of those with the lowest loss; None: no loss was a number."""
        finite = {step: loss for step, loss in self.losses.items() if math.isfinite(loss)}
        return min(finite, key=lambda step: finite[step]) if finite else None

    @property
    def stopped(self) -> bool:
        """Whether the last `patience` measurements brought nothing better."""
        steps = list(self.losses)
        since = len(steps) if self.kept is None else len(steps) - 1 - steps.index(self.kept)
        return since >= self.patience

    @torch.no_grad()
    def put_back(self, trained: Iterable[Tensor]) -> None:
        """Makes what is trained what it was after the best step; nothing where there is none."""
        for tensor, kept in zip(trained, self.weights, strict=bool(self.weights)):
            tensor.copy_(kept)

    def state(self) -> dict[str, Any]:
        """What `restore` needs."""
        return {"losses": dict(self.losses), "weights": self.weights}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.losses, self.weights = dict(state["losses"]), list(state["weights"])

    def figures(self, done: int) -> dict[str, Any]:
        """For metadata and registry. done: steps that were taken, of `total` at the most."""
        measured = [{"step": step, "loss": loss} for step, loss in self.losses.items()]
        return {"kept_step": self.kept or done, "steps": done, "of": self.total, "validation": measured}


class Validation(TrainerCallback):
    """Measures a trainer's validation rows where `best` is due, and ends the training when its patience has run out.

    jobs: the rows; autocast, prefixes: as in `validation_loss`
    """

    def __init__(
        self, best: BestStep, jobs: Sequence[ScoringJob], autocast: torch.dtype | None, prefixes: PrefixCache
    ) -> None:
        self._best, self._jobs, self._autocast, self._prefixes = best, jobs, autocast, prefixes

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._best.is_due(state.global_step):
            loss = validation_loss(model, self._jobs, self._autocast, self._prefixes)
            self._best.add(state.global_step, loss, trained_by(model))
        control.should_training_stop = control.should_training_stop or self._best.stopped


def trained_by(model: torch.nn.Module) -> list[Tensor]:
    """The parameters that are trained, in an order that is always the same."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def validation_loss(
    model: torch.nn.Module,
    jobs: Sequence[ScoringJob],
    autocast: torch.dtype | None,
    prefixes: PrefixCache,
) -> float:
    """Loss a token, nats, with the adapter on; prefixes: those that the training's own forwards look at."""
    with no_bars():
        return loss_of(cached_log_probs(model, jobs, None, autocast, "Validation", True, prefixes).log_probs)


def require_validation_rows(recipe: Recipe, rows: Sequence[Row]) -> None:
    """Raises DataError where the recipe asks for early stopping and none of its rows can say when."""
    require_validation(recipe, any(row.profile for row in of_split(rows, "validation")))


def require_validation(recipe: Recipe, there: bool) -> None:
    """Raises DataError where the recipe asks for early stopping and no validation row is `there`."""
    if recipe.early_stopping.patience is not None and not there:
        raise DataError(f"early_stopping.patience {NEEDS}; there are none. Raise split.validation, or leave it out.")
