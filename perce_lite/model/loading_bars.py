"""Bars while a base is brought from the Hub, in MB, and while its weights are read and quantised.

What is small or done at once has none: both are for gigabytes.
"""

import io
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import Progress, TaskID
from tqdm.std import tqdm
from transformers.utils.logging import set_tqdm_hook

from perce_lite.console import progress_bar

_MB = 10**6

SMALL = 10 * _MB
"""Bytes of a file that is downloaded without a bar."""

AT_ONCE = 5.0
"""Seconds of reading weights before its bar appears."""


@contextmanager
def loading_bars(weights: Callable[[], int], quantised: bool) -> Iterator[dict[str, Any]]:
    """Inside, `from_pretrained` shows bars; gives the options that it needs for that.

    weights: counts the weights of the model; asked only if a bar appears
    """
    bars = progress_bar()
    what = "Reading and quantising weights" if quantised else "Reading weights"

    def reading(factory: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if options.get("desc") != "Loading weights" or not args:
            return factory(*args, **options)
        return _read(bars, what, weights, args[0])

    before = set_tqdm_hook(reading)
    try:
        yield {"tqdm_class": type("Download", (_Download,), {"bars": bars})}
    finally:
        set_tqdm_hook(before)
        bars.stop()


class _Download(tqdm):
    """What huggingface_hub takes for a bar of one file's bytes: tqdm counts, `bars` shows."""

    bars: Progress
    task: TaskID | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "disable": False, "file": io.StringIO()})

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Called when the count has changed, some ten times a second at the most."""
        if (self.total or 0) >= SMALL:
            if self.task is None:
                self.bars.start()
                name = str(self.desc).split(": ")[0].rpartition("/")[2]
                self.task = self.bars.add_task(f"Downloading {name}, MB", total=None, note="")
            self.bars.update(self.task, total=int(self.total) // _MB, completed=int(self.n) // _MB)
        return True

    def update_transfer(self, count: int) -> None:
        """Takes the bytes that came over the network; `update` counts those of the file. With it Xet makes one bar."""


def _read(bars: Progress, what: str, weights: Callable[[], int], tensors: Collection[Any]) -> Iterator[Any]:
    """`tensors` as they are, with a bar once they have taken `AT_ONCE`."""
    start, task = time.monotonic(), None
    for index, tensor in enumerate(tensors):
        yield tensor
        if task is None and time.monotonic() - start >= AT_ONCE:
            bars.start()
            task = bars.add_task(what, total=len(tensors), note=f"{weights() / 1e9:.2f} billion weights")
        if task is not None:
            bars.update(task, completed=index + 1)
