"""Queries on a fleet's registry: which adapter serves a user, verification of the files, deletion of a user."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from perce_lite.errors import FleetError
from perce_lite.files import METADATA, bytes_of, read_json, safe_name
from perce_lite.fleet.groups import SHARED, Key, key_of
from perce_lite.fleet.registry import FILE, KEPT, Adapter, Registry, held

PERSONAL = (
    KEPT, "fleet.html", "eval.html", "inspect.html", "compare.html", "figures.json", "eval-answers.json",
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
        like = ", ".join(registry.users_like(user))
        raise FleetError(f"user {user}: the fleet knows no such user" + (f"; it knows {like}" if like else ""))
    return known


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
    from perce_lite.model import adapter_files  # brings torch, which no other question needs

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
            fault = adapter_files.fault(folder)
        if fault is not None:
            faults.append(f"{_called(adapter)}: {fault}")
    return faults


@dataclass
class Receipt:
    """What a deletion did. `removed` are paths, `bytes` their size; `due` is to be trained again without the user."""

    user: str
    removed: list[str] = field(default_factory=list)
    bytes: int = 0
    due: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def delete(folder: Path, user: str) -> Receipt:
    """Removes a user's adapter, checkpoints, store files, registry rows, and pages that quote texts.

    Raises:
        FleetError: no such user; a fleet run is on the folder. Then nothing is removed.
    """
    if not (folder / FILE).is_file():
        raise FleetError(f"{folder}: no fleet here ({FILE} is missing). Give its folder with --fleet.")
    with held(folder) as registry:
        if not registry.was_deleted(user):
            _known(registry, user)
        receipt = Receipt(user)
        _remove(folder / "adapters" / "user" / safe_name(user), receipt)
        for personal in PERSONAL:
            for file in (folder / personal, *folder.glob(f".{personal}.*.tmp")):
                _remove(file, receipt)
        for store in json.loads(registry.meta("stores") or "[]"):
            for base in sorted(Path(store).iterdir()) if Path(store).is_dir() else []:
                for file in base.glob(f"*{safe_name(user)}.safetensors*"):
                    _remove(file, receipt)
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


def _exports(registry: Registry, key: Key, called: str) -> list[str]:
    """What lies exported beside an adapter that has seen a deleted user's texts, and others may be served with."""
    adapter = registry.get(*key)
    beside = [] if adapter is None else sorted((registry.folder / adapter.folder).glob("adapter-*"))
    why = f"exported from {called} as it was; remove it, or export it anew (export --all) after the next fleet run"
    return [f"{place}: {why}" for place in beside]


def _remove(path: Path, receipt: Receipt) -> None:
    if not path.exists():
        return
    receipt.bytes += bytes_of(path)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    receipt.removed.append(str(path))
