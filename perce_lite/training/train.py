"""The story of a run: recipe, rows, base, trainer, held-out figures, adapter."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from transformers import PrinterCallback, TrainerCallback, TrainerState, set_seed
from transformers.trainer_callback import ProgressCallback

from perce_lite.config import PerCEConfig
from perce_lite.console import progress_bar, say
from perce_lite.data.pairs import PairMaker
from perce_lite.data.readers import read_rows
from perce_lite.data.rows import Row, of_split, spread_over_users, to_columns
from perce_lite.errors import DataError, RunError
from perce_lite.evaluation.conditions import before_and_after, cases
from perce_lite.files import digest, read_json, write_json
from perce_lite.model import adapters
from perce_lite.model.base import Base, fingerprint, load_base, with_adapter
from perce_lite.model.footprint import refuse_exports
from perce_lite.model.generate import generate
from perce_lite.model.lora_core import freeze
from perce_lite.model.scoring import store_of
from perce_lite.planning.oom_advice import full_card_is_clear
from perce_lite.recipe import Recipe, refuse_cores, training_config
from perce_lite.training.trainer import PerCETrainer


def train(recipe: Recipe, restart: bool = False) -> dict[str, Any]:
    """Trains the recipe's adapter, or goes on where an earlier run of the same recipe stopped.

    restart: forget an earlier run in the same output folder

    Gives the figures that `perce-lite train` shows. Raises what the rooms it calls raise, and
        RunError: the output folder belongs to another recipe, data or base.
        CardFullError: the card's memory is full; checkpoints are kept.
    """
    refuse_cores(recipe, "train")
    rows = read_rows(recipe)
    refuse_exports(recipe)
    run = run_of(recipe, rows)
    if restart:
        run.forget()
    finished = run.finished(recipe)
    if finished is not None:
        say(f"This recipe was trained before on the same data; --restart trains it anew. Adapter: {run.adapter}")
        return finished
    with full_card_is_clear(recipe, run.newest_checkpoint):
        trainer = fit(recipe, load_base(recipe), rows, run)
        figures = {**measure(recipe, trainer, rows), "evaluation": recipe.evaluation.model_dump()}
    write_json(run.figures, figures)
    adapters.save(trainer.model, run.adapter, described(recipe, trainer, rows, run, figures))
    return {**figures, "adapter": str(run.adapter)}


def run_of(recipe: Recipe, rows: Sequence[Row]) -> "Run":
    """The run of this recipe on these rows, in the recipe's output folder."""
    return Run(recipe.output_dir, digest([recipe.fingerprint(), [row.fingerprint() for row in rows]]))


def fit(recipe: Recipe, base: Base, rows: Sequence[Row], run: "Run", what: str = "Training") -> PerCETrainer:
    """Trains, or goes on from the last whole checkpoint, and saves the adapter; nothing is measured yet."""
    trainer = make_trainer(recipe, base, rows)
    to_the_end(trainer, recipe, rows, run, what)
    return trainer


def to_the_end(trainer: PerCETrainer, recipe: Recipe, rows: Sequence[Row], run: "Run", what: str = "Training") -> None:
    """What `fit` does with a trainer."""
    run.claim(fingerprint(trainer.model))
    checkpoint = run.last_checkpoint()
    if not (checkpoint and _take_finished(trainer, checkpoint)):
        with ShowProgress(trainer, what).bar:
            trainer.train(resume_from_checkpoint=checkpoint)
    bare: dict[str, Any] = {"losses": [], "weights": health(trainer)}
    adapters.save(trainer.model, run.adapter, described(recipe, trainer, rows, run, bare))  # whatever measuring meets


def _take_finished(trainer: PerCETrainer, checkpoint: str) -> bool:
    """Loads a checkpoint of the last step; transformers' own resume would take one step too many."""
    state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    if state.global_step < state.max_steps:
        return False
    trainer._load_from_checkpoint(checkpoint)
    trainer.state = state
    return True


