"""`perce-lite bench --fleet-scale`: seconds and resident memory of a fleet's commands, by the number of users.

Each phase is a process of its own, on one thread. All but one are the real command on real files. The exception is
`enrolment`: training thousands of adapters takes days, so a process calls `fleet()` with an engine that trains nothing
(`python -m perce_lite.evaluation.bench.fleetscale RECIPE`). It measures reading, enrolment, scheduling and the
registry. No adapter is written, so `adapters who` finds that the base serves.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perce_lite.console import progress_bar
from perce_lite.errors import BenchError
from perce_lite.fleet.engines.protocol import OnDone, OnProgress, Outcome, Task
from perce_lite.fleet.fleet import fleet
from perce_lite.recipe import Recipe, load_recipe

USERS = (1000, 2000, 5000, 10_000, 20_000)
"""Numbers of users, unless asked for otherwise."""

TEXTS, WORDS = 20, 40
"""Texts of a user, words of a text."""

_PHASES = 6

_RECIPE = """
model: smollm2-135m
quantization: nf4
data: {path: texts.jsonl, format: documents}
profile: {select: bm25, top_k: 3, max_tokens: 200, earlier_by: month}
fleet: {min_examples: 8, gate: null}
lora: {r: 1}
train: {max_steps: 1, max_length: 400, output_dir: out}
"""


# The peak of a process counts from that of the process which forked it: a small one forks, not this one with torch.
_LAUNCHER = """
import json, resource, subprocess, sys, time
started = time.perf_counter()
code = subprocess.run(sys.argv[2:]).returncode
seconds, used = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
figures = seconds, used.ru_maxrss, used.ru_utime + used.ru_stime
open(sys.argv[1], "w").write(json.dumps(figures))
sys.exit(code)
"""


@dataclass(frozen=True)
class Phase:
    """One process. seconds: wall time; mib: peak resident memory, MiB; due: adapters due, where the phase counts them.

    cpu_seconds: time of the processor, which work beside it does not lengthen much

    name: "dry run", "enrolment", "nothing due", "one changed user", "adapters list" or "adapters who"
    """

    users: int
    name: str
    seconds: float
    mib: float
    due: int | None = None
    cpu_seconds: float = 0.0


@dataclass(frozen=True)
class ScaleBar:
    """A limit and what was measured; `unit` is "s", "MiB" or "x" (memory over that at half as many users)."""

    name: str
    measured: float
    limit: float
    unit: str

    @property
    def met(self) -> bool:
        return self.measured <= self.limit


@dataclass(frozen=True)
class FleetScale:
    """The figures of `perce-lite bench --fleet-scale`; bars are those for 10,000 users, empty without them."""

    texts: int
    phases: tuple[Phase, ...]
    bars: tuple[ScaleBar, ...]

    def figures(self) -> dict[str, Any]:
        """The JSON object of `--json`."""
        return {**asdict(self), "bars": [{**asdict(bar), "met": bar.met} for bar in self.bars]}


class UntrainedEngine:
    """An engine that trains nothing and reports every task as done."""

    def __init__(self, recipe: Recipe) -> None:
        self._model = recipe.model

    def base(self) -> dict[str, Any]:
        return {"shape": [self._model], "embedding": [0.0]}

    def run(self, tasks: Iterator[Task], on_done: OnDone, on_progress: OnProgress) -> None:
        for task in tasks:
            on_done(task, Outcome({}, {}, 0, 0))


def fleet_scale(users: Sequence[int] = USERS) -> FleetScale:
    """Measures every phase at every number of `users`.

    Raises:
        BenchError: a process failed; its last line is in the message.
    """
    phases: list[Phase] = []
    with tempfile.TemporaryDirectory(prefix="perce-lite-fleet-scale-") as scratch, progress_bar() as bar:
        progress = bar.add_task("Measuring", total=_PHASES * len(users), note="")
        for count in users:
            folder = Path(scratch) / str(count)
            folder.mkdir()
            for phase in _measure(count, folder):
                phases.append(phase)
                bar.update(progress, advance=1, note=f"{count} users, {phase.name}")
    return FleetScale(TEXTS, tuple(phases), bars(phases))


def bars(phases: Sequence[Phase]) -> tuple[ScaleBar, ...]:
    """The limits for 10,000 users on one thread; empty where these were not measured."""
    at = {(phase.users, phase.name): phase for phase in phases}
    limits = []
    for name in ("dry run", "nothing due", "one changed user", "adapters list", "adapters who"):
        phase = at.get((10_000, name))
        if phase is None:
            return ()
        fast = name.startswith("adapters")
        limits.append(ScaleBar(name, phase.seconds, 1.0 if fast else 60.0, "s"))
        half = at.get((5000, name))
        if not fast:
            limits.append(ScaleBar(name, phase.mib, 700.0, "MiB"))
            limits += [] if half is None else [ScaleBar(name, phase.mib / half.mib, 1.2, "x")]
    return tuple(limits)


def write_texts(file: Path, users: int, seed: int = 0) -> None:
    """Writes `TEXTS` documents of made-up words for each user, as JSONL."""
    chooser = random.Random(seed)
    words = ["".join(chooser.choices("bdfgklmnprstvzaeiou", k=chooser.randint(2, 7))) for _ in range(4000)]
    with file.open("w", encoding="utf-8") as lines:
        for user in range(users):
            own = chooser.sample(words, 200)
            lines.writelines(_line(chooser, own, user, place) for place in range(TEXTS))


def _line(chooser: random.Random, words: Sequence[str], user: int, place: int) -> str:
    """One document, two a month."""
    query, text = (" ".join(chooser.choices(words, k=count)) for count in (6, WORDS))
    date = f"{2020 + place // 24}-{place // 2 % 12 + 1:02}-{1 + place % 2 * 10:02}"
    return json.dumps({"user": f"user{user:05}", "query": query, "text": text, "date": date}) + "\n"


def _measure(users: int, folder: Path) -> Iterator[Phase]:
    """All `_PHASES` phases for so many users, in `folder`."""
    data, recipe, program = folder / "texts.jsonl", str(folder / "recipe.yaml"), ("-m", "perce_lite")
    write_texts(data, users)
    Path(recipe).write_text(_RECIPE, encoding="utf-8")

    def run(name: str, *arguments: str) -> Phase:
        seconds, mib, cpu_seconds = _process(name, folder, arguments)
        due = folder / "due.json"
        count = sum(json.loads(due.read_text("utf-8"))["due"].values()) if due.is_file() else None
        due.unlink(missing_ok=True)
        return Phase(users, name, seconds, mib, count, cpu_seconds)

    dry = (*program, "fleet", recipe, "--dry-run", "--json", "due.json")
    yield run("dry run", *dry)
    yield run("enrolment", "-m", "perce_lite.evaluation.bench.fleetscale", recipe)
    yield run("nothing due", *program, "fleet", recipe, "--json", "due.json")
    with data.open("a", encoding="utf-8") as lines:
        lines.write(_line(random.Random(1), ["anew"], users // 2, 30))
    yield run("one changed user", *dry)
    yield run("adapters list", *program, "adapters", "list", "--fleet", "out")
    yield run("adapters who", *program, "adapters", "who", f"user{users // 2:05}", "--fleet", "out")


def _process(name: str, folder: Path, arguments: Sequence[str]) -> tuple[float, float, float]:
    """Runs Python with `arguments` in `folder` on one thread: (wall seconds, peak resident MiB, CPU seconds)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    log, measured = folder / "said.txt", folder / "measured.json"
    with log.open("wb") as output:
        command = [sys.executable, "-c", _LAUNCHER, str(measured), sys.executable, *arguments]
        child = subprocess.run(command, cwd=folder, env=environment, stdout=output, stderr=output, check=False)
    if child.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
        raise BenchError(f"bench --fleet-scale: {name} failed: {lines[-1]}")
    seconds, size, cpu_seconds = json.loads(measured.read_text("utf-8"))
    return seconds, size / (2**20 if sys.platform == "darwin" else 2**10), cpu_seconds


if __name__ == "__main__":
    fleet(load_recipe(Path(sys.argv[1])), UntrainedEngine)
