"""Grouped-query attention where torch's fused kernels do not take it: keys and values are repeated for every head.

From compute capability 8.0 on, in half precision, torch's flash attention takes keys and values that several heads
share. On older GPUs and in float32 it would fall back to plain mathematics, which builds the scores of all pairs of
tokens in float32: 6.4 instead of 1.0 GiB for Qwen3-4B and 4,096 tokens. Its memory-efficient kernel runs there as well
once every head has keys and values of its own.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from perce_lite.model.compat import attention_function, attention_implementation, register_attention

NAME = "perce_lite_repeated"
"""The implementation's name in transformers' registry."""


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention of a layer: query (B, heads, T, d); key, value (B, shared heads, T, d). As transformers' "sdpa"."""
    heads = query.shape[1] // key.shape[1]
    # transformers' function repeats, or asks torch to, where the module says so; this one says nothing of groups.
    every_head = SimpleNamespace(is_causal=vars(module).get("is_causal", True))
    repeated = (tensor.repeat_interleave(heads, 1) if heads > 1 else tensor for tensor in (key, value))
    return attention_function("sdpa", module)(every_head, query, *repeated, attention_mask, **options)


register_attention(NAME, "sdpa", attend)


def repeat_heads_where_needed(base: PreTrainedModel, autocast: torch.dtype | None) -> None:
    """Lets `base` compute attention by a fused kernel on every GPU; on a CPU nothing changes.

    autocast: the dtype that its forwards run in; None: float32
    """
    if base.device.type != "cuda" or attention_implementation(base) != "sdpa":
        return
    if not fused_attention_shares_heads(torch.cuda.get_device_capability(base.device)[0] >= 8, autocast):
        base.set_attn_implementation(NAME)


def fused_attention_shares_heads(bf16: bool, dtype: torch.dtype | None) -> bool:
    """Whether torch's fused attention takes keys and values that several heads share.

    bf16: whether the GPU computes in bf16, as those from compute capability 8.0 on do
    """
    return bf16 and dtype in (torch.float16, torch.bfloat16)
