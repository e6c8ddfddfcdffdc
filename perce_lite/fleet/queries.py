"""Queries on a fleet's registry: which adapter serves a user, verification of the files, deletion of a user."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from perce_lite.errors import AdapterError, FleetError
from perce_lite.files import METADATA, bytes_of, earlier_name, read_json, safe_name
from perce_lite.fleet.groups import SHARED, Key, key_of, served_name
from perce_lite.fleet.registry import FILE, KEPT, PACKS, SERVED, Adapter, Registry, held, imagined, opened
from perce_lite.model import store_files
from perce_lite.model.adapter_files import is_core, require_whole

PERSONAL = (
    KEPT, PACKS, f"{SERVED}/users.json",
    "fleet.html", "eval.html", "inspect.html", "compare.html", "figures.json", "eval-answers.json", "train.html",
)  # fmt: skip
"""Files in a fleet's folder, written by other commands, that quote users' texts or are trained on them."""


def find(folder: Path | None) -> Path:
    """`folder`, or where that is None the only fleet under runs/.

    Raises:
        FleetError: none there, or several to choose from.
    """
    if folder is not None:
        return folder
    folders = sorted(path.parent for path in Path("runs").glob(f"*/{FILE}"))
    if len(folders) == 1:
        return folders[0]
    choice = f"several: {', '.join(map(str, folders))}" if folders else "none"
    raise FleetError(f"Which fleet? Under runs/ there are {choice}. Give its folder with --fleet.")


@dataclass(frozen=True)
class Serving:
    """Which adapter serves a user. The fields are the keys of `adapters who --json`.

    adapter: (kind, name); None: the base serves
    folder: of the adapter's files; None: the base serves
    why: the reasons, separated by "; "
    """

    user: str
    adapter: Key | None
    folder: str | None
    why: str

    def figures(self) -> dict[str, Any]:
        """The JSON object of `adapters who --json`."""
        return {**vars(self), "adapter": None if self.adapter is None else list(self.adapter)}


@dataclass(frozen=True)
class AdapterFacts:
    """All that is known of one adapter.

    adapter: its row of the registry
    trained: what its training changed, in words
    lineage: model and fingerprints from its metadata; None: it was not trained yet
    """

    adapter: Adapter
    trained: str
    lineage: "Lineage | None"

    def figures(self) -> dict[str, Any]:
        """The JSON object of `adapters show --json`."""
        facts = {"state": self.adapter.state, "trained": self.trained, **asdict(self.adapter)}
        return facts if self.lineage is None else {**facts, **asdict(self.lineage)}


@dataclass(frozen=True)
class Lineage:
    """The model that an adapter was trained on, and the fingerprints of base, recipe and data."""

    model: str
    base_fingerprint: str
    recipe_fingerprint: str
    data_fingerprint: str


def who(registry: Registry, user: str) -> Serving:
    """Which adapter serves `user`, and why that one.

    Raises:
        FleetError: no such user.
    """
    cohort, examples, own = _known(registry, user)
    reasons = []
    chain: list[Key] = [("user", user)] if own else []
    chain += [("cohort", cohort)] if cohort is not None else []
    if not own and registry.meta("group_by") == "user":
        least = registry.meta("min_examples")
        reasons.append(f"{examples} training rows are too few for an adapter of their own (fleet.min_examples {least})")
    for key in [*chain, SHARED]:
        adapter = registry.get(*key)
        if adapter is None:
            continue
        folder = folder_in_service(registry, adapter)
        if folder is not None:
            reasons.append(adapter.why if not adapter.due else f"in service until trained anew: {adapter.why}")
            return Serving(user, key, str(folder), "; ".join(reasons))
        state = adapter.verdict if adapter.verdict == "held back" else adapter.state
        reasons.append(f"{_called(adapter)} is {state}: {adapter.why}")
    reasons.append("so the base serves them")
    return Serving(user, None, None, "; ".join(reasons))


def folder_in_service(registry: Registry, adapter: Adapter) -> Path | None:
    """The folder of an adapter's files; None where it is not in service, or they are of another training."""
    folder = registry.folder / adapter.folder / "adapter"
    return folder if adapter.verdict == "in service" and _is_of(folder, adapter) else None


