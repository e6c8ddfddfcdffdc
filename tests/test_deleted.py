"""A user who was deleted: asked before, shown in advance, and named with the day by every command afterwards."""

import json
import sqlite3
import sys
from pathlib import Path

import pytest
from fleet_fixtures import TEXT, Clock, rows_of

from perce_lite.cli.conversation import Conversation
from perce_lite.errors import FleetError
from perce_lite.files import safe_name
from perce_lite.fleet import queries, registry
from perce_lite.fleet.fleet import fleet
from perce_lite.fleet.registry import FILE, opened
from perce_lite.recipe import load_recipe
from perce_lite.serve.directory import Fleet, OneAdapter

pytest_plugins = ["cli_fixtures"]

DAY = "2026-11-26"


@pytest.fixture
def path(recipe, monkeypatch) -> Path:
    """The recipe of a fleet in out/ that an engine which trains nothing has been through."""
    monkeypatch.setattr(registry, "_now", lambda: f"{DAY}T12:00:00+00:00")
    made = recipe(rows_of(3), TEXT)
    fleet(load_recipe(made), Clock())
    return made


def folder_of(user: str) -> Path:
    return Path("out/adapters/user") / safe_name(user) / "adapter"


def test_nothing_is_removed_unasked(path, run, figures):
    code, _, err = run("adapters", "delete", "user0", "--fleet", "out")
    assert (code, "perce-lite adapters delete user0 --fleet out --yes" in err) == (2, True)
    receipt = figures("adapters", "delete", "user0", "--fleet", "out", "--dry-run")
    assert folder_of("user0").is_dir()
    with opened(Path("out")) as fleet_registry:
        assert fleet_registry.user("user0") is not None
    done = figures("adapters", "delete", "user0", "--fleet", "out", "--yes")
    assert {**receipt, "dry_run": False} == done, "the receipt in advance is the receipt"
    assert str(folder_of("user0").parent) in done["removed"]
    assert not folder_of("user0").exists()
    again = figures("adapters", "delete", "user0", "--fleet", "out", "--yes")
    assert (again["earlier"], again["removed"]) == (DAY, [])


@pytest.mark.parametrize("says", ["y\n", "n\n"])
def test_a_terminal_is_asked(path, run, monkeypatch, says):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("typer.confirm", lambda question, err: says == "y\n")
    code, out, err = run("adapters", "delete", "user0", "--fleet", "out")
    assert "removed: out/adapters/user/" in out
    assert (code, folder_of("user0").is_dir()) == ((0, False) if says == "y\n" else (2, True)), err


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "--adapter", "USER", "--prompt", "hello"),
        ("generate", "--adapter", "ALL", "--prompt", "hello", "--user", "user0"),
        ("chat", "USER"),
        ("chat", "ALL", "--user", "user0"),
        ("eval", "mine.yaml", "--adapter", "USER"),
        ("inspect", "mine.yaml", "--user", "user0"),
        ("inspect", "mine.yaml", "--adapter", "USER"),
        ("serve", "USER"),
        ("export", "USER", "--to", "peft"),
        ("export", "ALL", "--to", "peft", "--user", "user0"),
        ("adapters", "who", "user0", "--fleet", "out"),
        ("adapters", "show", "user0", "--fleet", "out"),
        ("fleet", "mine.yaml", "--only", "user0"),
    ],
    ids=" ".join,
)
def test_every_command_says_that_and_when_a_user_was_deleted(path, run, words):
    queries.delete(Path("out"), "user0")
    places = {"USER": folder_of("user0"), "ALL": Path("out/adapters/all/adapter")}
    code, _, err = run(*(places.get(word, word) for word in words))
    assert code == 2, err
    assert f"was deleted on {DAY}" in err
    assert "--retrain USER" in err


def test_chat_and_server_say_it_too(path, toy):
    queries.delete(Path("out"), "user0")
    all_of_them = Path("out/adapters/all/adapter").absolute()
    opened_adapter = type("Opened", (), {"metadata": {"folder": str(all_of_them)}})
    conversation = Conversation(type("Answerer", (), {"opened": opened_adapter}), 8, print)
    with pytest.raises(FleetError, match=f"was deleted on {DAY}"):
        conversation.set_profile("user user0")
    assert Fleet.deleted_on(type("Served", (), {"folder": Path("out")}), "user0") == DAY
    one = object.__new__(OneAdapter)
    one.reference, one._users = {"folder": str(all_of_them)}, ["user0", "user1"]
    assert (one.deleted_on("user:user0"), one.deleted_on("user1")) == (DAY, None)
    assert [entry.id for entry in one.entries()] == ["base", "adapter", "user1"]
    assert one.find("user0") is None


def test_outside_of_a_fleet_and_other_users_are_not_refused(path, tmp_path):
    queries.delete(Path("out"), "user0")
    queries.refuse_deleted(tmp_path / "elsewhere", "user0")
    queries.refuse_deleted(folder_of("user1"), "user1")
    assert queries.deletions(tmp_path / "elsewhere", ["user0"]) == {}


def test_who_is_taken_in_again_was_not_deleted(path, run):
    queries.delete(Path("out"), "user0")
    fleet(load_recipe(path), Clock(), retrain=["user0"])
    queries.refuse_deleted(folder_of("user0"), "user0")
    assert run("adapters", "who", "user0", "--fleet", "out")[0] == 0


def test_a_registry_of_before_knows_who_was_deleted_and_not_when(path):
    queries.delete(Path("out"), "user0")
    database = sqlite3.connect(Path("out") / FILE)
    [kept] = database.execute("SELECT user_hash FROM deleted").fetchone()
    database.executescript(
        "DROP TABLE deleted; CREATE TABLE deleted (user_hash TEXT PRIMARY KEY) WITHOUT ROWID;"
        f"INSERT INTO deleted VALUES ('{kept}'); PRAGMA user_version = 1;"
    )
    database.close()
    with pytest.raises(FleetError, match="was deleted on a day that was not recorded"):
        queries.refuse_deleted(Path("out"), "user0")
    with opened(Path("out")) as fleet_registry:
        assert fleet_registry.deleted_on("user0") is not None


def test_what_is_left_of_a_deleted_user_is_no_name(path):
    queries.delete(Path("out"), "user0")
    held = (Path("out") / FILE).read_bytes()
    assert b"user0" not in held
    assert json.dumps(safe_name("user0")).strip('"').encode() not in held
