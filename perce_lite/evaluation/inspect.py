"""What PerContrast sees in the data before any training: token by token, over the set, and against a control."""

import re
import string
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from perce_lite.config import PerCEConfig
from perce_lite.data.pairs import IGNORED, Audit, Pair, PairMaker, Tokens, require
from perce_lite.data.readers import read_rows
from perce_lite.data.rows import Row, of_split, spread_over_users, swap_profiles
from perce_lite.errors import DataError
from perce_lite.evaluation.conditions import id_of
from perce_lite.evaluation.interval_rules import FEW_USERS
from perce_lite.evaluation.metrics import Bootstrap
from perce_lite.model import adapter_files, adapters
from perce_lite.model.base import load_base
from perce_lite.model.scoring import ScoringJob, cached_log_probs, store_of
from perce_lite.recipe import Recipe, training_config
from perce_lite.training import loss
from perce_lite.training.leaning import leaning_units
from perce_lite.words import counted

EDGES = [-6.0, *np.arange(-5.0, 8.25, 0.25).tolist(), 9.0]
"""Bounds of the PIR histogram, nats; the outer bins take what lies beyond."""

IDLE = 0.05
"""A row whose mean absolute PIR, nats, is below this has a profile that does nothing."""


@dataclass(frozen=True)
class Seen:
    """One row as PerContrast sees it; each tensor is (R,), nats."""

    pair: Pair
    factual: Tensor
    counterfactual: Tensor
    swapped: Tensor | None

    @property
    def pir(self) -> Tensor:
        return loss.pir(self.factual, self.counterfactual)

    @property
    def swapped_pir(self) -> Tensor | None:
        """With another user's profile in the prompt; None where there is no other user."""
        return None if self.swapped is None else loss.pir(self.swapped, self.counterfactual)


def inspect(recipe: Recipe, adapter: Path | None, rows: int, user: str | None, top: int) -> dict[str, Any]:
    """The figures that `perce-lite inspect` shows, of `rows` training rows spread over users, or of one `user`.

    adapter: take the factual log-probs with this adapter on; the counterfactual stays the bare base's
    top: words and rows to list

    Raises:
        DataError: no rows, or no such user; and what reading, pairing and loading raise.
    """
    training = of_split(read_rows(recipe), "train")
    picked = [row for row in training if row.profile and user in (None, row.user)]
    if not picked:
        known = ", ".join(sorted({row.user for row in training if row.profile})[:20])
        if user is None or not known:
            raise DataError(f"None of the {len(training)} training rows has a profile; perce-lite check shows the rows")
        raise DataError(f"--user {user}: no training row of this user has a profile; users: {known}")
    config = training_config(recipe)
    base = load_base(recipe)
    maker = PairMaker.of(recipe, base.tokenizer, config.max_length)
    audit = Audit()
    pairs = maker.make(spread_over_users(picked, rows), audit)
    require(pairs, audit, "training")
    if adapter is not None:
        adapter_files.require_profile_pass(adapter, recipe)
    model = base.model if adapter is None else adapters.load(base.model, adapter)
    weighting = loss.Weighting.of(config)
    seen = _score(model, pairs, _swapped(maker, pairs, training), config, adapter is not None)
    return {
        "model": recipe.model,
        "adapter": None if adapter is None else str(adapter),
        "clip_min": weighting.low,
        "clip_max": weighting.clip_max,
        "weight_bounds": list(weighting.bounds),
        "weighting": weighting.formula,
        **_figures(seen, base.tokenizer, config, top),
    }


def _swapped(maker: PairMaker, pairs: Sequence[Pair], pool: Sequence[Row]) -> list[Tokens | None]:
    """Each row with the profile of another user of `pool`; None where it cannot be had."""
    given = {id_of(row): row for row in swap_profiles([pair.row for pair in pairs], pool=pool)}
    made = [maker.make([given[id_of(pair.row)]]) if id_of(pair.row) in given else [] for pair in pairs]
    return [swap[0].factual if swap else None for swap in made]


def _score(
    model: torch.nn.Module, pairs: list[Pair], swapped: list[Tokens | None], config: PerCEConfig, adapter_on: bool
) -> list[Seen]:
    """Log-probs of every pair and of its swapped twin, through the store that training uses."""
    autocast = config.autocast
    store = store_of(config.store, model, autocast)
    users = [pair.row.user for pair in pairs]
    twins = [ScoringJob(user, pair.counterfactual) for user, pair in zip(users, pairs, strict=True)]
    factual = [ScoringJob(user, pair.factual) for user, pair in zip(users, pairs, strict=True)]
    factual += [ScoringJob(user, tokens) for user, tokens in zip(users, swapped, strict=True) if tokens is not None]
    if adapter_on:
        counterfactuals = cached_log_probs(model, twins, store, autocast, "Scoring under the base").log_probs
        factuals = cached_log_probs(model, factual, None, autocast, "Scoring with the adapter", True).log_probs
    else:
        both = cached_log_probs(model, [*twins, *factual], store, autocast, "Scoring under the base").log_probs
        counterfactuals, factuals = both[: len(pairs)], both[len(pairs) :]
    rest = iter(factuals[len(pairs) :])
    return [
        Seen(pair, factuals[index], counterfactuals[index], None if swapped[index] is None else next(rest))
        for index, pair in enumerate(pairs)
    ]