def _known(registry: Registry, user: str) -> tuple[str | None, int, bool]:
    """What the registry says of `user`; raises FleetError where it knows no such user."""
    known = registry.user(user)
    if known is None:
        _refuse(f"user {user}", registry.deleted_on(user))
        like = ", ".join(registry.users_like(user))
        raise FleetError(f"user {user}: the fleet knows no such user" + (f"; it knows {like}" if like else ""))
    return known


def refuse_deleted(place: Path, user: str | None = None) -> None:
    """Refuses what is asked for a deleted user: by `user`, or by a `place` in a fleet that was their folder.

    place: an adapter's folder or a run's; outside of a fleet nobody was deleted

    Raises:
        FleetError: naming the day.
    """
    folder = _fleet_around(place)
    if folder is None:
        return
    with opened(folder) as registry:
        if user is not None:
            _refuse(f"user {user}", registry.deleted_on(user))
        for part in place.absolute().relative_to(folder).parts:
            _refuse(f"{place}: its user", registry.folder_deleted_on(part))


def deletions(place: Path, users: Iterable[str]) -> dict[str, str]:
    """Those of `users` who were deleted from the fleet that `place` lies in, with the days."""
    folder = _fleet_around(place)
    if folder is None:
        return {}
    with opened(folder) as registry:
        days = {user: registry.deleted_on(user) for user in users}
    return {user: day for user, day in days.items() if day is not None}


def _fleet_around(place: Path) -> Path | None:
    """The folder of the fleet that `place` is or lies in; None: it lies in none."""
    place = place.absolute()
    return next((folder for folder in (place, *place.parents) if (folder / FILE).is_file()), None)


def _refuse(who: str, deleted_on: str | None) -> None:
    """Raises FleetError where there is a day of deletion."""
    if deleted_on is not None:
        raise FleetError(
            f"{who} was deleted on {deleted_on}, with all that was written of them. If they are to be served again and "
            "your data has their texts: perce-lite fleet RECIPE --retrain USER."
        )


def _is_of(folder: Path, adapter: Adapter) -> bool:
    """Whether `folder` holds the training that the registry recorded, not one that was killed before recording."""
    metadata = read_json(folder / METADATA)
    return metadata is not None and metadata.get("run") == adapter.trained_run


def _called(adapter: Adapter) -> str:
    return "the shared adapter" if adapter.kind == "all" else f"{adapter.kind} {adapter.name}'s adapter"


def show(registry: Registry, name: str) -> AdapterFacts:
    """All that is known of one adapter: a user's, "cohort:NAME", or "all".

    Raises:
        FleetError: there is none.
    """
    adapter = registry.get(*key_of(name))
    if adapter is None:
        _refuse(f"user {name}", registry.deleted_on(name))
        raise FleetError(f"{name}: the fleet has no such adapter; perce-lite adapters who USER says what serves a user")
    metadata = read_json(registry.folder / adapter.folder / "adapter" / METADATA)
    return AdapterFacts(adapter, trained(adapter), None if metadata is None else lineage(metadata))


def lineage(metadata: Mapping[str, Any]) -> Lineage:
    """The origin of an adapter, from its metadata file."""
    return Lineage(
        model=metadata["recipe"]["model"],
        base_fingerprint=metadata["base"]["fingerprint"],
        recipe_fingerprint=metadata["recipe_fingerprint"],
        data_fingerprint=metadata["data"]["fingerprint"],
    )


def trained(adapter: Adapter) -> str:
    """What its training changed: all of A and B, or a core between those of the adapter that it started from."""
    count = adapter.metrics.get("parameters")
    if count is None:
        return "nothing so far"
    if not adapter.metrics["core_only"]:
        return f"{count:,} parameters"
    start = (
        "the shared adapter"
        if adapter.parent_kind == "all"
        else f"{adapter.parent_kind} {adapter.parent_name}'s adapter"
    )
    return f"a core of {count:,} parameters between A and B of {start} (lora.core_only)"


