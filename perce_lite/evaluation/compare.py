"""Arms against arms: one budget, seeds, data order and grid of rates; rates chosen on validation, judged on test."""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from perce_lite.console import say, warn
from perce_lite.data.pairs import PairMaker
from perce_lite.data.readers import library, read_rows
from perce_lite.data.rows import Row, of_split
from perce_lite.errors import DataError, NonFiniteLossError, RecipeError, RunError
from perce_lite.evaluation.answers import Answers, Writer, WrittenTexts, ways_of
from perce_lite.evaluation.arms import Arm
from perce_lite.evaluation.authorship import UserWords, training_texts
from perce_lite.evaluation.conditions import MATCH, OTHER, Case, Topics, is_candidate, score_cases
from perce_lite.evaluation.evaluate import chosen_tokens, held_out
from perce_lite.evaluation.judging import ArmSums, Judge, chance
from perce_lite.files import folder_written_aside, named, read_json, write_json
from perce_lite.locks import held_alone
from perce_lite.memory import modules_frozen
from perce_lite.model import adapters
from perce_lite.model.base import Base, load_base, load_tokenizer
from perce_lite.model.fingerprint import fingerprint
from perce_lite.model.footprint import source_stamp
from perce_lite.model.scoring import store_key, store_of
from perce_lite.planning.oom_advice import explain_out_of_memory, free_gpu_memory
from perce_lite.recipe import Recipe, refuse_cores, refuse_early_stopping, training_config, with_train
from perce_lite.training.run import Run, checkpoints_in, newest_checkpoint, run_of
from perce_lite.training.train import train

UNTRAINED = "untrained"

PRIMARY = (
    "Primary figure: what the own profile is worth over another user's and over the best topical match of others, nats "
    "a token over all response tokens, on the test split, set against plain SFT (uniform) with a 95 % interval."
)
"""Said before anything is trained: what a comparison is decided by."""

Cases = dict[str, list[Case]]
"""By split."""

_STEPS = "steps"

_KEPT_STEPS = 6
"""Adapters that are kept on the way of a plain-SFT training, at equal distances, its end among them."""

_NOTED = "base.json"
"""File that says over which weights the trainings are."""

_BASE = ("model", "quantization", "dtype")
"""Keys of a recipe that say which base adapters are of."""

AGAINST = ("uniform", "shuffled")
"""Estimators that all others are compared with: plain SFT, and the same weights on the wrong tokens."""


@dataclass(frozen=True)
class Training:
    """One training of an arm.

    step: an optimizer step on its way, whose adapter was kept; None: its end
    """

    arm: Arm
    rate: float
    seed: int
    step: int | None = None

    def folder(self, rows: Sequence[Row]) -> Path:
        """Where its adapter lies."""
        run = self.run(rows)[1]
        return run.adapter if self.step is None else run.folder / _STEPS / str(self.step)

    @property
    def told(self) -> str:
        """How progress and errors name it."""
        return f"{self.arm.name}, rate {self.rate:g}, seed {self.seed}" + (f", step {self.step}" if self.step else "")

    def run(self, rows: Sequence[Row]) -> tuple[Recipe, Run]:
        """Its recipe, and its run in a folder of its own under `<output_dir>/compare`."""
        recipe = self.arm.recipe
        folder = named(_folder(recipe), self.arm.name) / f"rate-{self.rate:g}-seed-{self.seed}"
        settings: dict[str, Any] = {
            "learning_rate": self.rate,
            "seed": self.seed,
            "output_dir": str(folder),
            "save_total_limit": 1,
        }
        if self.arm.estimator == "uniform":  # its way is kept: see `_equal_loss`
            settings |= {"save_strategy": "steps", "save_steps": 1 / _KEPT_STEPS, "save_total_limit": None}
        mine_only = recipe.model_copy(update={"train": {**recipe.train, **settings}})
        return mine_only, run_of(mine_only, rows)


