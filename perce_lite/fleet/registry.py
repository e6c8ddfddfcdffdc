"""A fleet's registry: one SQLite file that maps users to adapters, with lineage, metrics and state."""

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from perce_lite.errors import DiskFullError, FleetError
from perce_lite.files import safe_name
from perce_lite.locks import held_alone

VERSION = 2
"""Schema version of the tables below (`PRAGMA user_version`)."""

FILE = "fleet.sqlite"

KEPT = "slots.pt"
"""File beside the registry with the training state of users who were interrupted in slots."""

PACKS = "packs"
"""Folder beside the registry with the training state of users who were interrupted on a cluster, by pack."""

SERVED = "vllm"
"""Folder beside the registry with the adapters as `perce-lite export --all --to vllm` lays them out, by user."""

BY_CONTENT = "by content"
"""Key of `Registry.meta`: no adapter of this fleet was trained by a version that fingerprinted rows with profiles."""

STATES = ("due", "in service", "held back", "failed")
"""due: to be trained; held back: trained, but worse than what it would replace; failed: training raised an error."""

KINDS = ("user", "cohort", "all")

_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE adapters (
  kind TEXT NOT NULL, name TEXT NOT NULL, folder TEXT NOT NULL, parent_kind TEXT, parent_name TEXT,
  present INTEGER NOT NULL, run TEXT NOT NULL, trained_run TEXT, asked INTEGER NOT NULL DEFAULT 0, failed_run TEXT,
  verdict TEXT, why TEXT NOT NULL, examples INTEGER NOT NULL, bytes INTEGER NOT NULL DEFAULT 0, gain REAL,
  metrics TEXT NOT NULL DEFAULT '{}', updated TEXT NOT NULL,
  due INTEGER GENERATED ALWAYS AS (asked OR trained_run IS NOT run) STORED,
  PRIMARY KEY (kind, name)
) WITHOUT ROWID;
CREATE INDEX adapters_due ON adapters (due, present, kind, name);
CREATE TABLE users (
  user TEXT PRIMARY KEY, cohort TEXT, examples INTEGER NOT NULL, own INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE seen (user TEXT, kind TEXT, name TEXT, PRIMARY KEY (user, kind, name)) WITHOUT ROWID;
CREATE TABLE deleted (user_hash TEXT PRIMARY KEY, folder_hash TEXT, deleted_on TEXT) WITHOUT ROWID;
"""

_FROM_1 = """
ALTER TABLE deleted ADD COLUMN folder_hash TEXT;
ALTER TABLE deleted ADD COLUMN deleted_on TEXT;
"""
"""What the tables of version 1 lack."""


@dataclass(frozen=True)
class Adapter:
    """One row of the registry.

    present: 1 if its users are in the data of the last run, else 0
    run: fingerprint of what it should be trained from; trained_run: of what it was trained from
    asked: 1 if it is to be retrained although nothing changed; failed_run: `run` of a training that failed
    verdict: of its last training, "in service" or "held back"; None: it was never trained
    gain: nats a token on test rows by which it is better than its parent (or the base); None where none are held out
    """

    kind: str
    name: str
    folder: str
    parent_kind: str | None
    parent_name: str | None
    present: int
    run: str
    trained_run: str | None
    asked: int
    failed_run: str | None
    verdict: str | None
    why: str
    examples: int
    bytes: int
    gain: float | None
    metrics: dict[str, Any]
    updated: str
    due: int

    @property
    def key(self) -> tuple[str, str]:
        return self.kind, self.name

    @property
    def state(self) -> str:
        """One of STATES."""
        if not self.due:
            return self.verdict or "due"
        return "failed" if self.failed_run == self.run else "due"


def held_out(adapter: Adapter) -> dict[str, float] | None:
    """{base, start, own, tokens} of its last training on test rows, else on validation rows; None without any."""
    losses = adapter.metrics.get("losses", {})
    measured: dict[str, float] | None = losses.get("test") or losses.get("validation")
    return measured


class Registry:
    """The registry of the fleet in `folder`. Open it with `opened` or `held`."""

    def __init__(self, folder: Path, connection: sqlite3.Connection) -> None:
        self.folder, self._db = folder, connection

    def copy_to(self, other: sqlite3.Connection) -> None:
        """Copies the whole registry."""
        self._db.backup(other)

    # Meta

    def meta(self, key: str) -> str | None:
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def set_meta(self, key: str, value: str) -> None:
        with self._db:
            self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    # Users and adapters

    def enrol(self, users: Iterable[tuple[str, str | None, int, bool]], adapters: Iterable[Mapping[str, Any]]) -> None:
        """Upserts users (name, cohort, training rows, whether they get an adapter of their own) and adapters.

        An adapter whose `run` differs from its `trained_run` becomes due.
        """
        with self._db:
            self._db.executemany(
                "INSERT INTO users (user, cohort, examples, own) VALUES (?, ?, ?, ?) ON CONFLICT (user) DO UPDATE SET "
                "cohort = excluded.cohort, examples = excluded.examples, own = excluded.own",
                users,
            )
            self._db.execute("UPDATE adapters SET present = 0")
            self._db.executemany(
                "INSERT INTO adapters (kind, name, folder, parent_kind, parent_name, present, run, why, examples, "
                "updated) VALUES (:kind, :name, :folder, :parent_kind, :parent_name, 1, :run, 'new', :examples, :now) "
                "ON CONFLICT (kind, name) DO UPDATE SET parent_kind = excluded.parent_kind, parent_name = "
                "excluded.parent_name, present = 1, examples = excluded.examples, run = excluded.run",
                ({**adapter, "now": _now()} for adapter in adapters),
            )

    def due(self, kind: str, only: set[str] | None = None) -> Iterator[Adapter]:
        """Adapters of `kind` that are due, by name; read 200 at a time, so memory does not grow with their number."""
        after: str | None = None
        while True:
            clause = "WHERE due = 1 AND present = 1 AND kind = ? AND name > ? ORDER BY name LIMIT 200"
            if after is None:
                page = self._select(clause.replace("name > ?", "name >= ?"), (kind, ""))
            else:
                page = self._select(clause, (kind, after))
            yield from (adapter for adapter in page if only is None or adapter.name in only)
            if len(page) < 200:
                return
            after = page[-1].name

    def runs_of_users(self) -> dict[str, tuple[str | None, ...]]:
        """By user, `run` and `trained_run` of their adapters."""
        rows = self._db.execute("SELECT name, run, trained_run FROM adapters WHERE kind = 'user'")
        return {str(name): (run, trained) for name, run, trained in rows}

    def get(self, kind: str, name: str) -> Adapter | None:
        adapters = self._select("WHERE kind = ? AND name = ?", (kind, name))
        return adapters[0] if adapters else None

    def all(self) -> list[Adapter]:
        """Every adapter: all, cohorts, users."""
        return self._select("ORDER BY kind = 'user', kind = 'cohort', name")

    def counts(self) -> dict[str, int]:
        """Adapters by state."""
        rows = self._db.execute(
            "SELECT CASE WHEN due AND failed_run IS run THEN 'failed' WHEN due THEN 'due' ELSE verdict END, count(*) "
            "FROM adapters GROUP BY 1"
        )
        counted = {str(state): int(count) for state, count in rows}
        return {state: counted.get(state, 0) for state in STATES}

    def user(self, name: str) -> tuple[str | None, int, bool] | None:
        """(cohort, training rows, whether they get an adapter of their own)."""
        row = self._db.execute("SELECT cohort, examples, own FROM users WHERE user = ?", (name,)).fetchone()
        return None if row is None else (row[0], int(row[1]), bool(row[2]))

    def users(self) -> list[str]:
        """Every user, by name."""
        return [str(user) for (user,) in self._db.execute("SELECT user FROM users ORDER BY user")]

    def users_like(self, name: str, limit: int = 10) -> list[str]:
        """Names that begin as `name` does, else the first ones."""
        head = name[:2].replace("%", "").replace("_", "")
        sql = "SELECT user FROM users WHERE user LIKE ? ORDER BY user LIMIT ?"
        rows = self._db.execute(sql, (f"{head}%", limit)).fetchall() or self._db.execute(sql, ("%", limit)).fetchall()
        return [str(user) for (user,) in rows]

    # Results of training

    def done(self, adapter: Adapter, verdict: str, why: str, size: int, gain: float | None, metrics: Any) -> None:
        """Records a finished training."""
        with self._db:
            self._db.execute(
                "UPDATE adapters SET verdict = ?, why = ?, bytes = ?, gain = ?, metrics = ?, trained_run = ?, "
                "asked = 0, failed_run = NULL, updated = ? WHERE kind = ? AND name = ?",
                (verdict, why, size, gain, json.dumps(metrics), adapter.run, _now(), *adapter.key),
            )

    def starts(self, adapter: Adapter, users: Iterable[str]) -> None:
        """Records, before training starts, whose texts the adapter sees; `forget` reads it."""
        with self._db:
            self._db.executemany(
                "INSERT OR IGNORE INTO seen VALUES (?, ?, ?)", ((user, *adapter.key) for user in users)
            )

    def failed(self, adapter: Adapter, why: str) -> None:
        """Records a failed training; the adapter of before stays in service."""
        with self._db:
            self._db.execute(
                "UPDATE adapters SET failed_run = run, why = ?, updated = ? WHERE kind = ? AND name = ?",
                (why, _now(), *adapter.key),
            )

    def judged(self, adapter: Adapter, verdict: str, why: str) -> None:
        """Replaces the verdict on an earlier training after `fleet.gate` changed."""
        with self._db:
            self._db.execute(
                "UPDATE adapters SET verdict = ?, why = ? WHERE kind = ? AND name = ?", (verdict, why, *adapter.key)
            )

    def ask(self, kind: str, name: str, why: str) -> None:
        """Marks an adapter as due, and with it those that start from it."""
        with self._db:
            self._ask(kind, name, why)

    def _ask(self, kind: str, name: str, why: str) -> None:
        self._db.execute("UPDATE adapters SET asked = 1, why = ? WHERE kind = ? AND name = ?", (why, kind, name))
        if kind != "user":
            self._db.execute(
                "INSERT INTO meta VALUES (?, '1') ON CONFLICT (key) DO UPDATE SET value = CAST(value AS INTEGER) + 1",
                (f"generation {kind}:{name}",),
            )

    def generation(self, kind: str, name: str) -> str:
        """A counter that rises each time a shared or cohort adapter is marked as due by `ask` or `forget`."""
        return self.meta(f"generation {kind}:{name}") or "0"

    def forget(self, user: str) -> list[tuple[str, str]]:
        """Removes every row of `user`, marks the adapters that saw their texts as due, and returns their (kind, name).

        Hashes of the name and its folder stay with the day, so that later runs leave the user out. One transaction;
        then the file is vacuumed.
        """
        with self._db:
            rows = self._db.execute("SELECT kind, name FROM seen WHERE user = ? AND kind != 'user'", (user,))
            touched = [(str(kind), str(name)) for kind, name in rows.fetchall()]
            for kind, name in touched:
                self._ask(kind, name, "a user who was deleted is in it")
            self._db.execute(
                "INSERT OR IGNORE INTO deleted VALUES (?, ?, ?)", (_hash(user), _hash(safe_name(user)), _now()[:10])
            )
            self._db.execute("DELETE FROM seen WHERE user = ?", (user,))
            self._db.execute("DELETE FROM adapters WHERE kind = 'user' AND name = ?", (user,))
            self._db.execute("DELETE FROM users WHERE user = ?", (user,))
        self._db.execute("VACUUM")
        return touched

    def was_deleted(self, user: str) -> bool:
        return self.deleted_on(user) is not None

    def deleted_on(self, user: str) -> str | None:
        """The day on which `user` was deleted, 2026-11-26; None: they were not."""
        return self._deleted_on("user_hash", user)

    def folder_deleted_on(self, name: str) -> str | None:
        """The day on which the user was deleted whose adapter lay in a folder called `name`; None: there is none."""
        return self._deleted_on("folder_hash", name)

    def _deleted_on(self, column: str, name: str) -> str | None:
        row = self._db.execute(f"SELECT deleted_on FROM deleted WHERE {column} = ?", (_hash(name),)).fetchone()
        return None if row is None else str(row[0] or "a day that was not recorded")

    def readmit(self, user: str) -> None:
        with self._db:
            self._db.execute("DELETE FROM deleted WHERE user_hash = ?", (_hash(user),))

    def _select(self, clause: str, values: tuple[Any, ...] = ()) -> list[Adapter]:
        columns = list(Adapter.__dataclass_fields__)
        place, adapters = columns.index("metrics"), []
        for row in self._db.execute(f"SELECT {', '.join(columns)} FROM adapters {clause}", values):
            fields = list(row)
            fields[place] = json.loads(fields[place])
            adapters.append(Adapter(*fields))
        return adapters


@contextmanager
def opened(folder: Path, create: bool = False) -> Iterator[Registry]:
    """Opens the registry without the run lock, to read or for a single write.

    Raises:
        FleetError: no fleet there, or one of a newer version; DiskFullError: no space left.
    """
    path = folder / FILE
    if not create and not path.is_file():
        raise FleetError(f"{folder}: no fleet here ({FILE} is missing). Give the output folder of `perce-lite fleet`.")
    _folder(folder)
    connection = sqlite3.connect(path, timeout=30)
    connection.row_factory = sqlite3.Row
    try:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > VERSION:
            raise FleetError(
                f"{path} was written by a newer version of PerCE Lite (tables {version}, this one knows {VERSION}). "
                "Nothing was touched; install that version."
            )
        if version == 0:
            connection.executescript(f"BEGIN; {_TABLES} PRAGMA user_version = {VERSION}; COMMIT;")
        elif version == 1:
            connection.executescript(f"BEGIN; {_FROM_1} PRAGMA user_version = {VERSION}; COMMIT;")
        connection.execute("PRAGMA secure_delete = ON")  # deleted content is overwritten with zeros, not only unlinked
        yield Registry(folder, connection)
    except UnicodeEncodeError as error:
        raise FleetError(f"{error.object!a}: a name must be text that UTF-8 can hold") from error
    except sqlite3.OperationalError as error:
        if "full" in str(error):
            raise DiskFullError(f"The disk is full: {path} could not be written. What it held is unharmed.") from error
        raise FleetError(f"{path} cannot be used: {error}. Nothing was changed.") from error
    except sqlite3.DatabaseError as error:
        raise FleetError(f"{path} is not a fleet's registry, or is damaged: {error}. Nothing was changed.") from error
    finally:
        connection.close()


@contextmanager
def held(folder: Path) -> Iterator[Registry]:
    """Opens the registry for a training run and holds the folder's lock until the end.

    Raises:
        FleetError: another run holds the lock; and as `opened`.
    """

    def refuse(who: str) -> FleetError:
        return FleetError(
            f"{folder}: another fleet run is using it ({who}). Wait for it or stop it. Nothing was touched."
        )

    _folder(folder)
    with held_alone(folder / "fleet.lock", refuse), opened(folder, create=True) as registry:
        yield registry


@contextmanager
def imagined(folder: Path) -> Iterator[Registry]:
    """An in-memory copy of the registry of `folder`, for a dry run; empty where there is none. Raises as `held`."""
    copy = sqlite3.connect(":memory:")
    copy.row_factory = sqlite3.Row
    try:
        if (folder / FILE).is_file():
            with held(folder) as registry:
                registry.copy_to(copy)
        else:
            copy.executescript(_TABLES)
        yield Registry(folder, copy)
    finally:
        copy.close()


def _folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise FleetError(f"{folder}: is a file; train.output_dir must be a folder") from error


def _hash(user: str) -> str:
    return hashlib.sha256(f"perce-lite deleted {user}".encode()).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