def verify(registry: Registry) -> list[str]:
    """Faults of trained adapters: files missing or damaged, or of another training than the registry says."""
    faults = []
    for adapter in registry.all():
        if adapter.trained_run is None:
            continue
        folder = registry.folder / adapter.folder / "adapter"
        metadata = read_json(folder / METADATA)
        fault = None
        if metadata is None:
            fault = f"{folder / METADATA} is missing or torn"
        elif metadata.get("run") != adapter.trained_run:
            fault = f"{folder} holds an adapter of another training than the registry says"
        else:
            fault = _damage(folder)
        if fault is not None:
            faults.append(f"{_called(adapter)}: {fault}")
    return faults


def _damage(folder: Path) -> str | None:
    """What is wrong with an adapter's files; of a core its parent is read too, which is another's file."""
    try:
        require_whole(folder)
        if is_core(folder):
            from perce_lite.model.adapter_weights import tensors  # brings torch, which no other question needs

            tensors(folder)
    except AdapterError as error:
        return str(error)
    return None


@dataclass
class Receipt:
    """What a deletion did, or would do.

    earlier: the day of an earlier deletion, after which something was left; None: this is the first
    removed: paths; bytes: their size
    due: what is to be trained again without the user
    left: what may hold texts of theirs and is not removed, with the reason
    """

    user: str
    earlier: str | None = None
    removed: list[str] = field(default_factory=list)
    bytes: int = 0
    due: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def delete(folder: Path, user: str, dry_run: bool = False) -> Receipt:
    """Removes a user's adapter, checkpoints, store files, registry rows, and pages that quote texts.

    dry_run: nothing is removed; the receipt says what would be

    Raises:
        FleetError: no such user; a fleet run is on the folder. Then nothing is removed.
    """
    if not (folder / FILE).is_file():
        raise FleetError(f"{folder}: no fleet here ({FILE} is missing). Give its folder with --fleet.")
    with imagined(folder) if dry_run else held(folder) as registry:
        receipt = Receipt(user, registry.deleted_on(user))
        if receipt.earlier is None:
            _known(registry, user)
        for path in _written_of(registry, user):
            _remove(path, receipt, dry_run)
        for store in map(Path, json.loads(registry.meta("stores") or "[]")):
            for path, size in store_files.delete(store, user, dry_run).items():
                receipt.bytes += size
                receipt.removed.append(str(path))
        for key in registry.forget(user):
            called = "the shared adapter" if key == SHARED else f"the adapter of {' '.join(key)}"
            receipt.due.append(called)
            receipt.left += _exports(registry, key, called)
        data = registry.meta("data")
        if data:
            receipt.left.append(f"{data}: your own data; as long as it holds the user, fleet runs leave them out")
        for name in ("compare", "adapter"):
            if (folder / name).is_dir():
                receipt.left.append(f"{folder / name}: not of the fleet, but it may be trained with the user's texts")
        return receipt


def _written_of(registry: Registry, user: str) -> Iterator[Path]:
    """Every file and folder that a fleet's commands wrote of `user` beside the store, whether it is there or not."""
    folder = registry.folder
    for name in (safe_name(user), earlier_name(user)):
        yield folder / "adapters" / "user" / name
    yield folder / SERVED / served_name(("user", user))
    for personal in PERSONAL:
        yield from (folder / personal, *folder.glob(f".{personal}.*.tmp"))


def _exports(registry: Registry, key: Key, called: str) -> list[str]:
    """What lies exported beside an adapter that has seen a deleted user's texts, and others may be served with."""
    adapter = registry.get(*key)
    beside = [] if adapter is None else sorted((registry.folder / adapter.folder).glob("adapter-*"))
    beside += [place for place in [registry.folder / SERVED / served_name(key)] if place.is_dir()]
    why = f"exported from {called} as it was; remove it, or export it anew (export --all) after the next fleet run"
    return [f"{place}: {why}" for place in beside]


_ATTEMPTS = 20


def _remove(path: Path, receipt: Receipt, dry_run: bool) -> None:
    """Removes `path`, if it is there and also while an export is still writing into it; enters it in `receipt`."""
    for attempt in range(1, _ATTEMPTS + 1):
        if not path.exists():
            return
        try:
            size = bytes_of(path)
            if not dry_run:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        except OSError as error:  # what was counted has gone, or something new has come
            if attempt == _ATTEMPTS:
                raise FleetError(f"{path} cannot be removed: {error}. Run the same command again.") from error
            continue
        receipt.bytes += size
        receipt.removed.append(str(path))
        if dry_run:
            return
