"""Commands in processes of their own that need not import torch anew: a server that has imported it forks them."""

import gc
import importlib
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "perce_lite.cli.app",
        "perce_lite.evaluation.compare",
        "perce_lite.evaluation.summary",
        "perce_lite.export.export",
        "perce_lite.fleet.engines.slots",
    ]
)


class Child:
    """A process that calls `work(*args)` in this folder and environment; as far as the tests need it a `Popen`."""

    def __init__(self, work: Callable[..., None], *args: Any) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="perce-lite-test-")
        self._said = Path(self._folder.name) / "said"
        told = self._said, os.getcwd(), dict(os.environ), work, args
        self._process = _CONTEXT.Process(target=_carry_out, args=told)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        """Its exit code, negative for a signal; it does not outlive `timeout` seconds."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            raise AssertionError(f"not over after {timeout} s: {self.said()}")
        return self._process.exitcode

    def said(self) -> str:
        """What it has written so far, to standard output and standard error."""
        return self._said.read_text(errors="replace") if self._said.exists() else ""

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def command(words: list[str], at: str) -> None:
    """The command line, which stops at the first call of the function `at` until the file `go` is there.

    at: such as package.module:Class.method
    """
    import time

    from perce_lite.cli.app import main

    module, name = at.split(":")
    owner = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    original, waited = getattr(owner, last), []

    def waiting(*args: Any, **kwargs: Any) -> Any:
        if not waited:
            waited.append(True)
            Path("here").touch()
            while not Path("go").exists():
                time.sleep(0.02)
        return original(*args, **kwargs)

    setattr(owner, last, waiting)
    main(words)


def _carry_out(said: Path, folder: str, environment: dict[str, str], work: Callable[..., None], args: Any) -> None:
    gc.freeze()  # modules: see conftest
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    try:
        work(*args)
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
