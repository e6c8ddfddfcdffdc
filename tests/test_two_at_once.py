"""Two of everything at once, in two real processes: one is told who the other is, and a deletion is never undone."""

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fleet_fixtures import TEXT, rows_of
from forked import Child, command
from safetensors.torch import load_file

from perce_lite.errors import RunError
from perce_lite.files import earlier_name, safe_name
from perce_lite.fleet import queries
from perce_lite.locks import held_alone
from perce_lite.model.logprob_store import Store
from perce_lite.model.store_files import clear, delete

pytest_plugins = ["cli_fixtures"]


class Process:
    """A command that waits at a function of ours until `end` is called."""

    def __init__(self, at: str, *words: str) -> None:
        self.child = Child(command, list(words), at)
        while not Path("here").exists():
            assert self.child.poll() is None, self.child.said()
            time.sleep(0.01)

    def end(self) -> tuple[int, str]:
        """Exit code, and what it said."""
        Path("go").touch()
        return self.child.wait(300), self.child.said()

    @property
    def named(self) -> str:
        return f"process {self.child.pid} on {socket.gethostname()}, since 20"


@pytest.fixture
def waiting():
    """Makes a waiting command; none outlives the test."""
    started = []

    def start(at: str, *words: str) -> Process:
        for file in ("here", "go"):
            Path(file).unlink(missing_ok=True)
        started.append(Process(at, *words))
        return started[-1]

    yield start
    for process in started:
        process.child.kill()


TRAIN = "train: {max_steps: 2, output_dir: out, store: store}\nevaluation: {max_rows: 2, max_new_tokens: 2}\n"
ALONE = TEXT.replace("gate: null", "gate: null, init_from: none").replace("max_steps: 3", "max_steps: 1")


