"""Figures of held-out rows: losses of chosen tokens, worth of the own profile, who wrote a text; with intervals."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perce_lite.evaluation.conditions import MATCH, Case, score_cases
from perce_lite.evaluation.metrics import Array, Bootstrap
from perce_lite.model.logprob_store import Store
from perce_lite.training.loss import pir

PARTS = ("all", "personal", "others")
"""Tokens of a response: all of them, those whose PIR under the base is above the lower clip, and the rest."""

BY_WORDS, AGAINST_TOPIC, BY_MODEL = "by words", "against topic", "by another base"
"""Personal tokens chosen by something else than the training's own weights: see `masks`."""

LogProbs = Mapping[str, Sequence[Tensor]]
"""profile -> log-probs of each row's response tokens, (R,), nats."""


def masks(
    base: LogProbs, clip_min: float, chosen: Mapping[str, Sequence[Tensor]] | None = None
) -> dict[str, list[Tensor]]:
    """Which tokens each part holds, (R,) a row, from log-probs under the base.

    Beside PARTS: `against topic`, tokens that the own profile makes likelier by more than `clip_min` nats than the best
    topical match of other users does, where there is one.

    chosen: further parts, `by words` or `by another base`
    """
    personal = [pir(*both) > clip_min for both in zip(base["own"], base["none"], strict=True)]
    parts = {
        "all": [torch.ones_like(part) for part in personal],
        "personal": personal,
        "others": [~part for part in personal],
        **{name: list(part) for name, part in (chosen or {}).items()},
    }
    if MATCH in base:
        parts[AGAINST_TOPIC] = [pir(*both) > clip_min for both in zip(base["own"], base[MATCH], strict=True)]
    return parts


def losses(log_probs: Sequence[Tensor], mask: Sequence[Tensor]) -> Array:
    """Summed loss of each row's masked tokens, nats, (rows,)."""
    return np.array([-float(values[part].sum()) for values, part in zip(log_probs, mask, strict=True)])


def sizes(mask: Sequence[Tensor]) -> Array:
    """Tokens of each row that `mask` holds, (rows,)."""
    return np.array([float(part.sum()) for part in mask])