@dataclass(frozen=True)
class JudgedOn:
    """What trainings are judged on: rows of a recipe, which is that of training or another.

    cases: by `profile_pass`, the same rows in the same order
    """

    recipe: Recipe
    rows: Sequence[Row]
    cases: dict[str, Cases]


def compare(
    recipe: Recipe, arms: Sequence[Arm], rates: Sequence[float], seeds: int, judge_on: Recipe | None = None
) -> dict[str, Any]:
    """The figures that `perce-lite compare` shows.

    Every arm is trained with every rate on the first of `seeds` seeds, the recipe's own, then with the rate of the
    lowest validation loss on the others. A training that was finished before is not repeated; one that was stopped goes
    on from its checkpoint.

    judge_on: another recipe, whose held-out rows the adapters are judged on: whether what is learned on one task shows
        in another. Rates are chosen on the recipe's own validation rows

    Raises:
        DataError: no validation rows to choose a rate by, or none to judge by; RecipeError: `judge_on` has another
            base; RunError: another comparison is on in the folder; and what training raises.
    """
    refuse_cores(recipe, "compare")
    refuse_early_stopping(recipe, "compare")
    rows = read_rows(recipe)

    def refuse(who: str) -> RunError:
        return RunError(
            f"{_folder(recipe)}: another comparison is on here ({who}). Wait for it or stop it, or take another folder "
            "with --set train.output_dir=FOLDER. Nothing was touched."
        )

    with held_alone(_folder(recipe) / ".compare.lock", refuse):
        _require_same_base(recipe)
        with modules_frozen():
            return _compared(recipe, rows, arms, rates, seeds, judge_on)


def _folder(recipe: Recipe) -> Path:
    """Where the trainings of a comparison lie."""
    return recipe.output_dir / "compare"


def _require_same_base(recipe: Recipe) -> None:
    """Raises RunError where the folder's trainings are over a base whose weights were other ones."""
    noted = read_json(_folder(recipe) / _NOTED)
    if noted is None or noted["source"] == source_stamp(recipe):
        return
    base = load_base(recipe)  # its files were written since; what they hold may be the same
    if fingerprint(base.model) != noted["base"]:
        raise RunError(
            f"{_folder(recipe)} holds trainings over other weights of {recipe.model}: its files, or the quantization, "
            "have changed since. Nothing was touched. Take another folder with --set train.output_dir=FOLDER, or "
            "remove this one."
        )
    _note_base(recipe, base)


def _note_base(recipe: Recipe, base: Base) -> None:
    """Notes what the folder's trainings are over."""
    noted = {"source": source_stamp(recipe), "base": fingerprint(base.model)}
    if read_json(_folder(recipe) / _NOTED) != noted:
        write_json(_folder(recipe) / _NOTED, noted)


def _compared(
    recipe: Recipe,
    rows: Sequence[Row],
    arms: Sequence[Arm],
    rates: Sequence[float],
    seeds: int,
    judge_on: Recipe | None,
) -> dict[str, Any]:
    """As `compare`, of rows that were read; nobody else trains in the folder."""
    say(PRIMARY)
    trained = {row.user for row in of_split(rows, "train")}
    passes = dict.fromkeys(arm.recipe.profile_pass for arm in arms)
    judged_on = _judged_on(recipe, rows, judge_on, passes)
    tuned_on = {name: _tuning_cases(recipe, rows, name) for name in passes} if len(rates) > 1 else {}
    seed = training_config(recipe).seed
    total = len(arms) * (len(rates) + seeds - 1)
    first = [Training(arm, rate, seed) for arm in arms for rate in rates]
    failed = _train(first, rows, 0, total)
    tuning = _validation_losses(recipe, [training for training in first if training not in failed], rows, tuned_on)
    chosen = {arm.name: _best([training for training in first if training.arm == arm], tuning, failed) for arm in arms}
    usable = [training for training in chosen.values() if training is not None]
    rest = [Training(training.arm, training.rate, seed + more) for more in range(1, seeds) for training in usable]
    failed |= _train(rest, rows, len(first), total)
    done = [training for training in [*usable, *rest] if training not in failed]
    equal = _equal_loss(recipe, [chosen[arm.name] for arm in arms], rows, tuned_on, tuning) if tuning else {}
    answers = _answers(judged_on)
    scored = _score(judged_on, [*done, *dict.fromkeys(equal.values())], rows, answers)
    return {
        "model": recipe.model,
        "train_rows": sum(row.split == "train" for row in rows),
        "rates": list(rates),
        "seeds": [seed + more for more in range(seeds)],
        "clip_min": training_config(recipe).clip_min,
        "primary": PRIMARY,
        "judged_on": None if judge_on is None else judge_on.source,
        "arms": [_arm_figures(arm, chosen[arm.name], first, tuning, failed, equal) for arm in arms],
        "splits": {
            name: {
                **judge.told(trained),
                **_figures(arms, judge, sums),
                "equal_loss": _at_equal_loss(judge, sums, equal),
            }
            for name, (judge, sums) in scored.items()
        },
        "texts": _texts(arms, done, answers),
    }


