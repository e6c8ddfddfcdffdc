"""What it costs: the recipe's own rows trained by plain `SFTTrainer` and by PerCE, in turns, on the user's machine.

A measurement is one child process (see `measuring`). Repeats are interleaved, each arm once in every repeat, and a
ratio compares an arm with the plain SFT of its own repeat, so that what slows the machine for a while slows both.
That is also why nothing is kept of a bench that was stopped: it must be one run.
"""

import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from perce_lite.console import progress_bar
from perce_lite.data.rows import to_records
from perce_lite.errors import BenchError
from perce_lite.evaluation.bench import children
from perce_lite.evaluation.bench.arms import ARMS
from perce_lite.evaluation.bench.measuring import Job, recipe_of
from perce_lite.evaluation.bench.workload import Workload, workload
from perce_lite.recipe import Recipe, refuse_cores, refuse_early_stopping, training_config

REFERENCE = "sft"
"""The arm that the others are ratios to."""

PROFILE_HEAVY = 0.6
"""Share of profile tokens from which arms that spare the profile are held to their bars, which are for two thirds."""

_SPARING = ("counterfactual", "frozen")


@dataclass(frozen=True)
class Bar:
    """What an arm may cost, as a ratio to plain SFT; set for a CPU. `of` is "time", "memory" or "activations"."""

    arm: str
    of: str
    limit: float
    says: str


BARS = (
    Bar("base", "time", 1.02, "base, warm store"),
    Bar("base", "memory", 1.03, "base, warm store"),
    Bar("mixed", "time", 1.02, "mixed, warm store"),
    Bar("mixed", "memory", 1.03, "mixed, warm store"),
    Bar("base-cold", "time", 1.08, "base, scoring and {epochs} epochs"),
    Bar("mixed-cold", "time", 1.08, "mixed, scoring and {epochs} epochs"),
    Bar("counterfactual", "time", 0.7, "train_on: counterfactual"),
    Bar("frozen", "time", 0.7, "profile_pass: frozen"),
    Bar("frozen", "activations", 0.65, "profile_pass: frozen"),
)


def bench(
    recipe: Recipe,
    arms: Sequence[str] = tuple(ARMS),
    steps: int = 6,
    warmup: int = 1,
    repeats: int = 3,
    epochs: int = 3,
) -> dict[str, Any]:
    """The figures that `perce-lite bench` shows, every measurement included under `runs`.

    arms: names of `ARMS`; plain SFT is always measured as well
    steps: optimizer steps a measurement, an epoch over its rows; fewer where there are fewer rows
    warmup: steps ahead of them that do not count
    epochs: over which a cold store's scoring is spread. After scoring its steps are those of a warm store, so its time
        is the scoring that was measured and so many epochs of the steps that were measured. Scoring comes without a
        warm-up and with what it pays once a run, so over few rows it looks dearer than it is over many

    Raises:
        BenchError: rows for not even one step, or a measurement that failed; and what reading the recipe's rows raises.
    """
    refuse_cores(recipe, "bench")
    refuse_early_stopping(recipe, "bench")
    load = workload(recipe, steps)
    names = [name for name in ARMS if name in arms or name == REFERENCE]
    with tempfile.TemporaryDirectory(prefix="perce-lite-bench-") as folder:
        runs = _all_runs(_Measurements(portable(recipe), load, warmup, Path(folder)), names, repeats)
    by_arm = summary(names, runs, epochs)
    measured = [measurement for run in runs for measurement in run.values() if "machine" in measurement]
    on_cpu = all(measurement["machine"]["device"] == "cpu" for measurement in measured)
    loading_counts = any(measurement["peak_of"] == "process" for measurement in measured)
    return {
        "model": recipe.model,
        "machine": measured[0]["machine"] if measured else None,
        "rows": load.told(),
        "settings": {"steps": load.steps, "warmup": warmup, "repeats": repeats, "epochs": epochs},
        "arms": by_arm,
        "bars": judged(by_arm, load.profile_share, epochs, on_cpu, loading_counts),
        "runs": runs,
    }


# The measurements


