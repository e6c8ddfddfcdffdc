"""Trains a recipe's adapter: rows and base become a trainer, it runs to its last step, the adapter is saved."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerState, set_seed

from perce_lite.config import PerCEConfig
from perce_lite.console import progress_bar
from perce_lite.data.pairs import PairMaker
from perce_lite.data.readers import read_rows
from perce_lite.data.rows import Row, of_split
from perce_lite.errors import DataError
from perce_lite.files import digest
from perce_lite.model import adapters
from perce_lite.model.base import Base, with_adapter
from perce_lite.model.fingerprint import fingerprint
from perce_lite.model.footprint import refuse_exports
from perce_lite.model.lora_core import add_cores
from perce_lite.recipe import Recipe, refuse_cores, training_config
from perce_lite.training.early_stopping import BestStep, require_validation_rows, trained_by
from perce_lite.training.held_out import held_out_jobs
from perce_lite.training.loss import Weighting
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
    unmeasured: dict[str, Any] = {"losses": [], "weights": mean_statistics(trainer)}
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
    trainer._load_from_checkpoint(checkpoint)
    trainer.state = state
    return True


class ShowProgress(TrainerCallback):
    """One progress bar: steps, time left, the loss of the last logged step (nats a token)."""

    def __init__(self, trainer: PerCETrainer, what: str = "Training") -> None:
        self.bar, self.what = progress_bar(), what
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.task = self.bar.add_task(self.what, total=state.max_steps, completed=state.global_step, note="")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "unweighted_loss" in logs:
            self.bar.update(self.task, note=f"loss a token {logs['unweighted_loss']:.3f}")


def mean_statistics(trainer: PerCETrainer) -> dict[str, float]:
    """`weight_statistics`, means over the logged steps of the last epoch, and the share of store hits."""
    steps = [log for log in trainer.state.log_history if "weight_mean" in log]
    last = [log for log in steps if log["epoch"] > steps[-1]["epoch"] - 1] if steps else []
    names = ("weight_mean", "share_above_min", "share_at_min", "share_at_max", "effective_tokens", "pir_mean")
    figures = {name: sum(log[name] for log in last) / len(last) for name in names} if last else {}
    return {**figures, "store_hits": trainer.store_hits}


def save_adapter(recipe: Recipe, trainer: PerCETrainer, rows: Sequence[Row], run: Run, figures: dict[str, Any]) -> None:
    """Saves the trainer's adapter into the run's folder, with metadata that hold `figures`."""
    template, kept = trainer.processing_class.chat_template, len(trainer.pairs["train"])
    steps, best = trainer.state.global_step, trainer.best_step
    stopping = None if best is None else best.figures(steps)
    about = run_metadata(recipe, trainer.args, template, rows, kept, steps, run.name_in_metadata, figures, stopping)
    adapters.save(trainer.model, run.adapter, about, run.storage)


def run_metadata(
    recipe: Recipe,
    args: PerCEConfig,
    chat_template: str,
    rows: Sequence[Row],
    kept: int,
    steps: int,
    run: str,
    figures: dict[str, Any],
    stopping: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What an adapter's metadata (`perce_lite.json`) say of its run.

    kept: training rows that were not dropped; steps: optimizer steps taken
    figures: `losses` and `weights` of the run
    stopping: `BestStep.figures`, whose step is that of the adapter; None: that is the last one
    """
    recorded = recipe.model_dump(mode="json")
    if recipe.data.path:  # the adapter does not lie beside the recipe
        recorded["data"]["path"] = str(recipe.data_path)
    if recipe.model_folder is not None:
        recorded["model"] = str(recipe.model_folder)
    return {
        "run": run,
        "recipe": recorded,
        "recipe_fingerprint": recipe.fingerprint(),
        "estimator": args.estimator,
        "train_on": args.train_on,
        "clip_min": args.clip_min,
        "clip_max": args.clip_max,
        "weighting": Weighting.of(args).formula,
        "data": {
            "fingerprint": digest([row.fingerprint() for row in rows]),
            "rows": kept,
            "users": len({row.user for row in of_split(rows, "train")}),
        },
        "steps": steps if stopping is None else stopping["kept_step"],
        **({} if stopping is None else {"early_stopping": stopping}),
        "chat_template": chat_template,
        "metrics": {
            "losses": [{key: value for key, value in loss.items() if key != "per_row"} for loss in figures["losses"]],
            "weights": figures["weights"],
        },
    }
