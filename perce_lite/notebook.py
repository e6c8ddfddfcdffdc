"""PerCE Lite in a notebook: `%load_ext perce_lite.notebook` makes the command line the magic `%perce`."""

import gc
import html
import json
import os
import shlex
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from perce_lite.cli.app import main
from perce_lite.console import console, errors
from perce_lite.errors import NotebookError
from perce_lite.hub import reachable


def load_ipython_extension(shell: Any) -> None:
    """What `%load_ext perce_lite.notebook` calls: makes the magic %perce known."""
    console.width = errors.width = 100  # columns that a cell's output has room for
    shell.register_magic_function(perce, "line", "perce")


def perce(line: str) -> None:
    """%perce WORDS: the command `perce-lite WORDS`, in this process, so that its bars and tables are the notebook's.

    Raises:
        NotebookError: its exit code is not 0.
    """
    interrupt = signal.getsignal(signal.SIGINT)
    code: Any = 0
    try:
        main(shlex.split(line))
    except SystemExit as stop:
        code = stop.code
    finally:
        signal.signal(signal.SIGINT, interrupt)
        _free_gpu_memory()
    if code:
        raise NotebookError(f"perce-lite {line.split()[0] if line.split() else ''} ended with exit code {code}.")


def _free_gpu_memory() -> None:
    """Frees what a command left on the GPU, and forgets whether there was a network, as its end would have done."""
    gc.collect()
    reachable.cache_clear()
    if "torch" in sys.modules:
        import torch

        torch.cuda.empty_cache()


def page(path: str | os.PathLike[str], at: str = "", height: int = 640) -> Any:
    """A page that a command wrote, shown in the notebook in a frame of its own: its styles do not touch the notebook's.

    at: the heading that is shown first; else the page's beginning
    height: pixels

    Raises:
        NotebookError: no such page.
    """
    from IPython.display import HTML

    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise NotebookError(f"{path}: there is no such page; run the cell that writes it") from error
    # The page travels in the frame's attribute: Colab cannot open files of its machine by a link.
    frame = (
        f'<iframe srcdoc="{html.escape(text + _scroll(at))}" style="width:100%;height:{height}px;border:0"></iframe>'
    )
    return HTML(f"<div>{frame}</div>")


_serving = ExitStack()


def serve(
    adapter: str | os.PathLike[str] | None = None, fleet: str | os.PathLike[str] | None = None, height: int = 800
) -> Any:
    """The page of `perce-lite serve` in the notebook; an earlier one is ended. Needs the extra `serve`.

    adapter: the folder of an adapter, or fleet: of a fleet
    height: pixels

    Raises:
        NotebookError: not exactly one of the two; and what `serve.server.make_server` raises.
    """
    from IPython.display import IFrame

    from perce_lite.serve.server import Settings, make_server, running

    if (adapter is None) == (fleet is None):
        raise NotebookError("Give an adapter's folder, or fleet=FOLDER.")
    _serving.close()
    _free_gpu_memory()
    adapter_folder, fleet_folder = (None if folder is None else Path(folder) for folder in (adapter, fleet))
    server = _serving.enter_context(running(make_server(adapter_folder, fleet_folder, Settings(port=0, framed=True))))
    return IFrame(server.url, "100%", height)


def _scroll(heading: str) -> str:
    """A script that begins at `heading`; an anchor would move the notebook as well."""
    if not heading:
        return ""
    find = f"[...document.querySelectorAll('h2')].find(one => one.textContent === {json.dumps(heading)})"
    return f"<script>document.documentElement.scrollTop = {find}.offsetTop</script>"
