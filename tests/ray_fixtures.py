"""A Ray cluster of two nodes on this machine, and an engine for its workers that trains nothing and needs no torch.

The workers are real processes; what the engine does to them (it dies, waits, fails) stands in `plan.json`.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from perce_lite.errors import DiskFullError, FleetError, PerceLiteError
from perce_lite.files import write_text
from perce_lite.fleet.engines.protocol import Outcome
from perce_lite.fleet.engines.ray import RayOptions, ray_engines

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
ray = pytest.importorskip("ray")

NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two nodes of one core; ports and folders are its own, so several may run beside each other."""
    from ray.cluster_utils import Cluster

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    nodes = Cluster(initialize_head=True, head_node_args=NODE)
    nodes.add_node(**NODE)
    ray.init(address=nodes.address, log_to_driver=False, configure_logging=False)
    yield nodes
    ray.shutdown()
    nodes.shutdown()


@pytest.fixture
def occupied(cluster):
    """All cores of the two nodes are taken by others, so that a worker goes to a node that is added."""
    others = [ray.remote(num_cpus=1)(Light).remote() for _ in range(2)]
    ray.get([other.base.remote() for other in others])
    yield
    for other in others:
        ray.kill(other)


class Light:
    """Writes what it does into `log.txt`, a line a start and an end; a small file stands for an adapter."""

    kept = None

    def __init__(self, recipe=None, place=None) -> None:
        self.users = 1 if recipe is None else recipe.fleet.slots

    def base(self):
        return {"shape": ["toy", 1, 1, 1, True], "embedding": [1.0]}

    def fingerprint(self):
        return ""

    def run(self, tasks, done, progress):
        plan = json.loads(Path("plan.json").read_text()) if Path("plan.json").is_file() else {}
        pack = list(tasks)
        log("pack", " ".join(task.key[1] for task in pack))
        for task in pack:
            name = task.key[1]
            log("start", name)
            progress(1.0, 0.5)
            if name in plan.get("kills", []):
                os.kill(os.getpid(), signal.SIGKILL)
            while name in plan.get("waits", []) and not Path("go").exists():
                time.sleep(0.05)
            done(task, self.train(task, plan.get(name)))
            log("end", name)

    def train(self, task, fault):
        if fault == "fails":
            return FleetError(f"{task.key[1]} has no luck")
        if fault == "bug":
            raise ZeroDivisionError("of our own")
        if fault == "full":
            raise DiskFullError("The disk is full")
        (task.folder / "adapter").mkdir(parents=True, exist_ok=True)
        write_text(task.folder / "adapter/perce_lite.json", json.dumps({"run": task.run}))
        losses = {"base": 3.0, "start": 2.5, "own": 2.25, "tokens": 10.0}
        return Outcome({"test": losses}, {}, 100, 50)


def log(what: str, name: str) -> None:
    with Path("log.txt").open("a") as lines:
        lines.write(f"{what} {name}\n")


def logged(what: str) -> list[str]:
    """Names of those that `what` happened to, in order."""
    text = Path("log.txt").read_text() if Path("log.txt").exists() else ""
    return [name for first, name in (line.split(" ", 1) for line in text.splitlines()) if first == what]


def light(workers: int = 2, address: str | None = None):
    """The engines of a run whose workers are `Light`."""
    return ray_engines(RayOptions(address, workers, trainer=Light))


def plan(**faults) -> None:
    """What the workers do to which users: kills=[...], waits=[...], or user="fails"."""
    Path("plan.json").write_text(json.dumps(faults))


__all__ = ["Light", "PerceLiteError", "cluster", "light", "logged", "occupied", "plan"]
