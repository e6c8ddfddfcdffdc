"""One answer at a time: a queue with an end, and one thread that computes."""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from perce_lite.serve.wire import RequestError

T = TypeVar("T")


class Desk:
    """Gives turns in the order of asking.

    max_queue: who may wait, beside the one who is served; patience: seconds that one waits at the most
    """

    def __init__(self, max_queue: int, patience: float) -> None:
        self.max_queue, self.patience = max_queue, patience
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="answers")
        self._line: deque[asyncio.Future[None]] = deque()
        self._busy = self._closed = False

    @property
    def waiting(self) -> int:
        """How many wait for their turn."""
        return len(self._line)

    @property
    def busy(self) -> bool:
        """Whether an answer is under way."""
        return self._busy

    async def start(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """Waits for the turn, then runs `work` in the thread; the turn ends when `work` does, whoever still listens.

        Raises:
            RequestError: 429 where the queue is full, 503 where patience is out or the server stops.
        """
        await self._turn()
        loop = asyncio.get_running_loop()
        done: Future[T] = self._thread.submit(work)
        done.add_done_callback(lambda _: in_loop(loop, self._next))
        awaited = asyncio.wrap_future(done)
        awaited.add_done_callback(lambda future: future.cancelled() or future.exception())  # somebody may be gone
        return awaited

    def close(self) -> None:
        """Sends away who waits, and lets nobody in any more; the answer under way ends as it would have."""
        self._closed = True
        while self._line:
            place = self._line.popleft()
            if not place.done():
                place.set_exception(_closing())

    async def _turn(self) -> None:
        if self._closed:
            raise _closing()
        if not self._busy:
            self._busy = True
            return
        if len(self._line) >= self.max_queue:
            raise RequestError(
                429, "queue_full", f"One answer is made at a time, and {len(self._line)} wait already. Try again later."
            )
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line.append(place)
        try:
            async with asyncio.timeout(self.patience):
                await place
        except TimeoutError as error:
            self._leave(place)
            raise RequestError(
                503, "timeout", f"It was not your turn within {self.patience:g} seconds. Try again later."
            ) from error
        except asyncio.CancelledError:
            self._leave(place)
            raise

    def _leave(self, place: "asyncio.Future[None]") -> None:
        """Gives up a place in the line, or the turn if it came at this very moment."""
        if place in self._line:
            self._line.remove(place)
        elif place.done() and not place.cancelled() and place.exception() is None:
            self._next()

    def _next(self) -> None:
        while self._line:
            place = self._line.popleft()
            if not place.done():
                place.set_result(None)
                return
        self._busy = False


def in_loop(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *arguments: object) -> None:
    """Calls a function in the loop's thread; a loop that a second Ctrl-C has closed has nobody to hear of it."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *arguments)


def _closing() -> RequestError:
    return RequestError(503, "shutting_down", "The server is being stopped.")
