"""The results of a fleet: dataclasses for tables and pages, whose JSON keys stay as scripts read them."""

import json
from pathlib import Path

from fleet_fixtures import TEXT, Clock, rows_of

from perce_lite.fleet.fleet import fleet
from perce_lite.fleet.registry import Adapter, opened
from perce_lite.fleet.result import Gains, gains
from perce_lite.recipe import load_recipe

pytest_plugins = ["cli_fixtures"]

KEYS = ["folder", "due", "bytes_needed", "dry_run", "trained", "held_back", "failed", "states", "gains"]
GAIN_KEYS = {"users", "base", "start", "own", "over_start", "over_base", "parameters"}


def test_the_json_of_a_fleet_keeps_its_keys(recipe, figures, monkeypatch):
    monkeypatch.setattr("perce_lite.fleet.engines.slots.engine_for", Clock())
    path = recipe(rows_of(3), TEXT)
    before = figures("fleet", path, "--dry-run")
    assert (list(before), before["gains"]) == (KEYS, {"users": 0})
    after = figures("fleet", path)
    assert list(after) == KEYS
    assert set(after["gains"]) == GAIN_KEYS
    assert after["due"] == {"user": 3, "cohort": 0, "all": 1}
    result = fleet(load_recipe(path), Clock(), dry_run=True)
    assert json.loads(json.dumps(result.figures())) == {**after, **{"due": dict.fromkeys(after["due"], 0)}} | {
        "bytes_needed": 0, "dry_run": True, "trained": 0,
    }  # fmt: skip
    with opened(Path("out")) as registry:
        assert list(result.adapters) == registry.all()


def test_the_json_of_queries_keeps_its_keys(recipe, figures):
    fleet(load_recipe(recipe(rows_of(2), TEXT)), Clock())
    serving = figures("adapters", "who", "user0", "--fleet", "out")
    assert list(serving) == ["user", "adapter", "folder", "why"]
    assert serving["adapter"] == ["user", "user0"]
    facts = figures("adapters", "show", "user0", "--fleet", "out")
    lineage = ["model", "base_fingerprint", "recipe_fingerprint", "data_fingerprint"]
    assert list(facts) == ["state", "trained", *Adapter.__dataclass_fields__, *lineage]
    [entry] = [entry for entry in figures("adapters", "list", "--fleet", "out")["adapters"] if entry["name"] == "user0"]
    assert list(entry) == ["state", *Adapter.__dataclass_fields__]


def test_gains_are_means_over_users_with_held_out_rows(recipe):
    fleet(load_recipe(recipe(rows_of(2), TEXT)), Clock(gain=0.25))
    with opened(Path("out")) as registry:
        mean = gains(registry.all())
    assert mean == Gains(2, base=3.0, start=2.5, own=2.25, over_start=0.25, over_base=0.75, parameters=50.0)