@dataclass(frozen=True)
class ArmSums:
    """What one arm does on each row; every array is (rows,).

    losses: condition -> part -> summed loss, nats
    gives, costs: condition -> nats that the own profile adds over it, summed over the tokens that it makes likelier,
        and over those that it makes less likely (negative)
    identified: see `identify`; empty where there are no other users
    """

    losses: dict[str, dict[str, Array]]
    gives: dict[str, Array]
    costs: dict[str, Array]
    identified: dict[str, Array]

    def worth(self, over: str) -> dict[str, Array]:
        """part -> loss under the condition `over` less the loss with the own profile, nats, summed."""
        own = self.losses["own"]
        return {part: totals - own[part] for part, totals in self.losses[over].items()}

    @classmethod
    def mean(cls, several: Sequence[ArmSums]) -> ArmSums:
        """Row by row, the mean over seeds."""

        def over_seeds(arrays: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
            return {name: np.mean([named[name] for named in arrays], axis=0) for name in arrays[0]}

        return cls(
            {name: over_seeds([sums.losses[name] for sums in several]) for name in several[0].losses},
            over_seeds([sums.gives for sums in several]),
            over_seeds([sums.costs for sums in several]),
            over_seeds([sums.identified for sums in several]),
        )


def identify(summed: Mapping[str, Array], base: Mapping[str, Array] | None = None) -> dict[str, Array]:
    """Whether the own profile, among those of other users, gives a row its lowest loss.

    summed, base: condition -> summed loss of each row, nats, (rows,); with `base`, what training changed is ranked, not
        the loss itself (arXiv 2401.12005 subtracts the base likewise)

    Returns `top1` (1 where the own profile is first; ties share) and `mrr` (1 / rank), (rows,); empty where there is no
    other user's profile.
    """
    others = [name for name in summed if name not in ("own", "none")]
    if not others or "own" not in summed:
        return {}

    def value(name: str) -> Array:
        return summed[name] if base is None else summed[name] - base[name]

    own = value("own")
    below = np.sum([value(name) < own for name in others], axis=0)
    tied = np.sum([value(name) == own for name in others], axis=0)
    ranks = [below + 1 + place for place in range(len(others) + 1)]
    # The own profile is at each of the tied places equally often.
    share = [np.where(place <= tied, 1 / (tied + 1), 0.0) for place in range(len(others) + 1)]
    return {
        "top1": np.where(below == 0, 1 / (tied + 1), 0.0),
        "mrr": np.sum([part / rank for part, rank in zip(share, ranks, strict=True)], axis=0),
    }


class Judge:
    """Figures of one set of cases: every loss a token with its interval, and paired differences.

    base: log-probs under the base, by profile; they say which tokens are personal
    chosen: see `masks`
    """

    def __init__(
        self,
        found: Sequence[Case],
        base: LogProbs,
        clip_min: float,
        chosen: Mapping[str, Sequence[Tensor]] | None = None,
    ) -> None:
        users = [case.pair.row.user for case in found]
        self.bootstrap, self.users = Bootstrap(users), set(users)
        self.masks = masks(base, clip_min, chosen)
        self.tokens = {part: sizes(mask) for part, mask in self.masks.items()}
        self._base = {name: losses(log_probs, self.masks["all"]) for name, log_probs in base.items()}

    def told(self, trained: Collection[str]) -> dict[str, Any]:
        """Rows, users, how many of these are in `trained`, and tokens of each part."""
        return {
            "rows": self.bootstrap.rows,
            "users": len(self.users),
            "trained_users": len(self.users & set(trained)),
            "tokens": {part: int(count.sum()) for part, count in self.tokens.items()},
        }

    def sums(self, scored: LogProbs) -> ArmSums:
        """Of log-probs by profile."""
        summed = {
            name: {part: losses(log_probs, mask) for part, mask in self.masks.items()}
            for name, log_probs in scored.items()
        }
        gives, costs = {}, {}
        for name in scored:
            if name != "own" and "own" in scored:
                gained = [own - other for own, other in zip(scored["own"], scored[name], strict=True)]
                gives[name] = np.array([float(row.clamp(min=0).sum()) for row in gained])
                costs[name] = np.array([float(row.clamp(max=0).sum()) for row in gained])
        totals = {name: by_part["all"] for name, by_part in summed.items()}
        identified = identify(totals)
        identified |= {f"{name} relative": values for name, values in identify(totals, self._base).items()}
        return ArmSums(summed, gives, costs, identified)

    def figures(self, sums: Mapping[str, Array], less: Mapping[str, Array] | None = None) -> dict[str, Any]:
        """Nats a token of each part: {value, low, high}; None where no token is of it. `less` is taken away first."""
        figures: dict[str, Any] = {}
        for part, totals in sums.items():
            paired = totals if less is None else totals - less[part]
            known = self.tokens[part].sum() > 0
            figures[part] = self.bootstrap.ratio(paired, self.tokens[part])._asdict() if known else None
        return figures

    def worth(self, sums: ArmSums, over: str) -> dict[str, Any]:
        """What the own profile is worth over another condition, nats a token of each part; `gives` and `costs`."""
        return {
            **self.figures(sums.worth(over)),
            "gives": self.bootstrap.ratio(sums.gives[over], self.tokens["all"])._asdict(),
            "costs": self.bootstrap.ratio(sums.costs[over], self.tokens["all"])._asdict(),
        }

    def identified(self, sums: ArmSums, less: ArmSums | None = None) -> dict[str, Any]:
        """The mean of each figure of `identify` over rows, with its interval; `less` is taken away first."""
        return {
            name: self.bootstrap.ratio(values if less is None else values - less.identified[name])._asdict()
            for name, values in sums.identified.items()
            if less is None or name in less.identified
        }


def chance(candidates: int) -> dict[str, float]:
    """`top1` and `mrr` of a guess among `candidates` profiles."""
    return {"top1": 1 / candidates, "mrr": sum(1 / rank for rank in range(1, candidates + 1)) / candidates}


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
                "tokens": base_values.numel(),
                "base": -float(base_values.sum()),
                "adapter": -float(other.sum()),
            }
            for case, base_values, other in zip(found, base[name], adapter[name], strict=True)
        ]
        known = {"profile": name, **by_part["all"], "personal": by_part["personal"]}
        records.append({**known, "rows": len(found), "per_row": per_row})
    return records
