"""Fleets on a Ray cluster: real workers on two nodes, packs, lost workers, poison, resuming, refusals."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fleet_fixtures import rows_of
from ray_fixtures import cluster, light, logged, occupied, plan, ray
from safetensors.torch import load_file

from perce_lite.errors import DeviceError, DiskFullError, FleetError
from perce_lite.fleet.engines import ray_worker
from perce_lite.fleet.engines.ray import RayOptions, ray_engines
from perce_lite.fleet.engines.slots import engine_for
from perce_lite.fleet.fleet import fleet
from perce_lite.fleet.registry import PACKS, opened
from perce_lite.fleet.results import fleet as results
from perce_lite.recipe import load_recipe

pytest_plugins = ["cli_fixtures"]
pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.usefixtures("cluster")]
__all__ = ["cluster", "occupied"]

TEXT = """
train: {max_steps: 6, learning_rate: 0.05, output_dir: out, store: store, save_steps: 2}
fleet: {min_examples: 4, gate: null, slots: 2}
lora: {r: 4}
"""


def killed_once(recipe, place):
    """The real engine; in the middle of its first pack of users the worker kills itself, after states were saved."""
    engine = ray_worker.trainer(recipe, place)
    run = engine.run

    def mortal(tasks, done, progress):
        def step(loss, share):
            progress(loss, share)
            if share > 1.3 and not Path("killed").exists():
                Path("killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)

        run(tasks, done, step)

    engine.run = mortal
    return engine


def weights(folder):
    """{user: tensors} of a fleet's folder."""
    return {
        path.parent.parent.name.rpartition("-")[0]: load_file(path)
        for path in sorted(Path(folder).glob("adapters/*/*/adapter/adapter_model.safetensors"))
    }


