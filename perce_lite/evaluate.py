"""What training did, on held-out rows: loss with the own profile, with none, with another user's."""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from perce_lite.console import progress_bar
from perce_lite.contrast import pir
from perce_lite.pairs import Pair, PairMaker, Tokens
from perce_lite.rows import Row, swap_profiles
from perce_lite.score import log_probs

PROFILES = ("own", "none", "other user's")
"""The controls, in the order of the table."""


def controlled(maker: PairMaker, rows: Sequence[Row], seed: int = 0) -> list[tuple[Pair, dict[str, Tokens]]]:
    """Each row that can be had under every control, with its sequence under each.

    With a single user there is no other's profile: that control is then left out for all.
    """
    others = {id_of(row): row for row in swap_profiles(rows, seed)}
    kept = []
    for pair in maker.make(rows):
        passes = {"own": pair.factual, "none": pair.counterfactual}
        if others:
            swapped = maker.make([others[id_of(pair.row)]]) if id_of(pair.row) in others else []
            if not swapped:
                continue
            passes["other user's"] = swapped[0].factual
        kept.append((pair, passes))
    return kept


def id_of(row: Row) -> tuple[str, str]:
    """What tells a row from every other."""
    return row.where, row.user


def held_out_losses(
    model: PeftModel, maker: PairMaker, rows: Sequence[Row], autocast: torch.dtype | None, clip_min: float
) -> list[dict[str, Any]]:
    """Loss a token, nats, of base and adapter under each control, over `rows`.

    One record a control: {profile, base, adapter, tokens, personal: {base, adapter, tokens}, rows, per_row}, where
    personal tokens are those whose PIR under the base, own profile against none, is above `clip_min`. Empty where no
    row can be had.
    """
    cases = controlled(maker, rows)
    if not cases:
        return []
    names = [name for name in PROFILES if name in cases[0][1]]
    sequences = [passes[name] for _, passes in cases for name in names]
    scored: dict[bool, list[Tensor]] = {}
    with progress_bar() as bar:
        task = bar.add_task("Held-out rows", total=2 * len(sequences), note="")
        for adapter in (False, True):
            found: dict[int, Tensor] = {}

            def done(index: int, values: Tensor, found: dict[int, Tensor] = found) -> None:
                found[index] = values.double()
                bar.advance(task)

            log_probs(model, sequences, adapter, autocast, done)
            scored[adapter] = [found[index] for index in range(len(sequences))]
    by_name = {name: range(offset, len(sequences), len(names)) for offset, name in enumerate(names)}
    own, none = ([scored[False][index] for index in by_name[name]] for name in ("own", "none"))
    personal = [pir(*both) > clip_min for both in zip(own, none, strict=True)]
    return [
        _losses(
            name,
            [pair for pair, _ in cases],
            personal,
            *([scored[on][i] for i in by_name[name]] for on in (False, True)),
        )
        for name in names
    ]


def _losses(
    name: str, pairs: list[Pair], personal: list[Tensor], base: list[Tensor], adapter: list[Tensor]
) -> dict[str, Any]:
    """The record of one control; `base` and `adapter` hold log-probs (R,) a row, `personal` masks (R,)."""
    mask = torch.cat(personal)

    def figures(mask: Tensor | None) -> dict[str, Any]:
        both = {"base": torch.cat(base), "adapter": torch.cat(adapter)}
        kept = {who: values if mask is None else values[mask] for who, values in both.items()}
        count = kept["base"].numel()
        return {**{who: -float(values.sum()) / max(1, count) for who, values in kept.items()}, "tokens": count}

    per_row = [
        {
            "row": pair.row.where,
            "user": pair.row.user,
            "tokens": one.numel(),
            "base": -float(one.sum()),
            "adapter": -float(other.sum()),
        }
        for pair, one, other in zip(pairs, base, adapter, strict=True)
    ]
    return {"profile": name, **figures(None), "personal": figures(mask), "rows": len(pairs), "per_row": per_row}