def files(folder: Path) -> dict[str, bytes]:
    """What lies there, but for the locks."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith((".lock", ".holder"))
    }


def test_train_and_train(recipe, run, waiting):
    path = recipe(text=TRAIN)
    first = waiting("perce_lite.training.trainer:PerCETrainer.training_step", "train", str(path))
    before = files(Path("out"))
    code, _, err = run("train", path)
    told = " ".join(err.split())
    assert code == 2
    assert f"out: another run is training here ({first.named}" in told
    assert files(Path("out")) == before
    assert first.end()[0] == 0
    assert run("train", path)[0] == 0
    assert Path("out/.run.lock").is_file(), "a lock file stays"


def test_store_clear_and_train(recipe, run, waiting):
    """What the run had scored before is not brought back by what it scores later."""
    path = recipe(text=TRAIN)
    first = waiting("perce_lite.model.logprob_store:Store.put", "train", str(path))
    assert run("store", "clear", "--path", "store")[0] == 0
    code, told = first.end()
    assert code == 0, told
    assert told.count("Users were deleted from the store since this run began") == 1
    assert not list(Path("store").rglob("*.safetensors"))
    weights = load_file("out/adapter/adapter_model.safetensors")
    assert run("train", path, "--restart")[0] == 0
    again = load_file("out/adapter/adapter_model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights), "it is a cache and nothing else"
    assert list(Path("store").rglob("*.safetensors")), "who comes later may keep what it scores"


def test_fleet_and_delete_then_delete_and_a_run_with_its_store(recipe, run, waiting):
    path = recipe(rows_of(2), TEXT.replace("max_steps: 3", "max_steps: 1"))
    first = waiting("perce_lite.training.trainer:PerCETrainer.training_step", "fleet", str(path))
    code, _, err = run("adapters", "delete", "user0", "--fleet", "out", "--yes")
    assert code == 2
    assert f"another fleet run is using it ({first.named}" in " ".join(err.split())
    assert first.end()[0] == 0
    alone = Path("alone.yaml")
    alone.write_text(path.read_text().replace("output_dir: out", "output_dir: alone"))
    shutil.rmtree("store")  # so that it scores them anew
    other = waiting("perce_lite.model.logprob_store:Store.put", "train", str(alone))
    assert run("adapters", "delete", "user0", "--fleet", "out", "--yes")[0] == 0
    code, told = other.end()
    assert code == 0, told
    assert [file.name for file in Path("store").rglob("user*.safetensors") if file.name.startswith("user0")] == []
    assert [file.name for file in Path("store").rglob("user1-*.safetensors")], "of others it is kept"


def test_export_and_export_then_export_and_delete(recipe, run, waiting):
    path = recipe(rows_of(1), ALONE)
    assert run("fleet", path)[0] == 0
    [adapter] = Path("out/adapters/user").glob("*/adapter")
    first = waiting("perce_lite.export.export:verify", "export", str(adapter), "--to", "peft")
    code, _, err = run("export", adapter, "--to", "peft")
    assert code == 2
    assert f"another export is writing there ({first.named}" in " ".join(err.split())
    assert first.end()[0] == 0
    second = waiting("perce_lite.export.export:write", "export", str(adapter), "--to", "peft", "--force")
    assert run("adapters", "delete", "user0", "--fleet", "out", "--yes")[0] == 0
    code, told = second.end()
    assert code == 2, told
    assert "Traceback" not in told
    assert not list(Path("out/adapters/user").rglob("*.safetensors")), "nothing of a deleted user comes back"


def test_compare_and_compare(recipe, run, waiting):
    rows = rows_of(2)
    path = recipe(rows, "train: {max_steps: 1, output_dir: out, store: null}\nevaluation: {max_rows: 2}\n")
    words = ("compare", str(path), "--arms", "uniform", "--rates", "1e-3", "--seeds", "1")
    first = waiting("perce_lite.training.trainer:PerCETrainer.training_step", *words)
    code, _, err = run(*words)
    assert code == 2
    assert f"another comparison is on here ({first.named}" in " ".join(err.split())
    assert first.end()[0] == 0


def test_two_imports_to_one_file(tmp_path, monkeypatch, run, waiting):
    monkeypatch.chdir(tmp_path)
    for name in ("ann", "bo"):
        Path(f"{name}.txt").write_text(f"Some words that {name} wrote one day, long enough to be kept by an import.")
    words = ("import", "ann.txt", "--user", "ann", "--append", "--yes")
    first = waiting("perce_lite.data.importers.importing:Imported.write", *words)
    assert run("import", "bo.txt", "--user", "bo", "--append", "--yes")[0] == 0
    code, told = first.end()
    assert code == 2
    assert "was written by another program since it was read" in " ".join(told.split())
    assert run(*words)[0] == 0
    assert [json.loads(line)["user"] for line in Path("texts.jsonl").read_text().splitlines()] == ["bo", "ann"]


def test_what_a_killed_write_left_beside_a_file_is_gone_after_the_next(
    adapter_folder, run, waiting, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("Who are you?\n")
    generate = (
        "generate",
        "--adapter",
        str(adapter_folder),
        "--prompts",
        "prompts.txt",
        "--max-new-tokens",
        "2",
        "--profile",
        "An otter.",
    )
    for file, at, words in (
        ("answers.jsonl", "os:replace", (*generate, "--out", "answers.jsonl")),
        ("store.json", "os:replace", ("store", "show", "--path", "store", "--json", "store.json")),
    ):
        Path("store").mkdir(exist_ok=True)
        stopped = waiting(at, *words)
        stopped.child.kill()
        left = [path.name for path in tmp_path.iterdir() if path.name.startswith(f".{file}.")]
        assert len(left) == 1, "the kill came in the middle of the write"
        assert run(*words)[0] == 0
        assert Path(file).is_file()
        assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


# The parts, in one process


def test_a_lock_says_who_holds_it_and_not_who_held_it(tmp_path):
    def refuse(who: str) -> RunError:
        return RunError(who)

    file = tmp_path / "a.lock"
    with held_alone(file, refuse):
        with pytest.raises(RunError, match=rf"process {os.getpid()} on .*, since 20\d\d-"), held_alone(file, refuse):
            pass
        holder = tmp_path / "a.lock.holder"
        gone = subprocess.Popen([sys.executable, "-c", ""])
        gone.wait()
        holder.write_text(json.dumps({"pid": gone.pid, "host": socket.gethostname(), "since": "2026"}))
        with pytest.raises(RunError, match=r"^another process$"), held_alone(file, refuse):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.lock"]
    killed = os.fork()
    if not killed:
        with held_alone(file, refuse):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(killed, 0)
    with held_alone(file, refuse):
        pass


def test_a_deleted_user_is_not_written_by_who_opened_the_store_before(tmp_path, capfd):
    store = Store(tmp_path, "base")
    entries = {"a": torch.tensor([-1.0])}
    for user in ("ann", "bo"):
        store.put(user, entries)
    other = os.fork()
    if not other:  # another process deletes
        delete(tmp_path, "ann")
        os._exit(0)
    os.waitpid(other, 0)
    for _ in range(2):
        store.put("ann", entries)
        Store(tmp_path, "another base").put("ann", entries)
        store.put("bo", {"b": torch.tensor([-2.0])})
    assert store.get("ann") == Store(tmp_path, "another base").get("ann") == {}
    assert store.get("bo").keys() == {"a", "b"}
    assert capfd.readouterr().err.count("Users were deleted") == 1
    assert not [path for path in tmp_path.rglob("*") if "ann" in path.name], "no file names who was deleted"
    clear(tmp_path)  # by this process, so what it scores from now on it may keep
    store.put("ann", entries)
    assert store.get("ann").keys() == {"a"}


def test_files_of_earlier_versions_are_found_renamed_and_deleted(tmp_path):
    store = Store(tmp_path, "base")
    store.put("ann", {"a": torch.tensor([-1.0])})
    earlier = store.folder / f"{earlier_name('ann')}.safetensors"
    assert len(earlier_name("ann").rpartition("-")[2]) == 12
    assert len(safe_name("ann").rpartition("-")[2]) * 4 == 96
    store.path("ann").rename(earlier)
    assert store.get("ann").keys() == {"a"}
    store.put("ann", {"b": torch.tensor([-2.0])})
    assert not earlier.exists()
    assert store.get("ann").keys() == {"a", "b"}
    store.path("ann").rename(earlier)
    assert list(delete(tmp_path, "ann")) == [earlier]


def test_folders_of_earlier_versions_serve_train_and_are_deleted(recipe, run):
    """A fleet whose adapters' folders have names with 48 bits."""
    path = recipe(rows_of(2), ALONE)
    assert run("fleet", path)[0] == 0
    users = Path("out/adapters/user")
    with sqlite3.connect("out/fleet.sqlite") as database:
        for user in ("user0", "user1"):
            (users / safe_name(user)).rename(users / earlier_name(user))
            folder = f"adapters/user/{earlier_name(user)}"
            database.execute("UPDATE adapters SET folder = ? WHERE name = ?", (folder, user))
    assert run("fleet", path, "--retrain", "user0")[0] == 0
    assert sorted(folder.name for folder in users.iterdir()) == sorted(map(earlier_name, ("user0", "user1")))
    assert run("adapters", "verify", "--fleet", "out")[0] == 0
    assert str(users / earlier_name("user0")) in queries.delete(Path("out"), "user0").removed
    assert [folder.name for folder in users.iterdir()] == [earlier_name("user1")]
