"""A GPU whose memory is full: what is kept, and the override of the recipe that the plan says will fit."""

import gc
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from perce_lite.data.rows import Row
from perce_lite.errors import BaseTooLargeError, DataError, GpuOutOfMemoryError, ModelError, PlanError, TemplateError
from perce_lite.memory import return_free_memory
from perce_lite.model.full_gpu import gpu_is_full
from perce_lite.planning.gpus import GIB, Gpu, of_size, present
from perce_lite.planning.plan import CONTEXT, Plan
from perce_lite.planning.row_lengths import Rows, longest_of
from perce_lite.recipe import Recipe, training_config
from perce_lite.recipe_yaml import apply_overrides

_LESS = 0.9
"""An override brings the estimate below this share of what did not fit: it was too low, or others use the GPU too."""

_CLOSE = "Close other programs that use the GPU (nvidia-smi lists them)"
_NOTHING = f"{_CLOSE}; no change to the recipe needs much less, so else take a smaller model."


@contextmanager
def explain_out_of_memory(recipe: Recipe, checkpoint: Callable[[], Path | None]) -> Iterator[None]:
    """Inside, which trains, torch's out-of-memory error becomes one that says what to change.

    checkpoint: the newest whole checkpoint of the run, asked for when it comes to that

    Raises:
        GpuOutOfMemoryError: the GPU's memory is full.
    """
    with _told(lambda: _for_a_run(recipe, checkpoint())):
        yield


@contextmanager
def explain_out_of_memory_in_scoring(recipe: Recipe, own_folder: bool = False) -> Iterator[None]:
    """As `explain_out_of_memory` where log-probs are scored and nothing is trained.

    own_folder: what the output folder holds was made by this very recipe, so another one needs another folder
    """
    with _told(lambda: f"{_scored(recipe)}{_for_scoring(recipe, own_folder)}"):
        yield


@contextmanager
def explain_out_of_memory_in_fleet(
    recipe: Recipe, users: int, rows: Callable[[], Sequence[Row]], of_users: bool
) -> Iterator[None]:
    """As `explain_out_of_memory` for `users` that are trained at once in slots, or one after another.

    rows: those that are trained, asked for when it comes to that
    of_users: whether this is `recipe.of_users()`, so that an override of `train` may have to be one of `fleet.train`
    """
    with _told(lambda: f"Who was trained stays so. {_for_a_fleet(recipe, users, rows(), of_users)}"):
        yield