def _answers(judged_on: JudgedOn) -> Answers:
    """The answers to the queries of `judged_on`, those of an earlier comparison among them."""
    recipe, texts = judged_on.recipe, WrittenTexts(training_texts(judged_on.rows))
    return Answers(recipe, training_config(recipe), _folder(recipe) / "answers.json", texts)


def _texts(arms: Sequence[Arm], done: Sequence[Training], answers: Answers) -> dict[str, Any] | None:
    """What the answers of each arm's trainings say, means over its seeds, and what separates comparable arms."""
    if not answers.records:
        return None
    names = {arm.name: [training.told for training in done if training.arm == arm] for arm in arms}
    known = {UNTRAINED: [UNTRAINED], **{name: trainings for name, trainings in names.items() if trainings}}
    profiles = dict.fromkeys(arm.judged for arm in arms)
    ways = [way for profile in profiles for way in ways_of(answers.options, profile)]
    differences = []
    for arm, other in _comparable(arms):
        pairs = _pairs_of_a_seed([training for training in done if training.arm in (arm, other)], arm, other)
        for way in ways_of(answers.options, arm.judged) if pairs else []:
            change = answers.difference(
                [training.told for training, _ in pairs], [reference.told for _, reference in pairs], way
            )
            differences.append({"arm": arm.name, "against": other.name, **way._asdict(), "change": change})
    return {"table": answers.table(known, ways), "differences": differences, "answers": answers.records}


def _validation_losses(
    recipe: Recipe, trainings: Sequence[Training], rows: Sequence[Row], cases: dict[str, Cases]
) -> dict[Training, float]:
    """Loss a token of each training on the validation rows, nats, with the profile that its arm is used with.

    Empty where there are no `cases`: nothing is to be chosen.
    """
    if not cases:
        return {}
    judge, sums = _score(JudgedOn(recipe, rows, cases), trainings, rows, None)["validation"]
    tokens = judge.tokens["all"].sum()
    return {training: float(sums[training].losses[training.arm.judged]["all"].sum() / tokens) for training in trainings}


def _arm_figures(
    arm: Arm,
    best: Training | None,
    first: Sequence[Training],
    tuning: dict[Training, float],
    failed: set[Training],
    equal: dict[Training, Training],
) -> dict[str, Any]:
    """How an arm's rate was chosen, and which of its trainings came to no loss."""
    trainings = [training for training in first if training.arm == arm]
    rates = [training.rate for training in trainings]
    step = None if best is None else equal.get(best)
    return {
        "arm": arm.name,
        "profile": arm.judged,
        "rate": None if best is None else best.rate,
        "at_edge": best is not None and len(rates) > 2 and best.rate in (min(rates), max(rates)),
        "validation": {f"{training.rate:g}": tuning.get(training) for training in trainings},
        "equal_loss": None if step is None else {"step": step.step, "validation": tuning[step]},
        "failed": [f"rate {training.rate:g}, seed {training.seed}" for training in failed if training.arm == arm],
    }


