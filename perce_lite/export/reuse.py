"""What many exports share, such as a base: made once for all of them inside `kept`, for each one otherwise."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

Thing = TypeVar("Thing")

_open: ContextVar[tuple[ExitStack, dict[str, Any]] | None] = ContextVar("kept", default=None)


@contextmanager
def kept() -> Iterator[None]:
    """Keeps what `reused` makes in the block, and closes it at the block's end."""
    with ExitStack() as stack:
        before = _open.set((stack, {}))
        try:
            yield
        finally:
            _open.reset(before)


@contextmanager
def reused(key: str, make: Callable[[], AbstractContextManager[Thing]]) -> Iterator[Thing]:
    """What `make` gives: inside `kept` one for each key, otherwise for this block alone."""
    held = _open.get()
    if held is None:
        with make() as thing:
            yield thing
        return
    stack, known = held
    if key not in known:
        known[key] = stack.enter_context(make())
    yield known[key]
