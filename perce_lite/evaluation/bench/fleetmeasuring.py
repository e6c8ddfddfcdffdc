"""One measurement of `perce-lite bench --fleet`: one arm trains its users in a process of its own.

`python -m perce_lite.evaluation.bench.fleetmeasuring JOB.json`; see `perce_lite.evaluation.bench.children`.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from perce_lite.config import pick_device
from perce_lite.data.pairs import PairMaker
from perce_lite.data.rows import Row, from_columns
from perce_lite.errors import PerceLiteError
from perce_lite.evaluation.bench import children
from perce_lite.evaluation.bench.measuring import machine, peak_bytes, reset_peak
from perce_lite.fleet.engines.protocol import Outcome, Task
from perce_lite.fleet.engines.sequential import SequentialEngine
from perce_lite.fleet.engines.slots import SlotsEngine
from perce_lite.fleet.groups import Group
from perce_lite.model.base import load_base
from perce_lite.recipe import Recipe, training_config
from perce_lite.training.reference_logprobs import reference_log_probs


@dataclass(frozen=True)
class FleetJob:
    """What one process measures; every field is what JSON can hold.

    recipe: a `Recipe`, as `model_dump(mode="json")` gives it, which says the steps of a user
    rows: records of `to_records`, of all users
    slots: users trained at once; 0: one after another; None: nobody is trained, the store is filled
    warmup: steps of as many users as are trained at once, ahead of what is measured; they do not count
    whole: the whole process counts, its loading of the base too, so the peak is the process's
    scratch, result: a folder, and the file that the figures go to
    """

    recipe: dict[str, Any]
    rows: list[dict[str, Any]]
    slots: int | None
    warmup: int
    whole: bool
    scratch: str
    result: str


def measure(job: FleetJob) -> dict[str, Any]:
    """Trains the job's users as `perce-lite fleet` does, to the last adapter on the disk.

    Keys: `users`, `seconds` without the loading of the base, `peak_bytes` with `peak_of` (see `measuring.reset_peak`),
    `store_hits` (the least of any user: share of the scored sequences), `adapter_bytes` of all, `machine`.
    """
    recipe = Recipe.model_validate(job.recipe)
    rows = [replace(from_columns(record, f"row {number}"), split="train") for number, record in enumerate(job.rows)]
    if job.slots is None:
        return fill(recipe, rows)
    engine = SlotsEngine(recipe, job.slots) if job.slots else SequentialEngine(recipe)
    engine.base()
    device = pick_device(recipe.device)
    peak_of = "process" if job.whole else reset_peak(device)
    names = list(dict.fromkeys(row.user for row in rows))
    outcomes: list[Outcome] = []

    def done(task: Task, outcome: Outcome | PerceLiteError) -> None:
        if isinstance(outcome, PerceLiteError):
            raise outcome
        outcomes.append(outcome)

    def progress(loss: float | None, share: float) -> None:
        """Nobody watches."""

    if job.warmup:
        short = recipe.model_copy(update={"train": {**recipe.train, "max_steps": job.warmup}})
        engine.run(tasks(short, rows, names[: max(1, job.slots)], "warmup"), done, progress)
    outcomes.clear()
    started = time.perf_counter()
    engine.run(tasks(recipe, rows, names, "measured"), done, progress)
    seconds = time.perf_counter() - started
    return {
        "users": len(outcomes),
        "seconds": seconds,
        "peak_bytes": peak_bytes(device),
        "peak_of": peak_of,
        "store_hits": min(outcome.weights["store_hits"] for outcome in outcomes),
        "adapter_bytes": sum(outcome.bytes for outcome in outcomes),
        "machine": machine(device),
    }


def tasks(recipe: Recipe, rows: list[Row], names: list[str], what: str) -> Iterator[Task]:
    """A task a user of `names`, in folders of their own."""
    for name in names:
        own = [row for row in rows if row.user == name]
        group = Group(("user", name), (name,), len(own), None)
        yield Task(group.key, recipe, own, recipe.output_dir / what / group.folder, what, None)


def fill(recipe: Recipe, rows: list[Row]) -> dict[str, Any]:
    """Scores `rows` under the base into the recipe's store; `scored`: how many there were."""
    base = load_base(recipe)
    args = training_config(recipe)
    maker = PairMaker.of(recipe, base.tokenizer, args.max_length)
    reference_log_probs(base.model, maker.make(rows), args, args.seed)
    return {"scored": len(rows)}


if __name__ == "__main__":
    children.main(FleetJob, measure)
