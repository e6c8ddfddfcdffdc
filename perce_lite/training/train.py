"""Trains a recipe's adapter: rows and base become a trainer, it runs to its last step, the adapter is saved."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerState, set_seed

from perce_lite.console import progress_bar
from perce_lite.data.pairs import PairMaker
from perce_lite.data.readers import read_rows
from perce_lite.data.rows import Row, of_split
from perce_lite.errors import DataError
from perce_lite.model import adapters
from perce_lite.model.base import Base, with_adapter
from perce_lite.model.fingerprint import fingerprint
from perce_lite.model.footprint import refuse_exports
from perce_lite.model.lora_core import add_cores
from perce_lite.recipe import Recipe, refuse_cores, training_config
from perce_lite.training.early_stopping import BestStep, require_validation_rows, trained_by
from perce_lite.training.held_out import held_out_jobs
from perce_lite.training.metadata import mean_statistics, run_metadata
from perce_lite.training.run import Run, run_of
from perce_lite.training.trainer import PerCETrainer


def open_run(recipe: Recipe) -> tuple[list[Row], Run]:
    """The recipe's rows and its run; everything that can be refused before the base is loaded is refused here.

    Raises:
        RecipeError: `lora.core_only`, or an export target that cannot take the adapter.
        DataError: see `read_rows`; early stopping without validation rows.
    """
    refuse_cores(recipe, "train")
    rows = read_rows(recipe)
    require_validation_rows(recipe, rows)
    refuse_exports(recipe)
    return rows, run_of(recipe, rows)


def train(recipe: Recipe, base: Base, rows: Sequence[Row], run: Run, what: str = "Training") -> PerCETrainer:
    """Trains the adapter of `recipe`, or resumes from the last whole checkpoint, and saves it.

    what: label of the progress bar

    Raises:
        RunError: the output folder belongs to another recipe, data or base.
        DataError, TemplateError, ConfigError, NonFiniteLossError: see `PerCETrainer`.
    """
    trainer = make_trainer(recipe, base, rows)
    train_to_end(trainer, recipe, rows, run, what)
    return trainer


def make_trainer(recipe: Recipe, base: Base, rows: Sequence[Row], start: Path | None = None) -> PerCETrainer:
    """A trainer over the recipe's training rows; its validation rows are its `eval_dataset`.

    start: folder of an adapter whose weights it starts from; with `lora.core_only` they stay as they are

    Raises:
        DataError: every row is held out.
    """
    training, validation = of_split(rows, "train"), of_split(rows, "validation")
    if not training:
        raise DataError("No training rows: every row is held out. Lower split.test and split.validation.")
    config = training_config(recipe)
    set_seed(config.seed)  # LoRA's A is drawn at random
    model = with_adapter(base.model, recipe)
    if start is not None:
        adapters.start_from(model, start)
    if recipe.core_only:
        add_cores(model)
    trainer = PerCETrainer(
        model,
        config,
        train_dataset=training,
        eval_dataset=validation if validation and config.eval_strategy != "no" else None,
        processing_class=base.tokenizer,
        template=recipe.template,
        max_profile_tokens=recipe.profile.max_tokens,
    )
    trainer.recipe = recipe
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def train_to_end(trainer: PerCETrainer, recipe: Recipe, rows: Sequence[Row], run: Run, what: str = "Training") -> None:
    """Scores the reference log-probs, trains from the last whole checkpoint on, saves the adapter."""
    run.claim(fingerprint(trainer.model))
    trainer.prepare()
    checkpoint = run.last_checkpoint()
    _stop_early(trainer, recipe, rows)
    if checkpoint is not None and trainer.best_step is not None:
        trainer.best_step.restore(trainer.load_best_step(checkpoint))
    if not (checkpoint and _load_if_finished(trainer, checkpoint)):
        with ShowProgress(trainer, what).bar:
            trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.best_step is not None:
        trainer.best_step.put_back(trained_by(trainer.model))
    unmeasured: dict[str, Any] = {
        "losses": [],
        "weights": mean_statistics(trainer.state.log_history, trainer.store_hits),
    }
    save_adapter(recipe, trainer, rows, run, unmeasured)  # an error while measuring must not lose the adapter


def _stop_early(trainer: PerCETrainer, recipe: Recipe, rows: Sequence[Row]) -> None:
    """Lets validation rows end the training where the recipe asks for it and there are any."""
    if recipe.early_stopping.patience is None:
        return
    maker = PairMaker.of(recipe, trainer.processing_class, trainer.args.max_length)
    jobs = held_out_jobs(maker, recipe, trainer.args, rows, ["validation"])
    if jobs:
        best = BestStep.of(recipe.early_stopping, trainer.args, len(trainer.train_dataset))
        trainer.stop_early(best, jobs["validation"])


def _load_if_finished(trainer: PerCETrainer, checkpoint: str) -> bool:
    """Loads a checkpoint of the last step; transformers' own resume would take one step too many."""
    state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    stopped = trainer.best_step is not None and trainer.best_step.stopped
    if state.global_step < state.max_steps and not stopped:
        return False
    best = state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    trainer._load_from_checkpoint(checkpoint if best is None else str(Path(checkpoint).with_name(Path(best).name)))
    trainer.state = state
    return True


class ShowProgress(TrainerCallback):
    """One progress bar: steps, time left, loss (nats a token) and rate of the last logged step."""

    def __init__(self, trainer: PerCETrainer, what: str = "Training") -> None:
        self.bar, self.what = progress_bar(), what
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.task = self.bar.add_task(self.what, total=state.max_steps, completed=state.global_step, note="")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "unweighted_loss" in logs:
            rate = f", rate {logs['learning_rate']:.1e}" if "learning_rate" in logs else ""
            self.bar.update(self.task, note=f"loss a token {logs['unweighted_loss']:.3f}{rate}")


def save_adapter(recipe: Recipe, trainer: PerCETrainer, rows: Sequence[Row], run: Run, figures: dict[str, Any]) -> None:
    """Saves the trainer's adapter into the run's folder, with metadata that hold `figures`."""
    template, kept = trainer.processing_class.chat_template, len(trainer.pairs["train"])
    steps, best = trainer.state.global_step, trainer.best_step
    stopping = None if best is None else best.figures(steps)
    about = run_metadata(recipe, trainer.args, template, rows, kept, steps, run.name_in_metadata, figures, stopping)
    adapters.save(trainer.model, run.adapter, about, run.storage)
