"""Operations where floating tensors have shapes alone; integers and booleans keep their values.

So masks, lengths and labels are real, and an 8B takes no memory. A float that the host reads is 1.
"""

from collections.abc import Sequence
from typing import Any

import torch

from perce_lite.evaluation.bench.imitation import fused
from perce_lite.evaluation.bench.imitation.nesting import each, mapped, name_of

_LARGE = 2**24  # elements; beyond, the ones of `values` share a place

_FLOATS_BY_DEFAULT = {"aten::empty", "aten::zeros", "aten::ones", "aten::randn", "aten::rand", "aten::empty_strided"}

_TRUE = {"aten::isfinite", "aten::eq", "aten::ne", "aten::ge", "aten::le"}
"""Comparisons of floats without values that are taken to be true; all others are false."""

INDEXING = {"aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_"}


def values(tensor: torch.Tensor) -> torch.Tensor:
    """What a tensor holds; ones where it has a shape alone."""
    if tensor.device.type != "meta":
        return tensor
    if tensor.numel() > _LARGE:
        return torch.ones(1, dtype=tensor.dtype).expand(tensor.shape)
    return torch.ones(tensor.shape, dtype=tensor.dtype)


def blank(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's shape alone."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def compute(func: Any, args: Sequence[Any], kwargs: dict[str, Any], on_host: bool) -> Any:
    """One operation.

    on_host: its result has room on the host, though it has no values
    """
    tensors = [value for value in each((args, kwargs)) if isinstance(value, torch.Tensor)]
    if not any(tensor.device.type == "meta" for tensor in tensors):
        return _over_values(func, args, kwargs, tensors)
    name = name_of(func)
    if name == "aten::_local_scalar_dense":
        return 1.0
    if name == "aten::nonzero":
        raise RuntimeError("nonzero of a tensor that has a shape alone")
    if name == "aten::masked_select":
        return torch.empty(int(args[1].expand(args[0].shape).sum()), dtype=args[0].dtype, device="meta")
    if fused.is_mixed_addmm(func, kwargs):
        return torch.empty_like(args[0], dtype=torch.float32) if kwargs.get("out") is None else kwargs["out"]
    if on_host:
        return torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
    if name in INDEXING:
        args = (args[0], _places(args[1]), *args[2:])
    if kwargs.get("device") is not None:
        kwargs["device"] = "meta"
    return _over_shapes(func, args, kwargs)


def _places(indices: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Indices with each boolean mask replaced by the places where it is true, which meta cannot count."""
    places: list[torch.Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            places += list(values(index).nonzero(as_tuple=True))
        else:
            places.append(index)
    return places


def _over_values(func: Any, args: Sequence[Any], kwargs: dict[str, Any], tensors: Sequence[torch.Tensor]) -> Any:
    """No tensor is blank; a floating result becomes so, save what was given."""
    dtype, name = kwargs.get("dtype"), name_of(func)
    makes_floats = name in _FLOATS_BY_DEFAULT if dtype is None else dtype.is_floating_point
    if kwargs.get("device") is not None:
        kwargs["device"] = "meta" if makes_floats and not tensors else "cpu"
    given = {id(tensor) for tensor in tensors}

    def without_values(value: Any) -> Any:
        made_here = isinstance(value, torch.Tensor) and id(value) not in given and value.device.type != "meta"
        return blank(value) if made_here and value.is_floating_point() else value

    return mapped(without_values, func(*args, **kwargs))


def _over_shapes(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Everything is done on meta; results that are no floats get values."""
    given = {}

    def without_values(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.device.type == "meta":
            return value
        shape = blank(value)
        given[id(shape)] = value
        return shape

    args, kwargs = mapped(without_values, args), mapped(without_values, kwargs)
    fill = torch.ones if name_of(func) in _TRUE else torch.zeros

    def solid(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in given:
            return given[id(value)]
        if value.is_floating_point() or value.dtype in (torch.uint8, torch.int8):  # bytes are 4-bit or 8-bit floats
            return value
        return fill(value.shape, dtype=value.dtype)

    return mapped(solid, func(*args, **kwargs))
