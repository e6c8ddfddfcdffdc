"""The registry of a fleet: deletion without a trace, folders that cannot be used, odd names, growth that is linear."""

import json
import shutil
import struct
import threading
from pathlib import Path

import pytest
import toys
from filelock import FileLock
from fleet_fixtures import TEXT, Clock, Quick, rows_of

from perce_lite.errors import FleetError
from perce_lite.fleet import queries as roster
from perce_lite.fleet import registry
from perce_lite.fleet.engines.sequential import SequentialEngine
from perce_lite.fleet.fleet import fleet
from perce_lite.fleet.registry import FILE, Registry, opened
from perce_lite.recipe import load_recipe

pytest_plugins = ["cli_fixtures"]


def test_deleting_leaves_no_trace(recipe, run, figures, tmp_path):
    """Everything the tool wrote is searched for the user's texts, their token ids and their name."""
    secret = "zanzibar quokka marmalade"
    rows = rows_of(3, cohorts=1)
    for row in rows:
        if row["user"] == "user1":
            row |= {"user": "Sée Crét/user", "completion": f"{secret} {row['completion']}"}
    path = recipe(rows, TEXT)
    assert run("fleet", path)[0] == 0
    assert run("inspect", path)[0] == 0
    [adapter] = [one.parent for one in Path("out/adapters/cohort").rglob("adapter_config.json")]
    assert run("eval", path, "--adapter", adapter, "--set", "evaluation.max_new_tokens=2")[0] == 0
    data, kept = Path("rows.jsonl"), {"rows.jsonl", "mine.yaml"}
    assert traces(tmp_path, secret, kept)
    code, out, err = run("adapters", "delete", "Sée Crét/user", "--fleet", "out", "--yes")
    assert code == 0, err
    assert "the adapter of cohort c0" in out
    assert str(data.absolute()) in out.replace("\n", "")
    assert traces(tmp_path, secret, kept) == []
    assert traces(tmp_path, "Crét/user", kept) == []
    assert run("adapters", "who", "Sée Crét/user", "--fleet", "out")[0] == 2
    told = figures("fleet", path, "--dry-run")
    assert told["due"] == {"user": 2, "cohort": 1, "all": 0}, "what had seen the texts, and its children"
    assert run("fleet", path)[0] == 0
    assert traces(tmp_path, secret, kept) == [], "the user stays out though the data has them"


def traces(folder: Path, text: str, kept: set[str]) -> list[str]:
    """Files that hold `text`, as UTF-8, as JSON escapes, or as runs of its token ids in any usual width."""
    tokenizer = toys.toy_tokenizer("chatml")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    needles = [text.encode(), json.dumps(text)[1:-1].encode(), text.encode("utf-16-le")]
    needles += [struct.pack(f"<{len(ids)}{width}", *ids) for width in "iqHf"]
    needles += [sep.join(map(str, ids)).encode() for sep in (", ", ",", "\n")]
    files = [one for one in folder.rglob("*") if one.is_file() and one.name not in kept and "figures" not in one.parts]
    return [str(one) for one in files if any(needle in one.read_bytes() for needle in needles)]


def test_a_second_fleet_on_the_folder_stops(recipe, run):
    path = recipe(rows_of(2), TEXT)
    Path("out").mkdir()
    with FileLock("out/fleet.lock"):
        code, _, err = run("fleet", path)
    assert code == 2
    assert "another fleet run is using it" in " ".join(err.split())


