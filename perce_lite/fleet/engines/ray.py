"""Trains a fleet on the workers of a Ray cluster: several GPUs, several machines.

The driver makes the rows, gives a worker one pack at a time and alone writes the registry. Workers write adapters into
the fleet's folder, which all machines share, and give back a row for each.
"""

import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

from perce_lite.console import say, warn
from perce_lite.errors import DeviceError, DiskFullError, FleetError, ModelError, PerceLiteError, first_line
from perce_lite.fleet.engines.packs import DEATHS, KeptPacks, Pack, PackQueue
from perce_lite.fleet.engines.protocol import Engine, OnDone, OnProgress, Task
from perce_lite.fleet.engines.ray_worker import (
    Ended,
    Failure,
    Introduction,
    Item,
    Loaded,
    PackWorker,
    Place,
    Progress,
    Trainer,
    trainer,
    versions,
)
from perce_lite.fleet.registry import PACKS
from perce_lite.model.fingerprint import same_base
from perce_lite.model.footprint import source_fingerprint
from perce_lite.recipe import Recipe
from perce_lite.words import counted

CORES = 4
"""Cores of a worker on a CPU, where neither --cores nor OMP_NUM_THREADS says so and the machines have as many."""

START_SECONDS = 600
"""A cluster that has the room has to start a worker within this time."""

OBJECT_STORE = 256 * 2**20
"""Bytes of Ray's object store on one machine: it holds the rows of a few packs."""


@dataclass(frozen=True)
class RayOptions:
    """address: of a cluster ("host:6379", "auto"); None: RAY_ADDRESS, else a Ray of this machine alone for this run.

    workers: how many; None: one for each GPU, or for each `cores` cores where the cluster has no GPU
    cores: of a worker on a CPU, and threads of every worker
    trainer: makes the engine that each worker trains its packs with
    """

    address: str | None = None
    workers: int | None = None
    cores: int | None = None
    trainer: Trainer = trainer


@contextmanager
def ray_engines(options: RayOptions) -> Iterator[Callable[[Recipe], Engine]]:
    """Yields what makes the engine of a recipe; the cluster is left, and its workers end, with the block."""
    with ExitStack() as stack:
        yield lambda recipe: stack.enter_context(RayEngine(recipe, options))


@dataclass
class _Worker:
    """An actor. call: what it is at: an object reference or a generator of items; None: it waits for a pack."""

    number: int
    actor: Any
    call: Any
    mark: Path
    host: str = "a machine not known yet"
    introduced: bool = False
    loaded: Loaded | None = None
    pack: Pack | None = None
    progress: Progress = field(default_factory=lambda: Progress(None, 0.0))

    def __str__(self) -> str:
        return f"worker {self.number} on {self.host}"


