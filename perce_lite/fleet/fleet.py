"""A fleet run: enrols users in the registry, trains the adapters that are due, records the results."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perce_lite.console import progress_bar, say, warn
from perce_lite.data.readers import RowsByUser
from perce_lite.errors import DataError, FleetError, PerceLiteError
from perce_lite.fleet.disk import DiskSize
from perce_lite.fleet.engines.protocol import Engine, OrderingEngine, Outcome, Task
from perce_lite.fleet.groups import PARENTS, Group, Key, Plan, key_of, plan, run_fingerprint
from perce_lite.fleet.queries import refuse_deleted
from perce_lite.fleet.registry import BY_CONTENT, KEPT, KINDS, PACKS, Adapter, Registry, held, imagined
from perce_lite.fleet.result import AdapterResult, FleetResult, gains
from perce_lite.memory import modules_frozen
from perce_lite.model.adapter_weights import drop_unused_parents
from perce_lite.model.fingerprint import same_base
from perce_lite.model.footprint import refuse_exports, source_fingerprint
from perce_lite.recipe import Recipe, training_config
from perce_lite.training.early_stopping import NEEDS, require_validation
from perce_lite.words import counted

PAGE = "fleet.html"


@dataclass
class Tally:
    """Adapters that a run has finished so far. report: takes each as it ends, and None in between."""

    report: Callable[[AdapterResult | None], None] = field(default=lambda result: None)
    trained: int = 0
    held_back: int = 0
    failed: int = 0


def fleet(
    recipe: Recipe,
    engine: Callable[[Recipe], Engine],
    only: Sequence[str] = (),
    retrain: Sequence[str] = (),
    dry_run: bool = False,
    report: Callable[[AdapterResult | None], None] = lambda result: None,
) -> FleetResult:
    """Trains every adapter that is due, parents before the adapters that start from them.

    engine: makes the thing that trains, where there is something to train
    only: users to train now, with what they start from; the others wait
    retrain: users to train again, though nothing has changed; "cohort:NAME" or "all" for what others start from
    dry_run: nothing is trained, and the registry stays as it was
    report: called with every adapter that was due as it ends, and with None while others are trained

    Raises:
        FleetError: another run is on this folder, it is of another base, or a name is not known.
        DataError: as `groups.plan`; DiskFullError: no space left. One user's failure is recorded; the run continues.
    """
    refuse_exports(recipe)
    # Every row of a user counts: with data.max_rows, one user's new rows would push out another's.
    with RowsByUser(recipe) as data, _registry(recipe, dry_run) as registry:
        planned = _planned(data, registry, recipe, only, retrain)
        work = Work.of(recipe, planned, only)
        for name in retrain:
            registry.ask(*key_of(name), "asked for")
        _enrol(registry, planned, work.recipes)
        _apply_new_gate(registry, recipe)
        _store_settings(registry, recipe)
        due = {kind: sum(1 for _ in registry.due(kind, work.wanted(kind))) for kind in KINDS}
        parents = sum(group.key[0] != "user" for group in planned.groups)
        bytes_needed = _disk(recipe, parents, due)
        tally = Tally(report)
        if sum(due.values()) and not dry_run:
            trainer = engine(recipe)
            order = _order(registry, work, trainer, due)
            _same_base(registry, trainer, recipe)
            _train(registry, work, trainer, order, sum(due.values()), tally)
        if not dry_run:
            _clear(registry, recipe)
        adapters = tuple(registry.all())
        return FleetResult(
            folder=str(recipe.output_dir),
            due=due,
            bytes_needed=bytes_needed,
            dry_run=dry_run,
            trained=tally.trained,
            held_back=tally.held_back,
            failed=tally.failed,
            states=registry.counts(),
            gains=gains(adapters),
            adapters=adapters,
        )


def _clear(registry: Registry, recipe: Recipe) -> None:
    """Removes what trainings left that nobody needs; also after a run that was killed before it came to that."""
    if next(registry.due("user"), None) is None:  # its users were trained in another way since
        (recipe.output_dir / KEPT).unlink(missing_ok=True)
        shutil.rmtree(recipe.output_dir / PACKS, ignore_errors=True)
    _drop_unused_parents(registry)


def _planned(data: RowsByUser, registry: Registry, recipe: Recipe, only: Sequence[str], retrain: Sequence[str]) -> Plan:
    """Who gets which adapter, without those who were deleted; raises as `fleet`."""
    for name in retrain:
        registry.readmit(name)
    for name in only:
        refuse_deleted(recipe.output_dir, name)
    gone = {user for user in data.users if registry.was_deleted(user)}
    if gone:
        users = counted(len(gone), "user who was deleted is", "users who were deleted are")
        say(f"{users} left out, though the data has them; --retrain takes one in")
    planned = plan(data, recipe, gone)
    _report_users_without_adapter(planned, recipe)
    _require_validation_rows(planned, recipe)
    _require_known(planned, [*(("user", name) for name in only), *(key_of(name) for name in retrain)])
    return planned


@contextmanager
def _registry(recipe: Recipe, dry_run: bool) -> Iterator[Registry]:
    if dry_run:
        with imagined(recipe.output_dir) as copy:
            yield copy
        return
    with held(recipe.output_dir) as registry:
        yield registry


@dataclass(frozen=True)
class Work:
    """Groups and their recipes by key; `only`: names to train by kind, None for all."""

    planned: Plan
    groups: dict[Key, Group]
    recipes: dict[Key, Recipe]
    only: dict[str, set[str]] | None

    @classmethod
    def of(cls, recipe: Recipe, planned: Plan, only: Sequence[str]) -> "Work":
        """`fleet.train` and `lora.core_only` count for groups that start from another, `fleet.patience` for users."""
        first, later = recipe.without_cores(), recipe.of_users()
        training_config(later)  # its faults, before anything is trained
        patience = recipe.fleet.patience
        of_others = {False: first, True: later}
        of_users = {starts: made.with_patience(patience) for starts, made in of_others.items()}
        groups = {group.key: group for group in planned.groups}
        recipes = {
            group.key: (of_users if group.key[0] == "user" else of_others)[group.parent is not None]
            for group in planned.groups
        }
        if not only:
            return cls(planned, groups, recipes, None)
        wanted: dict[str, set[str]] = {kind: set() for kind in KINDS}
        for user in only:
            key: Key | None = ("user", user)
            while key is not None:
                wanted[key[0]].add(key[1])
                key = groups[key].parent
        return cls(planned, groups, recipes, wanted)

    def wanted(self, kind: str) -> set[str] | None:
        """Names to train of this kind; None: every one."""
        return None if self.only is None else self.only[kind]


def _report_users_without_adapter(planned: Plan, recipe: Recipe) -> None:
    """Reports users who have too few rows for an adapter of their own."""
    few = [entry.user for entry in planned.users if not entry.own]
    if few and recipe.fleet.group_by == "user":
        names = ", ".join(few[:10]) + (" ..." if len(few) > 10 else "")
        reason = f"fewer than {recipe.fleet.min_examples} training rows (fleet.min_examples)"
        say(f"{counted(len(few), 'user has', 'users have')} {reason}, so no adapter of their own: {names}")


def _require_validation_rows(planned: Plan, recipe: Recipe) -> None:
    """Raises DataError where early stopping is asked for and nobody has validation rows; reports users without any."""
    held_out = {entry.user: "validation" in planned.data.outline(entry.user).splits for entry in planned.users}
    require_validation(recipe, any(held_out.values()))
    own = [entry.user for entry in planned.users if entry.own] if recipe.fleet.patience is not None else []
    without = [user for user in own if not held_out[user]]
    if without and len(without) == len(own):
        raise DataError(f"fleet.patience {NEEDS}; nobody has any. Raise split.validation, or leave it out.")
    if without:
        names = ", ".join(without[:10]) + (" ..." if len(without) > 10 else "")
        users = counted(len(without), "user has no validation rows", "users have no validation rows")
        say(f"{users}, so training goes to its last step (fleet.patience): {names}")


def _require_known(planned: Plan, keys: Sequence[Key]) -> None:
    """Raises FleetError where a key is of no group: a user who is not in the data, or gets no adapter of their own."""
    users = {entry.user: entry.own for entry in planned.users}
    groups = {group.key for group in planned.groups}
    for kind, name in keys:
        if kind != "user" and (kind, name) not in groups:
            raise FleetError(f"{kind} {name}: this fleet has no such adapter")
        if kind == "user" and name not in users:
            known = ", ".join(list(users)[:10])
            raise FleetError(f"user {name}: not in the data; users: {known}{' ...' if len(users) > 10 else ''}")
        if kind == "user" and not users[name]:
            raise FleetError(f"user {name} gets no adapter of their own (fleet.min_examples, fleet.group_by)")


def _enrol(registry: Registry, planned: Plan, recipes: Mapping[Key, Recipe]) -> None:
    """Writes users and adapters into the registry. An adapter whose inputs changed becomes due."""
    sources = {
        id(recipe): f"{recipe.fleet_fingerprint()} {source_fingerprint(recipe)}"
        for recipe in {id(recipe): recipe for recipe in recipes.values()}.values()
    }
    runs: dict[Key, str] = {}
    # An earlier version looked at the rows themselves: what it trained is as it was where those are.
    older = {} if registry.meta(BY_CONTENT) else registry.runs_of_users()
    if not older:
        registry.set_meta(BY_CONTENT, "yes")

    def run_of(group: Group) -> str:
        parent = None if group.parent is None else runs[group.parent]
        inputs = sources[id(recipes[group.key])], registry.generation(*group.key), parent
        if group.key[0] != "user":
            return run_fingerprint(group, *inputs, None)
        run, before = run_fingerprint(group, *inputs, planned.content_of(group)), older.get(group.key[1], ())
        if before and run not in before:
            of_rows = run_fingerprint(group, *inputs, planned.fingerprints_of(group))
            return of_rows if of_rows in before else run
        return run

    def records() -> Iterator[dict[str, Any]]:
        """A line an adapter; only one user's texts are in memory at a time."""
        for group in _under_bar(planned.groups, "Looking for what is due"):
            run = run_of(group)
            if group.key[0] != "user":
                runs[group.key] = run
            (kind, name), (parent_kind, parent_name) = group.key, group.parent or (None, None)
            yield {
                "kind": kind, "name": name, "folder": group.folder, "parent_kind": parent_kind,
                "parent_name": parent_name, "run": run, "examples": group.examples,
            }  # fmt: skip

    registry.enrol(planned.users, records())