def test_folders_that_cannot_be_used(recipe, tmp_path):
    path, engine = recipe(rows_of(2), TEXT), Clock()
    fleet(load_recipe(path), engine)
    other = Clock()
    other.base = lambda: {"shape": ["toy", 2, 1, 1, True], "embedding": [1.0]}
    with pytest.raises(FleetError, match="another base"):
        fleet(load_recipe(path), other, retrain=["all"])
    import sqlite3

    with sqlite3.connect(Path("out") / FILE) as fleet_registry:
        fleet_registry.execute("PRAGMA user_version = 9")
    with pytest.raises(FleetError, match="newer version"):
        fleet(load_recipe(path), engine)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / FILE).write_text("not a database" * 100)
    with pytest.raises(FleetError, match="damaged"), opened(tmp_path / "broken"):
        pass
    with pytest.raises(FleetError, match="no fleet here"), opened(tmp_path / "nowhere"):
        pass


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda rows: [{**row, "cohort": f"c{n % 2}"} for n, row in enumerate(rows)], "is in two cohorts: c0"),
        (lambda rows: [{**row, "user": f"u{n}"} for n, row in enumerate(rows)], "nobody has 4 training rows"),
    ],
)
def test_data_that_makes_no_fleet(recipe, run, change, expected):
    text = TEXT.replace("gate: null", "gate: null, init_from: none")
    code, _, err = run("fleet", recipe(change(rows_of(2)), text))
    assert code == 2
    assert expected in " ".join(err.split())


def test_odd_names_are_names_and_never_paths(recipe, run, monkeypatch):
    odd = ["../../etc", "a\x07b\nc", "x" * 300, "Ann", "ann", "Ren\u00e9", "Rene\u0301"]
    rows = rows_of(len(odd))
    rows = [{**row, "user": odd[int(row["user"][4:])]} for row in rows]
    path, engine = recipe(rows, TEXT), Clock()
    monkeypatch.setattr("perce_lite.fleet.engines.slots.engine_for", engine)
    code, _, err = run("fleet", path)
    assert code == 0
    assert "differ only in case or Unicode form" in " ".join(err.split())
    assert len(set(engine.trained)) == len(odd) + 1
    assert all(one.resolve().is_relative_to(Path("out").resolve()) for one in Path("out").rglob("*"))
    for name in odd:
        assert run("adapters", "who", "--fleet", "out", "--json", "who.json", "--", name)[0] == 0
        assert json.loads(Path("who.json").read_text("utf-8"))["adapter"] == ["user", name]
        assert run("adapters", "show", "--fleet", "out", "--", name)[0] == 0
    code, out, _ = run("adapters", "list", "--fleet", "out")
    assert (code, len(out.splitlines())) == (0, len(odd) + 3), "a line each, whatever is in a name"


def test_ten_thousand_users_grow_linearly(recipe, run, monkeypatch):
    """Work is counted, not timed: statements of the registry stay proportional to the users, and each is a look-up."""
    counts = {}
    for users in (1000, 10_000):
        text = {"profile": "a text", "prompt": "Hi", "completion": "Hi", "split": "train"}
        path = recipe([{"user": f"user{number}", **text} for number in range(users)], TEXT)
        read = load_recipe(path, [f"train.output_dir=fleet{users}", "fleet.min_examples=1"])
        statements = []
        monkeypatch.setattr(registry, "Registry", traced(statements))
        told = fleet(read, Quick())
        assert (told.trained, told.failed, len(told.adapters)) == (users + 1, 0, users + 1)
        counts[users] = len(statements)
        assert fleet(read, Quick()).trained == 0
        again = len(statements) - counts[users]
        with opened(Path(f"fleet{users}")) as fleet_registry:
            plans = [
                str(one[3])
                for query in (
                    "SELECT * FROM adapters WHERE kind = 'user' AND name = 'user5'",
                    "SELECT * FROM users WHERE user = 'user5'",
                    "SELECT * FROM seen WHERE user = 'user5'",
                    "SELECT * FROM adapters WHERE due = 1 AND present = 1 AND kind = 'user' AND name > 'x'",
                )
                for one in fleet_registry._db.execute(f"EXPLAIN QUERY PLAN {query}")
            ]
        assert all(one.startswith("SEARCH") for one in plans), plans
        assert again < 4.1 * users, "a run with nothing to do only enrols"
        statements.clear()
        code, out, _ = run("adapters", "list", "--fleet", f"fleet{users}")
        assert (code, len(out.splitlines())) == (0, users + 3)
        assert len([one for one in statements if one.startswith("SELECT")]) == 1, "the registry alone, in one go"
        assert not Path(f"fleet{users}/adapters").exists(), "so no adapter's folder can have been read"
    assert counts[10_000] < 10.5 * counts[1000]