class RayEngine:
    """Trains users in packs on workers; to be entered and left as a context.

    Raises:
        FleetError: no Ray, a cluster that cannot be reached or has no room for the workers, a worker that does not see
            the fleet's folder, has other versions or another base; DeviceError: no GPU where the recipe wants one.
    """

    def __init__(self, recipe: Recipe, options: RayOptions) -> None:
        self._recipe, self._options = recipe, options
        self._kept = KeptPacks(recipe.output_dir / PACKS)
        self._workers: list[_Worker] = []
        self._adapters: int | None = None
        self._deaths = 0  # workers lost since a user ended
        self._last_news = time.monotonic()
        self._said: set[str] = set()
        self._mark = recipe.output_dir / f".ray-{secrets.token_hex(8)}" / "driver"
        self._expected = versions()

    def __enter__(self) -> "RayEngine":
        self._ray = _import_ray()
        self._connected = _connect(self._ray, self._options.address)
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            self._ray.kill(worker.actor)
        if self._connected:
            self._ray.shutdown()
        shutil.rmtree(self._mark.parent, ignore_errors=True)

    def order(self, lengths: dict[str, int], parents: int) -> list[str]:
        """Users by the length of their rows, the longest first; ahead of all those who were interrupted."""
        self._adapters = len(lengths) + parents
        return self._kept.order(lengths)

    def base(self) -> dict[str, Any]:
        """Starts the workers, and waits until each has loaded the base."""
        with _interruptible():
            self._start()
            while not all(worker.loaded for worker in self._workers):
                self._wait(None, _nobody)
        ready = [worker.loaded for worker in self._workers if worker.loaded]
        self._users = min(loaded.users for loaded in ready)  # of a pack: every worker has room for it
        hosts = ", ".join(sorted({worker.host for worker in self._workers}))
        devices = ", ".join(sorted({loaded.device for loaded in ready}))
        workers, users = counted(len(ready), "worker"), counted(self._users, "user")
        say(f"Ray: {workers} on {hosts} ({devices}), {users} at once in each")
        return ready[0].sketch

    def run(self, tasks: Iterator[Task], on_done: OnDone, on_progress: OnProgress) -> None:
        """Trains all tasks; a pack whose worker is lost is trained by another.

        Raises:
            FleetError: workers are lost one after another and nobody is trained; and every error in FATAL_ERRORS.
        """
        first = next(tasks, None)
        if first is None:
            return
        tasks = chain([first], tasks)
        of_users = first.key[0] == "user"
        queue = PackQueue(self._kept.packs(tasks, self._users) if of_users else (Pack([task]) for task in tasks))
        while True:
            queue.look_ahead()
            for worker in self._workers:
                if worker.loaded and worker.pack is None and (pack := queue.next()) is not None:
                    self._send(worker, pack)
            busy = [worker.progress for worker in self._workers if worker.pack is not None]
            if not busy and not queue:
                return
            losses = [progress.loss for progress in busy if progress.loss is not None]
            loss = sum(losses) / len(losses) if losses else None
            on_progress(loss, sum(progress.share for progress in busy))
            with _interruptible():
                self._wait(queue, on_done)

    # Workers

    def _start(self) -> None:
        """Starts as many workers as were asked for, and fit, and have something to do."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        self._gpu = self._recipe.device != "cpu" and any(node.get("GPU") for node in nodes)
        if self._recipe.device == "cuda" and not self._gpu:
            raise DeviceError("device: cuda, but the Ray cluster has no GPU. Nothing was trained; take device: auto.")
        self._cores = self._options.cores or _cores(nodes, self._options.workers)
        room = sum(int(node.get("GPU", 0)) if self._gpu else int(node.get("CPU", 0) // self._cores) for node in nodes)
        share = "1 GPU" if self._gpu else f"{self._cores} cores"
        wanted = self._options.workers or max(1, room)
        if wanted > room:
            raise FleetError(
                f"--engine ray: {wanted} workers with {share} each do not fit the cluster, which has room for {room}. "
                "Nothing was trained; give --workers or --cores."
            )
        count = wanted if self._adapters is None else max(1, min(wanted, self._adapters))
        if count < (self._options.workers or 0):
            say(f"{count} workers instead of {wanted}: no more adapters are due")
        self._mark.parent.mkdir(parents=True)
        self._mark.touch()
        sharers = min(count, max(int(node.get("CPU", 0) // self._cores) for node in nodes))  # its own GPU each, if any
        self._place = Place(self._gpu, self._cores, sharers, source_fingerprint(self._recipe))
        for number in range(1, count + 1):
            self._workers.append(self._new(number))

    def _new(self, number: int) -> _Worker:
        """An actor that was asked who it is."""
        resources = {"num_gpus": 1, "num_cpus": 0} if self._gpu else {"num_cpus": self._cores}
        actor_class = self._ray.remote(scheduling_strategy="SPREAD", **resources)(PackWorker)
        actor = actor_class.remote(self._recipe, os.getcwd(), self._options.trainer)
        mark = self._mark.with_name(f"worker-{secrets.token_hex(8)}")
        return _Worker(number, actor, actor.introduce.remote(self._mark, mark.name), mark)

    def _send(self, worker: _Worker, pack: Pack) -> None:
        self._kept.begins(pack)
        worker.pack, worker.progress = pack, Progress(None, 0.0)
        method = worker.actor.train.options(num_returns="streaming")
        worker.call = method.remote(list(pack.waiting.values()), pack.kept)

    def _wait(self, queue: PackQueue | None, on_done: OnDone) -> None:
        """Waits a second at the most for news of any worker, and takes in what there is."""
        by_call = {id(worker.call): worker for worker in self._workers if worker.call is not None}
        calls = [worker.call for worker in by_call.values()]
        ready, _ = self._ray.wait(calls, num_returns=len(calls), timeout=0)
        if not ready:
            ready, _ = self._ray.wait(calls, num_returns=1, timeout=1)
        self._last_news = time.monotonic() if ready else self._last_news
        if time.monotonic() - self._last_news > START_SECONDS and not any(
            worker.introduced for worker in by_call.values()
        ):
            raise FleetError(
                f"--engine ray: {len(calls)} of {len(self._workers)} workers have not started within {START_SECONDS} "
                "s; the cluster has lost machines, or others use it. What is trained stays; ask for fewer --workers."
            )
        for worker in [worker for worker in by_call.values() if any(worker.call is call for call in ready)]:
            try:
                self._take(worker, on_done)
            except self._ray.exceptions.RayError as error:
                self._lost(worker, error, queue, on_done)

    def _take(self, worker: _Worker, on_done: OnDone) -> None:
        """Takes in the next news of a worker."""
        if worker.pack is None:
            news = self._ray.get(worker.call)
            if isinstance(news, Introduction):
                self._greet(worker, news)
            else:
                self._check_base(worker, news)
            return
        try:
            item: Item = self._ray.get(next(worker.call))
        except StopIteration:
            self._kept.remove(worker.pack.kept)
            worker.pack = worker.call = None
            return
        if isinstance(item, Ended):
            self._deaths = 0
            task = worker.pack.waiting.pop(item.key)
            outcome = item.outcome
            on_done(task, PerceLiteError(outcome.message) if isinstance(outcome, Failure) else outcome)
        elif isinstance(item, Progress):
            worker.progress = item
        elif isinstance(item, Failure):
            raise _error(worker, item)
        elif item.line not in self._said:
            self._said.add(item.line)
            plain = item.line.removeprefix("warning: ")
            (say if plain == item.line else warn)(plain)

    def _greet(self, worker: _Worker, news: Introduction) -> None:
        """Refuses a worker that could not train what the others train; tells one that can to load the base."""
        worker.host, worker.introduced = news.host, True
        fault = news.fault
        if fault is None and not worker.mark.is_file():
            fault = "what it wrote there is not here"
        if fault is not None:
            raise FleetError(
                f"{worker} does not see {self._recipe.output_dir.absolute()} as {socket.gethostname()} does ({fault}). "
                "Nothing was trained. All machines have to share this folder, under one path: --set "
                "train.output_dir=FOLDER."
            )
        other = {name: version for name, version in news.versions.items() if version != self._expected[name]}
        if other:
            unlike = ", ".join(f"{name} {version} instead of {self._expected[name]}" for name, version in other.items())
            raise FleetError(f"{worker} has {unlike}. Nothing was trained; install the same on all machines.")
        worker.call = worker.actor.load.remote(self._place)

    def _check_base(self, worker: _Worker, news: Loaded | Failure) -> None:
        """Refuses a worker over another base."""
        if isinstance(news, Failure):
            raise _error(worker, news)
        for other in self._workers:
            same = other.loaded is None or (
                same_base(other.loaded.sketch, news.sketch)
                and (other.loaded.device != news.device or other.loaded.fingerprint == news.fingerprint)
            )
            if not same:
                raise FleetError(f"{worker} has another base than {other}: {self._recipe.model}. Nothing was trained.")
        worker.loaded, worker.call = news, None

    def _lost(self, worker: _Worker, error: Exception, queue: PackQueue | None, on_done: OnDone) -> None:
        """Puts another worker in the place of one that died; its pack goes back to the queue."""
        self._deaths += 1
        why = self._why(error)
        if queue is None and isinstance(error, self._ray.exceptions.RayTaskError):
            raise FleetError(f"{worker}: {why}. Nothing was trained.") from error
        if self._deaths > 3 * len(self._workers) + 3:
            raise FleetError(f"{self._deaths} workers were lost and no user was trained in between; the last: {why}")
        warn(f"{worker} was lost, another takes its place: {why}")
        self._ray.kill(worker.actor)
        self._workers[self._workers.index(worker)] = self._new(worker.number)
        if worker.pack is None or queue is None:
            return
        for task in queue.lost(worker.pack):
            on_done(task, FleetError(f"{DEATHS} workers were lost while they trained it alone; the last: {why}"))
        if worker.pack.deaths >= DEATHS:
            self._kept.remove(worker.pack.kept)

    def _why(self, error: Exception) -> str:
        """Why a worker was lost, in one line."""
        if isinstance(error, self._ray.exceptions.RayTaskError):
            return f"{type(error.cause).__name__}: {first_line(error.cause)}"
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return lines[-1] if lines else type(error).__name__


def _nobody(task: Task, outcome: Any) -> None:
    raise AssertionError("nothing is trained while workers start")


@contextmanager
def _interruptible() -> Iterator[None]:
    """Raises what a signal's handler raised: Ray passes on a KeyboardInterrupt, and makes SystemError of others."""
    try:
        yield
    except SystemError as error:
        if error.__cause__ is None:
            raise
        raise error.__cause__ from None


