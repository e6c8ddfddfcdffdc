"""What runs on the workers of a Ray cluster: an actor that loads the base once and trains one pack after another.

Torch and all that needs it is imported by the functions that use it: a worker that does not fit is refused at once.
"""

import importlib.metadata
import io
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from perce_lite import __version__, console
from perce_lite.errors import DeviceError, FleetError, PerceLiteError
from perce_lite.files import digest
from perce_lite.fleet.engines.protocol import Engine, Outcome, Task
from perce_lite.fleet.groups import Key
from perce_lite.fleet.stream import stream
from perce_lite.recipe import Recipe

PROGRESS_SECONDS = 1.0
"""A worker says how far it is this often, at the most."""


class PackEngine(Engine, Protocol):
    """An engine that a worker trains its packs with.

    users: how many it trains at once; kept: file with the states of users that were interrupted, a pack's own
    """

    users: int
    kept: Path | None

    def fingerprint(self) -> str:
        """Hash of the base as loaded; it depends on device and dtype."""


@dataclass(frozen=True)
class Place:
    """Where a worker trains.

    gpu: Ray has given it a GPU; threads: of torch; sharers: workers on one machine, at the most
    base: the driver's `source_fingerprint` of the recipe's base
    """

    gpu: bool
    threads: int
    sharers: int
    base: str


Trainer = Callable[[Recipe, Place], PackEngine]
"""Makes a worker's engine; raises a PerceLiteError where it cannot train what the others train."""


def trainer(recipe: Recipe, place: Place) -> PackEngine:
    """The engine that trains on one machine without Ray, too.

    Raises:
        DeviceError: no GPU that torch could use; FleetError: another base.
    """
    import torch

    if place.gpu and not torch.cuda.is_available():
        raise DeviceError("the cluster says that it has a GPU here, but torch sees none. Nothing was trained.")
    torch.set_num_threads(place.threads)
    from perce_lite.fleet.engines.slots import engine_for
    from perce_lite.model.footprint import source_fingerprint

    if source_fingerprint(recipe) != place.base:
        raise FleetError(f"{recipe.model} has other files here than where the command runs. Nothing was trained.")
    return engine_for(recipe, place.sharers)


@dataclass(frozen=True)
class Failure:
    """An error that crosses from a worker to the driver: its type's name and its text."""

    kind: str
    message: str

    @classmethod
    def of(cls, error: PerceLiteError) -> "Failure":
        return cls(type(error).__name__, str(error))


@dataclass(frozen=True)
class Introduction:
    """What a worker is, before anything is loaded.

    versions: see `versions`; fault: why it cannot read or write the fleet's folder
    """

    host: str
    versions: dict[str, str]
    fault: str | None


@dataclass(frozen=True)
class Loaded:
    """A worker that is ready. users: at once; sketch, fingerprint: of its base; device: a GPU's name or "CPU"."""

    users: int
    sketch: dict[str, Any]
    fingerprint: str
    device: str


@dataclass(frozen=True)
class Ended:
    """One task of a pack is over."""

    key: Key
    outcome: Outcome | Failure


@dataclass(frozen=True)
class Progress:
    """Mean loss of the users in training, nats a token, and their summed progress in adapters."""

    loss: float | None
    share: float


@dataclass(frozen=True)
class Said:
    """A line for people, as `console.say` and `console.warn` write it."""

    line: str


Item = Ended | Progress | Said | Failure
"""What comes from a worker while it trains a pack; a Failure is of all of it and comes last."""


def versions() -> dict[str, str]:
    """What must be equal on all machines for adapters to be equal."""
    package = Path(console.__file__).parent
    code = digest([[path.name, path.read_text(encoding="utf-8")] for path in sorted(package.rglob("*.py"))])
    others = ("torch", "transformers", "trl", "peft", "bitsandbytes")
    return {"perce-lite": __version__, "its code": code} | {name: importlib.metadata.version(name) for name in others}


class PackWorker:
    """An actor. folder: the driver's working folder, which relative paths start from; make: makes its engine."""

    def __init__(self, recipe: Recipe, folder: str, make: Trainer) -> None:
        self._recipe, self._make = recipe, make
        self._engine: PackEngine | None = None
        if Path(folder).is_dir():
            os.chdir(folder)

    def introduce(self, mark: Path, name: str) -> Introduction:
        """Looks for the driver's `mark` in the shared folder, and leaves a file `name` beside it."""
        fault = None
        try:
            mark.read_bytes()
            mark.with_name(name).touch()
        except OSError as error:
            fault = f"{type(error).__name__}: {error}"
        return Introduction(socket.gethostname(), versions(), fault)

    def load(self, place: Place) -> Loaded | Failure:
        """Loads the base."""
        console.quiet()
        try:
            engine = self._make(self._recipe, place)
            loaded = Loaded(engine.users, engine.base(), engine.fingerprint(), _device(place.gpu))
        except PerceLiteError as error:
            return Failure.of(error)
        self._engine = engine
        return loaded

    def train(self, tasks: Sequence[Task], kept: Path | None) -> Iterator[Item]:
        """Trains a pack; every outcome is handed out as its user ends."""
        engine = self._engine
        assert engine is not None
        engine.kept = kept

        def work(hand_out: Callable[[Item | None], None]) -> None:
            console.errors.file = _Lines(hand_out)
            last = 0.0

            def done(task: Task, outcome: Outcome | PerceLiteError) -> None:
                hand_out(Ended(task.key, Failure.of(outcome) if isinstance(outcome, PerceLiteError) else outcome))

            def progress(loss: float | None, share: float) -> None:
                nonlocal last
                if time.monotonic() - last >= PROGRESS_SECONDS:
                    last = time.monotonic()
                    hand_out(Progress(loss, share))

            try:
                engine.run(iter(tasks), done, progress)
            except PerceLiteError as error:
                hand_out(Failure.of(error))

        items: Iterator[Item] = stream(work)
        yield from items


class _Lines(io.StringIO):
    """Text that is written becomes `Said`, line by line."""

    def __init__(self, hand_out: Callable[[Item | None], None]) -> None:
        super().__init__()
        self._hand_out, self._rest = hand_out, ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in filter(None, map(str.strip, lines)):
            self._hand_out(Said(line))
        return len(text)


def _device(gpu: bool) -> str:
    if not gpu:
        return "CPU"
    import torch

    return torch.cuda.get_device_name()