def traced(statements):
    class Traced(Registry):
        def __init__(self, folder, connection):
            connection.set_trace_callback(statements.append)
            super().__init__(folder, connection)

    return Traced


def test_a_killed_deletion_can_be_done_again(recipe, run, monkeypatch):
    path = recipe(rows_of(2), TEXT)
    fleet(load_recipe(path), Clock())

    class Killed(BaseException):
        pass

    def killed(self, *args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(registry.Registry, "_ask", killed)
        with pytest.raises(Killed):
            roster.delete(Path("out"), "user0")
    with opened(Path("out")) as fleet_registry:
        assert fleet_registry.user("user0") is not None, "all or nothing"
    assert run("adapters", "delete", "user0", "--fleet", "out", "--yes")[0] == 0
    assert run("adapters", "delete", "user0", "--fleet", "out", "--yes")[0] == 0, "again, to be sure"
    told = fleet(load_recipe(path), Clock(), dry_run=True)
    assert told.due == {"user": 1, "cohort": 0, "all": 1}


def test_a_cohort_that_a_user_has_left_is_due_when_they_are_deleted(recipe):
    rows = rows_of(4, cohorts=2)
    fleet(load_recipe(recipe(rows, TEXT)), Clock())
    moved = [{**row, "cohort": "c1"} if row["user"] == "user0" else row for row in rows]
    fleet(load_recipe(recipe(moved, TEXT)), Clock())
    with opened(Path("out")) as fleet_registry:
        assert fleet_registry.user("user0")[0] == "c1"
    assert roster.delete(Path("out"), "user0").due == ["the adapter of cohort c0"], "that of c1 was trained before"


def test_exports_of_what_had_seen_a_deleted_user_are_named(recipe):
    fleet(load_recipe(recipe(rows_of(4, cohorts=2), TEXT)), Clock())
    with opened(Path("out")) as fleet_registry:
        mine, other = (
            Path("out") / fleet_registry.get("cohort", name).folder / "adapter-gguf" for name in ("c0", "c1")
        )
    mine.mkdir(parents=True)
    other.mkdir(parents=True)
    left = roster.delete(Path("out"), "user0").left
    assert [one for one in left if one.startswith(f"{mine}: exported from the adapter of cohort c0 as it was")]
    assert not [one for one in left if str(other) in one]


def test_a_store_of_another_folder_is_found(recipe, tmp_path, monkeypatch):
    path = recipe(rows_of(2), TEXT)
    fleet(load_recipe(path), SequentialEngine)
    assert list(Path("store").rglob("user0-*"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    roster.delete(tmp_path / "out", "user0")
    assert not list((tmp_path / "store").rglob("user0-*"))


def test_two_writers_wait_for_each_other(recipe):
    """Reading the registry while a fleet writes it: neither fails."""
    fleet(load_recipe(recipe(rows_of(2), TEXT)), Clock())
    faults = []

    def read():
        try:
            for _ in range(30):
                with opened(Path("out")) as fleet_registry:
                    fleet_registry.all()
        except FleetError as error:
            faults.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(10):
        fleet(load_recipe("mine.yaml"), Clock(), retrain=["user0"])
    reader.join()
    assert faults == []


def test_one_adapter_that_is_gone_stops_nobody_else(recipe):
    rows = rows_of(4, cohorts=2)
    fleet(load_recipe(recipe(rows, TEXT)), SequentialEngine)
    [gone] = Path("out/adapters/cohort").glob("c0-*")
    shutil.rmtree(gone)
    told = fleet(load_recipe("mine.yaml"), SequentialEngine, retrain=["user0", "user1"])
    assert (told.trained, told.failed) == (1, 1)