def _under_bar(groups: Sequence[Group], what: str) -> Iterator[Group]:
    """`groups`, one after another, under a progress bar."""
    with progress_bar() as bar:
        progress = bar.add_task(what, total=len(groups), note="")
        for group in groups:
            yield group
            bar.advance(progress)


def _order(registry: Registry, work: Work, engine: Engine, due: Mapping[str, int]) -> list[str] | None:
    """The users in the order that the engine chooses; None: by name."""
    if not isinstance(engine, OrderingEngine):
        return None
    groups = [work.groups[adapter.key] for adapter in registry.due("user", work.wanted("user"))]
    lengths = {
        group.key[1]: max((row.characters for row in work.planned.rows_of(group)), default=0)
        for group in _under_bar(groups, "Measuring rows")
    }
    return engine.order(lengths, sum(due.values()) - len(groups))


def _apply_new_gate(registry: Registry, recipe: Recipe) -> None:
    """Where `fleet.gate` changed since the last run, decides anew about every trained adapter."""
    gate = json.dumps(recipe.fleet.gate)
    if registry.meta("gate") not in (None, gate):
        for adapter in registry.all():
            if adapter.verdict is not None:
                registry.judged(adapter, *verdict(recipe, adapter.kind, adapter.metrics["losses"]))
    registry.set_meta("gate", gate)


