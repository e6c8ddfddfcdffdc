"""What torch, bitsandbytes and TRL ask of a GPU, and their answers; `imitated` puts them in place."""

import contextlib
import gc
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import bitsandbytes as bnb
import bitsandbytes.functional
import torch
import trl.kernels.chunked_logprob as chunked
import trl.trainer.utils

from perce_lite.evaluation.bench.imitation import functions
from perce_lite.evaluation.bench.imitation.card import Card, current, put_in
from perce_lite.evaluation.bench.imitation.tensors import CUDA, CardTensor, MadeOnCard, is_card
from perce_lite.model import compat

Patch = contextlib.AbstractContextManager[Any]


_WHOLE_ON_CUDA = ("silu_backward",)
"""Operations that are one kernel on CUDA, and that torch takes apart for devices that it has no kernel for."""


@contextlib.contextmanager
def imitated(**options: Any) -> Iterator[Card]:
    """Inside, torch sees a GPU; options: of `Card`."""
    before, card = current(), Card(**options)
    put_in(card)
    gc.freeze()  # trainers collect garbage often, and would go through every object of the test-suite each time
    try:
        with contextlib.ExitStack() as stack:
            for patches in (_of_cuda, _of_torch, _of_bitsandbytes, _of_trl):
                for patch in patches(card):
                    stack.enter_context(patch)
            library = stack.enter_context(torch.library._scoped_library("aten", "IMPL"))
            for name in _WHOLE_ON_CUDA:
                library.impl(name, torch.library.fallthrough_kernel, "AutogradLazy")
            stack.enter_context(MadeOnCard())
            yield card
    finally:
        gc.unfreeze()
        functions.casts.clear()
        put_in(before)


# torch.cuda


class Event:
    """An event of a stream: over at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, *args: Any) -> "Event":
        return self

    def wait(self, *args: Any) -> None:
        pass

    def synchronize(self) -> None:
        current().synchronise("event")

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: "Event") -> float:
        return 1.0


class Stream:
    """A stream: its work is done when it is given."""

    device = CUDA

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def is_capturing(self) -> bool:
        return False

    def record_event(self, *args: Any) -> Event:
        return Event()

    def wait_event(self, event: Event) -> None:
        pass

    def wait_stream(self, stream: "Stream") -> None:
        pass

    def synchronize(self) -> None:
        current().synchronise("stream")

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *error: object) -> None:
        pass


_STREAM = Stream()

_RANDOM: dict[str, Callable[..., Any]] = {
    "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
    "set_rng_state": lambda state, device=None: None,
    "get_rng_state_all": lambda: [torch.zeros(16, dtype=torch.uint8)],
    "set_rng_state_all": lambda states: None,
    "manual_seed": lambda seed: None,
    "manual_seed_all": lambda seed: None,
}
"""The card draws from the CPU's generator, which torch seeds and saves by itself."""


def _of_cuda(card: Card) -> Iterator[Patch]:
    major, minor = card.capability
    properties = types.SimpleNamespace(
        name=card.name, total_memory=card.memory, major=major, minor=minor, multi_processor_count=28, gcnArchName=""
    )
    answers: dict[str, Callable[..., Any]] = {
        **_RANDOM,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_capability": lambda device=None: card.capability,
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: card.name,
        "is_bf16_supported": lambda *args, **kwargs: major >= 8,
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda device=None: card.synchronise("torch.cuda.synchronize"),
        "empty_cache": lambda: card.counts.update(["empty_cache"]),
        "ipc_collect": lambda: None,
        "memory_allocated": lambda device=None: card.allocated,
        "max_memory_allocated": lambda device=None: card.peak,
        "memory_reserved": lambda device=None: card.peak,
        "max_memory_reserved": lambda device=None: card.peak,
        "mem_get_info": lambda device=None: (card.memory - card.allocated, card.memory),
        "reset_peak_memory_stats": lambda device=None: setattr(card, "peak", card.allocated),
        "current_stream": lambda device=None: _STREAM,
        "default_stream": lambda device=None: _STREAM,
        "stream": lambda stream: contextlib.nullcontext(),
        "Stream": Stream,
        "Event": Event,
    }
    yield from (mock.patch.object(torch.cuda, name, answer) for name, answer in answers.items())
    yield from (mock.patch.object(torch.cuda.random, name, answer) for name, answer in _RANDOM.items())
    yield mock.patch.object(torch.cuda.memory, "mem_get_info", answers["mem_get_info"])
    yield mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False)
    yield mock.patch.object(torch.version, "cuda", "13.0")


# torch


def _of_torch(card: Card) -> Iterator[Patch]:
    torch.utils._device._device_constructors()  # torch keeps these functions: as they are without our patches
    accelerator: dict[str, Callable[..., Any]] = {
        "current_accelerator": lambda *args, **kwargs: torch.device("cuda"),
        "is_available": lambda: True,
        "current_stream": lambda device=None: _STREAM,
        "current_device_index": lambda: 0,
    }
    yield from (mock.patch.object(torch.accelerator, name, answer) for name, answer in accelerator.items())
    asked, clear, cpu = torch.is_autocast_enabled, torch.clear_autocast_cache, torch.Tensor.cpu

    def clear_casts() -> None:
        functions.casts.clear()
        clear()

    yield mock.patch.object(torch, "is_autocast_enabled", lambda device="cuda": asked(device))
    yield mock.patch.object(torch, "clear_autocast_cache", clear_casts)
    yield mock.patch.object(torch, "empty", _never_pinned(torch.empty))
    yield mock.patch.object(torch, "empty_like", _never_pinned(torch.empty_like))
    yield mock.patch.object(torch, "tensor", _tensor(torch.tensor))
    yield mock.patch.object(torch.Tensor, "to", functions.to(torch.Tensor.to))
    yield mock.patch.object(torch.Tensor, "cuda", lambda self, *args, **kwargs: self.to(CUDA))
    yield mock.patch.object(
        torch.Tensor, "cpu", lambda self, *args, **kwargs: self.to("cpu") if isinstance(self, CardTensor) else cpu(self)
    )
    yield mock.patch.object(torch.Tensor, "pin_memory", lambda self, *args, **kwargs: self)
    yield mock.patch("torch.utils.data._utils.pin_memory.pin_memory", lambda data, device=None: data)
    yield mock.patch.object(torch._C, "_storage_Use_Count", return_value=1)
    if card.shapes:
        yield mock.patch.object(torch.amp.GradScaler, "_maybe_opt_step", _step_of_a_scaler)


