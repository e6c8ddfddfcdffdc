"""`perce-lite bench --fleet-engine`: what a fleet on a Ray cluster costs beside the training itself.

Real enrolment, rows, packs, actors and registry; the workers train nothing, so that all of the time is overhead.
"""

import os
import tempfile
import time
from contextlib import chdir
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from perce_lite.evaluation.bench.fleetscale import UntrainedEngine, write_texts
from perce_lite.fleet.engines.ray import RayOptions, ray_engines
from perce_lite.fleet.engines.ray_worker import Place
from perce_lite.fleet.fleet import fleet
from perce_lite.fleet.result import AdapterResult
from perce_lite.recipe import Recipe, load_recipe

USERS = 10_000

SECOND, SHARE, GROWTH = 1000.0, 0.05, 1.05
"""A user who trains for a second, ms; the share of it that the rest may take; memory at the end over that at 10 %."""

_RECIPE = """
model: smollm2-135m
device: cpu
data: {path: texts.jsonl, format: documents}
profile: {select: bm25, top_k: 3, max_tokens: 200, earlier_by: month}
fleet: {min_examples: 8, gate: null, slots: 1, init_from: none}
lora: {r: 1}
train: {max_steps: 1, max_length: 400, output_dir: out}
"""


@dataclass(frozen=True)
class EngineCost:
    """The figures of `perce-lite bench --fleet-engine`.

    seconds: from the first user's end to the last one's; ms: of them a user; packs have one user each
    mib_early, mib_late: resident memory of the driver after a tenth of the users and after all, MiB
    """

    users: int
    workers: int
    seconds: float
    ms: float
    mib_early: float
    mib_late: float

    @property
    def cheap(self) -> bool:
        """Whether users of one second would take at most 5 % more, with one worker."""
        return self.ms <= SHARE * SECOND

    @property
    def flat(self) -> bool:
        """Whether the driver's memory stays."""
        return self.mib_late <= GROWTH * self.mib_early

    def figures(self) -> dict[str, Any]:
        """The JSON object of `--json`."""
        return {**asdict(self), "cheap": self.cheap, "flat": self.flat}


class UntrainedWorker(UntrainedEngine):
    """The engine that trains nothing, as a worker builds it."""

    users = 1
    kept: Path | None = None

    def __init__(self, recipe: Recipe, place: Place) -> None:
        super().__init__(recipe)

    def fingerprint(self) -> str:
        return ""


def engine_cost(users: int = USERS, workers: int = 1) -> EngineCost:
    """Runs a fleet of so many users over so many workers on this machine, on a core each.

    Raises:
        FleetError: as `RayEngine`.
    """
    seen: list[tuple[float, float]] = []  # when each user ended, s, and the driver's memory then, MiB
    process = psutil.Process(os.getpid())

    def ended(result: AdapterResult | None) -> None:
        if result is not None:
            seen.append((time.perf_counter(), process.memory_info().rss / 2**20))

    with tempfile.TemporaryDirectory(prefix="perce-lite-fleet-engine-") as scratch, chdir(scratch):
        write_texts(Path("texts.jsonl"), users)
        Path("recipe.yaml").write_text(_RECIPE, encoding="utf-8")
        with ray_engines(RayOptions(workers=workers, cores=1, trainer=UntrainedWorker)) as make:
            fleet(load_recipe("recipe.yaml"), make, report=ended)
    seconds = seen[-1][0] - seen[0][0]
    early, late = seen[len(seen) // 10][1], seen[-1][1]
    return EngineCost(len(seen), workers, seconds, 1000 * seconds / max(1, len(seen) - 1), early, late)
