"""Kernels that a CPU does not have: attention's by plain arithmetic, and what kernels take for a moment."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from perce_lite.evaluation.bench.imitation.card import current
from perce_lite.evaluation.bench.imitation.nesting import name_of


def is_mixed_addmm(func: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether this is `addmm` of half-precision factors with a float32 sum, which only CUDA has."""
    return name_of(func) == "aten::addmm" and (func._overloadname.startswith("dtype") or "out_dtype" in kwargs)


# Attention


def attention_values(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """What torch's fused kernel `name` gives, forward or backward."""
    efficient, scale = "efficient" in name, kwargs.get("scale")
    if "backward" in name:
        gradient, query, key, value = args[:4]
        bias = args[4] if efficient else None
        causal = args[11] if len(args) > 11 else kwargs.get("is_causal", False)
        gradients = _backward(gradient.float(), query.float(), key.float(), value.float(), bias, causal, scale)
        own = [made.to(of.dtype) for made, of in zip(gradients, (query, key, value), strict=True)]
        return (*own, None) if efficient else tuple(own)
    query, key, value = args[:3]
    bias = args[3] if efficient else None
    given = args[6:7] if efficient else args[4:5]
    causal = given[0] if given else kwargs.get("is_causal", False)
    key_heads, value_heads = _for_each_head(query, key), _for_each_head(query, value)
    result = _probabilities(query.float(), key_heads.float(), bias, causal, scale) @ value_heads.float()
    result, seed = result.to(query.dtype), torch.zeros((), dtype=torch.int64)
    if efficient:
        padded = -(-query.shape[2] // 32) * 32
        return result, torch.zeros(*query.shape[:2], padded), seed, seed.clone()
    lengths = query.shape[2], key.shape[2]
    return (result, torch.zeros(query.shape[:3]), None, None, *lengths, seed, seed.clone(), torch.zeros(0))


def _for_each_head(query: Tensor, shared: Tensor) -> Tensor:
    return shared.repeat_interleave(query.shape[1] // shared.shape[1], 1)


def _probabilities(query: Tensor, key: Tensor, bias: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    scores = query @ key.mT * _scale(query, scale)
    if causal:
        scores = scores.masked_fill(~torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(), -math.inf)
    if bias is not None:
        scores = scores + bias
    return scores.softmax(-1).nan_to_num(0.0)  # a row that sees nothing gives nothing, as in torch


def _scale(query: Tensor, scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if scale is None else scale


def _backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, all in float32."""
    heads, repeat = key.shape[1], query.shape[1] // key.shape[1]
    key, value = _for_each_head(query, key), _for_each_head(query, value)
    probabilities = _probabilities(query, key, bias, causal, scale)
    of_value, of_probabilities = probabilities.mT @ gradient, gradient @ value.mT
    inner = of_probabilities - (of_probabilities * probabilities).sum(-1, keepdim=True)
    of_scores = probabilities * inner * _scale(query, scale)
    of_query, of_key = of_scores @ key, of_scores.mT @ query
    return of_query, *(part.unflatten(1, (heads, repeat)).sum(2) for part in (of_key, of_value))


# What kernels take for a moment

_GEMM_ROWS = 512
"""Rows beyond which bitsandbytes makes a 4-bit weight whole for a product."""


def take_scratch(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Counts what the real kernel of this operation takes beside its arguments and results."""
    card = current()
    if name == "bitsandbytes::gemm_4bit":
        inputs, shape = args[0], args[2]
        if inputs.numel() // inputs.shape[-1] > _GEMM_ROWS:
            scales = args[7] if len(args) > 7 else kwargs.get("absmax_8bit")
            nested = 0 if scales is None else 8 * scales.numel()
            card.take_for_a_moment(shape[0] * shape[1] * inputs.element_size() + nested)
            card.counts["launches"] += 3
    elif name == "aten::_scaled_dot_product_flash_attention_backward":
        query, key = args[1], args[2]
        rows, heads, length, width = query.shape
        summed = 4 * rows * heads * -(-length // 128) * 128 * width
        repeated = 2 * rows * heads * key.shape[2] * width * query.element_size() if heads != key.shape[1] else 0
        card.take_for_a_moment(summed + repeated)
    elif name == "aten::_scaled_dot_product_efficient_attention_backward":
        card.take_for_a_moment(4 * args[1].numel())
