"""What a fleet asks of an engine: tasks in, outcomes out. Imports neither torch nor transformers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from perce_lite.data.rows import Row
from perce_lite.errors import ConfigError, DeviceError, DiskFullError, ModelError, PerceLiteError, RecipeError
from perce_lite.files import digest
from perce_lite.fleet.groups import PARENTS, Key
from perce_lite.model.adapter_files import Storage
from perce_lite.recipe import Recipe

EngineName = Literal["local", "ray"]
"""local: this process; ray: the workers of a Ray cluster."""


@dataclass(frozen=True)
class Task:
    """One adapter to train.

    key: (kind, name) in the fleet's registry
    folder: the task's own; the adapter is saved to `folder/adapter`
    run: fingerprint of the inputs of the training (see `groups.run_fingerprint`)
    start: folder of the adapter that training starts from; None: fresh weights
    """

    key: Key
    recipe: Recipe
    rows: Sequence[Row]
    folder: Path
    run: str
    start: Path | None

    @property
    def storage(self) -> Storage:
        """How its adapter is stored: a core beside the other cores' parents, in `PARENTS` of the fleet's adapters."""
        return Storage(self.recipe.fleet.adapter_dtype, self.folder.parent.parent / PARENTS)

    @property
    def begun(self) -> str:
        """As `run`, with the rows: a cohort's `run` does not depend on them, but a resumed one needs the same."""
        return digest([self.run, [row.fingerprint() for row in self.rows]])


@dataclass(frozen=True)
class Outcome:
    """The result of a task.

    losses: split -> {base, start, own, tokens}, loss a token with the own profile, nats; a split without rows is absent
    bytes: of the adapter's folder; parameters: how many were trained
    stopping: `BestStep.figures`; None: training went to its last step, and that is the adapter's
    """

    losses: dict[str, dict[str, float]]
    weights: dict[str, float]
    bytes: int
    parameters: int
    stopping: dict[str, Any] | None = None


OnDone = Callable[[Task, Outcome | PerceLiteError], None]
OnProgress = Callable[[float | None, float], None]
"""Called after each step with the mean loss of the users in training, nats a token, None as long as there is none, and
their summed progress in adapters: three users who are halfway are 1.5.
"""


class Engine(Protocol):
    """Trains the tasks of a fleet."""

    def base(self) -> dict[str, Any]:
        """A sketch of its base (`model.fingerprint.sketch`), stored in the registry to recognise the base."""

    def run(self, tasks: Iterator[Task], on_done: OnDone, on_progress: OnProgress) -> None:
        """Trains each task and calls `on_done` with its outcome or its error; reads `tasks` as it has room.

        Errors in FATAL_ERRORS are raised.
        """


@runtime_checkable
class OrderingEngine(Engine, Protocol):
    """An engine that chooses in which order users are trained."""

    def order(self, lengths: Mapping[str, int], parents: int) -> list[str]:
        """The users in the order of their training; called once, before `base`.

        lengths: user -> characters of the longest row, of users who are due
        parents: how many adapters are due that others start from
        """


FATAL_ERRORS = (DiskFullError, DeviceError, ModelError, RecipeError, ConfigError)
"""Errors that the next user would meet as well. After any other error the run continues with the next user."""
