"""PerContrast as pure functions on tensors: influence, weights, health figures.

Shapes: (R,) is one row's response tokens, (B, T) a batch; every function takes either.
Source: "Rethinking Personalization in Large Language Models at the Token Level", arXiv 2603.06595.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["base", "mixed", "bootstrap", "uniform", "shuffled"]
Normalization = Literal["none", "mean"]
TrainOn = Literal["factual", "counterfactual"]
ProfilePass = Literal["full", "frozen"]


def pir(factual_log_probs: Tensor, counterfactual_log_probs: Tensor) -> Tensor:
    """Personal influence ratio of each token, nats: how much likelier the profile makes it.

    Both of one shape. The result is detached: a weight is not a path for gradients.
    """
    return (factual_log_probs - counterfactual_log_probs).detach().float()


def weights(pir: Tensor, clip_min: float, clip_max: float, scale: float = 1.0) -> Tensor:
    """Loss weight of each token, `clip(pir, clip_min, clip_max) * scale`; shape of `pir`.

    `scale` is 1 / mean weight of the data set where weights are normalised.
    """
    return pir.clamp(clip_min, clip_max) * scale


def mean_weight(pirs: Sequence[Tensor], clip_min: float, clip_max: float) -> float:
    """Mean weight over the tokens of a data set, given each row's `pir` (R,)."""
    total = sum(float(weights(row.double(), clip_min, clip_max).sum()) for row in pirs)
    return total / max(1, sum(row.numel() for row in pirs))


def permutation(responses: Sequence[int], seed: int, row: int) -> Tensor:
    """The order in which the `shuffled` control hands out a row's weights; (R,) of indices.

    `responses` are the lengths of the row's responses, R in sum; no weight leaves its response.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + row)
    parts, start = [], 0
    for length in responses:
        parts.append(start + torch.randperm(length, generator=generator))
        start += length
    return torch.cat([torch.empty(0, dtype=torch.long), *parts])


def health(pir: Tensor, clip_min: float, clip_max: float) -> dict[str, float]:
    """Figures that tell whether the weights still carry information. `pir` is (N,), nats.

    `share_at_min` and `share_at_max` are clip saturation, `share_above_min` the share of tokens above
    the weight floor, `effective_tokens` the share (sum w)^2 / (N sum w^2): 1 when all weights are equal (and above 0).
    """
    if pir.numel() == 0:
        return {}
    values = pir.double() if pir.device.type == "cpu" else pir.float()
    weight = weights(values, clip_min, clip_max)
    tenths = torch.quantile(values, torch.tensor([0.1, 0.5, 0.9], dtype=values.dtype, device=values.device))
    relative = weight / weight.max().clamp(min=torch.finfo(weight.dtype).tiny)
    effective = relative.sum() ** 2 / (relative * relative).sum().clamp(min=torch.finfo(weight.dtype).tiny)
    figures = {
        "pir_mean": values.mean(),
        "pir_p10": tenths[0],
        "pir_p50": tenths[1],
        "pir_p90": tenths[2],
        "weight_mean": weight.mean(),
        "share_at_min": (values <= clip_min).to(values.dtype).mean(),
        "share_above_min": (values > clip_min).to(values.dtype).mean(),
        "share_at_max": (values >= clip_max).to(values.dtype).mean(),
        "effective_tokens": effective / weight.numel(),
    }
    read = torch.stack(list(figures.values())).tolist()  # one wait for the device, not nine
    return dict(zip(figures, read, strict=True))
