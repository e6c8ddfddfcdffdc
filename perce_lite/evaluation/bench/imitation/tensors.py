"""Tensors that say they are on cuda:0, and every operation of torch's dispatcher over them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from perce_lite.evaluation.bench.imitation import fused, shapes
from perce_lite.evaluation.bench.imitation.card import current, place_in_code
from perce_lite.evaluation.bench.imitation.nesting import each, mapped, name_of

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)


class DeviceMismatchError(RuntimeError):
    """Tensors of two devices in one operation, which a GPU refuses and a CPU never sees."""


class CardTensor(torch.Tensor):
    """A tensor on the card; `inner` is what holds its values or its shape."""

    inner: Any  # a tensor; in C++ a product of vectors has this name

    @staticmethod
    def __new__(cls: type, inner: torch.Tensor) -> "CardTensor":
        current().hold(inner)
        made: CardTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device("lazy"),
            requires_grad=False,
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from perce_lite.evaluation.bench.imitation.functions import call  # it needs this class

        return call(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return operate(func, args, kwargs or {})

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, new: torch.Tensor) -> None:
        if not isinstance(new, CardTensor):
            raise DeviceMismatchError(f".data of a tensor on the card set to one on {new.device}: it leaves the card")
        torch.Tensor.data.__set__(self, new)  # type: ignore[attr-defined]
        self.inner = new.inner

    # What C++ would read from memory

    def tolist(self) -> Any:
        current().synchronise("tolist")
        return shapes.values(self.inner).tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy()

    def data_ptr(self) -> Any:
        return current().address(self.inner.untyped_storage()) + self.inner.storage_offset() * self.inner.element_size()

    def untyped_storage(self) -> "StorageView":  # type: ignore[override]
        return StorageView(self.inner.untyped_storage())

    def get_device(self) -> Any:
        return 0

    def pin_memory(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")

    def record_stream(self, stream: Any) -> None:
        pass

    def type(self, *args: Any, **kwargs: Any) -> Any:
        return super().type(*args, **kwargs) if args or kwargs else f"torch.cuda.{self.dtype}"

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"CardTensor({tuple(self.shape)}, {self.dtype}, cuda:0)"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            made = self.detach().clone().requires_grad_(self.requires_grad)
            vars(made).update({name: value for name, value in vars(self).items() if name != "inner"})
            memo[id(self)] = made
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        made = shapes.values(self.inner).clone()
        if getattr(self, "_is_param", False):
            made = torch.nn.Parameter(made, requires_grad=self.requires_grad)
        return made.__reduce_ex__(protocol)


class StorageView:
    """A storage on the card as Python sees it; while it lives, so does the storage."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self._storage = storage
        self._cdata = storage._cdata

    def data_ptr(self) -> Any:
        return current().address(self._storage)

    def nbytes(self) -> int:
        return self._storage.nbytes()

    size = __len__ = nbytes


class MadeOnCard(TorchDispatchMode):
    """Catches what has no tensor of the card among its arguments: what is made there, or brought there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return operate(func, args, kwargs or {})


# The dispatcher

_BOTH_DEVICES = {
    "aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put",
    "aten::set_", "aten::lift_fresh",
}  # fmt: skip
"""Operations that a GPU too takes with tensors of both devices."""

_READ_BY_HOST = {"aten::nonzero", "aten::_local_scalar_dense", "aten::masked_select", "aten::equal", "aten::is_nonzero"}

_NOT_INITIALISED = {"aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided"}
"""Operations whose result holds whatever lay there before: here NaN, so that a read ahead of a write shows."""

_NO_KERNEL = {
    "view", "_unsafe_view", "t", "transpose", "expand", "slice", "select", "unsqueeze", "squeeze", "permute", "chunk",
    "as_strided", "detach", "alias", "split", "split_with_sizes", "unbind", "empty", "empty_like", "new_empty",
    "empty_strided", "lift_fresh", "diagonal", "view_as_real", "unfold", "_reshape_alias", "narrow",
}  # fmt: skip


def is_card(device: Any) -> bool:
    """Whether `device`, in any form that torch takes, is the card."""
    return device is not None and torch.device(device).type in ("cuda", "lazy")


def operate(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One operation, whatever its tensors are."""
    name, device = name_of(func), kwargs.get("device")
    tensors = [value for value in each((args, kwargs)) if isinstance(value, torch.Tensor)]
    on_card = [tensor for tensor in tensors if isinstance(tensor, CardTensor)]
    if not on_card and not is_card(device):
        return func(*args, **kwargs)
    if on_card and len(on_card) < len(tensors):
        _require_one_device(name, tensors)
    if name == "aten::_to_copy":
        return _copied_to(func, args[0], kwargs)
    if name == "aten::copy_" and len(on_card) < len(tensors):
        return _copied_into(*args[:2])
    _count(name, args)
    out = _computed(func, args, kwargs, on_card)
    fused.take_scratch(name, args, kwargs)
    return out


