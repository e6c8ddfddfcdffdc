"""What `--personal` costs: answers of one adapter with the contrast and without, in turns, in this process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import set_seed

from perce_lite.console import progress_bar
from perce_lite.data.pairs import Audit, Pair, PairMaker, require
from perce_lite.data.readers import read_rows
from perce_lite.evaluation.bench.bench import note
from perce_lite.evaluation.bench.measuring import machine
from perce_lite.model.base import load_base, with_adapter
from perce_lite.model.generate import Personal, generate
from perce_lite.recipe import Recipe, training_config

LIMIT = 2.1
"""Seconds a token with the contrast, at most so many times those without."""

_STRENGTH = 0.5


@dataclass(frozen=True)
class GenerationCost:
    """Seconds a generated token, the prompt's reading taken off; a ratio a repeat, in the order they were measured.

    prompt: seconds to read the prompt and give one token, medians, without the contrast and with it
    """

    rows: int
    tokens: int
    plain_seconds: float
    personal_seconds: float
    ratios: list[float]
    prompt: tuple[float, float]
    machine: dict[str, Any]

    @property
    def ratio(self) -> float:
        """The median over repeats."""
        return statistics.median(self.ratios)

    def figures(self) -> dict[str, Any]:
        """For `--json`."""
        return {**asdict(self), "ratio": self.ratio, "limit": LIMIT, "met": self.ratio <= LIMIT}


def generation_cost(recipe: Recipe, rows: int = 4, tokens: int = 48, repeats: int = 3) -> GenerationCost:
    """Answers of `tokens` tokens to the first `rows` queries of the recipe, plain and at strength 0.5 in turns.

    The adapter is a fresh one of the recipe's shape: what it has learned changes no time.

    Raises:
        DataError: no row has a profile that fits; and what loading the base raises.
    """
    config = training_config(recipe)
    base = load_base(recipe)
    set_seed(config.seed)
    model = with_adapter(base.model, recipe)
    maker, audit = PairMaker.of(recipe, base.tokenizer, config.max_length), Audit()
    pairs = maker.make(read_rows(recipe)[: 4 * rows], audit)[:rows]
    require(pairs, audit, "measured")

    def seconds(personal: Personal, length: int) -> float:
        """Of one answer of `length` tokens to each query, together."""
        started = time.perf_counter()
        for pair in pairs:
            _answer(model, maker, pair, personal, length, config.autocast)
        return time.perf_counter() - started

    plain, contrast = Personal(0.0), Personal(_STRENGTH)
    measured: list[tuple[float, float]] = []
    prompts: list[tuple[float, float]] = []
    with progress_bar() as bar:
        task = bar.add_task("Measuring", total=repeats + 1, note="")
        for repeat in range(repeats + 1):  # the first is a warm-up
            note(bar, task, f"repeat {repeat} of {repeats}" if repeat else "warming up")
            prompt = seconds(plain, 1), seconds(contrast, 1)
            several = seconds(plain, tokens), seconds(contrast, tokens)
            if repeat:
                prompts.append(prompt)
                measured.append(_a_token(several, prompt, len(pairs) * (tokens - 1)))
            bar.advance(task)
    plain_seconds, personal_seconds = (statistics.median(column) for column in zip(*measured, strict=True))
    first, second = (statistics.median(column) for column in zip(*prompts, strict=True))
    ratios = [with_contrast / without for without, with_contrast in measured]
    where = machine(next(model.parameters()).device)
    return GenerationCost(len(pairs), tokens, plain_seconds, personal_seconds, ratios, (first, second), where)


def _a_token(several: Sequence[float], prompt: Sequence[float], tokens: int) -> tuple[float, float]:
    return (several[0] - prompt[0]) / tokens, (several[1] - prompt[1]) / tokens


def _answer(
    model: torch.nn.Module,
    maker: PairMaker,
    pair: Pair,
    personal: Personal,
    length: int,
    autocast: torch.dtype | None,
) -> None:
    generate(
        model,
        maker,
        pair.row.prompt,
        pair.profile,
        length,
        autocast=autocast,
        personal=personal,
        min_new_tokens=length,
    )