def portable(recipe: Recipe) -> Recipe:
    """The recipe as a process can read it that does not know where its file lies."""
    folder, template = recipe.model_path, recipe.chat_template_file
    train = recipe.train if template is None else {**recipe.train, "chat_template_path": str(template)}
    return recipe.model_copy(update={"model": recipe.model if folder is None else str(folder), "train": train})


class _Measurements:
    """Runs one child process after another, in `scratch`."""

    def __init__(self, recipe: Recipe, load: Workload, warmup: int, scratch: Path) -> None:
        self._recipe, self._load, self._warmup, self._scratch = recipe.model_dump(mode="json"), load, warmup, scratch
        self._rows = to_records([pair.row for pair in load.pairs])

    def job(self, arm: str, fill: bool = False) -> Job:
        """The job of one measurement of `arm`; `fill`: only its store is filled."""
        store = self._scratch / "stores" / (f"{ARMS[arm].store}-cold" if ARMS[arm].cold else str(ARMS[arm].store))
        steps, warmup = (0, 0) if fill else (self._load.steps, self._warmup)
        places = {"store": str(store), "scratch": str(self._scratch), "result": str(self._scratch / "result.json")}
        return Job(arm, self._recipe, self._rows, steps, warmup, **places)

    def run(self, arm: str, fill: bool = False) -> dict[str, Any]:
        """What `measuring.measure` gives, or `out_of_memory` with what was said.

        Raises:
            BenchError: the process failed, or trained on other tokens than it was to.
        """
        job = self.job(arm, fill)
        if ARMS[arm].cold:
            shutil.rmtree(job.store, ignore_errors=True)
        result = children.run("measuring", asdict(job), arm, self._scratch)
        if "digest" in result and result["digest"] != self._load.digest(ARMS[arm].sees_profile):
            raise BenchError(f"{arm} was trained on other tokens than the rows hold, so its figures mean nothing.")
        return result