def _require_one_device(name: str, tensors: Sequence[torch.Tensor]) -> None:
    """Raises DeviceMismatchError; numbers of the CPU (no dimensions) and paged state may join, as on a GPU."""
    others = [tensor for tensor in tensors if not isinstance(tensor, CardTensor)]
    if any(tensor.device.type == "meta" for tensor in others):
        raise DeviceMismatchError(f"{name}: a tensor of meta meets one on the card, at {place_in_code()}")
    if all(tensor.dim() == 0 or "is_paged" in vars(tensor) for tensor in others) or name in _BOTH_DEVICES:
        return
    where = [(tuple(tensor.shape), str(tensor.device)) for tensor in tensors]
    raise DeviceMismatchError(
        f"{name}: Expected all tensors to be on the same device, but got {where} at {place_in_code()}"
    )


def _count(name: str, args: tuple[Any, ...]) -> None:
    """Counts a kernel, and a synchronisation where the host has to know a value."""
    card, short = current(), name.split("::")[-1]
    if short not in _NO_KERNEL:
        card.counts["launches"] += 1
    if name in _READ_BY_HOST:
        card.synchronise(short)
    masks = (torch.bool, torch.uint8)
    if name in shapes.INDEXING and any(index is not None and index.dtype in masks for index in args[1]):
        card.synchronise(f"{short} by a boolean mask")


def _computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], on_card: Sequence[CardTensor]) -> Any:
    """The operation over what the tensors hold; its results are on the card unless it names another device.

    on_card: the tensors of the card among the arguments
    """
    device = kwargs.get("device")
    if "pin_memory" in kwargs:
        kwargs = {**kwargs, "pin_memory": None}
    if not current().shapes and any(value.inner.is_meta for value in on_card):
        raise DeviceMismatchError(f"{func}: a tensor of another card, which has a shape alone, at {place_in_code()}")
    inner_args, inner_kwargs = mapped(_inner, args), mapped(_inner, kwargs)
    if current().shapes:
        out = shapes.compute(func, inner_args, inner_kwargs, on_host=device is not None and not is_card(device))
    else:
        out = _with_values(func, inner_args, inner_kwargs)
    # Operations in place, and those with `out=`, give back what they were given.
    given = {id(value.inner): value for value in on_card}

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in given:
            return given[id(value)]
        return CardTensor(value) if device is None or is_card(device) else value

    return mapped(wrapped, out)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, CardTensor) else value


def _with_values(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    name = name_of(func)
    if kwargs.get("device") is not None:
        kwargs["device"] = "cpu"
    if name.startswith("aten::_scaled_dot_product_"):
        return fused.attention_values(name, args, kwargs)
    if fused.is_mixed_addmm(func, kwargs):
        summed = args[0] + args[1].float() @ args[2].float()
        return summed if kwargs.get("out") is None else kwargs["out"].copy_(summed)
    made = func(*args, **kwargs)
    if name in _NOT_INITIALISED and made.is_floating_point():
        made.fill_(math.nan)
    return made


# Copies between devices, and casts


def _copied_into(target: torch.Tensor, source: Any) -> torch.Tensor:
    """`copy_` from one device to the other."""
    card = current()
    card.counts["launches"] += 1
    if isinstance(target, CardTensor):
        card.counts["copies to the card"] += 1
        if target.inner.device.type != "meta":
            target.inner.copy_(source)
        return target
    card.synchronise("copy to the host")
    if source.inner.is_meta:  # ones to the host
        return target.copy_(torch.ones((), dtype=target.dtype).expand(source.shape))
    return target.copy_(source.inner)


def _copied_to(func: Any, source: torch.Tensor, kwargs: Mapping[str, Any]) -> torch.Tensor:
    """`_to_copy`: to another dtype, another device, or both."""
    card, device = current(), kwargs.get("device")
    card.counts["launches"] += 1
    options = {name: value for name, value in kwargs.items() if name not in ("device", "pin_memory", "non_blocking")}
    if not isinstance(source, CardTensor):
        return _brought_to_card(func, source, options)
    if device is None or is_card(device):
        return CardTensor(func(source.inner, **options))
    if torch.device(device).type == "meta":
        return func(source.inner, **options, device="meta")
    card.counts["copies to the host"] += 1
    if not kwargs.get("non_blocking"):
        card.synchronise("copy to the host")
    return func(shapes.values(source.inner), **options)


def _brought_to_card(func: Any, source: torch.Tensor, options: dict[str, Any]) -> CardTensor:
    current().counts["copies to the card"] += 1
    made = func(source, **options)
    if made.untyped_storage()._cdata == source.untyped_storage()._cdata:
        made = made.clone()
    if current().shapes and made.is_floating_point():
        made = shapes.blank(made)
    return CardTensor(made)