def _maker(recipe: Recipe, profile_pass: str) -> PairMaker:
    """Makes pairs as the recipe has them, whatever else an arm changes: all arms are judged on the same tokens."""
    limits = training_config(recipe).max_length, recipe.profile.max_tokens
    return PairMaker(load_tokenizer(recipe), recipe.template, *limits, profile_pass)


def _judged_on(recipe: Recipe, rows: Sequence[Row], other: Recipe | None, passes: Iterable[str]) -> JudgedOn:
    """Test and unseen rows of `recipe`, or of `other`.

    Raises:
        DataError: there are no test rows; RecipeError: `other` has another base.
    """
    if other is not None:
        differ = [key for key in _BASE if getattr(other, key) != getattr(recipe, key)]
        if differ:
            bases = [f"{key}: here {getattr(other, key)}, {getattr(recipe, key)} in {recipe.source}" for key in differ]
            raise RecipeError(f"--judge-on {other.source}", bases)
        recipe, rows = with_train(other, "--judge-on", [f"output_dir={recipe.output_dir}"]), read_rows(other)
    topics = Topics(library(recipe), recipe.profile.top_k)
    cases = {
        name: held_out(recipe, _maker(recipe, name), rows, topics, recipe.evaluation.candidates) for name in passes
    }
    if any("validation" in by_split for by_split in cases.values()):
        raise DataError("No test rows: compare chooses rates on validation and must judge on others. Raise split.test.")
    return JudgedOn(recipe, rows, cases)


def _tuning_cases(recipe: Recipe, rows: Sequence[Row], profile_pass: str) -> Cases:
    """Validation rows to choose rates by.

    Raises:
        DataError: there are none.
    """
    if not of_split(rows, "validation"):
        raise DataError(
            "No validation rows to choose a rate by: raise split.validation, or give one rate with --rates."
        )
    return held_out(recipe, _maker(recipe, profile_pass), rows, splits=("validation",))


def _train(trainings: Sequence[Training], rows: Sequence[Row], before: int, total: int) -> set[Training]:
    """Trains those that were not trained before, one base in memory at a time; gives those that came to no loss."""
    failed = set()
    for number, training in enumerate(trainings, before + 1):
        recipe, run = training.run(rows)
        label = f"{number} of {total}: {training.told}"
        with run.locked():
            if run.trained():
                say(f"{label}: trained before")
                continue
            try:
                with explain_out_of_memory(training.arm.recipe, partial(newest_checkpoint, run.folder)):
                    _train_one(training.arm.recipe, recipe, rows, run, label)
                if training.arm.estimator == "uniform":
                    _keep_steps(run)
                run.drop_checkpoints()
            except NonFiniteLossError as error:
                warn(f"{label}: left out. {error}")
                failed.add(training)
        free_gpu_memory()
    return failed


def _train_one(compared: Recipe, recipe: Recipe, rows: Sequence[Row], run: Run, label: str) -> None:
    """Trains `recipe`, that of one training of the comparison `compared`; its base is gone afterwards."""
    base = load_base(recipe)
    _note_base(compared, base)
    train(recipe, base, rows, run, label)


def _keep_steps(run: Run) -> None:
    """Makes an adapter of ours of each checkpoint, so that it can be loaded when the training is over."""
    for checkpoint in checkpoints_in(run.folder):
        with folder_written_aside(run.folder / _STEPS / checkpoint.name.rpartition("-")[2]) as aside:
            for file in ("adapter_model.safetensors", "adapter_config.json"):
                shutil.copy2(checkpoint / file, aside / file)
            shutil.copy2(run.adapter / adapters.METADATA, aside / adapters.METADATA)


