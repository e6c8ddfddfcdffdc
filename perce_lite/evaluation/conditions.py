"""Held-out rows under their controls: own profile, none, a random other user's, the best topical match of others."""

import functools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from perce_lite.data.pairs import Pair, PairMaker, Tokens
from perce_lite.data.retrieval import Bm25Index, Item
from perce_lite.data.rows import Row
from perce_lite.model.logprob_store import Store
from perce_lite.model.scoring import ScoringJob, cached_log_probs

OTHER, MATCH = "other user's", "topical match"
"""Conditions with a profile of other users: a random one's, and the texts nearest to the query."""


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
    maker: PairMaker,
    rows: Sequence[Row],
    topics: Topics | None = None,
    pool: Sequence[Row] = (),
    seed: int = 0,
    candidates: int = 0,
) -> list[Case]:
    """`rows` under every control; a row that one of them cannot be had for is left out of all.

    topics: also the best topical match of other users
    pool: rows whose profiles serve as those of random other users, beside those of `rows`
    candidates: further profiles of random other users, each of another user where there are enough, to tell the writer
        of a row by; the conditions "candidate 1" and so on
    With a single user there is no other's profile: such controls are then left out for all rows.
    """
    chosen = other_profiles(rows, seed, [*rows, *pool], 1 + candidates)
    kept = []
    for pair in maker.make(rows):
        passes = {"own": pair.factual, "none": pair.counterfactual}
        others = chosen[id_of(pair.row)]
        given: dict[str, Row | None] = dict(zip(_other_names(candidates), others, strict=False))
        if topics is not None and len(topics.texts) > 1:
            given[MATCH] = topics.match(pair.row)
        for name, row in given.items():
            for made in maker.make([row] if row is not None else []):
                passes[name] = made.factual
        if len(passes) == 2 + len(given):
            kept.append(Case(pair, passes))
    return kept


def other_profiles(rows: Sequence[Row], seed: int, pool: Sequence[Row], count: int) -> dict[tuple[str, str], list[Row]]:
    """By `id_of` of each row: the row with the profiles of `count` other users of `pool`, or of as many as all can."""
    by_row: dict[tuple[str, str], list[Row]] = {id_of(row): [] for row in rows}
    taken: dict[tuple[str, str], set[str]] = {id_of(row): {row.user} for row in rows}
    for number in range(count):
        chooser = random.Random(seed + number)
        for row in rows:
            key = id_of(row)
            others = [other for other in pool if other.user not in taken[key] and other.profile]
            if others:
                other = chooser.choice(others)
                taken[key].add(other.user)
                by_row[key].append(replace(row, profile=other.profile))
    common = min(map(len, by_row.values()), default=0)
    return {key: several[:common] for key, several in by_row.items()}


def _other_names(candidates: int) -> list[str]:
    return [OTHER, *(f"candidate {number}" for number in range(1, candidates + 1))]


def is_candidate(name: str) -> bool:
    """Whether a condition is there only to tell the writer by."""
    return name.startswith("candidate ")


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
