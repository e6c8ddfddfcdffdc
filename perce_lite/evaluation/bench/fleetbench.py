"""What many users cost: a process each, one after another over one base, and several at once in slots.

As in `bench`, a measurement is one child process, repeats are interleaved, and a ratio compares an arm with
`one-by-one` of its own repeat. Users are synthetic: rows of exactly so many tokens, a row a step.
"""

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perce_lite.config import pick_device
from perce_lite.console import progress_bar
from perce_lite.data.rows import to_records
from perce_lite.errors import BenchError
from perce_lite.evaluation.bench import children
from perce_lite.evaluation.bench.arms import LENGTHS, SLOTS
from perce_lite.evaluation.bench.bench import median, note, portable, spread
from perce_lite.evaluation.bench.exactrows import CHAT_TEMPLATE, TEMPLATE, exact_rows, words_of
from perce_lite.evaluation.bench.fleetmeasuring import FleetJob
from perce_lite.evaluation.bench.measuring import STILL
from perce_lite.files import write_text
from perce_lite.recipe import Profile, Recipe, refuse_cores, refuse_early_stopping, training_config

PROCESSES, REFERENCE = "processes", "one-by-one"
"""A process a user, its start and the loading of the base counted; and the arm that the others are ratios to."""

RANK = 8
"""Rank of every adapter."""


@dataclass(frozen=True)
class FleetBar:
    """What `arm` must reach against `to` at `length` tokens, at least for "speed", at most for "memory"."""

    arm: str
    to: str
    of: str
    limit: float
    length: int = 64


BARS = (
    FleetBar("slots-8", REFERENCE, "speed", 1.8),
    FleetBar("slots-8", REFERENCE, "memory", 1.6),
    FleetBar(REFERENCE, PROCESSES, "speed", 3.0),
)
"""Set for a CPU and the built-in model in NF4."""


def fleet_bench(
    recipe: Recipe,
    lengths: Sequence[int] = LENGTHS,
    slots: Sequence[int] = SLOTS,
    steps: int = 6,
    warmup: int = 1,
    repeats: int = 3,
    users: int = 4,
) -> dict[str, Any]:
    """The figures that `perce-lite bench --fleet` shows, every measurement included under `runs`.

    lengths: tokens a row
    slots: users at once, an arm each
    steps: optimizer steps of a user, a row each
    warmup: steps ahead of a measurement that do not count; `processes` has none, as all that it does counts
    users: of a measurement, or as many as the slots where those are more; `processes` has one

    Raises:
        BenchError: rows that cannot be made, or a measurement that failed; and what reading the recipe's rows raises.
    """
    refuse_cores(recipe, "bench --fleet")
    refuse_early_stopping(recipe, "bench --fleet")
    with tempfile.TemporaryDirectory(prefix="perce-lite-bench-") as folder:
        measurements = _Measurements(recipe, Path(folder), steps, warmup)
        measurements.make_rows(lengths, max(users, *slots))
        runs = _all_runs(measurements, arms_of(slots, users), lengths, repeats)
    by_length = {str(length): summary([run[str(length)] for run in runs]) for length in lengths}
    results = [arm for run in runs for arms in run.values() for arm in arms.values()]
    given = {"steps": steps, "warmup": warmup, "repeats": repeats, "lengths": list(lengths), "slots": list(slots)}
    return {
        "model": recipe.model,
        "machine": next((result["machine"] for result in results if "machine" in result), None),
        "settings": {**given, "users": users, "rank": RANK, "estimator": "base"},
        "lengths": by_length,
        "bars": judged(runs, _meant_for(recipe)),
        "runs": runs,
    }


@dataclass(frozen=True)
class FleetArm:
    """One way to train many: `users` of a measurement, `slots` at once; 0: one after another."""

    users: int
    slots: int = 0
    whole: bool = False


def arms_of(slots: Sequence[int], users: int) -> dict[str, FleetArm]:
    """The arms by name; `users` as in `fleet_bench`."""
    together = {f"slots-{count}": FleetArm(max(users, count), count) for count in slots}
    return {PROCESSES: FleetArm(1, whole=True), REFERENCE: FleetArm(users), **together}


# The measurements


