"""What the host's memory has room for, inside a container too; what is no longer needed is given back."""

import gc
import subprocess
import sys
import weakref

import psutil
import pytest
from fleet_fixtures import rows_of

from perce_lite.fleet import capacity
from perce_lite.fleet.engines.sequential import SequentialEngine
from perce_lite.fleet.engines.slots import SlotsEngine
from perce_lite.fleet.fleet import fleet
from perce_lite.memory import available_memory, modules_frozen, return_free_memory
from perce_lite.recipe import load_recipe

pytest_plugins = ["cli_fixtures"]

MIB = 2**20


def group(folder, limit: str, used: int, cached: int, version: int) -> None:
    """A control group that limits memory."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2: ("memory.max", "memory.current")}[version]
    for name, value in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    inactive = {1: "total_inactive_file", 2: "inactive_file"}[version]
    (folder / "memory.stat").write_text(f"anon 5\n{inactive} {cached}\n")


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_s_limit_counts(tmp_path, version):
    groups, own = tmp_path / "groups", tmp_path / "cgroup"
    top = groups / "memory" if version == 1 else groups
    own.write_text("0::/docker/me\n" if version == 2 else "5:cpu:/docker/me\n4:memory,hugetlb:/docker/me\n")
    system = psutil.virtual_memory().available
    assert available_memory(groups, own) > system // 2, "no limit"
    group(top / "docker/me", "max" if version == 2 else str(2**63 - 4096), 3 * MIB, 0, version)
    assert available_memory(groups, own) > system // 2, "no limit"
    group(top / "docker/me", str(100 * MIB), 60 * MIB, 20 * MIB, version)
    assert available_memory(groups, own) == 60 * MIB, "what is cached can be given back"
    group(top / "docker", str(50 * MIB), 49 * MIB, 0, version)
    assert available_memory(groups, own) == 1 * MIB, "the group around it is fuller"
    group(top / "docker", str(50 * MIB), 60 * MIB, 0, version)
    assert available_memory(groups, own) == 0


def test_a_container_that_sees_its_own_group_as_the_root(tmp_path):
    (tmp_path / "cgroup").write_text("0::/../outside\n")
    group(tmp_path / "groups", str(100 * MIB), 60 * MIB, 0, 2)
    assert available_memory(tmp_path / "groups", tmp_path / "cgroup") == 40 * MIB
    assert available_memory(tmp_path / "none", tmp_path / "absent") > 0


def test_users_at_once_are_as_many_as_the_container_takes(recipe, monkeypatch):
    read = load_recipe(recipe(rows_of(2), "train: {max_length: 256, output_dir: out}\nfleet: {slots: auto}\n"))
    counts = []
    for room in (2**34, 0):
        monkeypatch.setattr(capacity, "available_memory", lambda room=room: room)
        counts.append(capacity.users_at_once(read))
    assert counts[0] > counts[1] == 1


FREED = """
import gc, psutil, torch
from perce_lite.{module} import return_free_memory
resident = lambda: psutil.Process().memory_info().rss
before = resident()
pieces = [torch.ones(20_000) for _ in range(4000)]  # 80 kB each: below malloc's threshold for a mapping of its own
kept = pieces[::400]  # holes between what stays
filled = resident() - before
del pieces
gc.collect()
return_free_memory()
print(filled, resident() - before, len(kept))
"""


def test_what_was_freed_goes_back_to_the_system():
    """In a process of its own: a heap that was used before has room for the pieces."""
    code = FREED.format(module=return_free_memory.__module__.removeprefix("perce_lite."))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    filled, left, _ = map(int, done.stdout.split())
    assert filled > 250 * MIB
    assert left < 100 * MIB


@pytest.mark.parametrize("engine", [lambda read: SequentialEngine(read), lambda read: SlotsEngine(read, 2)])
def test_hooks_of_checkpointing_do_not_pile_up(recipe, engine):
    text = "train: {max_steps: 1, output_dir: out, store: null, gradient_checkpointing: true}\n"
    read = load_recipe(recipe(rows_of(3), text + "fleet: {min_examples: 4, gate: null}\n"))
    made = engine(read)
    fleet(read, lambda _: made)
    base = made._base().model
    assert sum(len(module._forward_hooks) for module in base.modules()) == 0


def test_collections_spare_what_was_there_before_and_find_what_is_new():
    class Node:
        pass

    gc.unfreeze()  # the tests freeze their modules too
    try:
        with modules_frozen():
            assert gc.get_freeze_count() > 100_000
            assert len(gc.get_objects()) < 10_000
            node = Node()
            node.itself = node
            gone = weakref.ref(node)
            del node
            gc.collect()
            assert gone() is None
        assert gc.get_freeze_count() == 0
        gc.freeze()
        with modules_frozen():
            pass
        assert gc.get_freeze_count() > 100_000, "what others froze stays so"
    finally:
        gc.freeze()