def _store_settings(registry: Registry, recipe: Recipe) -> None:
    """Stores the settings of the recipe that `adapters who` and `adapters delete` read."""
    store = training_config(recipe).store
    stores = set(json.loads(registry.meta("stores") or "[]")) | ({str(Path(store).absolute())} if store else set())
    registry.set_meta("stores", json.dumps(sorted(stores)))
    registry.set_meta("data", str(recipe.data_path or recipe.data.hub))
    registry.set_meta("group_by", recipe.fleet.group_by)
    registry.set_meta("min_examples", str(recipe.fleet.min_examples))


def _disk(recipe: Recipe, parents: int, due: Mapping[str, int]) -> int:
    """Bytes that the adapters which are due, and the checkpoints of those at work, will take.

    parents: how many adapters others start from; due: adapters by kind

    Raises:
        FleetError: there is not so much space.
    """
    count, users = sum(due.values()), due["user"]
    if not count:
        return 0
    size = DiskSize.of(recipe)
    need = size.need(parents, count - users, users)
    folder = recipe.output_dir.absolute()
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    kinds = [(count - users, size.whole), (users, size.of_a_user)] if size.core else [(count, size.whole)]
    sizes = " and ".join(f"{many} adapters of {bytes_each / 2**20:.1f} MiB" for many, bytes_each in kinds if many)
    say(
        f"{sizes}, with checkpoints in training: {need / 2**30:.2f} GiB of disk at the most, "
        f"{free / 2**30:.1f} GiB are free"
    )
    if size.core:
        say(f"Users train a core of {size.trained // 4:,} parameters, of {size.numbers // 4:,} in an adapter")
    if need > free:
        raise FleetError(
            f"{folder}: the fleet needs {need / 2**30:.2f} GiB of disk, {free / 2**30:.2f} GiB are free. Nothing was "
            "trained. Free some, lower lora.r, take fleet.adapter_dtype: bfloat16 or lora.core_only: true, or raise "
            "fleet.min_examples."
        )
    return need


def _same_base(registry: Registry, engine: Engine, recipe: Recipe) -> None:
    """Stores the base's identity; raises FleetError where the fleet's adapters are of another base."""
    base = engine.base()
    known = registry.meta("base")
    if known is not None and not same_base(json.loads(known), base):
        raise FleetError(
            f"{recipe.output_dir}: the adapters of this fleet are of another base than {recipe.model}. Nothing was "
            "touched. Take another folder with --set train.output_dir=FOLDER."
        )
    registry.set_meta("base", json.dumps(base))  # an earlier version noted less of it