def _step_of_a_scaler(scaler: Any, optimizer: Any, state: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """A scaler's step without an overflow, which gradients without values cannot show; the host asks all the same."""
    for overflows in state["found_inf_per_device"].values():
        overflows.item()
    return optimizer.step(*args, **kwargs)


def _never_pinned(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, pin_memory=False, **kwargs: original(*args, **kwargs)


def _tensor(original: Callable[..., Any]) -> Callable[..., Any]:
    def tensor(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        made = original(*args, device=None if is_card(device) else device, **kwargs)
        return made.to(CUDA) if is_card(device) else made

    return tensor


# bitsandbytes


class Params4bit(CardTensor, bnb.nn.Params4bit):
    """bitsandbytes' parameter on the card."""

    bnb_quantized: bool
    module: Any

    def to(self, *args: Any, **kwargs: Any) -> Any:
        device, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if not self.bnb_quantized:
            return self._quantized()
        if device is not None and not is_card(device):
            raise NotImplementedError("a 4-bit weight is moved off the card")
        return self

    def _quantized(self) -> "Params4bit":
        names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        packed, state = bnb.functional.quantize_4bit(self.detach(), **{name: getattr(self, name) for name in names})
        made = params_4bit(packed, {**vars(self), "quant_state": state, "bnb_quantized": True})
        if self.module is not None:
            self.module.quant_state = state
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            memo[id(self)] = params_4bit(self.detach().clone(), vars(self))
        return memo[id(self)]


def params_4bit(tensor: Any, attributes: Mapping[str, Any]) -> Params4bit:
    """A parameter over what `tensor` holds, with bitsandbytes' attributes."""
    made = Params4bit(tensor.inner)
    made.__dict__.update({name: value for name, value in attributes.items() if name != "inner"})
    made._is_param = True
    return made


def _new_params_4bit(original: Callable[..., Any]) -> Callable[..., Any]:
    def new(
        cls: type,
        data: torch.Tensor | None = None,
        requires_grad: bool = False,
        quant_state: Any = None,
        blocksize: int | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        module: Any = None,
        bnb_quantized: bool = False,
        **kwargs: Any,
    ) -> Any:
        options = {
            "quant_state": quant_state,
            "blocksize": blocksize,
            "compress_statistics": compress_statistics,
            "quant_type": quant_type,
            "quant_storage": quant_storage,
            "module": module,
            "bnb_quantized": bnb_quantized,
        }
        if isinstance(data, CardTensor):
            return params_4bit(data, {**options, "blocksize": blocksize or 64})
        return original(cls, data, requires_grad, **options, **kwargs)

    return new


def _of_bitsandbytes(card: Card) -> Iterator[Patch]:
    def paged(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device) -> torch.Tensor:
        state: Any = torch.zeros(*shape, dtype=dtype)
        state.is_paged, state.page_deviceid = True, device.index
        card.managed += state.nbytes
        return state

    yield mock.patch.dict(bnb.functional.name2qmap, clear=True)  # tables that are made once, of another card perhaps
    yield mock.patch.object(bnb.functional, "get_paged", paged)
    yield mock.patch.object(bnb.functional, "fill", lambda tensor, value, device=None, prefetch=True: tensor.zero_())
    yield mock.patch.object(bnb.functional, "prefetch_tensor", return_value=None)
    made = bnb.nn.Params4bit.__new__
    yield mock.patch.object(bnb.nn.Params4bit, "__new__", staticmethod(_new_params_4bit(made)))


# TRL


def _of_trl(card: Card) -> Iterator[Patch]:
    """Its Triton kernels: counted, and done in torch where there are values."""

    def use_triton(device: Any) -> bool:
        return card.triton and torch.device(device).type == "cuda"

    yield mock.patch.object(trl.trainer.utils, "_use_triton", use_triton)
    yield mock.patch.object(compat, "_use_triton", use_triton)
    yield mock.patch.object(chunked, "_use_triton", return_value=False)  # a CUDA build has Triton, which needs a GPU
    for name in ("_forward_tile", "_backward_tile") if card.triton else ():
        tile = _counted_only if card.shapes else _as_one_kernel(vars(chunked)[name])
        yield mock.patch.object(chunked, name, tile)


def _counted_only(*args: Any, **kwargs: Any) -> None:
    current().counts["launches"] += 1


def _as_one_kernel(original: Callable[..., None]) -> Callable[..., None]:
    """What torch takes for a while in the place of a Triton kernel is no memory of the card."""

    def kernel(*args: Any, **kwargs: Any) -> None:
        card = current()
        peak, launches = card.peak, card.counts["launches"]
        original(*args, **kwargs)
        card.peak, card.counts["launches"] = peak, launches + 1

    return kernel
