"""One measurement, one child process: how a bench starts it, and what the process itself does around its figures.

A process each, so that peak memory is a measurement's own and nothing of the one before is left in an allocator or a
cache. Its standard input is a pipe that the parent holds: when it ends, so does the child.
"""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from perce_lite.console import quiet
from perce_lite.errors import BenchError, PerceLiteError
from perce_lite.files import read_json, write_json
from perce_lite.model.full_gpu import gpu_is_full


class Placed(Protocol):
    """What every job names: a folder for all that it writes, and the file that its figures go to."""

    @property
    def scratch(self) -> str: ...

    @property
    def result(self) -> str: ...


Kind = TypeVar("Kind", bound=Placed)


def run(module: str, job: dict[str, Any], what: str, scratch: Path) -> dict[str, Any]:
    """What the process of `job` wrote to the file `job["result"]`, or `out_of_memory` with what was said.

    module: a room whose `main` carries out the job file that it is given; what: the measurement, for errors

    Raises:
        BenchError: the process failed.
    """
    result = Path(job["result"])
    result.unlink(missing_ok=True)
    write_json(scratch / "job.json", job)
    log = scratch / "said.txt"
    with log.open("wb") as file, _child(module, scratch / "job.json", file) as child:
        code = child.wait()
    figures = read_json(result)
    if code == -9:
        return {"out_of_memory": "the process was killed with signal 9, as the system does when memory is short"}
    if code or figures is None:
        raise BenchError(f"The measurement of {what} failed: {_last_line(log)}")
    return dict(figures)


@contextmanager
def _child(module: str, job: Path, output: Any) -> Iterator[subprocess.Popen[bytes]]:
    """The process of one job. It ends with the block, whatever ends that, and with this process, even one killed."""
    command = [sys.executable, "-m", f"perce_lite.evaluation.bench.{module}", str(job)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=output)
    try:
        yield child
    finally:
        child.kill()
        child.wait()
        assert child.stdin is not None
        child.stdin.close()


def _last_line(log: Path) -> str:
    """The last thing that a process said, without the name of our own exception."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    last = lines[-1] if lines else "it said nothing"
    name, _, rest = last.partition(": ")
    return rest if name.startswith("perce_lite.errors.") and rest else last


# In the child


def end_with_parent(scratch: Path) -> None:
    """Ends this process, and removes `scratch`, when standard input does: the parent is gone, killed perhaps."""

    def wait() -> None:
        while os.read(0, 1):  # not sys.stdin: its lock would outlive this thread
            pass
        shutil.rmtree(scratch, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main(job_of: Callable[..., Kind], measure: Callable[[Kind], dict[str, Any]]) -> None:
    """What such a process does: `measure` the job whose file its first argument names."""
    quiet()
    job = job_of(**read_json(Path(sys.argv[1])))
    end_with_parent(Path(job.scratch))
    carry_out(job, measure)


def carry_out(job: Kind, measure: Callable[[Kind], dict[str, Any]]) -> None:
    """Writes what `measure` finds to `job.result`, also where there is too little memory for it."""
    try:
        figures = measure(job)
    except (MemoryError, RuntimeError, PerceLiteError) as error:
        if not out_of_memory(error):
            raise
        figures = {"out_of_memory": (str(error).strip().splitlines() or ["no memory left"])[0]}
    write_json(Path(job.result), figures)


def out_of_memory(error: BaseException) -> bool:
    """Whether `error`, or what it came from, says that there is no memory left."""
    if isinstance(error, MemoryError) or gpu_is_full(error):
        return True
    words = ("can't allocate memory", "not enough memory")  # of torch's allocator on a CPU, a plain RuntimeError
    no_memory = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return no_memory or (error.__cause__ is not None and out_of_memory(error.__cause__))
