"""PerCE Lite in a notebook: `%load_ext perce_lite.notebook` makes the command line the magic `%perce`."""

import gc
import html
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

from perce_lite.cli import main
from perce_lite.errors import NotebookError


def load_ipython_extension(shell: Any) -> None:
    """What `%load_ext perce_lite.notebook` calls: makes the magic %perce known."""
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
        _let_go()
    if code:
        raise NotebookError(f"perce-lite {line.split()[0] if line.split() else ''} ended with exit code {code}.")


def _let_go() -> None:
    """Frees what a command left on the GPU: in a terminal its end would have done so."""
    gc.collect()
    if "torch" in sys.modules:
        import torch

        torch.cuda.empty_cache()


def page(path: str | os.PathLike[str], height: int = 640) -> Any:
    """A page that a command wrote, shown in the notebook in a frame of its own: its styles do not touch the notebook's.

    height: pixels

    Raises:
        FileNotFoundError: no such page.
    """
    from IPython.display import HTML

    # The page travels in the frame's attribute: Colab cannot open files of its machine by a link.
    inside = html.escape(Path(path).read_text(encoding="utf-8"))
    frame = f'<iframe srcdoc="{inside}" sandbox="allow-scripts" style="width:100%;height:{height}px;border:0"></iframe>'
    return HTML(f"<div>{frame}</div>")