def _equal_loss(
    recipe: Recipe,
    chosen: Sequence[Training | None],
    rows: Sequence[Row],
    cases: dict[str, Cases],
    tuning: dict[Training, float],
) -> dict[Training, Training]:
    """By training: the step of plain SFT, of all that were kept, whose validation loss is nearest to its own.

    So that nobody can say that an arm merely learned less. `tuning` gains the validation loss of each step.
    """
    plain = [
        training
        for training in chosen
        if training is not None and training.arm.estimator == "uniform" and training.arm.judged == "own"
    ]
    steps = [
        replace(training, step=int(folder.name))
        for training in plain
        for folder in sorted((training.run(rows)[1].folder / _STEPS).glob("*"), key=lambda folder: int(folder.name))
    ]
    if not steps:
        return {}
    tuning |= _validation_losses(recipe, steps, rows, cases)
    others = [
        training
        for training in chosen
        if training is not None and training not in plain and training.arm.judged == "own"
    ]
    return {training: min(steps, key=lambda step: abs(tuning[step] - tuning[training])) for training in others}


def _at_equal_loss(
    judge: Judge, sums: dict[Training | None, ArmSums], equal: dict[Training, Training]
) -> list[dict[str, Any]]:
    """What separates each arm, first seed, from the step of plain SFT that has its validation loss."""
    return [
        {"arm": training.arm.name, "step": step.step, **_difference(judge, [(sums[training], sums[step])], "own")}
        for training, step in equal.items()
        if training in sums
    ]


def _score(
    judged_on: JudgedOn, trainings: Sequence[Training], rows: Sequence[Row], answers: Answers | None
) -> dict[str, tuple[Judge, dict[Training | None, ArmSums]]]:
    """By split: what every training's adapter, and the base (None), loses under every condition.

    rows: those of training, which name its folder
    answers: gains those of the base and of each training's end to the queries of the first split; None: a rate is to
        be chosen, by the loss with the profile alone that the arm is judged with
    """
    recipe, by_pass, tuning = judged_on.recipe, judged_on.cases, answers is None
    config = training_config(recipe)
    chosen = {} if tuning else _chosen(judged_on)
    base = load_base(recipe)
    judged: dict[str, tuple[Judge, dict[Training | None, ArmSums]]] = {}
    for training in (None, *trainings):
        folder = None if training is None else training.folder(rows)
        what = UNTRAINED if training is None else training.told
        with adapters.attached(base.model, folder) as model:
            store = store_of(config.store, model, config.autocast, folder is not None)
            profile_pass = next(iter(by_pass)) if training is None else training.arm.recipe.profile_pass
            for split, cases in by_pass[profile_pass].items():
                label = f"{what}, {split}"
                names = ("own", "none") if tuning else tuple(cases[0].passes)
                if tuning and training is not None:
                    names = (training.arm.judged,)
                scored = score_cases(model, cases, names, store, config.autocast, label, folder is not None)
                if training is None:
                    judged[split] = Judge(cases, scored, config.clip_min, chosen.get(split)), {}
                judge, sums = judged[split]
                sums[training] = judge.sums(scored)
            if answers is not None and (training is None or training.step is None):
                answered = next(iter(by_pass[profile_pass].values()))[: answers.options.generated_rows]
                key = store_key(model, config.autocast, folder is not None)
                writer = Writer(what, model, _maker(recipe, profile_pass), folder is not None, key)
                for profile in dict.fromkeys(trained.arm.judged for trained in ([training] if training else trainings)):
                    answers.add(writer, answered, ways_of(answers.options, profile))
    return judged


def _chosen(judged_on: JudgedOn) -> dict[str, Any]:
    """As `chosen_tokens`, of the queries that are judged on, as the first way of reading a profile has them."""
    recipe, words = judged_on.recipe, UserWords(training_texts(judged_on.rows))
    return chosen_tokens(recipe, next(iter(judged_on.cases.values())), words, load_tokenizer(recipe))


def _best(trainings: Sequence[Training], tuning: dict[Training, float], failed: set[Training]) -> Training | None:
    """The training of lowest validation loss; None where all have failed."""
    left = [training for training in trainings if training not in failed]
    return min(left, key=lambda training: tuning.get(training, 0.0), default=None)


