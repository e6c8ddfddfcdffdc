"""The engine that trains one adapter after another."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from perce_lite.console import no_bars
from perce_lite.data.pairs import PairMaker
from perce_lite.data.rows import Row
from perce_lite.errors import PerceLiteError
from perce_lite.files import bytes_of
from perce_lite.fleet.engines.protocol import FATAL_ERRORS, OnDone, OnProgress, Outcome, Task
from perce_lite.model import adapters
from perce_lite.model.base import Base, load_base
from perce_lite.model.compat import forward_hooks, restore_forward_hooks
from perce_lite.model.fingerprint import fingerprint, sketch
from perce_lite.model.scoring import cached_log_probs, store_of
from perce_lite.planning.oom_advice import explain_out_of_memory_in_fleet, free_gpu_memory
from perce_lite.recipe import Recipe
from perce_lite.training.held_out import held_out_jobs, loss_of
from perce_lite.training.metadata import mean_statistics
from perce_lite.training.run import Run
from perce_lite.training.train import make_trainer, train_to_end
from perce_lite.training.trainer import PerCETrainer


class SequentialEngine:
    """Trains with `PerCETrainer`, one adapter after another, over a base that is loaded once.

    users: how many are trained at once; here it is for the message where not even the base fits
    kept: file with the states of users who were interrupted in slots; None: `registry.KEPT` in the fleet's folder
    """

    def __init__(self, recipe: Recipe, users: int = 1) -> None:
        self._recipe, self.users = recipe, users
        self.kept: Path | None = None
        self._loaded: Base | None = None

    def base(self) -> dict[str, Any]:
        return sketch(self._base().model)

    def fingerprint(self) -> str:
        """Hash of the base as loaded."""
        return fingerprint(self._base().model)

    def run(self, tasks: Iterator[Task], on_done: OnDone, on_progress: OnProgress) -> None:
        for task in tasks:
            outcome: Outcome | PerceLiteError
            try:
                outcome = self._train(task, on_progress)
            except FATAL_ERRORS:
                raise
            except PerceLiteError as error:  # out of memory too: other users may have shorter rows
                outcome = error
            on_done(task, outcome)
            if isinstance(outcome, PerceLiteError):
                del outcome  # its frames hold tensors on the GPU
                free_gpu_memory()

    def _train(self, task: Task, on_progress: OnProgress) -> Outcome:
        with explain_out_of_memory_in_fleet(task.recipe, 1, lambda: task.rows, of_users=task.start is not None):
            return self._train_task(task, on_progress)

    def _train_task(self, task: Task, on_progress: OnProgress) -> Outcome:
        run = Run(task.folder, task.begun, task.run, task.storage)
        recipe = task.recipe.model_copy(update={"train": {**task.recipe.train, "output_dir": str(task.folder)}})
        base = self._base()
        with no_bars(), bare(base.model):
            run.make_way(fingerprint(base.model))
            trainer = make_trainer(recipe, base, task.rows, task.start)
            trainer.add_callback(_Progress(on_progress))
            before = _losses(trainer, recipe, task.rows, ("base", "start"))
            train_to_end(trainer, recipe, task.rows, run)
            after = _losses(trainer, recipe, task.rows, ("own",))
            weights = mean_statistics(trainer.state.log_history, trainer.store_hits)
            trained_parameters = sum(
                parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad
            )
        run.drop_checkpoints()
        losses = {split: {**before[split], **after[split]} for split in before}
        stopping = None if trainer.best_step is None else trainer.best_step.figures(trainer.state.global_step)
        return Outcome(losses, weights, bytes_of(run.adapter), trained_parameters, stopping)

    def _base(self) -> Base:
        if self._loaded is None:
            with explain_out_of_memory_in_fleet(self._recipe, self.users, lambda: (), of_users=False):
                self._loaded = load_base(self._recipe)
        return self._loaded


class _Progress(TrainerCallback):
    """Reports the loss of each logged step."""

    def __init__(self, on_progress: OnProgress) -> None:
        self._on_progress = on_progress

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "unweighted_loss" in logs:
            self._on_progress(float(logs["unweighted_loss"]), state.global_step / state.max_steps)


@contextmanager
def bare(model: PreTrainedModel) -> Iterator[None]:
    """Restores the base at the end: a trainer inserts adapter layers, wraps `forward`, and hooks the embedding."""
    before, hooks = model.__dict__.get("forward"), forward_hooks(model)
    try:
        yield
    finally:
        adapters.strip(model)
        restore_forward_hooks(model, hooks)
        model.__dict__.pop("forward", None)
        if before is not None:
            model.forward = before


def _losses(
    trainer: PerCETrainer, recipe: Recipe, rows: Sequence[Row], who: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Loss on held-out rows by split, nats a token: of the base (from the store on a hit), of the current adapter."""
    maker = PairMaker.of(recipe, trainer.processing_class, trainer.args.max_length)
    losses: dict[str, dict[str, float]] = {}
    base = store_of(trainer.args.store, trainer.model, trainer.autocast) if "base" in who else None
    for split, jobs in held_out_jobs(maker, recipe, trainer.args, rows).items():
        losses[split] = {}
        for name in who:
            on = name != "base"
            scored = cached_log_probs(trainer.model, jobs, None if on else base, trainer.autocast, split, on).log_probs
            losses[split] |= figures_of(name, scored)
    return losses


def figures_of(name: str, scored: Sequence[Tensor]) -> dict[str, float]:
    """{name: loss a token, nats, "tokens": their number} of log-probs (R,) a row."""
    return {name: loss_of(scored), "tokens": float(sum(map(len, scored)))}