def test_adapters_are_those_of_this_process_though_a_worker_is_killed(recipe, capfd, monkeypatch):
    """Two real workers on two nodes train packs of two; one is killed by SIGKILL in mid-pack."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    loaded = load_recipe(recipe(rows_of(4), TEXT))
    options = RayOptions(workers=2, trainer=killed_once)
    ended = {result.name: result for result in results(loaded, "ray", options=options)}
    assert Path("killed").exists()
    said = capfd.readouterr().err
    assert "was lost, another takes its place" in said
    assert "Ray: 2 workers on" in said
    assert {name: result.state for name, result in ended.items()} == dict.fromkeys(
        ["all", "user0", "user1", "user2", "user3"], "in service"
    )
    assert ended["all"].user is None
    assert ended["user2"].user == "user2"
    assert (ended["user2"].adapter / "adapter_model.safetensors").is_file()
    assert not (Path("out") / PACKS).exists(), "nothing is kept of packs that are done"
    assert not list(Path("out").glob(".ray-*"))
    # The same packs in this process, on as many threads.
    with opened(Path("out")) as registry:
        gains = {adapter.name: adapter.gain for adapter in registry.all()}
    assert gains == {name: result.gain for name, result in ended.items()}
    lengths = {user: max(row.characters for row in _rows(loaded, user)) for user in gains if user != "all"}
    order = sorted(lengths, key=lambda user: (-lengths[user], user))
    shutil.move("out", "on-ray")
    for pack in (order[:2], order[2:]):
        fleet(loaded, engine_for, only=pack)
    here, there = weights("out"), weights("on-ray")
    assert here.keys() == there.keys() == gains.keys()
    for name, tensors in here.items():
        assert all(torch.equal(tensors[key], there[name][key]) for key in tensors | there[name]), name


def _rows(loaded, user):
    from perce_lite.data.readers import RowsByUser

    with RowsByUser(loaded) as data:
        return data.rows_of(user)


def test_parents_come_first_then_users_by_length_and_a_failure_is_a_result(recipe):
    rows = rows_of(6, cohorts=2)
    for row in rows:
        row["prompt"] += " please" * 40 * int(row["user"][4:])  # the last user has the longest rows
    loaded = load_recipe(recipe(rows, TEXT))
    plan(user3="fails", user1="bug")
    ended = []
    with light() as make:
        done = fleet(loaded, make, report=lambda result: ended.append(result) if result else None)
    assert (done.trained, done.failed) == (6, 2)
    assert sorted(logged("start")[:2]) == ["c0", "c1"]
    lines = Path("log.txt").read_text().splitlines()
    last_parent = max(lines.index("end c0"), lines.index("end c1"))
    assert last_parent < min(number for number, line in enumerate(lines) if line.startswith("start user"))
    packs = [pack for pack in logged("pack") if pack.startswith("user")]
    assert {"user5 user4", "user3 user2", "user1 user0"} <= set(packs)
    assert packs[:2] in (["user5 user4", "user3 user2"], ["user3 user2", "user5 user4"]), "the longest come first"
    errors = {result.name: result.error for result in ended if result.error}
    assert errors["user3"] == "user3 has no luck"
    assert "ZeroDivisionError: of our own" in errors["user1"], "a fault of ours costs workers, and one user"
    assert {result.name for result in ended if result.adapter} == {"c0", "c1", "user0", "user2", "user4", "user5"}
    assert next(result for result in ended if result.name == "user5").gain == 0.25


def test_the_user_who_kills_workers_is_found_and_left_out(recipe, capfd):
    loaded = load_recipe(recipe(rows_of(4), TEXT.replace("slots: 2", "slots: 4")))
    plan(kills=["user2"])
    with light() as make:
        done = fleet(loaded, make)
    assert (done.trained, done.failed) == (4, 1)
    with opened(Path("out")) as registry:
        poison = registry.get("user", "user2")
        assert [adapter.name for adapter in registry.all() if adapter.state == "failed"] == ["user2"]
    assert "workers were lost while they trained it alone" in poison.why
    assert logged("start").count("user2") == 3, "twice in its pack, once alone"
    for user in ("user0", "user1", "user3"):
        assert logged("end").count(user) == 1, "who has ended is not trained again"
    assert capfd.readouterr().err.count("was lost, another takes its place") == 3
    plan()
    with light(1) as make:
        assert fleet(loaded, make).trained == 1, "it is tried again by the next run"


def test_where_every_worker_dies_the_fleet_stops(recipe):
    loaded = load_recipe(recipe(rows_of(4), TEXT), ["fleet.init_from=none", "fleet.slots=1"])
    plan(kills=["user0", "user1", "user2", "user3"])
    with pytest.raises(FleetError, match="workers were lost and no user was trained in between"), light(1) as make:
        fleet(loaded, make)


def test_a_driver_that_is_killed_or_stopped_is_resumed(recipe, cluster):
    """The driver is another process: first Ctrl-C, then kill -9, then the same run here. Workers end with it."""
    path = recipe(rows_of(5), TEXT.replace("slots: 2", "slots: 1"))
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import ray, ray_fixtures\n"
        "ray.cloudpickle.register_pickle_by_value(ray_fixtures)\n"
        "from perce_lite.fleet import results\n"
        "results.engines = lambda name, options: ray_fixtures.light(options.workers, options.address)\n"
        "from perce_lite.cli.app import main\n"
        f"main(['fleet', {str(path)!r}, '--engine', 'ray', '--workers', '1', '--address', {cluster.address!r}])\n"
    )
    users = ["all", *_by_length(load_recipe(path))]
    for waits, stop, expected in ((users[2], signal.SIGINT, 130), (users[4], signal.SIGKILL, -signal.SIGKILL)):
        plan(waits=[waits])
        driver = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
        while waits not in logged("start"):
            assert driver.poll() is None, driver.stderr.read()
            time.sleep(0.1)
        driver.send_signal(stop)
        assert driver.wait() == expected, driver.stderr.read()
        said = driver.stderr.read()
        assert "Traceback" not in said
    assert logged("end") == users[:4]
    plan()
    with light(1) as make:
        assert fleet(load_recipe(path), make).trained == 2
    assert logged("end") == users, "each once"
    assert logged("start").count(users[4]) == 2


def _by_length(loaded):
    users = [f"user{number}" for number in range(5)]
    return sorted(users, key=lambda user: (-max(row.characters for row in _rows(loaded, user)), user))


def test_a_full_disk_stops_the_fleet_and_names_the_worker(recipe):
    plan(user0="full")
    with pytest.raises(DiskFullError, match=r"worker 1 on .*: The disk is full"), light(1) as make:
        fleet(load_recipe(recipe(rows_of(2), TEXT)), make)


def test_no_more_workers_than_adapters_and_than_fit(recipe, capfd):
    loaded = load_recipe(recipe(rows_of(2), TEXT), ["fleet.group_by=all"])
    with light(2) as make:
        assert fleet(loaded, make).trained == 1
    assert "1 workers instead of 2: no more adapters are due" in capfd.readouterr().err
    with pytest.raises(FleetError, match="3 workers with 1 cores each do not fit the cluster"), light(3) as make:
        fleet(loaded, make, retrain=["all"])


def test_refusals_before_anything_is_trained(recipe, run, monkeypatch):
    path = recipe(rows_of(2), TEXT)
    for words, told in (
        (["--workers", "2"], "--workers goes with --engine ray"),
        (["--engine", "ray", "--address", "127.0.0.1:1"], "--address 127.0.0.1:1: nothing answers there"),
        (["--engine", "ray", "--address", "nonsense"], "nothing answers there"),
        (["--engine", "ray", "--address", "ray://head:10001"], "Ray Client is not supported"),
    ):
        code, _, err = run("fleet", path, *words)
        assert code == 2
        assert told in " ".join(err.split()).replace("│ │", "")
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = run("fleet", path, "--engine", "ray")
    assert code == 2
    assert (
        err.splitlines()[-1] == "error: --engine ray needs Ray: pip install 'perce-lite[ray]' (in a clone: -e '.[ray]')"
    )
    assert not list(Path("out").glob("adapters"))


def test_a_worker_with_another_version_is_refused(recipe, cluster, occupied, tmp_path):
    shutil.copytree(Path(ray_worker.__file__).parents[2], tmp_path / "other/perce_lite")
    init = tmp_path / "other/perce_lite/__init__.py"
    init.write_text(init.read_text().replace('__version__ = "', '__version__ = "9.'))
    (tmp_path / "other/sitecustomize.py").write_text("import perce_lite")  # ahead of the driver's own paths
    node = cluster.add_node(num_cpus=1, env_vars={"PYTHONPATH": str(tmp_path / "other")})
    try:
        with pytest.raises(FleetError, match=r"has perce-lite 9\.\S+ instead of .* install the same"), light(1) as make:
            fleet(load_recipe(recipe(rows_of(3), TEXT)), make)
    finally:
        cluster.remove_node(node)
    assert logged("start") == []


def test_a_worker_whose_gpu_torch_does_not_see_is_refused(recipe, cluster):
    if torch.cuda.is_available():
        pytest.skip("torch sees a GPU here")
    node = cluster.add_node(num_cpus=1, num_gpus=1)  # what a node with a broken driver says
    try:
        loaded = load_recipe(recipe(rows_of(2), TEXT), ["device=auto"])
        refused = pytest.raises(DeviceError, match=r"worker 1 on .* has a GPU here, but torch sees none")
        with refused, ray_engines(RayOptions()) as make:
            fleet(loaded, make)
    finally:
        cluster.remove_node(node)


def test_a_gpu_that_no_node_has_is_refused(recipe):
    with pytest.raises(DeviceError, match="CUDA"), light() as make:
        fleet(load_recipe(recipe(rows_of(2), TEXT), ["device=cuda"]), make)


@pytest.fixture
def elsewhere(cluster, occupied):
    """Starts a node in a mount namespace of its own, in which `mount` was run."""
    started = []

    def make(mount: str):
        command = f"{mount} && exec ray start --address {cluster.address} --num-cpus 1 --block"
        if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
            pytest.skip("no mount namespaces here")
        nodes = len(ray.nodes())
        node = subprocess.Popen(
            ["unshare", "-m", "sh", "-c", command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        started.append(node)
        while len(ray.nodes()) == nodes:
            assert node.poll() is None, node.stderr.read()
            time.sleep(0.1)

    yield make
    for node in started:
        node.terminate()
        node.wait()


def test_a_folder_that_a_worker_does_not_see_is_refused(recipe, elsewhere):
    path = recipe(rows_of(3), TEXT)
    Path("out").mkdir()
    elsewhere(f"mount -t tmpfs none {Path('out').absolute()}")
    with pytest.raises(FleetError, match=r"does not see \S+/out as .* does"), light(1) as make:
        fleet(load_recipe(path), make)
    assert logged("start") == []


def test_a_worker_with_another_base_is_refused(recipe, elsewhere, toy, tmp_path):
    shutil.copytree(toy, tmp_path / "changed")
    file = tmp_path / "changed/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    elsewhere(f"mount --bind {tmp_path / 'changed'} {toy}")
    loaded = load_recipe(recipe(rows_of(3), TEXT))
    refused = pytest.raises(FleetError, match=r"worker \d on .* has other files here than where the command runs")
    with refused, ray_engines(RayOptions(workers=1)) as make:
        fleet(loaded, make)
    assert not (Path("out") / "adapters").exists()
