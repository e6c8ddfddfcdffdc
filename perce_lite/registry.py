"""Which adapter belongs to whom: a fleet's book, one SQLite file, with lineage, figures and state."""

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from perce_lite.errors import FleetError

VERSION = 1
"""Of the tables below; raised when they change."""

FILE = "fleet.sqlite"

STATES = ("due", "in service", "held back", "failed")
"""due: to be trained; held back: trained, but worse than what it would replace."""

KINDS = ("user", "cohort", "all")

_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE adapters (
  kind TEXT NOT NULL, name TEXT NOT NULL, state TEXT NOT NULL, why TEXT NOT NULL, folder TEXT NOT NULL,
  parent_kind TEXT, parent_name TEXT, run TEXT NOT NULL, trained_run TEXT, examples INTEGER NOT NULL,
  bytes INTEGER NOT NULL DEFAULT 0, gain REAL, metrics TEXT NOT NULL DEFAULT '{}', updated TEXT NOT NULL,
  PRIMARY KEY (kind, name)
) WITHOUT ROWID;
CREATE INDEX adapters_by_state ON adapters (state, kind, name);
CREATE TABLE users (
  user TEXT PRIMARY KEY, cohort TEXT, examples INTEGER NOT NULL, own INTEGER NOT NULL, losses TEXT NOT NULL DEFAULT '{}'
) WITHOUT ROWID;
CREATE INDEX users_by_cohort ON users (cohort);
CREATE TABLE deleted (user_hash TEXT PRIMARY KEY) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Adapter:
    """One row of the book.

    run: fingerprint of what it should be trained from; trained_run: of what it was trained from
    gain: nats a token on test rows by which it is better than its parent (or the base); None where none are held out
    """

    kind: str
    name: str
    state: str
    why: str
    folder: str
    parent_kind: str | None
    parent_name: str | None
    run: str
    trained_run: str | None
    examples: int
    bytes: int
    gain: float | None
    metrics: dict[str, Any]
    updated: str