def _figures(seen: list[Seen], tokenizer: PreTrainedTokenizerBase, config: PerCEConfig, top: int) -> dict[str, Any]:
    """What the page shows; `personal_rows` and `idle_rows` are positions in `rows`."""
    weighting = loss.Weighting.of(config)
    own = torch.cat([row.pir for row in seen])
    swapped_pirs = [row.swapped_pir for row in seen if row.swapped_pir is not None]
    swapped = torch.cat(swapped_pirs) if swapped_pirs else torch.empty(0)
    shown = [_row(row, tokenizer, weighting) for row in seen]
    ranked = sorted(range(len(shown)), key=lambda number: -float(shown[number]["pir_mean"]))
    return {
        "own": {**loss.weight_statistics(own, weighting), "tokens": own.numel()},
        "swapped": {**loss.weight_statistics(swapped, weighting), "tokens": swapped.numel()},
        "histogram": {"edges": EDGES, "own": _histogram(own), "swapped": _histogram(swapped)},
        "signal": signal(seen),
        "words": _words([row["units"] for row in shown])[:top],
        "users": _users(seen),
        "personal_rows": ranked[:top],
        "idle_rows": [number for number, row in enumerate(shown) if row["mean_absolute_pir"] < IDLE],
        "rows": shown,
    }


def _users(seen: Sequence[Seen]) -> list[dict[str, Any]]:
    """Mean PIR of each user's tokens, with the own profile and with another's (None where there is no other)."""
    by_user: dict[str, list[Seen]] = defaultdict(list)
    for seen_row in seen:
        by_user[seen_row.pair.row.user].append(seen_row)
    users = []
    for user, rows in sorted(by_user.items()):
        own = torch.cat([row.pir for row in rows])
        swapped = [row.swapped_pir for row in rows if row.swapped_pir is not None]
        means = {
            "pir_mean": float(own.mean()),
            "swapped_pir_mean": float(torch.cat(swapped).mean()) if swapped else None,
        }
        users.append({"user": user, "rows": len(rows), "tokens": own.numel(), **means})
    return users


def signal(seen: Sequence[Seen]) -> dict[str, Any]:
    """Whether the own profile says more than another user's: mean PIR a row, own less swapped, with its interval.

    A paired bootstrap over rows, grouped by user, 95 %. `says`: "signal", "none", or "unknown" where there are too few
    rows or users to tell.
    """
    swapped = [(row.pair.row.user, row.pir, row.swapped_pir) for row in seen if row.swapped_pir is not None]
    bootstrap = Bootstrap([user for user, _, _ in swapped])
    rows, users = bootstrap.rows, bootstrap.users
    counts = f"{counted(rows, 'row')} of {counted(users, 'user')}"
    mean, low, high = bootstrap.ratio([float(own.mean() - other.mean()) for _, own, other in swapped])
    if low is None or high is None:
        sentence = f"{counts} with another's profile are too few to tell whether they matter."
        return {"says": "unknown", "mean": None, "low": None, "high": None, "rows": rows, "sentence": sentence}
    margin = f"{mean:+.3f} nats a token (95 % interval {low:+.3f} to {high:+.3f}, {counts})"
    if low > 0:
        sentence = f"The profiles carry signal: the own profile helps more than another user's by {margin}."
    elif high < 0:
        sentence = f"The profiles carry no signal: another user's helps more; own less another user's is {margin}."
    else:
        sentence = f"The profiles carry no signal that can be told from chance: own less another user's is {margin}."
    if users < FEW_USERS:
        sentence += " With so few users the interval is too narrow: take it as a hint."
    return {
        "says": "signal" if low > 0 else "none",
        "mean": mean, "low": low, "high": high, "rows": rows, "sentence": sentence,
    }  # fmt: skip


def _histogram(pir: Tensor) -> list[int]:
    """Tokens in each bin of EDGES, the outer ones taking what lies beyond."""
    clipped = np.clip(pir.double().numpy(), EDGES[0], EDGES[-1])
    return [int(count) for count in np.histogram(clipped, bins=EDGES)[0]]


def _row(seen_row: Seen, tokenizer: PreTrainedTokenizerBase, weighting: loss.Weighting) -> dict[str, Any]:
    ids = [label for label in seen_row.pair.factual.labels if label != IGNORED]
    weight = weighting.weights(seen_row.pir)
    units = [
        {**unit, "weight": float(weight[tokens].mean())}
        for tokens, unit in leaning_units(tokenizer, ids, seen_row.factual, seen_row.counterfactual)
    ]
    row = seen_row.pair.row
    known = {"row": row.where, "user": row.user, "query": row.query, "profile": seen_row.pair.profile}
    means = {"pir_mean": float(seen_row.pir.mean()), "mean_absolute_pir": float(seen_row.pir.abs().mean())}
    return {**known, **means, "units": units}


def _words(rows: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Words by their mean PIR (a word's is the sum of its tokens'), most personal first; twice in the set at least."""
    totals: dict[str, list[float]] = defaultdict(list)
    for units in rows:
        for word, pir in _spelled(units):
            totals[word.lower().strip(string.punctuation + "“”‘’…—–")].append(pir)
    totals.pop("", None)
    often = {word: pirs for word, pirs in totals.items() if len(pirs) > 1} or totals
    ranked = [{"word": word, "pir": sum(pirs) / len(pirs), "count": len(pirs)} for word, pirs in often.items()]
    return sorted(ranked, key=lambda entry: -float(entry["pir"]))


def _spelled(units: Sequence[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """(word, PIR) of a response; a token that reaches over white space belongs to the first word in it."""
    word, pir = "", 0.0
    for unit in units:
        left = unit["pir"]
        for piece in re.findall(r"\s+|\S+", " " if unit["end_of_turn"] else unit["text"]):
            if not piece.isspace():
                word, pir, left = word + piece, pir + left, 0.0
            elif word:
                yield word, pir
                word, pir = "", 0.0
    if word:
        yield word, pir
