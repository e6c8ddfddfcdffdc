"""A callback turned into an iterator: work that hands out items runs in a thread, and who iterates gets them."""

import contextvars
import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


class _Stopped(BaseException):
    """Raised in the work when nobody iterates any more. No Exception, so that no handler of errors takes it."""


def stream(work: Callable[[Callable[[Item | None], None]], None]) -> Iterator[Item]:
    """Yields what `work` hands to its argument, as it comes; an error of `work` is raised here.

    work: runs in a thread of its own, in a copy of the caller's context. Once the iterator is closed (a `break`,
        Ctrl-C), the next call of its argument ends it, and closing waits for that. None is not yielded: it is handed
        out by work that can be ended there.
    """
    items: queue.SimpleQueue[tuple[Item | None, BaseException | None]] = queue.SimpleQueue()
    stopped = threading.Event()

    def hand_out(item: Item | None) -> None:
        if stopped.is_set():
            raise _Stopped
        if item is not None:
            items.put((item, None))

    def run() -> None:
        error: BaseException = _Stopped()
        try:
            work(hand_out)
        except BaseException as raised:  # handed to whoever iterates
            error = raised
        items.put((None, error))

    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True)
    thread.start()
    try:
        while True:
            item, error = items.get()
            if isinstance(error, _Stopped):
                return
            if error is not None:
                raise error
            assert item is not None
            yield item
    finally:
        stopped.set()
        thread.join()
