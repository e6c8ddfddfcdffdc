"""A card whose memory is full: what is kept, and the override of the recipe that the plan says will fit."""

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from perce_lite.errors import BaseTooLargeError, CardFullError, ModelError, PlanError
from perce_lite.planning.cards import GIB, Card, of_size, present
from perce_lite.planning.plan import CONTEXT, Choice, Need, Plan
from perce_lite.recipe import Recipe
from perce_lite.source import apply_overrides

_LESS = 0.9
"""An override brings the estimate below this share of what did not fit: it was too low, or others use the card too."""

_CLOSE = "Close other programs that use the card (nvidia-smi lists them)"
_NOTHING = f"{_CLOSE}; no change to the recipe needs much less, so else take a smaller model."


@contextmanager
def full_card_is_clear(recipe: Recipe, checkpoint: Callable[[], Path | None]) -> Iterator[None]:
    """Inside, which trains, torch's out-of-memory error becomes one that says what to change.

    checkpoint: the newest whole checkpoint of the run, asked for when it comes to that

    Raises:
        CardFullError: the card's memory is full.
    """
    with _told(lambda: _for_a_run(recipe, checkpoint())):
        yield


@contextmanager
def full_card_in_scoring(recipe: Recipe) -> Iterator[None]:
    """As `full_card_is_clear` where log-probs are scored and nothing is trained."""
    with _told(lambda: f"What was scored is kept. {_for_scoring(recipe)}"):
        yield


@contextmanager
def full_card_in_a_fleet(recipe: Recipe, users: int) -> Iterator[None]:
    """As `full_card_is_clear` for `users` that are trained at once in slots, or one after another."""
    with _told(lambda: f"Who was trained stays so. {_for_a_fleet(recipe, users)}"):
        yield


@contextmanager
def _told(rest: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise CardFullError(f"{_what_is_full(error)} {rest()}") from error
    except BaseTooLargeError as error:
        raise CardFullError(f"{_what_is_full(error.__cause__)} {rest()}") from error


def _what_is_full(error: BaseException | None) -> str:
    first = (str(error).strip().splitlines() or ["out of memory"])[0]
    return f"The card's memory is full: {first.split('. ')[0].rstrip('.')}."


def _less(recipe: Recipe, users: int, need: Callable[[Plan], Need]) -> tuple[Plan, Card] | None:
    """The plan, and a card on which what did not fit here would not fit either; None: the plan does not know."""
    try:
        plan = Plan(recipe)
    except (PlanError, ModelError):
        return None
    here = present() or of_size(1024)
    too_much = need(plan)(replace(plan.choice, users=users), here) - CONTEXT
    return plan, replace(here, bytes=min(here.bytes, CONTEXT + int(_LESS * too_much)))


def _for_a_run(recipe: Recipe, checkpoint: Path | None) -> str:
    """What is kept, the overrides that fit, and what the same command does with them."""
    kept = "No checkpoint had been written; what was scored is kept."
    if checkpoint is not None:
        kept = f"What was trained up to {checkpoint} is kept."
    found = _less(recipe, 1, lambda plan: plan.training)
    if found is None:
        return f"{kept} {_CLOSE}, or lower train.per_device_train_batch_size, train.max_length or lora.r."
    plan, target = found
    change = plan.smallest_change(target)
    if change is None:
        return f"{kept} {_NOTHING}"
    words, choice = change
    then = "and goes on from there (without --restart)" if checkpoint is not None else "and starts at the first step"
    if changed(recipe, words).fingerprint() != recipe.fingerprint():
        words = [*words, f"train.output_dir={recipe.output_dir}-smaller"]
        then = "in a folder of its own: it trains other batches, rows or weights, so it starts at the first step"
    return f"{kept} {_line(words, plan.training(choice, target))}, {then}."


def _for_scoring(recipe: Recipe) -> str:
    found = _less(recipe, 1, lambda plan: plan.evaluation)
    if found is None:
        return f"{_CLOSE}, or lower train.max_length."
    plan, target = found
    change = plan.smallest_change(target, plan.evaluation)
    if change is None:
        return _NOTHING
    words, choice = change
    return f"{_line(words, plan.evaluation(choice, target))}."


def _for_a_fleet(recipe: Recipe, users: int) -> str:
    found = _less(recipe, users, lambda plan: plan.training)
    if found is None:
        return f"{_CLOSE}, or lower fleet.slots, train.per_device_train_batch_size or train.max_length."
    plan, target = found
    fewer = min(plan.most_users(plan.choice, target), users - 1)
    if fewer:
        choice: Choice = replace(plan.choice, users=fewer)
        need = plan.training(choice, target)
        return f"{_line([f'fleet.slots={fewer}'], need)}, and goes on from what is kept."
    change = plan.smallest_change(target)
    if change is None:
        return _NOTHING
    words, choice = change
    then = "and goes on from what is kept"
    if changed(recipe, words).fleet_fingerprint() != recipe.fleet_fingerprint():
        then = "and trains everybody anew, as it is another recipe"
    slots = ["fleet.slots=1"] if users > 1 else []
    return f"{_line([*slots, *words], plan.training(choice, target))}, {then}."


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