def _all_runs(measurements: _Measurements, names: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """Every repeat's measurements by arm. Where an arm starts moves from repeat to repeat."""
    for name in names:
        training_config(recipe_of(measurements.job(name)))  # what an arm refuses is told before anything is measured
    warm = {ARMS[name].store: name for name in names if ARMS[name].store is not None and not ARMS[name].cold}
    runs: list[dict[str, Any]] = []
    with progress_bar(refresh_per_second=1) as bar:  # the machine's cores belong to what is measured
        task = bar.add_task("Measuring", total=len(warm) + repeats * len(names), note="")
        for name in warm.values():
            note(bar, task, f"filling the store of {name}")
            measurements.run(name, fill=True)
            bar.advance(task)
        for repeat in range(repeats):
            shift = repeat * len(names) // repeats
            by_arm: dict[str, Any] = {}
            for name in [*names[shift:], *names[:shift]]:
                note(bar, task, f"{name}, repeat {repeat + 1} of {repeats}")
                failed = next((run[name] for run in runs if "out_of_memory" in run[name]), None)
                by_arm[name] = measurements.run(name) if failed is None else failed
                bar.advance(task)
            runs.append({name: by_arm[name] for name in names})
    return runs


def note(bar: Progress, task: Any, text: str) -> None:
    """Says beside the bar what is measured now; the bar itself is drawn seldom."""
    bar.update(task, note=text)
    bar.refresh()


# The figures


def summary(names: Sequence[str], runs: Sequence[dict[str, Any]], epochs: int) -> dict[str, Any]:
    """By arm: `tokens_per_second`, `step_seconds`, `scoring_seconds`, `peak_bytes`, `activation_bytes`, `disk_bytes`,
    medians over repeats; `time`, `memory`, `activations` and `disk` as ratios to plain SFT, each {median, min, max,
    runs}; or `out_of_memory` alone.

    A time ratio is the median over steps of an arm's seconds to plain SFT's for the same rows, and for a cold store the
    scoring beside it, over plain SFT's time for `epochs` epochs. A ratio is None where plain SFT has no figure.
    """
    by_arm: dict[str, Any] = {}
    for name in names:
        measurements, plain = [run[name] for run in runs], [run[REFERENCE] for run in runs]
        failed = [measurement["out_of_memory"] for measurement in measurements if "out_of_memory" in measurement]
        if failed:
            by_arm[name] = {"out_of_memory": failed[0]}
            continue
        cold = ARMS[name].cold
        comparable = not any("out_of_memory" in measurement for measurement in plain)
        pairs = list(zip(measurements, plain, strict=True)) if comparable else []
        by_arm[name] = {
            "tokens_per_second": median(_tokens_per_second(measurement, epochs, cold) for measurement in measurements),
            "step_seconds": median(statistics.median(measurement["step_seconds"]) for measurement in measurements),
            "scoring_seconds": median(measurement["scoring_seconds"] for measurement in measurements),
            "peak_bytes": median(measurement["peak_bytes"] for measurement in measurements),
            "activation_bytes": _known(median, [measurement["activation_bytes"] for measurement in measurements]),
            "disk_bytes": median(map(_disk, measurements)),
            "time": spread([_time_ratio(measurement, other, epochs, cold) for measurement, other in pairs]),
            "memory": spread([measurement["peak_bytes"] / other["peak_bytes"] for measurement, other in pairs]),
            "activations": _known(
                spread, [_ratio("activation_bytes", measurement, other) for measurement, other in pairs]
            ),
            "disk": spread([_disk(measurement) / _disk(other) for measurement, other in pairs]),
        }
    return by_arm


def _tokens_per_second(measurement: dict[str, Any], epochs: int, cold: bool) -> float:
    seconds = sum(measurement["step_seconds"]) * epochs + (measurement["scoring_seconds"] if cold else 0)
    return float(measurement["tokens"] * epochs / seconds)


def _time_ratio(measurement: dict[str, Any], plain: dict[str, Any], epochs: int, cold: bool) -> float:
    steps = zip(measurement["step_seconds"], plain["step_seconds"], strict=True)
    ratio = statistics.median(seconds / plain_seconds for seconds, plain_seconds in steps)
    return ratio + (measurement["scoring_seconds"] / (epochs * sum(plain["step_seconds"])) if cold else 0)


def _ratio(name: str, measurement: dict[str, Any], other: dict[str, Any]) -> float | None:
    return None if measurement[name] is None or other[name] is None else measurement[name] / other[name]


def _known(figure: Callable[[list[float]], Any], values: list[float | None]) -> Any:
    """`figure` of the values; None where an arm has none."""
    known = [value for value in values if value is not None]
    return figure(known) if known else None


def _disk(measurement: dict[str, Any]) -> int:
    return int(measurement["adapter_bytes"] + measurement["store_bytes"])


def median(values: Any) -> float:
    """Of repeats."""
    return float(statistics.median(values))


def spread(values: list[float]) -> dict[str, Any] | None:
    """{median, min, max, runs} of repeats; None of none."""
    if not values:
        return None
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": values}


def judged(
    found: dict[str, Any], profile_share: float, epochs: int, on_cpu: bool = True, loading_counts: bool = False
) -> list[dict[str, Any]]:
    """Each of `BARS` with the median ratio, and whether it was `met`: None where it cannot be told, `why` says why.

    loading_counts: this system could not start the peak of memory anew after the base was loaded
    """
    verdicts = []
    for bar in BARS:
        facts = {"bar": f"{bar.of}: {bar.says.format(epochs=epochs)}", "arm": bar.arm, "of": bar.of, "limit": bar.limit}
        ratio = found.get(bar.arm, {}).get(bar.of)
        value = None if ratio is None else float(ratio["median"])
        why = "not measured" if value is None else None
        if value is not None and bar.arm in _SPARING and profile_share < PROFILE_HEAVY:
            why = f"it is meant for rows whose profile is two thirds of the tokens, here {profile_share:.0%}"
        if value is not None and bar.of == "memory" and loading_counts:
            why = "the peak of memory holds the loading of the base here"
        if value is not None and not on_cpu:
            why = "it is set for a CPU"
        verdicts.append(
            {**facts, "ratio": value, "met": None if value is None or why else value <= bar.limit, "why": why}
        )
    return verdicts
