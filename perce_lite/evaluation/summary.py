"""What `perce-lite train` does: train, then measure the adapter on held-out rows, then keep both."""

from collections.abc import Sequence
from typing import Any

from perce_lite.console import say
from perce_lite.data.pairs import PairMaker
from perce_lite.data.rows import Row, content_of, of_split, spread_over_users
from perce_lite.evaluation.conditions import cases
from perce_lite.evaluation.judging import before_and_after
from perce_lite.files import write_json
from perce_lite.model.base import Base, load_base
from perce_lite.model.fingerprint import fingerprint
from perce_lite.model.footprint import source_stamp
from perce_lite.model.generate import generate
from perce_lite.model.scoring import store_of
from perce_lite.recipe import Recipe
from perce_lite.training.metadata import loss_curve, mean_statistics
from perce_lite.training.run import Run
from perce_lite.training.train import open_run, save_adapter, train
from perce_lite.training.trainer import PerCETrainer


def train_and_measure(recipe: Recipe, restart: bool = False) -> dict[str, Any]:
    """Trains the recipe's adapter, or resumes an earlier run of the same recipe, and measures it on held-out rows.

    restart: forget an earlier run in the same output folder

    Gives the figures that `perce-lite train` shows; they are kept in `<output_dir>/figures.json`. A run that was
    finished before is not repeated. Raises what `open_run`, `Run.locked`, `load_base` and `train` raise.
    """
    rows, run = open_run(recipe)
    with run.locked():
        if restart:
            run.forget()
        source = source_stamp(recipe)
        figures = run.finished(recipe)
        if figures is None or figures.get("source") != source:
            base = load_base(recipe)
            if figures is None:
                return _trained_and_measured(recipe, base, rows, run, source)
            run.claim(fingerprint(base.model))  # the model's files were written since, or nobody noted when
        say(f"This recipe was trained before on the same data; --restart trains it anew. Adapter: {run.adapter}")
        return figures


def _trained_and_measured(recipe: Recipe, base: Base, rows: Sequence[Row], run: Run, source: str) -> dict[str, Any]:
    """As `train_and_measure`, of a run that is not finished; source: `source_stamp` of the base."""
    trainer = train(recipe, base, rows, run)
    figures = {**measure(recipe, trainer, rows), "evaluation": recipe.evaluation.model_dump(), "source": source}
    save_adapter(recipe, trainer, rows, run, figures)
    write_json(run.figures, figures)  # last: it says that the run is finished
    return {**figures, "adapter": str(run.adapter)}


def measure(recipe: Recipe, trainer: PerCETrainer, rows: Sequence[Row]) -> dict[str, Any]:
    """Figures of a finished training: held-out losses, the step kept, loss curve, weights, one answer of each."""
    maker = PairMaker.of(recipe, trainer.processing_class, trainer.args.max_length)
    held_out = spread_over_users(of_split(rows, "test") or of_split(rows, "validation"), recipe.evaluation.max_rows)
    store = store_of(trainer.args.store, trainer.model, trainer.autocast)
    losses = before_and_after(trainer.model, cases(maker, held_out), store, trainer.autocast, trainer.args.clip_min)
    best, steps = trainer.best_step, trainer.state.global_step
    stopping = {} if best is None else {"early_stopping": best.figures(steps)}
    return {
        "losses": losses,
        **stopping,
        "curve": loss_curve(trainer.state.log_history),
        "weights": mean_statistics(trainer.state.log_history, trainer.store_hits),
        "sample": _sample(recipe, trainer, maker, held_out),
        "rows": trainer.audits["train"].summary(),
    }


def _sample(recipe: Recipe, trainer: PerCETrainer, maker: PairMaker, held_out: Sequence[Row]) -> dict[str, str] | None:
    """The answers of base and adapter to the first held-out query that fits, beside what the user wrote."""
    pair = next(iter(maker.make(held_out)), None)
    if pair is None:
        return None
    profile = "" if trainer.args.train_on == "counterfactual" else pair.profile
    options = (maker, pair.row.prompt, profile, recipe.evaluation.max_new_tokens)
    return {
        "user": pair.row.user,
        "query": pair.row.query,
        "written": next(content_of(message) for message in pair.row.completion if message["role"] == "assistant"),
        "base": generate(trainer.model, *options, use_adapter=False, autocast=trainer.autocast),
        "adapter": generate(trainer.model, *options, use_adapter=True, autocast=trainer.autocast),
    }