def _figures(arms: Sequence[Arm], judge: Judge, sums: dict[Training | None, ArmSums]) -> dict[str, Any]:
    """Losses of each arm, means over its seeds, and what separates it from plain SFT and from shuffled weights.

    An arm with options is set against its estimator without them as well.
    """
    ends = [training for training in sums if training is not None and training.step is None]
    by_arm = {arm.name: [training for training in ends if training.arm == arm] for arm in arms}
    means = {
        name: ArmSums.mean([sums[training] for training in trainings])
        for name, trainings in by_arm.items()
        if trainings
    }
    all_sums = {UNTRAINED: sums[None], **means}
    differences = []
    for arm, other in _comparable(arms):
        paired = [(sums[training], sums[reference]) for training, reference in _pairs_of_a_seed(ends, arm, other)]
        if paired:
            known = {"arm": arm.name, "against": other.name, "profile": arm.judged}
            differences.append({**known, **_difference(judge, paired, arm.judged)})
    return {
        "losses": [
            {"arm": name, "profile": profile, **judge.figures(by_part)}
            for name, arm_sums in all_sums.items()
            for profile, by_part in arm_sums.losses.items()
            if not is_candidate(profile)
        ],
        "worth": [
            {"arm": name, "over": over, **judge.worth(arm_sums, over)}
            for name, arm_sums in all_sums.items()
            for over in arm_sums.losses
            if over != "own" and not is_candidate(over)
        ],
        "who": _who(judge, all_sums),
        "differences": differences,
    }


def _comparable(arms: Sequence[Arm]) -> list[tuple[Arm, Arm]]:
    """Which arms are set against which: all against plain SFT and shuffled weights; one with options, without them."""
    return [
        (arm, other)
        for arm in arms
        for other in arms
        if arm != other
        and other.judged == arm.judged
        and (other.name == arm.estimator or (arm.estimator != "uniform" and other.estimator in AGAINST))
    ]


def _pairs_of_a_seed(ends: Sequence[Training], arm: Arm, other: Arm) -> list[tuple[Training, Training]]:
    trainings, references = ([training for training in ends if training.arm == wanted] for wanted in (arm, other))
    return [
        (training, reference) for training in trainings for reference in references if training.seed == reference.seed
    ]


def _who(judge: Judge, all_sums: dict[str, ArmSums]) -> dict[str, Any] | None:
    """How often each arm finds a text's writer among the profiles; None where there are no other users."""
    arms = [{"arm": name, **judge.identified(arm_sums)} for name, arm_sums in all_sums.items() if arm_sums.identified]
    if not arms:
        return None
    candidates = len(all_sums[UNTRAINED].losses) - 1  # without the condition "none"
    return {"candidates": candidates, "chance": chance(candidates), "arms": arms}


def _difference(judge: Judge, pairs: Sequence[tuple[ArmSums, ArmSums]], profile: str) -> dict[str, Any]:
    """What separates two arms, by seed and in the mean: losses of each part, `worth` over each condition, `who`."""
    arm_sums, other_sums = (ArmSums.mean(several) for several in zip(*pairs, strict=True))

    def with_seeds(name: str, figure: dict[str, Any], by_seed: Sequence[dict[str, Any]]) -> Any:
        return (
            None if figure[name] is None else {**figure[name], "seeds": [figures[name]["value"] for figures in by_seed]}
        )

    losses = judge.figures(arm_sums.losses[profile], other_sums.losses[profile])
    losses_by_seed = [judge.figures(sums.losses[profile], reference.losses[profile]) for sums, reference in pairs]
    worth = {}
    for over in (OTHER, MATCH, "none") if profile == "own" else ():
        if over in arm_sums.losses:
            figure = judge.figures(arm_sums.worth(over), other_sums.worth(over))
            seeds = [judge.figures(sums.worth(over), reference.worth(over)) for sums, reference in pairs]
            worth[over] = {part: with_seeds(part, figure, seeds) for part in figure}
    return {
        **{part: with_seeds(part, losses, losses_by_seed) for part in losses},
        "worth": worth,
        "who": judge.identified(arm_sums, other_sums),
    }
