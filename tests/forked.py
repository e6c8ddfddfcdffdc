"""Commands in processes of their own that need not import torch anew: a server that has imported it forks them."""

import gc
import importlib
import itertools
import multiprocessing
import os
import signal
import sys
import tempfile
import time
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
    """A process that calls `work(*args)` in this environment; as far as the tests need it a `Popen`.

    folder: where it works; None: here
    """

    def __init__(self, work: Callable[..., None], *args: Any, folder: Path | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="perce-lite-test-")
        self._said = Path(self._folder.name) / "said"
        told = self._said, str(folder or Path.cwd()), dict(os.environ), work, args
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

    def wait(number: int) -> None:
        if number == 1:
            Path("here").touch()
            while not Path("go").exists():
                time.sleep(0.02)

    before(at, wait)
    run(words)


def killed(words: list[str], at: str, number: int) -> None:
    """The command line, which the system kills at the call of that number of the function `at`, as in `command`."""
    before(at, lambda call: os.kill(os.getpid(), signal.SIGKILL) if call == number else None)
    run(words)


def run(words: list[str]) -> None:
    """The command line."""
    from perce_lite.cli.app import main

    main(words)


def before(at: str, do: Callable[[int], None]) -> None:
    """From now on `do(n)` comes ahead of the n-th call of the function `at`."""
    module, name = at.split(":")
    owner = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    original, calls = getattr(owner, last), itertools.count(1)

    def called(*args: Any, **kwargs: Any) -> Any:
        do(next(calls))
        return original(*args, **kwargs)

    setattr(owner, last, called)


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
