"""What training did, on held-out rows: loss with the own profile, with none, with another user's."""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel

from perce_lite.console import progress_bar
from perce_lite.pairs import Pair, PairMaker, Tokens
from perce_lite.rows import Row, swap_profiles
from perce_lite.score import log_probs

PROFILES = ("own", "none", "other user's")
"""The controls, in the order of the table."""


def spread_over_users(rows: Sequence[Row], count: int) -> list[Row]:
    """At most `count` rows, one of each user in turn."""
    by_user: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_user[row.user].append(row)
    turns = itertools.zip_longest(*by_user.values())
    return [row for turn in turns for row in turn if row is not None][:count]


def controlled(maker: PairMaker, rows: Sequence[Row], seed: int = 0) -> list[tuple[Pair, dict[str, Tokens]]]:
    """Each row that can be had under every control, with its sequence under each.

    With a single user there is no other's profile: that control is then left out for all.
    """
    others = {id_of(row): row for row in swap_profiles(rows, seed)}
    kept = []
    for pair in maker.make(rows):
        passes = {"own": pair.factual, "none": pair.counterfactual}
        if others:
            swapped = maker.make([others[id_of(pair.row)]])
            if not swapped:
                continue
            passes["other user's"] = swapped[0].factual
        kept.append((pair, passes))
    return kept


def id_of(row: Row) -> tuple[str, str]:
    """What tells a row from every other."""
    return row.where, row.user


def held_out_losses(
    model: PeftModel, maker: PairMaker, rows: Sequence[Row], autocast: torch.dtype | None
) -> list[dict[str, Any]]:
    """Loss a token, nats, of base and adapter under each control, over all scored tokens of `rows`.

    A list of {profile, base, adapter, tokens, rows, per_row}; empty where no row can be had.
    """
    cases = controlled(maker, rows)
    if not cases:
        return []
    names = [name for name in PROFILES if name in cases[0][1]]
    sequences = [passes[name] for _, passes in cases for name in names]
    nats: dict[bool, list[float]] = {}
    counts = [0] * len(sequences)
    with progress_bar() as bar:
        task = bar.add_task("Held-out rows", total=2 * len(sequences), note="")
        for adapter in (False, True):
            nats[adapter] = [0.0] * len(sequences)
            for index, values in log_probs(model, sequences, adapters=adapter, autocast=autocast):
                nats[adapter][index], counts[index] = -float(values.double().sum()), values.numel()
                bar.advance(task)
    table = []
    for offset, name in enumerate(names):
        picked = range(offset, len(sequences), len(names))
        tokens = sum(counts[index] for index in picked)
        per_row = [
            {"row": pair.row.where, "user": pair.row.user, "tokens": counts[index], "base": nats[False][index], "adapter": nats[True][index]}
            for (pair, _), index in zip(cases, picked, strict=True)
        ]
        base, adapter = (sum(nats[on][index] for index in picked) / tokens for on in (False, True))
        table.append({"profile": name, "base": base, "adapter": adapter, "tokens": tokens, "rows": len(per_row), "per_row": per_row})
    return table