@dataclass(frozen=True)
class Run:
    """An output folder and the one run it belongs to."""

    folder: Path
    fingerprint: str
    called: str | None = None

    @property
    def in_card(self) -> str:
        """What the adapter's card names the run: its fingerprint, unless it is `called` something else."""
        return self.called or self.fingerprint

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def figures(self) -> Path:
        """Beside the adapter, not in it: they quote the user's texts."""
        return self.folder / "figures.json"

    def finished(self, recipe: Recipe) -> dict[str, Any] | None:
        """The figures of this very run where it was finished before; refuses a folder of another run.

        None as well where `evaluation` asks for other figures: they are then measured from the last checkpoint.
        """
        if self._known() and read_json(self._marker)["run"] != self.fingerprint:
            self._refuse()
        figures = read_json(self.figures)
        if not self.trained():
            return None
        if figures is None or figures["evaluation"] != recipe.evaluation.model_dump():
            return None
        return {**figures, "adapter": str(self.adapter)}

    def trained(self) -> bool:
        """Whether this run's adapter is there, whole; refuses a folder with another's."""
        card = read_json(self.adapter / adapters.CARD)
        if card is not None and card.get("run") != self.in_card:
            self._refuse()
        return card is not None

    def claim(self, base: str) -> None:
        """Takes the folder for this run over `base` (a fingerprint), or finds that it was this run's already."""
        for leftover in self.folder.glob(".adapter.*.tmp"):  # of a run that was killed while it wrote
            shutil.rmtree(leftover)
        mine = {"run": self.fingerprint, "base": base}
        if not self._known():
            write_json(self._marker, mine)
        elif read_json(self._marker) != mine:
            self._refuse()

    def newest_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written whole: its trainer_state.json, which comes last, can be read."""
        whole = [one for one in self._checkpoints() if read_json(one / "trainer_state.json") is not None]
        return max(whole, key=lambda one: int(one.name.rpartition("-")[2]), default=None)

    def last_checkpoint(self) -> str | None:
        """Says from which checkpoint the run goes on, and gives it."""
        newest = self.newest_checkpoint()
        if newest is None:
            return None
        say(f"Going on from {newest}")
        return str(newest)

    def forget(self) -> None:
        """Removes what a run leaves in the folder, and nothing else.

        Raises:
            RunError: checkpoints or an adapter of which nothing says that they are of a run of PerCE Lite.
        """
        known = self._known()
        for folder in [*self._checkpoints(), self.adapter]:
            shutil.rmtree(folder, ignore_errors=True)
        for file in (self.figures, self._marker) if known else ():  # the marker last: a kill leaves the rest known
            file.unlink(missing_ok=True)

    def make_way(self, base: str) -> None:
        """Removes checkpoints of another run, or over another base; the adapter stays until a new one replaces it.

        For a folder that is known to be ours: a fleet's own.
        """
        if read_json(self._marker) != {"run": self.fingerprint, "base": base}:
            self.drop_checkpoints()
        if self.adapter.is_dir() and not _has_run(self.adapter / adapters.CARD):  # torn: nobody can load it
            shutil.rmtree(self.adapter)

    def drop_checkpoints(self) -> None:
        """Removes the checkpoints and the marker: the adapter's card says all that is left to say."""
        for folder in self._checkpoints():
            shutil.rmtree(folder)
        self._marker.unlink(missing_ok=True)

    @property
    def _marker(self) -> Path:
        return self.folder / "run.json"

    def _checkpoints(self) -> list[Path]:
        return [one for one in self.folder.glob("checkpoint-*") if one.name.rpartition("-")[2].isdigit()]

    def _known(self) -> bool:
        """Whether the folder has a run's marker; refuses checkpoints and adapters that may be another program's."""
        if _has_run(self._marker):
            return True
        unknown = self._checkpoints()
        if self.adapter.exists() and not _has_run(self.adapter / adapters.CARD):
            unknown.append(self.adapter)
        if unknown:
            raise RunError(
                f"{self.folder} holds {', '.join(one.name for one in unknown)}, but no {self._marker.name} that would "
                "say that PerCE Lite made them. Nothing was touched. Take another folder with --set "
                "train.output_dir=FOLDER, or remove them yourself: --restart does not."
            )
        return False

    def _refuse(self) -> None:
        raise RunError(
            f"{self.folder} holds a run of another recipe, data or base. Nothing was touched. Take another folder with "
            "--set train.output_dir=FOLDER, or throw the old run away: perce-lite train --restart, or rm -r."
        )


def _has_run(path: Path) -> bool:
    """Whether `path` is a file of ours: it names a run and its base."""
    found = read_json(path)
    return isinstance(found, dict) and {"run", "base"} <= set(found)


