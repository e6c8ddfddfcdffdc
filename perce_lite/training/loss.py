"""The PerCE loss as pure functions on tensors: personal influence ratio (PIR), token weights, weighted NLL.

Shapes: (R,) is one row's response tokens, (B, T) a batch; every function takes either.
Source: "Rethinking Personalization in Large Language Models at the Token Level", arXiv 2603.06595.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from perce_lite.config import PerCEConfig


@dataclass(frozen=True)
class Weighting:
    """How a token's weight follows from its PIR.

    kind: `clip`, the paper's, clip(PIR, clip_min, clip_max); `additive`, 1 + strength * clip(PIR, 0, clip_max), which
        leaves no token below the weight that plain SFT gives it
    clip_min, clip_max: nats
    scale: a factor of every weight: 1, or 1 / mean weight of the data set (`normalize_weights: mean`)
    """

    kind: str
    clip_min: float
    clip_max: float
    strength: float = 0.5
    scale: float = 1.0

    @classmethod
    def of(cls, args: PerCEConfig, scale: float = 1.0) -> Weighting:
        return cls(args.weighting, args.clip_min, args.clip_max, args.strength, scale)

    @property
    def low(self) -> float:
        """PIR, nats, up to which all tokens have the lowest weight."""
        return self.clip_min if self.kind == "clip" else 0.0

    def weights(self, pir: Tensor) -> Tensor:
        """Loss weight of each token; shape of `pir`."""
        clipped = pir.clamp(self.low, self.clip_max)
        return (clipped if self.kind == "clip" else 1 + self.strength * clipped) * self.scale

    @property
    def bounds(self) -> tuple[float, float]:
        """The lowest and the highest weight."""
        low, high = self.weights(torch.tensor([self.low, self.clip_max], dtype=torch.float64)).tolist()
        return low, high

    @property
    def formula(self) -> str:
        """`weights` as a person writes it, without the scale."""
        clipped = f"clip(PIR, {self.low:g}, {self.clip_max:g})"
        return clipped if self.kind == "clip" else f"1 + {self.strength:g} x {clipped}"


class WeightedNLL(NamedTuple):
    """The loss of each token, and the PIR that its weight comes from.

    per_token: -w_i log P(y_i), nats; sum it over an accumulation window and divide by the window's token count
    pir: detached, float32, nats; None where all weights are 1
    """

    per_token: Tensor
    pir: Tensor | None


def weighted_nll(
    log_probs: Tensor,
    counterfactual_log_probs: Tensor | None,
    factual_log_probs: Tensor | None = None,
    *,
    weighting: Weighting,
) -> WeightedNLL:
    """The PerCE loss: L = -(1/n) sum_i w_i log P(y_i | p_u, x, y_<i), before the sum and the division by n.

        PIR_i = log P(y_i | p_u, x, y_<i) - log P(y_i | x, y_<i)
        w_i   = weighting.weights(PIR_i)                         (no gradient flows through w_i)

    All tensors are of one shape.

    log_probs: of the training forward, with gradients, nats
    counterfactual_log_probs: log P(y_i | x, y_<i), without the profile; None: plain SFT, w_i = 1
    factual_log_probs: log P(y_i | p_u, x, y_<i) for the PIR; None: `log_probs`, detached
    """
    if counterfactual_log_probs is None:
        return WeightedNLL(-log_probs, None)
    influence = pir(log_probs if factual_log_probs is None else factual_log_probs, counterfactual_log_probs)
    return WeightedNLL(-(weighting.weights(influence) * log_probs), influence)


def pir(factual_log_probs: Tensor, counterfactual_log_probs: Tensor) -> Tensor:
    """Personal influence ratio of each token, nats: how much more likely the profile makes it.

    It is the conditional pointwise mutual information of token and profile. Both tensors are of one shape. The result
    is detached, float32.
    """
    return (factual_log_probs - counterfactual_log_probs).detach().float()


def mean_weight(pirs: Sequence[Tensor], weighting: Weighting) -> float:
    """Mean weight over the tokens of a data set, given each row's `pir` (R,)."""
    total = sum(float(weighting.weights(row.double()).sum()) for row in pirs)
    return total / max(1, sum(row.numel() for row in pirs))


def permutation(responses: Sequence[int], seed: int, row: int) -> Tensor:
    """The order in which the `shuffled` control assigns a row's weights to its tokens; (R,) of indices.

    responses: lengths of the row's responses, R in sum; no weight leaves its response
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + row)
    parts, start = [], 0
    for length in responses:
        parts.append(start + torch.randperm(length, generator=generator))
        start += length
    return torch.cat([torch.empty(0, dtype=torch.long), *parts])


def weight_statistics(pir: Tensor, weighting: Weighting) -> dict[str, float]:
    """Figures that tell whether the weights carry information. `pir` is (N,), nats; empty for N = 0.

    `share_at_min` and `share_at_max` are the shares of tokens with the lowest and the highest weight (clip saturation),
    `share_above_min` is the rest of the first, `effective_tokens` the share (sum w)^2 / (N sum w^2): 1 when all weights
    are equal and above 0.
    """
    if pir.numel() == 0:
        return {}
    values = pir.double() if pir.device.type == "cpu" else pir.float()
    weight = weighting.weights(values)
    tenths = torch.quantile(values, torch.tensor([0.1, 0.5, 0.9], dtype=values.dtype, device=values.device))
    relative = weight / weight.max().clamp(min=torch.finfo(weight.dtype).tiny)
    effective = relative.sum() ** 2 / (relative * relative).sum().clamp(min=torch.finfo(weight.dtype).tiny)
    figures = {
        "pir_mean": values.mean(),
        "pir_p10": tenths[0],
        "pir_p50": tenths[1],
        "pir_p90": tenths[2],
        "weight_mean": weight.mean(),
        "share_at_min": (values <= weighting.low).to(values.dtype).mean(),
        "share_above_min": (values > weighting.low).to(values.dtype).mean(),
        "share_at_max": (values >= weighting.clip_max).to(values.dtype).mean(),
        "effective_tokens": effective / weight.numel(),
    }
    read = torch.stack(list(figures.values())).tolist()  # one synchronisation with the device, not nine
    return dict(zip(figures, read, strict=True))