class _Measurements:
    """Runs one child process after another, in `scratch`; the store there is filled once."""

    def __init__(self, recipe: Recipe, scratch: Path, steps: int, warmup: int) -> None:
        self._recipe, self._scratch, self._steps, self._warmup = portable(recipe), scratch, steps, warmup
        self._rows: dict[int, dict[str, list[dict[str, Any]]]] = {}
        write_text(scratch / "plain.jinja", CHAT_TEMPLATE)

    def make_rows(self, lengths: Sequence[int], users: int) -> None:
        """Rows of `users` users of every length.

        Raises:
            BenchError, RecipeError: words that do not come out even; options that cannot be trained.
        """
        words = words_of(self._recipe)
        for length in lengths:
            own = self._of(length)
            training_config(own)  # what a trainer refuses is told before anything is measured
            rows = exact_rows(own, words, length, users, self._steps)
            names = dict.fromkeys(row.user for row in rows)
            self._rows[length] = {name: to_records([row for row in rows if row.user == name]) for name in names}

    def _of(self, length: int) -> Recipe:
        """The recipe for rows of `length` tokens, as every arm trains it: a row a step, the constants in the store."""
        own = {
            "estimator": "base",
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "max_length": length,
            "max_steps": self._steps,
            "chat_template_path": str(self._scratch / "plain.jinja"),
            "output_dir": str(self._scratch / "out"),
            "store": str(self._scratch / "store"),
        }
        changed = {
            "template": TEMPLATE,
            "profile": Profile(),
            "lora": {**self._recipe.lora, "r": RANK},
            "train": {**self._recipe.train, **STILL, **own},
        }
        return self._recipe.model_copy(update=changed)

    def _job(self, length: int, rows: list[dict[str, Any]], slots: int | None, whole: bool) -> dict[str, Any]:
        warmup = 0 if whole else self._warmup
        places = {"scratch": str(self._scratch), "result": str(self._scratch / "result.json")}
        return asdict(FleetJob(self._of(length).model_dump(mode="json"), rows, slots, warmup, whole, **places))

    def fill(self) -> None:
        """Scores all rows under the base: the store of every arm is warm."""
        rows = [row for by_user in self._rows.values() for user_rows in by_user.values() for row in user_rows]
        job = self._job(max(self._rows), rows, None, False)
        result = children.run("fleetmeasuring", job, "the filling of the store", self._scratch)
        if "out_of_memory" in result:
            raise BenchError(f"The base alone does not fit: {result['out_of_memory']}")

    def run(self, name: str, arm: FleetArm, length: int) -> dict[str, Any]:
        """What `fleetmeasuring.measure` gives, or `out_of_memory` with what was said.

        Raises:
            BenchError: the process failed, or scored what the store was to have.
        """
        shutil.rmtree(self._scratch / "out", ignore_errors=True)
        rows = [row for user_rows in list(self._rows[length].values())[: arm.users] for row in user_rows]
        job = self._job(length, rows, arm.slots, arm.whole)
        what = f"{name} at {length} tokens"
        started = time.perf_counter()
        result = children.run("fleetmeasuring", job, what, self._scratch)
        seconds = time.perf_counter() - started
        if "out_of_memory" in result:
            return result
        if result["store_hits"] < 1:
            raise BenchError(f"{what} scored rows that the store was to have, so its figures mean nothing.")
        return {**result, "seconds": seconds} if arm.whole else result


def _all_runs(
    measurements: _Measurements, arms: dict[str, FleetArm], lengths: Sequence[int], repeats: int
) -> list[dict[str, Any]]:
    """Every repeat's measurements by length and arm. Where an arm starts moves from repeat to repeat."""
    names = list(arms)
    runs: list[dict[str, Any]] = []
    failed: dict[tuple[int, str], dict[str, Any]] = {}
    with progress_bar(refresh_per_second=1) as bar:  # the machine's cores belong to what is measured
        task = bar.add_task("Measuring", total=1 + repeats * len(names) * len(lengths), note="")
        note(bar, task, "filling the store")
        measurements.fill()
        bar.advance(task)
        for repeat in range(repeats):
            shift = repeat * len(names) // repeats
            once: dict[str, Any] = {}
            for length in lengths:
                by_arm: dict[str, Any] = {}
                for name in [*names[shift:], *names[:shift]]:
                    note(bar, task, f"{name} at {length} tokens, repeat {repeat + 1} of {repeats}")
                    by_arm[name] = failed.get((length, name)) or measurements.run(name, arms[name], length)
                    if "out_of_memory" in by_arm[name]:
                        failed[length, name] = by_arm[name]
                    bar.advance(task)
                once[str(length)] = {name: by_arm[name] for name in names}
            runs.append(once)
    return runs


# The figures


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By arm, from its measurements in every repeat of one length: `users_per_hour` and `peak_bytes`, medians; `speed`
    and `memory` as ratios to `one-by-one`, each {median, min, max, runs}, or None; or `out_of_memory` alone.
    """
    by_arm: dict[str, Any] = {}
    for name in runs[0]:
        measurements = [run[name] for run in runs]
        failed = [measurement["out_of_memory"] for measurement in measurements if "out_of_memory" in measurement]
        if failed:
            by_arm[name] = {"out_of_memory": failed[0]}
            continue
        by_arm[name] = {
            "users_per_hour": median(_value(measurement, "speed") for measurement in measurements),
            "peak_bytes": median(_value(measurement, "memory") for measurement in measurements),
            "speed": spread(ratios(runs, name, REFERENCE, "speed")),
            "memory": spread(ratios(runs, name, REFERENCE, "memory")),
        }
    return by_arm


def ratios(runs: Sequence[dict[str, Any]], arm: str, to: str, of: str) -> list[float]:
    """Of `arm` to another, repeat by repeat, in users an hour ("speed") or peak bytes ("memory"); empty where one of
    them was not measured.
    """
    pairs = [(run.get(arm), run.get(to)) for run in runs]
    if not all(
        measurement is not None and "out_of_memory" not in measurement for pair in pairs for measurement in pair
    ):
        return []
    return [_value(measurement, of) / _value(other, of) for measurement, other in pairs]


def _value(measurement: Any, of: str) -> float:
    return float(3600 * measurement["users"] / measurement["seconds"] if of == "speed" else measurement["peak_bytes"])


def judged(runs: Sequence[dict[str, Any]], meant: bool) -> list[dict[str, Any]]:
    """Each of `BARS` with the median `ratio`, and whether it was `met`: None where it cannot be told, `why` says why.

    meant: whether this is what the bars are set for
    """
    verdicts = []
    for bar in BARS:
        measured = [run.get(str(bar.length), {}) for run in runs]
        ratio = spread(ratios(measured, bar.arm, bar.to, bar.of))
        value = None if ratio is None else float(ratio["median"])
        why = "not measured" if value is None else None if meant else "it is set for the built-in model in NF4 on a CPU"
        met = None
        if value is not None and meant:
            met = value >= bar.limit if bar.of == "speed" else value <= bar.limit
        verdicts.append({**asdict(bar), "ratio": value, "met": met, "why": why})
    return verdicts


def _meant_for(recipe: Recipe) -> bool:
    builtin = recipe.model == "smollm2-135m" and recipe.quantization == "nf4"
    return builtin and pick_device(recipe.device).type == "cpu"
