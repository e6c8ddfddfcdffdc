"""Torch functions over the card's tensors: autocast, the choice of attention's kernel, backward, moves."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from perce_lite.evaluation.bench.imitation.card import current
from perce_lite.evaluation.bench.imitation.nesting import mapped
from perce_lite.evaluation.bench.imitation.tensors import CUDA, CardTensor, is_card, operate

aten = torch.ops.aten

_IN_LOWER_PRECISION = {
    functional.linear, torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum,
    torch.Tensor.__matmul__, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.bmm, torch.Tensor.__rmatmul__,
    functional.scaled_dot_product_attention, torch.Tensor.addmm,
}  # fmt: skip
"""Of the functions that autocast runs in its dtype, those that language models call."""

_IN_FLOAT32 = {
    torch.exp, torch.Tensor.exp, torch.log, torch.Tensor.log, torch.pow, torch.Tensor.pow, torch.Tensor.__pow__,
    torch.rsqrt, torch.softmax, torch.Tensor.softmax, functional.softmax, torch.log_softmax, functional.log_softmax,
    torch.logsumexp, torch.cumsum, torch.Tensor.cumsum, torch.sum, torch.Tensor.sum, torch.prod, torch.Tensor.prod,
    functional.layer_norm, torch.norm, torch.Tensor.norm,
}  # fmt: skip
"""Of the functions that autocast runs in float32, those that language models call."""

casts: dict[int, tuple[Tensor, Tensor]] = {}
"""Autocast's copies of float32 leaves in its dtype, kept until the outermost context ends; by the leaf's id."""


def call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A torch function with a tensor of the card among its arguments."""
    # Torch would run a whole backward with our functions switched off, and with it what checkpoints compute again.
    if func in (torch.Tensor.backward, torch.autograd.backward):
        return _backward(*args, **kwargs)
    if func is torch.autograd.grad:
        return _grad(*args, **kwargs)
    with torch._C.DisableTorchFunctionSubclass():
        if torch.is_autocast_enabled("cuda"):
            args, kwargs = _as_autocast_takes(func, args, kwargs)
        if func is functional.scaled_dot_product_attention:
            return attention(*args, **kwargs)
        return args[0] if func is torch.as_tensor else func(*args, **kwargs)


# Autocast


