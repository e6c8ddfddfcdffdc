"""Hashes of weights; what a frozen base was found to hash to, so that a fleet does not hash it several times a user."""

from collections.abc import Callable, Iterator, Sequence
from weakref import WeakKeyDictionary

import torch
import xxhash
from torch import nn

_known: "WeakKeyDictionary[nn.Module, dict[tuple[int, ...], str]]" = WeakKeyDictionary()


def hash_once(base: nn.Module) -> None:
    """From now on `models.fingerprint` hashes `base`, bare or with adapters on it, once for all.

    It is hashed anew where a weight was replaced or written to, as torch counts writes. For a base that nobody else
    writes to: a write through `.data` is not counted.
    """
    _known.setdefault(base, {})


def remembered(base: nn.Module, frozen: Sequence[torch.Tensor], compute: Callable[[], str]) -> str:
    """What `compute` gives for the weights `frozen` of `base`, or gave before, after `hash_once`."""
    known = _known.get(base)
    if known is None:
        return compute()
    as_they_are = tuple(number for parameter in frozen for number in _written(parameter))
    if as_they_are not in known:
        known.clear()
        known[as_they_are] = compute()
    return known[as_they_are]


def _written(parameter: torch.Tensor) -> Iterator[int]:
    """Numbers that change where a parameter, or the constants of its quantisation, are others or were written to."""
    quant_state = vars(parameter).get("quant_state")
    for one in [parameter] if quant_state is None else [parameter, quant_state.absmax]:
        yield from (id(one), one.data_ptr(), one._version)


def hash_parameter(state: xxhash.xxh3_128, name: str, parameter: torch.Tensor) -> None:
    """Adds a parameter to `state`, the constants of its quantisation included."""
    tensors = {name: parameter.data}
    quant_state = vars(parameter).get("quant_state")
    if quant_state is not None:
        tensors |= {f"{name}.{key}": value for key, value in quant_state.as_dict(packed=True).items()}
    for key, tensor in tensors.items():
        hash_tensor(state, key, tensor)


def hash_tensor(state: xxhash.xxh3_128, name: str, tensor: torch.Tensor) -> None:
    """Adds a tensor's name, dtype, shape and bytes to `state`."""
    flat = tensor.detach().cpu().contiguous()
    state.update(f"{name} {flat.dtype} {tuple(flat.shape)}".encode())
    state.update(flat.view(-1).view(torch.uint8).numpy().data)
