"""A card whose memory is full: what is kept, and the override of the recipe that the plan says will fit."""

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from perce_lite.cards import GIB, of_size, present
from perce_lite.errors import CardFullError, ModelError, PlanError
from perce_lite.plan import CONTEXT, Plan
from perce_lite.recipe import Recipe
from perce_lite.source import apply_overrides

_LESS = 0.9
"""An override brings the estimate below this share of what did not fit: it was too low, or others use the card too."""


@contextmanager
def full_card_is_clear(recipe: Recipe, checkpoint: Callable[[], Path | None]) -> Iterator[None]:
    """Inside, torch's out-of-memory error becomes one that says what to change.

    checkpoint: the newest whole checkpoint of the run, asked for when it comes to that

    Raises:
        CardFullError: the card's memory is full.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        kept = checkpoint()
        raise CardFullError(f"{_what_is_full(error)} {_kept(kept)} {_mend(recipe, kept)}") from error


def _what_is_full(error: torch.OutOfMemoryError) -> str:
    first = (str(error).strip().splitlines() or ["out of memory"])[0]
    return f"The card's memory is full: {first.split('. ')[0].rstrip('.')}."


def _kept(checkpoint: Path | None) -> str:
    if checkpoint is None:
        return "No checkpoint had been written; what was scored is kept."
    return f"What was trained up to {checkpoint} is kept."


def _mend(recipe: Recipe, checkpoint: Path | None) -> str:
    """The overrides that fit, and what the same command does with them."""
    close = "Close other programs that use the card (nvidia-smi lists them)"
    try:
        plan = Plan(recipe)
    except (PlanError, ModelError):
        return f"{close}, or lower train.per_device_train_batch_size, train.max_length or lora.r."
    here = present() or of_size(1024)
    too_much = plan.parts(plan.choice, here)["total"] - CONTEXT
    target = replace(here, bytes=min(here.bytes, CONTEXT + int(_LESS * too_much)))
    change = plan.smallest_change(target)
    if change is None:
        return f"{close}; no change to the recipe needs much less, so else take a smaller model."
    words, choice = change
    same_run = changed(recipe, words).fingerprint() == recipe.fingerprint()
    if not same_run:
        words = [*words, f"train.output_dir={recipe.output_dir}-smaller"]
    line = " ".join(f"--set {shlex.quote(word)}" for word in words)
    need = f"{plan.parts(choice, target)['total'] / GIB:.2f} GiB"
    then = "and goes on from there (without --restart)" if checkpoint is not None else "and starts at the first step"
    if not same_run:
        then = "in a folder of its own: it trains other batches, rows or weights, so it starts at the first step"
    return f"{close}, or run the same command with {line}, which needs {need} by the plan, {then}."


def changed(recipe: Recipe, overrides: list[str]) -> Recipe:
    """`recipe` with overrides of the command line's form ("lora.r=8") that are known to be right."""
    plain = recipe.model_dump(mode="json")
    apply_overrides(plain, {}, overrides)
    made = Recipe.model_validate(plain)
    made._source = recipe.source
    return made
