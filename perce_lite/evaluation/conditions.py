"""Held-out rows under their controls: own profile, none, a random other user's, the best topical match of others."""

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perce_lite.data.pairs import Pair, PairMaker, Tokens
from perce_lite.data.retrieval import Bm25Index, Item
from perce_lite.data.rows import Row, swap_profiles
from perce_lite.evaluation.metrics import Array, Bootstrap
from perce_lite.model.logprob_store import Store
from perce_lite.model.scoring import ScoringJob, cached_log_probs
from perce_lite.training.loss import pir

PARTS = ("all", "personal", "others")
"""Tokens of a response: all of them, those whose PIR under the base is above the lower clip, and the rest."""


@dataclass(frozen=True)
class Case:
    """A row that can be had under every control, with its sequence under each."""

    pair: Pair
    passes: dict[str, Tokens]


@dataclass(frozen=True)
class Topics:
    """Every user's texts, to find the best match of other users for a query; one BM25 index over all of them."""

    texts: Mapping[str, Sequence[Item]]
    top_k: int

    @functools.cached_property
    def _owned(self) -> list[tuple[str, Item]]:
        return [(user, item) for user, items in self.texts.items() for item in items]

    @functools.cached_property
    def _index(self) -> Bm25Index:
        return Bm25Index([f"{item.title}\n{item.text}" for _, item in self._owned])

    def match(self, row: Row) -> Row | None:
        """`row` with the other users' texts nearest to its query (BM25) as profile; None where there are none."""
        others = [place for place, (user, _) in enumerate(self._owned) if user != row.user]
        if not others:
            return None
        scores = self._index.scores(row.query)
        nearest = sorted(others, key=lambda place: -scores[place])[: self.top_k]
        return replace(row, profile=tuple(self._owned[place][1] for place in nearest))


def cases(
    maker: PairMaker, rows: Sequence[Row], topics: Topics | None = None, pool: Sequence[Row] = (), seed: int = 0
) -> list[Case]:
    """`rows` under every control; a row that one of them cannot be had for is left out of all.

    topics: also the best topical match of other users
    pool: rows whose profiles serve as the random other user's, beside those of `rows`
    With a single user there is no other's profile: such controls are then left out for all rows.
    """
    swapped = {id_of(row): row for row in swap_profiles(rows, seed, [*rows, *pool])}
    kept = []
    for pair in maker.make(rows):
        passes = {"own": pair.factual, "none": pair.counterfactual}
        given = {"other user's": swapped.get(id_of(pair.row))} if swapped else {}
        if topics is not None and len(topics.texts) > 1:
            given["topical match"] = topics.match(pair.row)
        for name, row in given.items():
            for made in maker.make([row] if row is not None else []):
                passes[name] = made.factual
        if len(passes) == 2 + len(given):
            kept.append(Case(pair, passes))
    return kept


def id_of(row: Row) -> tuple[str, str]:
    """What tells a row from every other."""
    return row.where, row.user


def score_cases(
    model: torch.nn.Module,
    found: Sequence[Case],
    profiles: Sequence[str],
    store: Store | None,
    autocast: torch.dtype | None,
    what: str,
    adapters: bool,
) -> dict[str, list[Tensor]]:
    """Log-probs of each case's response, (R,) float64, nats, under each of `profiles`."""
    jobs = [ScoringJob(case.pair.row.user, case.passes[name]) for name in profiles for case in found]
    scored = cached_log_probs(model, jobs, store, autocast, what, adapters).log_probs
    size = len(found)
    return {
        name: [values.double() for values in scored[index * size : (index + 1) * size]]
        for index, name in enumerate(profiles)
    }


def masks(base: Mapping[str, Sequence[Tensor]], clip_min: float) -> dict[str, list[Tensor]]:
    """Which tokens each of PARTS holds, (R,) a row, from log-probs under the base with the own profile and none."""
    personal = [pir(*both) > clip_min for both in zip(base["own"], base["none"], strict=True)]
    every = [torch.ones_like(one) for one in personal]
    return {"all": every, "personal": personal, "others": [~one for one in personal]}