def make_trainer(recipe: Recipe, base: Base, rows: Sequence[Row], start: Path | None = None) -> PerCETrainer:
    """A trainer over the recipe's training rows; its validation rows are its `eval_dataset`.

    start: the folder of an adapter whose weights it starts from; with `lora.core_only` they stay as they are
    """
    training, validation = of_split(rows, "train"), of_split(rows, "validation")
    if not training:
        raise DataError("No training rows: every row is held out. Lower split.test and split.validation.")
    config = training_config(recipe)
    set_seed(config.seed)  # LoRA's first matrix is random
    evaluated = validation if config.eval_strategy != "no" else []
    model = with_adapter(base.model, recipe)
    if start is not None:
        adapters.start_from(model, start)
    if recipe.core_only:
        freeze(model)
    trainer = PerCETrainer(
        model,
        config,
        train_dataset=datasets.Dataset.from_list(to_columns(training)),
        eval_dataset=datasets.Dataset.from_list(to_columns(evaluated)) if evaluated else None,
        processing_class=base.tokenizer,
        template=recipe.template,
        max_profile_tokens=recipe.profile.max_tokens,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


class ShowProgress(TrainerCallback):
    """One bar: steps, time left, the losses of the last logged step."""

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


def measure(recipe: Recipe, trainer: PerCETrainer, rows: Sequence[Row]) -> dict[str, Any]:
    """The figures of a finished training: held-out losses, health of the weights, one answer of base and adapter."""
    maker = PairMaker.of(recipe, trainer.processing_class, trainer.args.max_length)
    held_out = spread_over_users(of_split(rows, "test") or of_split(rows, "validation"), recipe.evaluation.max_rows)
    store = store_of(trainer.args.store, trainer.model, trainer.autocast)
    losses = before_and_after(trainer.model, cases(maker, held_out), store, trainer.autocast, trainer.args.clip_min)
    sample = None
    for pair in maker.make(held_out)[:1]:
        asked, shown = pair.row, "" if trainer.args.train_on == "counterfactual" else pair.profile
        options = (maker, asked.prompt, shown, recipe.evaluation.max_new_tokens)
        sample = {
            "user": asked.user,
            "query": asked.query,
            "written": next(one["content"] for one in asked.completion if one["role"] == "assistant"),
            "base": generate(trainer.model, *options, use_adapter=False, autocast=trainer.autocast),
            "adapter": generate(trainer.model, *options, use_adapter=True, autocast=trainer.autocast),
        }
    return {"losses": losses, "weights": health(trainer), "sample": sample, "rows": trainer.audits["train"].summary()}


def health(trainer: PerCETrainer) -> dict[str, float]:
    """The weight figures, means over the logged steps of the last epoch."""
    steps = [one for one in trainer.state.log_history if "weight_mean" in one]
    last = [one for one in steps if one["epoch"] > steps[-1]["epoch"] - 1] if steps else []
    names = ("weight_mean", "share_above_min", "share_at_min", "share_at_max", "effective_tokens", "pir_mean")
    figures = {name: sum(one[name] for one in last) / len(last) for name in names} if last else {}
    return {**figures, "store_hits": trainer.store_hits}


def described(
    recipe: Recipe, trainer: PerCETrainer, rows: Sequence[Row], run: Run, figures: dict[str, Any]
) -> dict[str, Any]:
    """`describe` of what a trainer did."""
    template, kept = trainer.processing_class.chat_template, len(trainer.pairs["train"])
    return describe(recipe, trainer.args, template, rows, kept, trainer.state.global_step, run.in_card, figures)


def describe(
    recipe: Recipe,
    args: PerCEConfig,
    chat_template: str,
    rows: Sequence[Row],
    kept: int,
    steps: int,
    run: str,
    figures: dict[str, Any],
) -> dict[str, Any]:
    """What `perce_lite.json` says of a run: `kept` training rows, `steps` optimizer steps, its losses and weights."""
    trained = of_split(rows, "train")
    plain = recipe.model_dump(mode="json")
    if recipe.data.path:  # the adapter does not lie beside the recipe
        plain["data"]["path"] = str(recipe.data_path)
    if recipe.model_folder is not None:
        plain["model"] = str(recipe.model_folder)
    return {
        "run": run,
        "recipe": plain,
        "recipe_fingerprint": recipe.fingerprint(),
        "estimator": args.estimator,
        "train_on": args.train_on,
        "clip_min": args.clip_min,
        "clip_max": args.clip_max,
        "data": {
            "fingerprint": digest([row.fingerprint() for row in rows]),
            "rows": kept,
            "users": len({row.user for row in trained}),
        },
        "steps": steps,
        "chat_template": chat_template,
        "metrics": {
            "losses": [{key: value for key, value in one.items() if key != "per_row"} for one in figures["losses"]],
            "weights": figures["weights"],
        },
    }