def _import_ray() -> ModuleType:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the machine unasked
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise FleetError("--engine ray needs Ray: pip install 'perce-lite[ray]' (in a clone: -e '.[ray]')") from error
    return ray


def _connect(ray: ModuleType, address: str | None) -> bool:
    """Joins the cluster; False: this process had joined one before, which is used and not left.

    Raises:
        FleetError: it cannot be reached.
    """
    wanted = address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if wanted == "local":
        options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE}
    else:
        _reach(wanted)
    if ray.is_initialized():
        joined = ray.get_runtime_context().gcs_address
        if address not in (None, "auto", joined):
            raise FleetError(f"--address {address}: this process has joined the cluster at {joined}; leave it first.")
        return False
    try:
        with _interruptible():
            ray.init(address=wanted, **options)
    except Exception as error:  # Ray raises many kinds
        raise FleetError(f"--address {wanted}: no Ray cluster could be joined: {first_line(error)}") from error
    return True


def _reach(address: str) -> None:
    """Raises FleetError where nothing listens at "host:port"; Ray itself would try for a minute."""
    if address == "auto":
        return
    if "://" in address:
        raise FleetError(
            f"--address {address}: Ray Client is not supported. Run the command on a machine of the cluster, with "
            "--address auto."
        )
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError, OverflowError) as error:
        raise FleetError(
            f"--address {address}: nothing answers there ({error}). Give host:port of the cluster's head (ray start "
            "prints it), or auto on a machine of the cluster."
        ) from error


def _cores(nodes: list[dict[str, float]], workers: int | None) -> int:
    """Cores of a worker where --cores does not say so."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) > 0:
        return int(threads)
    share = sum(node.get("CPU", 0) for node in nodes) // (workers or 1)
    return max(1, int(min(CORES, share, *(node["CPU"] for node in nodes if node.get("CPU")))))


def _error(worker: _Worker, failure: Failure) -> PerceLiteError:
    """The error of a worker as one of this process, with the worker's name."""
    kinds: dict[str, type[PerceLiteError]] = {
        "DiskFullError": DiskFullError,
        "DeviceError": DeviceError,
        "ModelError": ModelError,
    }
    return kinds.get(failure.kind, FleetError)(f"{worker}: {failure.message}")