def _train(
    registry: Registry, work: Work, engine: Engine, order: Sequence[str] | None, total: int, tally: Tally
) -> None:
    """Trains what is due: the shared adapter, then cohorts, then users. order: of the users; None: by name."""
    at_work: dict[Key, Adapter] = {}
    with progress_bar() as bar:
        progress = bar.add_task("Adapters", total=total, note="")

        def show(loss: float | None, share: float) -> None:
            speed = bar.tasks[0].speed
            rate = "" if speed is None else f"{3600 * speed:.0f} an hour"
            now = "" if loss is None else f"loss {loss:.3f}"
            failures = f"{tally.failed} failed" if tally.failed else ""
            note = ", ".join(part for part in (rate, now, failures) if part)
            so_far = tally.trained + tally.failed + share
            bar.update(progress, completed=max(so_far, bar.tasks[0].completed), note=note)
            tally.report(None)

        def tasks(kind: str) -> Iterator[Task]:
            for adapter in _due(registry, work, kind, order):
                group = work.groups[adapter.key]
                parent = None if group.parent is None else registry.get(*group.parent)
                if parent is not None and parent.due:
                    _failed(registry, adapter, f"{' '.join(parent.key)}, which it starts from, was not trained", tally)
                    show(None, 0)
                    continue
                start = None if parent is None else registry.folder / parent.folder / "adapter"
                at_work[adapter.key] = adapter
                registry.starts(adapter, group.users)
                folder = registry.folder / adapter.folder  # an earlier version may have named it
                rows = work.planned.rows_of(group)
                yield Task(adapter.key, work.recipes[adapter.key], rows, folder, adapter.run, start)

        def done(task: Task, outcome: Outcome | PerceLiteError) -> None:
            _record(registry, at_work.pop(task.key), task.recipe, outcome, tally)
            show(None, 0)

        with modules_frozen():
            for kind in reversed(KINDS):
                engine.run(tasks(kind), done, show)


def _drop_unused_parents(registry: Registry) -> None:
    """Removes what cores stood in and none stands in any more, since all were trained anew."""
    folders = (registry.folder / adapter.folder / "adapter" for adapter in registry.all())
    drop_unused_parents(registry.folder / "adapters" / PARENTS, folders)


def _due(registry: Registry, work: Work, kind: str, order: Sequence[str] | None) -> Iterator[Adapter]:
    """The adapters of a kind that are to be trained, users in `order`, each read when it is needed."""
    if kind != "user" or order is None:
        yield from registry.due(kind, work.wanted(kind))
        return
    for name in order:
        adapter = registry.get(kind, name)
        assert adapter is not None
        yield adapter


def _failed(registry: Registry, adapter: Adapter, why: str, tally: Tally) -> None:
    registry.failed(adapter, why)
    warn(f"{adapter.kind} {adapter.name}: left out. {why}")
    tally.failed += 1
    tally.report(AdapterResult(*adapter.key, None, None, "failed", why))


def _record(
    registry: Registry, adapter: Adapter, recipe: Recipe, outcome: Outcome | PerceLiteError, tally: Tally
) -> None:
    """Records the outcome of one task in the registry."""
    if isinstance(outcome, PerceLiteError):
        _failed(registry, adapter, str(outcome), tally)
        return
    decision, why = verdict(recipe, adapter.kind, outcome.losses)
    test = outcome.losses.get("test") or outcome.losses.get("validation")
    gain = None if test is None else test["start"] - test["own"]
    trained = {"core_only": recipe.core_only, "parameters": outcome.parameters}
    stopping = {} if outcome.stopping is None else {"early_stopping": outcome.stopping}
    metrics = {"losses": outcome.losses, "weights": outcome.weights, **trained, **stopping}
    registry.done(adapter, decision, why, outcome.bytes, gain, metrics)
    tally.trained += 1
    tally.held_back += decision == "held back"
    folder = registry.folder / adapter.folder / "adapter"
    tally.report(AdapterResult(*adapter.key, folder, gain, decision, None))


def verdict(recipe: Recipe, kind: str, losses: Mapping[str, Mapping[str, float]]) -> tuple[str, str]:
    """("in service" or "held back", why): a user's adapter must beat its parent by `fleet.gate` on validation rows."""
    gate, judged = recipe.fleet.gate, losses.get("validation")
    if kind != "user" or gate is None:
        return "in service", "trained"
    if judged is None:
        return "in service", "trained; no validation rows to judge it by"
    gain = judged["start"] - judged["own"]
    if gain > gate:  # not so where it is no number
        return "in service", f"trained; {gain:+.3f} nats a token on validation rows"
    return "held back", f"{gain:+.3f} nats a token on validation rows against what it replaces; gate {gate:g}"
