"""Many users over one base: who is due is trained, the rest is left alone; the book says who is served by what."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from perce_lite.console import progress_bar, say, warn
from perce_lite.data import read_rows
from perce_lite.errors import FleetError, PerceLiteError
from perce_lite.groups import EVERYBODY, Group, Key, Plan, plan, run_fingerprint
from perce_lite.inprocess import Engine, Outcome, Task
from perce_lite.models import adapter_bytes, same_base
from perce_lite.recipe import Recipe, training_config, with_train
from perce_lite.registry import KINDS, Adapter, Registry, held

PAGE = "fleet.html"


@dataclass
class Tally:
    """What a run of the fleet did."""

    trained: int = 0
    held_back: int = 0
    failed: int = 0


def fleet(
    recipe: Recipe,
    engine: Callable[[Recipe], Engine],
    only: Sequence[str] = (),
    retrain: Sequence[str] = (),
    dry_run: bool = False,
) -> dict[str, Any]:
    """Trains every adapter that is due, those that others start from first, and gives what `perce-lite fleet` shows.

    engine: makes the thing that trains, where there is something to train
    only: users to train now; the others wait
    retrain: users to train again, though nothing has changed; "cohort:NAME" or "all" for what others start from

    Raises:
        FleetError: another run is on this folder, it is of another base, or a name is not known.
        DataError: as `groups.plan`; DiskFullError: no space left. One user's failure is written down, and others go on.
    """
    rows = read_rows(recipe)
    with held(recipe.output_dir) as registry:
        _readmit(registry, retrain)
        left_out = {user for user in {row.user for row in rows} if registry.was_deleted(user)}
        if left_out:
            say(
                f"{len(left_out)} users who were deleted are left out, though the data has them; --retrain takes one in"
            )
        planned = plan([row for row in rows if row.user not in left_out], recipe)
        _know(planned, [*only, *(name for name in retrain if _key(name)[0] == "user")])
        stages = {key: _stage(recipe, group) for group in planned.groups for key in [group.key]}
        _enrol(registry, planned, stages, retrain)
        groups = {group.key: group for group in planned.groups}
        due = {kind: sum(1 for _ in registry.due(kind, _wanted(kind, only))) for kind in KINDS}
        need = _disk(recipe, sum(due.values()))
        known = {"store": training_config(recipe).store or "", "data": str(recipe.data_path or recipe.data.hub)}
        known |= {"group_by": recipe.fleet.group_by, "min_examples": str(recipe.fleet.min_examples)}
        for key, value in known.items():
            registry.set_meta(key, value)
        figures: dict[str, Any] = {"folder": str(recipe.output_dir), "due": due, "bytes_needed": need}
        if dry_run or not sum(due.values()):
            return {**figures, "dry_run": dry_run, **_told(registry, Tally())}
        working = engine(recipe)
        _same_base(registry, working, recipe)
        tally = _train(registry, groups, stages, working, only, sum(due.values()))
        (recipe.output_dir / PAGE).unlink(missing_ok=True)
        return {**figures, "dry_run": False, **_told(registry, tally)}


def _key(name: str) -> Key:
    """ "cohort:press", "all" or a user."""
    if name == "all":
        return EVERYBODY
    kind, colon, rest = name.partition(":")
    return ("cohort", rest) if colon and kind == "cohort" else ("user", name)


def _wanted(kind: str, only: Sequence[str]) -> set[str] | None:
    """Names to train of this kind; None: every one."""
    return set(only) if only and kind == "user" else None


def _readmit(registry: Registry, names: Sequence[str]) -> None:
    for name in names:
        registry.readmit(name)


def _know(planned: Plan, names: Sequence[str]) -> None:
    """Raises FleetError where a name is of no user in the data, or of one without an adapter of their own."""
    known = {user: own for user, _, _, own in planned.users}
    for name in names:
        if name not in known:
            some = ", ".join(list(known)[:10])
            raise FleetError(f"user {name}: not in the data; users: {some}{' ...' if len(known) > 10 else ''}")
        if not known[name]:
            raise FleetError(f"user {name} gets no adapter of their own (fleet.min_examples, fleet.group_by)")


def _stage(recipe: Recipe, group: Group) -> Recipe:
    """The recipe of one group: `fleet.train` counts for those that start from another."""
    if group.parent is None:
        return recipe
    return with_train(recipe, "fleet.train", [f"{name}={value}" for name, value in recipe.fleet.train.items()])


def _enrol(registry: Registry, planned: Plan, stages: dict[Key, Recipe], retrain: Sequence[str]) -> None:
    """Writes users and adapters into the book; what has changed becomes due."""
    for name in retrain:
        kind, plain = _key(name)
        if kind == "user":
            registry.make_due(kind, plain, "asked for")
        else:
            renew(registry, (kind, plain))
    runs: dict[Key, str] = {}
    records = []
    for group in planned.groups:
        generation = registry.meta(f"generation {':'.join(group.key)}") or "0"
        parent = None if group.parent is None else runs[group.parent]
        runs[group.key] = run_fingerprint(group, stages[group.key], generation, parent)
        kind, name = group.key
        above = group.parent or (None, None)
        records.append(
            {
                "kind": kind, "name": name, "folder": group.folder, "parent_kind": above[0], "parent_name": above[1],
                "run": runs[group.key], "examples": group.examples,
            }
        )  # fmt: skip
    registry.enrol(planned.users, records)


def renew(registry: Registry, key: Key) -> None:
    """A cohort's adapter, and all that start from it, are to be trained again."""
    name = f"generation {':'.join(key)}"
    registry.set_meta(name, str(int(registry.meta(name) or 0) + 1))