class Registry:
    """The book of the fleet in `folder`. Open it with `opened` or `held`."""

    def __init__(self, folder: Path, connection: sqlite3.Connection) -> None:
        self.folder, self._db = folder, connection

    # Meta

    def meta(self, key: str) -> str | None:
        found = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if found is None else str(found[0])

    def set_meta(self, key: str, value: str) -> None:
        with self._db:
            self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    # Who there is

    def enrol(self, users: Iterable[tuple[str, str | None, int, bool]], adapters: Iterable[Mapping[str, Any]]) -> None:
        """Takes in users (name, cohort, training rows, whether they get one of their own) and adapters to be had.

        An adapter whose `run` is as it was trained keeps its state; one whose `run` is new becomes due.
        """
        with self._db:
            self._db.executemany(
                "INSERT INTO users (user, cohort, examples, own) VALUES (?, ?, ?, ?) ON CONFLICT (user) DO UPDATE SET "
                "cohort = excluded.cohort, examples = excluded.examples, own = excluded.own",
                users,
            )
            self._db.executemany(
                "INSERT INTO adapters (kind, name, state, why, folder, parent_kind, parent_name, run, examples, "
                "updated) VALUES (:kind, :name, 'due', 'new', :folder, :parent_kind, :parent_name, :run, :examples, "
                ":now) "
                "ON CONFLICT (kind, name) DO UPDATE SET parent_kind = excluded.parent_kind, "
                "parent_name = excluded.parent_name, examples = excluded.examples, run = excluded.run, "
                "why = CASE WHEN trained_run IS NULL OR trained_run IS excluded.run THEN why "
                "ELSE 'data, recipe or parent changed' END, "
                "state = CASE WHEN trained_run IS excluded.run THEN state ELSE 'due' END",
                ({**one, "now": _now()} for one in adapters),
            )

    def due(self, kind: str, only: set[str] | None = None, after: str = "") -> Iterator[Adapter]:
        """Adapters of `kind` to be trained, by name; a page at a time, so that ten thousand need no more memory."""
        while True:
            page = self._select("WHERE state = 'due' AND kind = ? AND name > ? ORDER BY name LIMIT 200", (kind, after))
            yield from (one for one in page if only is None or one.name in only)
            if len(page) < 200:
                return
            after = page[-1].name

    def get(self, kind: str, name: str) -> Adapter | None:
        found = self._select("WHERE kind = ? AND name = ?", (kind, name))
        return found[0] if found else None

    def all(self) -> list[Adapter]:
        """Every adapter: all, cohorts, users."""
        return self._select("ORDER BY kind = 'user', kind = 'cohort', name")

    def counts(self) -> dict[str, int]:
        """Adapters by state."""
        found = dict(self._db.execute("SELECT state, count(*) FROM adapters GROUP BY state"))
        return {state: int(found.get(state, 0)) for state in STATES}

    def user(self, name: str) -> tuple[str | None, int, bool] | None:
        """(cohort, training rows, whether they get an adapter of their own)."""
        found = self._db.execute("SELECT cohort, examples, own FROM users WHERE user = ?", (name,)).fetchone()
        return None if found is None else (found[0], int(found[1]), bool(found[2]))

    def users_like(self, name: str, limit: int = 10) -> list[str]:
        """Names that begin as `name` does, else the first ones."""
        head = name[:2].replace("%", "").replace("_", "")
        sql = "SELECT user FROM users WHERE user LIKE ? ORDER BY user LIMIT ?"
        found = self._db.execute(sql, (f"{head}%", limit)).fetchall() or self._db.execute(sql, ("%", limit)).fetchall()
        return [str(one[0]) for one in found]

    # What became of them

    def done(self, adapter: Adapter, state: str, why: str, size: int, gain: float | None, metrics: Any) -> None:
        """Writes down a training that came to its end."""
        with self._db:
            self._db.execute(
                "UPDATE adapters SET state = ?, why = ?, bytes = ?, gain = ?, metrics = ?, trained_run = ?, updated = ?"
                " WHERE kind = ? AND name = ?",
                (state, why, size, gain, json.dumps(metrics), adapter.run, _now(), adapter.kind, adapter.name),
            )

    def failed(self, adapter: Adapter, why: str) -> None:
        with self._db:
            self._db.execute(
                "UPDATE adapters SET state = 'failed', why = ?, updated = ? WHERE kind = ? AND name = ?",
                (why, _now(), adapter.kind, adapter.name),
            )

    def make_due(self, kind: str, name: str, why: str) -> bool:
        """Whether there is such an adapter; it is to be trained again."""
        with self._db:
            changed = self._db.execute(
                "UPDATE adapters SET state = 'due', why = ?, trained_run = NULL WHERE kind = ? AND name = ?",
                (why, kind, name),
            )
        return changed.rowcount > 0

    def forget(self, user: str) -> list[tuple[str, str]]:
        """Removes every row of `user` and marks what had seen their texts as due; gives (kind, name) of those.

        What stays is a hash of the name, so that the next run leaves the user out. The file is vacuumed.
        """
        known = self.user(user)
        touched = [("all", "all")] + ([("cohort", known[0])] if known and known[0] is not None else [])
        with self._db:
            self._db.execute("DELETE FROM users WHERE user = ?", (user,))
            self._db.execute("DELETE FROM adapters WHERE kind = 'user' AND name = ?", (user,))
            self._db.execute("INSERT OR IGNORE INTO deleted VALUES (?)", (_hash(user),))
        due = [one for one in touched if self.make_due(*one, "a user who was deleted is in it")]
        self._db.execute("VACUUM")
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return due

    def was_deleted(self, user: str) -> bool:
        return self._db.execute("SELECT 1 FROM deleted WHERE user_hash = ?", (_hash(user),)).fetchone() is not None

    def readmit(self, user: str) -> None:
        with self._db:
            self._db.execute("DELETE FROM deleted WHERE user_hash = ?", (_hash(user),))

    def _select(self, clause: str, values: tuple[Any, ...] = ()) -> list[Adapter]:
        columns = ", ".join(Adapter.__dataclass_fields__)
        found = self._db.execute(f"SELECT {columns} FROM adapters {clause}", values)
        return [Adapter(**{**dict(one), "metrics": json.loads(one["metrics"])}) for one in found]


@contextmanager
def opened(folder: Path, create: bool = False) -> Iterator[Registry]:
    """The fleet's book, to read or to write one thing.

    Raises:
        FleetError: no fleet there, or one of a newer version.
    """
    path = folder / FILE
    if not create and not path.is_file():
        raise FleetError(f"{folder}: no fleet here ({FILE} is missing). Give the output folder of `perce-lite fleet`.")
    folder.mkdir(parents=True, exist_ok=True)
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
        connection.execute("PRAGMA secure_delete = ON")  # what is deleted is overwritten, not only let go
        yield Registry(folder, connection)
    except sqlite3.DatabaseError as error:
        raise FleetError(f"{path} is not a fleet's book, or is damaged: {error}. Nothing was changed.") from error
    finally:
        connection.close()


@contextmanager
def held(folder: Path) -> Iterator[Registry]:
    """The fleet's book for a run that trains; nobody else trains meanwhile.

    Raises:
        FleetError: another run is on it; and as `opened`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "fleet.lock")
    try:
        with lock.acquire(timeout=0), opened(folder, create=True) as registry:
            yield registry
    except Timeout as error:
        raise FleetError(
            f"{folder}: another fleet run is on it. Wait for it or stop it; nothing was touched."
        ) from error


def _hash(user: str) -> str:
    return hashlib.sha256(f"perce-lite deleted {user}".encode()).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
