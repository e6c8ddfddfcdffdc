"""Packs: the users that one worker trains at once, their queue, and what is on disk of those that were interrupted."""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from perce_lite.files import digest, read_json, write_json
from perce_lite.fleet.engines.protocol import Task

AHEAD = 2
"""Packs whose rows are made before a worker has room for them, at the most."""

DEATHS = 2
"""Workers that a pack may cost before it is taken apart, or, where it is one user, left out."""


@dataclass
class Pack:
    """Tasks that one worker trains at once.

    deaths: workers that were lost with it
    kept: file with the states of its users if they are interrupted; None: it is what users start from
    """

    tasks: list[Task]
    kept: Path | None = None
    deaths: int = 0
    waiting: dict[tuple[str, str], Task] = field(init=False)

    def __post_init__(self) -> None:
        self.waiting = {task.key: task for task in self.tasks}


class PackQueue:
    """Packs to be trained, made of tasks as they are needed; a lost worker's pack comes first."""

    def __init__(self, packs: Iterator[Pack]) -> None:
        self._packs = packs
        self._ready: deque[Pack] = deque()

    def __bool__(self) -> bool:
        """Whether a pack is ready."""
        return bool(self._ready)

    def look_ahead(self) -> None:
        """Makes packs until `AHEAD` are ready."""
        self._ready.extend(itertools.islice(self._packs, max(0, AHEAD - len(self._ready))))

    def next(self) -> Pack | None:
        """The next pack; None: there is none."""
        return self._ready.popleft() if self._ready else next(self._packs, None)

    def lost(self, pack: Pack) -> list[Task]:
        """Takes back a pack whose worker was lost, as it stands: without the users who had ended.

        After `DEATHS` workers it comes back user by user, each with one more try; gives the user who is left out then.
        """
        pack.deaths += 1
        rest = list(pack.waiting.values())
        if pack.deaths < DEATHS:
            self._ready.appendleft(Pack(rest, pack.kept, pack.deaths))
            return []
        if len(rest) == 1:
            return rest
        self._ready.extendleft(Pack([task], _alone(pack, task), DEATHS - 1) for task in reversed(rest))
        return []


def _alone(pack: Pack, task: Task) -> Path | None:
    """The file of one user who was taken out of a pack."""
    return None if pack.kept is None else pack.kept.parent / _file([task.key[1]])


def _file(users: Iterable[str]) -> str:
    return f"{digest(sorted(users))}.pt"


class KeptPacks:
    """What is on disk of packs in training: for each who is in it, and beside that the state of those interrupted.

    folder: in the fleet's folder; it is made when the first pack begins
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._of: dict[str, Path] = {}

    def order(self, lengths: Mapping[str, int]) -> list[str]:
        """Users in the order of their training: those who were interrupted, pack by pack; then the longest rows first.

        What is kept of packs of which nobody is due any more is removed.
        """
        for record in sorted(self._folder.glob("*.json")):
            users, state = (read_json(record) or {}).get("users", []), record.with_suffix(".pt")
            again = [user for user in users if user in lengths]
            if not again or not state.is_file():
                self.remove(state)
                continue
            self._of |= dict.fromkeys(again, state)
        rest = sorted(lengths.keys() - self._of.keys(), key=lambda user: (-lengths[user], user))
        return [*self._of, *rest]

    def packs(self, tasks: Iterator[Task], size: int) -> Iterator[Pack]:
        """Packs of at most `size` tasks that follow each other; users who were interrupted together stay together."""
        for state, together in itertools.groupby(tasks, lambda task: self._of.get(task.key[1])):
            while batch := list(itertools.islice(together, size)):
                yield Pack(batch, state or self._folder / _file(task.key[1] for task in batch))

    def begins(self, pack: Pack) -> None:
        """Notes who is in a pack, before it is trained."""
        if pack.kept is not None and not pack.kept.is_file():
            write_json(pack.kept.with_suffix(".json"), {"users": [task.key[1] for task in pack.tasks]})

    def remove(self, state: Path | None) -> None:
        """Removes what is kept of a pack, its record last."""
        if state is not None:
            state.unlink(missing_ok=True)
            state.with_suffix(".json").unlink(missing_ok=True)