def losses(log_probs: Sequence[Tensor], mask: Sequence[Tensor]) -> Array:
    """Summed loss of each row's masked tokens, nats, (rows,)."""
    return np.array([-float(values[one].sum()) for values, one in zip(log_probs, mask, strict=True)])


def sizes(mask: Sequence[Tensor]) -> Array:
    """Tokens of each row that `mask` holds, (rows,)."""
    return np.array([float(part.sum()) for part in mask])


Sums = dict[str, dict[str, Array]]
"""profile -> part -> summed loss of each row, nats, (rows,)."""


class Judge:
    """Figures of one set of cases: every loss a token with its interval, and paired differences.

    base: log-probs under the base, by profile; they say which tokens are personal
    """

    def __init__(self, found: Sequence[Case], base: Mapping[str, Sequence[Tensor]], clip_min: float) -> None:
        users = [case.pair.row.user for case in found]
        self.bootstrap, self.users = Bootstrap(users), set(users)
        self.masks = masks(base, clip_min)
        self.tokens = {part: sizes(mask) for part, mask in self.masks.items()}

    def told(self, trained: Collection[str]) -> dict[str, Any]:
        """Rows, users, how many of these are in `trained`, and tokens of each part."""
        return {
            "rows": self.bootstrap.rows,
            "users": len(self.users),
            "trained_users": len(self.users & set(trained)),
            "tokens": {part: int(count.sum()) for part, count in self.tokens.items()},
        }

    def sums(self, scored: Mapping[str, Sequence[Tensor]]) -> Sums:
        """Of log-probs by profile."""
        return {
            name: {part: losses(log_probs, mask) for part, mask in self.masks.items()}
            for name, log_probs in scored.items()
        }

    def figures(self, sums: Mapping[str, Array], less: Mapping[str, Array] | None = None) -> dict[str, Any]:
        """Nats a token of each part: {value, low, high}; None where no token is of it. `less` is taken away first."""
        told: dict[str, Any] = {}
        for part, totals in sums.items():
            paired = totals if less is None else totals - less[part]
            known = self.tokens[part].sum() > 0
            told[part] = self.bootstrap.ratio(paired, self.tokens[part])._asdict() if known else None
        return told


def before_and_after(
    model: torch.nn.Module,
    found: Sequence[Case],
    store: Store | None,
    autocast: torch.dtype | None,
    clip_min: float,
) -> list[dict[str, Any]]:
    """Loss a token, nats, of base and adapter under each control.

    One record a control: {profile, base, adapter, tokens, personal: {base, adapter, tokens}, rows, per_row}. `store` is
    the base's; empty where there are no cases.
    """
    if not found:
        return []
    names = list(found[0].passes)
    base = score_cases(model, found, names, store, autocast, "Held-out rows, base", False)
    adapter = score_cases(model, found, names, None, autocast, "Held-out rows, adapter", True)
    parts = masks(base, clip_min)
    records = []
    for name in names:
        by_part: dict[str, dict[str, Any]] = {}
        for part in ("all", "personal"):
            tokens = sizes(parts[part]).sum()
            by_part[part] = {
                "base": float(losses(base[name], parts[part]).sum() / max(1, tokens)),
                "adapter": float(losses(adapter[name], parts[part]).sum() / max(1, tokens)),
                "tokens": int(tokens),
            }
        per_row = [
            {
                "row": case.pair.row.where,
                "user": case.pair.row.user,
                "tokens": one.numel(),
                "base": -float(one.sum()),
                "adapter": -float(other.sum()),
            }
            for case, one, other in zip(found, base[name], adapter[name], strict=True)
        ]
        known = {"profile": name, **by_part["all"], "personal": by_part["personal"]}
        records.append({**known, "rows": len(found), "per_row": per_row})
    return records