def free_gpu_memory() -> None:
    """Frees what a training that is over, or an error that is forgotten, had kept on the GPU and on the host."""
    gc.collect()
    return_free_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _told(rest: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not gpu_is_full(error):
            raise
        raise GpuOutOfMemoryError(f"{_what_is_full(error)} {rest()}") from error
    except BaseTooLargeError as error:
        raise GpuOutOfMemoryError(f"{_what_is_full(error.__cause__ or error)} {rest()}") from error


def _what_is_full(error: BaseException) -> str:
    first = (str(error).strip().splitlines() or ["out of memory"])[0]
    return f"GPU out of memory: {first.split('. ')[0].rstrip('.')}."


def _scored(recipe: Recipe) -> str:
    return "What was scored under the base is kept. " if training_config(recipe).store else ""


def _less(need: int, here: Gpu) -> Gpu:
    """A GPU on which what did not fit here, which needs so many bytes by the plan, would not fit either."""
    return replace(here, bytes=min(here.bytes, CONTEXT + int(_LESS * (need - CONTEXT))))


def _planned(recipe: Recipe, rows: Rows | None = None) -> tuple[Plan, Gpu] | None:
    """The plan and the GPU here; None: the plan does not know."""
    try:
        return Plan(recipe, rows), present() or of_size(1024)
    except (PlanError, ModelError):
        return None


def _for_a_run(recipe: Recipe, checkpoint: Path | None) -> str:
    """What is kept, the overrides that fit, and what the same command does with them."""
    kept = f"No checkpoint had been written. {_scored(recipe)}"
    if checkpoint is not None:
        kept = f"What was trained up to {checkpoint} is kept. "
    planned = _planned(recipe)
    if planned is None:
        return f"{kept}{_CLOSE}, or lower train.per_device_train_batch_size, train.max_length or lora.r."
    plan, here = planned
    target = _less(plan.training(plan.choice, here), here)
    change = plan.smallest_change(target)
    if change is None:
        return f"{kept}{_NOTHING}"
    words, choice = change
    then = "and resumes from there" if checkpoint is not None else "and starts at the first step"
    folder = _another_folder(recipe, words)
    if folder:
        then = "in a folder of its own: it trains other batches, rows or weights, so it starts at the first step"
    return f"{kept}{_line([*words, *folder], plan.training(choice, target))}, {then}."


def _for_scoring(recipe: Recipe, own_folder: bool) -> str:
    planned = _planned(recipe)
    if planned is None:
        return f"{_CLOSE}, or lower train.max_length."
    plan, here = planned
    target = _less(plan.scoring(plan.choice, here), here)
    change = plan.smallest_change(target, scoring=True)
    if change is None:
        return _NOTHING
    words, choice = change
    folder = _another_folder(recipe, words) if own_folder else []
    return f"{_line([*words, *folder], plan.scoring(choice, target))}."


def _for_a_fleet(recipe: Recipe, users: int, rows: Sequence[Row], of_users: bool) -> str:
    try:
        longest = longest_of(recipe, rows, training_config(recipe).max_length) if rows else None
    except (DataError, TemplateError, ModelError):
        longest = None
    planned = _planned(recipe, longest)
    if planned is None:
        return f"{_CLOSE}, or lower fleet.slots, train.per_device_train_batch_size or train.max_length."
    plan, here = planned
    target = _less(plan.training(replace(plan.choice, users=users), here), here)
    fewer = min(plan.most_users(plan.choice, target), users - 1)
    if fewer > 1:
        need = plan.training(replace(plan.choice, users=fewer), target)
        return f"{_line([f'fleet.slots={fewer}'], need)}, and resumes from what is kept."
    change = ([], plan.choice) if fewer else plan.smallest_change(target)
    if change is None:
        return _NOTHING
    words, choice = change
    own = [_of_users(word, recipe) if of_users else word for word in words]
    slots = [] if recipe.fleet.slots == 1 else ["fleet.slots=1"]
    then = "Who was in the middle of the training starts anew"
    if changed(recipe, words).fleet_fingerprint() != recipe.fleet_fingerprint():
        then = "It is another recipe, so it trains everybody anew"
    return f"{_line([*slots, *own], plan.training(choice, target))}. {then}."


def _of_users(word: str, recipe: Recipe) -> str:
    """The override under `fleet.train`, where that has the key and would win."""
    name = word.partition("=")[0].removeprefix("train.")
    return f"fleet.{word}" if word.startswith("train.") and name in recipe.fleet.train else word


def _another_folder(recipe: Recipe, words: list[str]) -> list[str]:
    """An override that takes another output folder, where the others make it another run."""
    same = changed(recipe, words).fingerprint() == recipe.fingerprint()
    return [] if same else [f"train.output_dir={recipe.output_dir}-smaller"]


def _line(words: list[str], need: int) -> str:
    line = " ".join(f"--set {shlex.quote(word)}" for word in words)
    return f"{_CLOSE}, or run the same command with {line}, which needs {need / GIB:.2f} GiB by the plan"


def changed(recipe: Recipe, overrides: list[str]) -> Recipe:
    """`recipe` with overrides of the command line's form ("lora.r=8") that are known to be right."""
    plain = recipe.model_dump(mode="json")
    apply_overrides(plain, {}, overrides)
    made = Recipe.model_validate(plain)
    made._source = recipe.source
    return made