def _as_autocast_takes(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if func in _IN_LOWER_PRECISION:
        dtype = torch.get_autocast_dtype("cuda")
        return mapped(lambda value: _lower(value, dtype), args), mapped(lambda value: _lower(value, dtype), kwargs)
    if func in _IN_FLOAT32 and kwargs.get("dtype") is None:
        return mapped(_float32, args), mapped(_float32, kwargs)
    return args, kwargs


def _float32(value: Any) -> Any:
    half = isinstance(value, CardTensor) and value.dtype in (torch.float16, torch.bfloat16)
    return aten._to_copy(value, dtype=torch.float32) if half else value


def _lower(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, CardTensor) or not value.is_floating_point() or value.dtype in (dtype, torch.float64):
        return value
    is_weight = value.requires_grad and value.is_leaf and value.dtype == torch.float32
    if not (is_weight and torch.is_autocast_cache_enabled()):
        return aten._to_copy(value, dtype=dtype)
    if id(value) not in casts:
        casts[id(value)] = value, aten._to_copy(value, dtype=dtype)
    return casts[id(value)][1]


# Backward


def _as_tuple(tensors: Any) -> tuple[Tensor, ...]:
    return (tensors,) if isinstance(tensors, Tensor) else tuple(tensors or ())


def _backward(
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
    gradient: Any = None,
    **kwargs: Any,
) -> None:
    tensors, gradients = _as_tuple(tensors), _as_tuple(grad_tensors if gradient is None else gradient)
    with torch._C.DisableTorchFunctionSubclass():
        gradients = gradients or tuple(torch.ones_like(tensor) for tensor in tensors)
    keep = bool(retain_graph or create_graph)
    _run_engine(tensors, gradients, keep, create_graph, _as_tuple(inputs), True, accumulate_grad=True)


def _grad(
    outputs: Any,
    inputs: Any,
    grad_outputs: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    *,
    allow_unused: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor | None, ...]:
    unused = bool(allow_unused)
    gradients, inputs = _as_tuple(grad_outputs), _as_tuple(inputs)
    return _run_engine(
        _as_tuple(outputs), gradients, bool(retain_graph), create_graph, inputs, unused, accumulate_grad=False
    )


def _run_engine(*args: Any, accumulate_grad: bool) -> Any:
    return torch.autograd.Variable._execution_engine.run_backward(*args, accumulate_grad=accumulate_grad)


# Attention


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` with the kernel that torch takes on such a GPU, which is counted by name.

    Flash where it can be, else the memory-efficient one, else plain mathematics (sdp_utils.cpp of torch 2.13).
    """
    counts, kernel = current().counts, _kernel(query, key, attn_mask, is_causal, enable_gqa)
    counts[f"attention: {kernel}{'' if attn_mask is None else ' with a mask'}"] += 1
    if kernel == "flash":
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    if kernel == "memory-efficient":
        bias = None if attn_mask is None else _bias(attn_mask, query, key)
        backward = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, backward, dropout_p, is_causal, scale=scale
        )[0]
    return _plain_attention(query, key, value, attn_mask, is_causal, scale)


def _kernel(query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool, enable_gqa: bool) -> str:
    half, major = query.dtype in (torch.float16, torch.bfloat16), current().capability[0]
    same_heads, width = query.shape[1] == key.shape[1], query.shape[-1]
    square = not (is_causal and query.shape[2] != key.shape[2])
    if attn_mask is None and major >= 8 and half and width <= 256 and (same_heads or enable_gqa) and square:
        return "flash"
    computed = major >= 8 or query.dtype in (torch.float16, torch.float32)
    return "memory-efficient" if same_heads and computed and width % _alignment(query) == 0 else "plain mathematics"


def _alignment(query: Tensor) -> int:
    return 4 if query.dtype == torch.float32 else 8


def _bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """What the memory-efficient kernel adds to the scores: in the dtype of the query, its rows aligned."""
    bias = _added(mask, query.dtype)
    width, alignment = bias.shape[-1], _alignment(query)
    if width % alignment:
        bias = functional.pad(bias, (0, alignment - width % alignment))[..., :width]
    return bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What a mask adds to the scores."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -math.inf) if mask.dtype == torch.bool else mask


def _plain_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    """Torch's plain mathematics: scores of all pairs, in float32, and every step kept for the backward."""
    dtype, repeat = query.dtype, query.shape[1] // key.shape[1]
    if repeat > 1:
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    with torch.autocast("cuda", enabled=False):
        query, key, value = query.float(), key.float(), value.float()
        factor = math.sqrt(scale if scale is not None else query.shape[-1] ** -0.5)
        scores = (query * factor) @ (key * factor).mT
        if is_causal:
            seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
            scores = scores + _added(seen, scores.dtype)
        if attn_mask is not None:
            scores = scores + _added(attn_mask, scores.dtype)
        return (torch._safe_softmax(scores, -1) @ value).to(dtype)


# Moves


def to(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`Tensor.to` that also moves to the card and away from it."""

    def moved(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        asked = {name: value for name, value in kwargs.items() if name not in ("copy", "memory_format")}
        places = args
        if args and isinstance(args[0], Tensor):
            asked, places = {"device": args[0].device, "dtype": args[0].dtype}, ()
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*places, **asked)
        on_card, wanted = isinstance(self, CardTensor), is_card(device)
        if not on_card and not wanted:
            return original(self, *args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            if not on_card:
                options = {"device": CUDA, "dtype": dtype, "non_blocking": non_blocking}
                made = operate(aten._to_copy.default, (self.detach(),), options)
                return made.requires_grad_(self.requires_grad)
            if device is None or wanted:
                return self if dtype in (None, self.dtype) else aten._to_copy(self, dtype=dtype)
            return aten._to_copy(self, device=device, dtype=dtype, non_blocking=non_blocking)

    return moved
