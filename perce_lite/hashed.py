"""What a frozen base was found to hash to, so that a fleet does not hash it several times a user."""

from collections.abc import Callable, Iterator, Sequence
from weakref import WeakKeyDictionary

from torch import nn

_known: "WeakKeyDictionary[nn.Module, dict[tuple[int, ...], str]]" = WeakKeyDictionary()


def hash_once(base: nn.Module) -> None:
    """From now on `models.fingerprint` hashes `base`, bare or with adapters on it, once for all.

    It is hashed anew where a weight was replaced or written to, as torch counts writes. For a base that nobody else
    writes to: a write through `.data` is not counted.
    """
    _known.setdefault(base, {})


def remembered(base: nn.Module, frozen: Sequence[nn.Parameter], compute: Callable[[], str]) -> str:
    """What `compute` gives for the weights `frozen` of `base`, or gave before, after `hash_once`."""
    known = _known.get(base)
    if known is None:
        return compute()
    as_they_are = tuple(number for parameter in frozen for number in _written(parameter))
    if as_they_are not in known:
        known.clear()
        known[as_they_are] = compute()
    return known[as_they_are]


def _written(parameter: nn.Parameter) -> Iterator[int]:
    """Numbers that change where a parameter, or the constants of its quantisation, are others or were written to."""
    quant_state = vars(parameter).get("quant_state")
    for one in [parameter] if quant_state is None else [parameter, quant_state.absmax]:
        yield from (id(one), one.data_ptr(), one._version)
