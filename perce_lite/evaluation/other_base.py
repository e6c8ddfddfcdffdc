"""Personal tokens as another base sees them: chosen by a model that neither training nor judging knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from perce_lite.console import warn
from perce_lite.data.pairs import IGNORED, PairMaker
from perce_lite.evaluation.authorship import Covered, response_units, tokens_covered
from perce_lite.evaluation.conditions import Case, score_cases
from perce_lite.model.base import load_base
from perce_lite.model.scoring import store_of
from perce_lite.planning.oom_advice import free_gpu_memory
from perce_lite.recipe import Recipe, training_config
from perce_lite.training.loss import pir


def tokens_by_other_base(
    recipe: Recipe, name: str, found: Mapping[str, Sequence[Case]], tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[Tensor]]:
    """By split: which response tokens of each case have a PIR above `clip_min` under the base `name`, (R,) a row.

    That base reads the rows with its own template and tokenizer; its tokens are mapped by their characters. Its memory
    is free again at the end. A row that it cannot read, or reads as other text, has no such tokens, with a warning.

    Raises:
        ModelError: the base cannot be loaded.
    """
    other = recipe.model_copy(update={"model": name})
    config, base = training_config(other), load_base(other)
    maker = PairMaker.of(other, base.tokenizer, config.max_length)
    store = store_of(config.store, base.model, config.autocast)
    chosen: dict[str, list[Tensor]] = {}
    unread = 0
    for split, split_cases in found.items():
        made = [maker.make([case.pair.row]) for case in split_cases]
        pairs = [Case(pair[0], {"own": pair[0].factual, "none": pair[0].counterfactual}) for pair in made if pair]
        names, label = ("own", "none"), f"{name}, {split}"
        scored = score_cases(base.model, pairs, names, store, config.autocast, label, False) if pairs else None
        spans = iter(_personal(pairs, scored, config.clip_min, base.tokenizer) if scored else ())
        masks = []
        for case, pair in zip(split_cases, made, strict=True):
            covered = next(spans) if pair else None
            mask = None if covered is None else tokens_covered(case.pair, tokenizer, covered)
            unread += mask is None
            masks.append(_none_of(case) if mask is None else mask)
        chosen[split] = masks
    if unread:
        warn(f"evaluation.personal_by: {name} cannot read {unread} rows as the model does; they count no such tokens")
    del base
    free_gpu_memory()
    return chosen


def _personal(
    cases: Sequence[Case],
    scored: Mapping[str, Sequence[Tensor]],
    clip_min: float,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Covered]:
    """The text of each response, and which of its characters belong to personal tokens."""
    covered = []
    for case, own, none in zip(cases, scored["own"], scored["none"], strict=True):
        units, at = response_units(case.pair, tokenizer), 0
        personal = pir(own, none) > clip_min
        characters = np.zeros(sum(len(text) for _, _, text in units), dtype=bool)
        for start, end, text in units:
            characters[at : at + len(text)] = bool(personal[start:end].any())
            at += len(text)
        covered.append(Covered("".join(text for _, _, text in units), characters))
    return covered


def _none_of(case: Case) -> Tensor:
    scored = sum(label != IGNORED for label in case.pair.factual.labels)
    return torch.zeros(scored, dtype=torch.bool)