def _disk(recipe: Recipe, count: int) -> int:
    """Bytes that `count` adapters and the checkpoints of one will take.

    Raises:
        FleetError: there is not so much space.
    """
    if not count:
        return 0
    size = adapter_bytes(recipe)
    need = size * (count + 6)  # two checkpoints of one adapter, each with two moments of the optimizer
    folder = recipe.output_dir.absolute()
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    say(f"{count} adapters of {size / 2**20:.1f} MiB: {need / 2**30:.2f} GiB of disk, {free / 2**30:.1f} GiB are free")
    if need > free:
        raise FleetError(
            f"{folder}: the fleet needs {need / 2**30:.2f} GiB of disk, {free / 2**30:.2f} GiB are free. Nothing was "
            "trained. Free some, lower lora.r, or raise fleet.min_examples."
        )
    return need


def _same_base(registry: Registry, engine: Engine, recipe: Recipe) -> None:
    """Writes the base into the book, or refuses a folder whose adapters are of another."""
    mine = engine.base()
    known = registry.meta("base")
    if known is None:
        registry.set_meta("base", json.dumps(mine))
    elif not same_base(json.loads(known), mine):
        raise FleetError(
            f"{recipe.output_dir}: the adapters of this fleet are of another base than {recipe.model}. Nothing was "
            "touched. Take another folder with --set train.output_dir=FOLDER."
        )


def _train(
    registry: Registry,
    groups: dict[Key, Group],
    stages: dict[Key, Recipe],
    engine: Engine,
    only: Sequence[str],
    total: int,
) -> Tally:
    """One pass over what is due: everybody, cohorts, users."""
    tally = Tally()
    at_work: dict[Key, Adapter] = {}
    with progress_bar() as bar:
        progress = bar.add_task("Adapters", total=total, note="")

        def tell(note: str) -> None:
            failures = f", {tally.failed} failed" if tally.failed else ""
            bar.update(progress, advance=1, note=f"{note}{failures}")

        def tasks(kind: str) -> Iterator[Task]:
            for adapter in registry.due(kind, _wanted(kind, only)):
                key = (adapter.kind, adapter.name)
                group = groups.get(key)
                if group is None:  # of a user who is no longer in the data
                    continue
                parent = None if group.parent is None else registry.get(*group.parent)
                if group.parent is not None and (parent is None or parent.trained_run is None):
                    why = f"{' '.join(group.parent)}, which it starts from, was not trained"
                    _failed(registry, adapter, why, tally)
                    tell("")
                    continue
                start = None if parent is None else registry.folder / parent.folder / "adapter"
                at_work[key] = adapter
                yield Task(key, stages[key], group.rows, registry.folder / group.folder, adapter.run, start)

        def done(task: Task, outcome: Outcome | PerceLiteError) -> None:
            tell(_note(registry, at_work.pop(task.key), task.recipe, outcome, tally))

        for kind in KINDS[::-1]:
            engine.run(tasks(kind), done)
    return tally


def _failed(registry: Registry, adapter: Adapter, why: str, tally: Tally) -> None:
    registry.failed(adapter, why)
    warn(f"{adapter.kind} {adapter.name}: left out. {why}")
    tally.failed += 1


def _note(registry: Registry, adapter: Adapter, recipe: Recipe, outcome: Outcome | PerceLiteError, tally: Tally) -> str:
    """Writes down what came of one; gives what is said of it beside the bar."""
    if isinstance(outcome, PerceLiteError):
        _failed(registry, adapter, str(outcome), tally)
        return ""
    state, why = _verdict(recipe, adapter, outcome)
    test = outcome.losses.get("test") or outcome.losses.get("validation")
    gain = None if test is None else test["start"] - test["own"]
    registry.done(adapter, state, why, outcome.bytes, gain, {"losses": outcome.losses, "weights": outcome.weights})
    tally.trained += 1
    tally.held_back += state == "held back"
    return "" if test is None else f"loss {test['own']:.3f}"


def _verdict(recipe: Recipe, adapter: Adapter, outcome: Outcome) -> tuple[str, str]:
    """Whether a user's adapter goes into service: it must beat what it would replace, on validation rows."""
    gate, judged = recipe.fleet.gate, outcome.losses.get("validation")
    if adapter.kind != "user" or gate is None:
        return "in service", "trained"
    if judged is None:
        return "in service", "trained; no validation rows to judge it by"
    gain = judged["start"] - judged["own"]
    if gain <= gate:
        return (
            "held back",
            f"{gain:+.3f} nats a token on validation rows against what it replaces; gate {gate:g}",
        )
    return "in service", f"trained; {gain:+.3f} nats a token on validation rows"


def _told(registry: Registry, tally: Tally) -> dict[str, Any]:
    """What a run shows at its end."""
    return {
        "trained": tally.trained,
        "held_back": tally.held_back,
        "failed": tally.failed,
        "states": registry.counts(),
    }
