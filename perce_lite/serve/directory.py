"""What `model` of a request may name: the base, adapters, and users, with the adapter that serves each."""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

from perce_lite.console import warn
from perce_lite.data.readers import RowsByUser, known_users
from perce_lite.errors import DataError, ServeError
from perce_lite.fleet.groups import SHARED, key_of
from perce_lite.fleet.queries import deletions, folder_in_service, who
from perce_lite.fleet.registry import Registry, opened
from perce_lite.model import adapter_files
from perce_lite.model.adapter_files import recipe_of
from perce_lite.serve.keys import Caller

Metadata = dict[str, Any]

BASE, ADAPTER = "base", "adapter"
_RESERVED = (BASE, ADAPTER, SHARED[1])
_USER = "user:"


@dataclass(frozen=True)
class Entry:
    """One model.

    id: what a request calls it; name: the user's name, or the adapter's as `adapters show` takes it
    gain: nats a token on held-out rows by which a user's own adapter beats what it started from; None: unknown
    """

    id: str
    kind: Literal["base", "adapter", "user"]
    name: str
    gain: float | None = None

    def seen_by(self, caller: Caller) -> bool:
        """Whether `caller` may know of it: a key that is tied to a user sees that user and the base."""
        return caller.user is None or self.kind == "base" or (self.kind == "user" and self.name == caller.user)


class Directory(Protocol):
    """Who is there. `reference`: metadata of an adapter whose template and data are those of whom the base serves."""

    reference: Metadata

    def entries(self) -> list[Entry]:
        """Every model: the base, adapters, users by name."""

    def find(self, model: str) -> Entry | None:
        """The entry that a request means; None: there is none."""

    def deleted_on(self, model: str) -> str | None:
        """The day on which the user was deleted whom a request means; None: no such user was."""

    def metadata_of(self, entry: Entry) -> Metadata | None:
        """Metadata of the adapter that serves it, as `adapter_files.read_metadata`; None: the base serves."""


def user_id(user: str) -> str:
    """What a request calls a user: the name, or "user:" ahead of one that would mean something else."""
    clashes = user in _RESERVED or user.startswith((_USER, "cohort:"))
    return f"{_USER}{user}" if clashes else user


def _user_of(model: str) -> str:
    return model.removeprefix(_USER)


class OneAdapter:
    """The adapter in `folder`, its base, and the users of its data, all served by it.

    Raises:
        AdapterError: no adapter there. Data that cannot be read are warned of: then no users are listed.
    """

    def __init__(self, folder: Path) -> None:
        self.reference = adapter_files.read_metadata(folder)
        try:
            self._users = known_users(recipe_of(self.reference))
        except DataError as error:
            warn(f"{error}. No users are listed; give the profile with each question.")
            self._users = []

    def entries(self) -> list[Entry]:
        first = [Entry(BASE, "base", BASE), Entry(ADAPTER, "adapter", ADAPTER)]
        gone = deletions(Path(self.reference["folder"]), self._users)
        return first + [Entry(user_id(user), "user", user) for user in self._users if user not in gone]

    def find(self, model: str) -> Entry | None:
        return next((entry for entry in self.entries() if model in (entry.id, f"{_USER}{entry.name}")), None)

    def deleted_on(self, model: str) -> str | None:
        return deletions(Path(self.reference["folder"]), [_user_of(model)]).get(_user_of(model))

    def metadata_of(self, entry: Entry) -> Metadata | None:
        return None if entry.kind == "base" else self.reference


class Fleet:
    """The fleet in `folder`; its registry is asked anew for every request, so what a later run trains is served.

    Raises:
        FleetError: no fleet there; ServeError: no adapter of it is in service.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with opened(folder) as registry:
            folders = (folder_in_service(registry, adapter) for adapter in registry.all())
            first = next((folder for folder in folders if folder is not None), None)
        if first is None:
            raise ServeError(f"{folder}: no adapter of this fleet is in service. Run `perce-lite fleet` first.")
        self.reference = adapter_files.read_metadata(first)

    def entries(self) -> list[Entry]:
        with opened(self.folder) as registry:
            trained = [adapter for adapter in registry.all() if adapter.verdict == "in service"]
            gains = {adapter.name: adapter.gain for adapter in trained if adapter.kind == "user"}
            users = registry.users()
        shared = [_id_of(adapter.key) for adapter in trained if adapter.kind != "user"]
        first = [Entry(BASE, "base", BASE), *(Entry(name, "adapter", name) for name in shared)]
        return first + [Entry(user_id(user), "user", user, gains.get(user)) for user in users]

    def find(self, model: str) -> Entry | None:
        if model == BASE:
            return Entry(BASE, "base", BASE)
        with opened(self.folder) as registry:
            kind, name = key_of(model)
            if kind != "user":
                adapter = registry.get(kind, name)
                return Entry(model, "adapter", model) if adapter and folder_in_service(registry, adapter) else None
            return _user_entry(registry, _user_of(model))

    def deleted_on(self, model: str) -> str | None:
        with opened(self.folder) as registry:
            return registry.deleted_on(_user_of(model))

    def metadata_of(self, entry: Entry) -> Metadata | None:
        if entry.kind == "base":
            return None
        with opened(self.folder) as registry:
            if entry.kind == "user":
                folder = who(registry, entry.name).folder
                serving = None if folder is None else Path(folder)
            else:
                adapter = registry.get(*key_of(entry.name))
                serving = None if adapter is None else folder_in_service(registry, adapter)
        return None if serving is None else adapter_files.read_metadata(serving)


def _id_of(key: tuple[str, str]) -> str:
    return key[1] if key == SHARED else f"{key[0]}:{key[1]}"


def _user_entry(registry: Registry, user: str) -> Entry | None:
    if registry.user(user) is None:
        return None
    own = registry.get("user", user)
    return Entry(user_id(user), "user", user, own.gain if own and own.verdict == "in service" else None)


class HeldOut:
    """Held-out questions of a user, with what the user wrote. The data are read at the first call, and kept aside."""

    def __init__(self, metadata: Metadata) -> None:
        self._recipe, self._open = recipe_of(metadata), ExitStack()

    @cached_property
    def _rows(self) -> RowsByUser:
        return self._open.enter_context(RowsByUser(self._recipe))

    def of(self, user: str, limit: int = 50) -> list[dict[str, str]]:
        """{query, written} of rows that training has not seen, `limit` at the most.

        Raises:
            DataError: the data cannot be read.
        """
        if user not in self._rows.users:
            return []
        rows = [row for row in self._rows.rows_of(user) if row.split != "train" and len(row.completion) == 1]
        return [{"query": row.query, "written": row.completion[0]["content"].strip()} for row in rows[:limit]]

    def close(self) -> None:
        """Removes the temporary file."""
        self._open.close()


def tied_users(callers: Iterable[Caller], directory: Directory) -> None:
    """Raises ServeError where a key is tied to a user who is not there: a slip of the pen would lock them out."""
    for caller in callers:
        if caller.user is not None and directory.find(f"{_USER}{caller.user}") is None:
            raise ServeError(f"--api-key-file: a key is tied to {caller.user}, and there is no such user.")
