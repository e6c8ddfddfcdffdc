"""A whole fleet exported: who serves somebody, once; a stopped run goes on; a failing one is named."""

import json
import shutil
from pathlib import Path

import pytest
from fleet_fixtures import TEXT, rows_of
from test_export import change_json, change_tensors

from perce_lite.errors import DiskFullError, ExportError
from perce_lite.export import export_all as every
from perce_lite.export import proof
from perce_lite.export.export_all import served
from perce_lite.export_targets import PROOF
from perce_lite.files import safe_name
from perce_lite.fleet.registry import opened
from perce_lite.model import base as models

pytest_plugins = ["cli_fixtures"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Where the first test of this module leaves its fleet for the others."""
    return tmp_path_factory.mktemp("trained") / "fleet"


@pytest.fixture
def fleet(recipe, run, trained, tmp_path) -> Path:
    """Three users with an adapter of their own, each; one held back; the shared adapter serves that one."""
    if not trained.exists():
        mine = recipe(rows_of(3), TEXT)
        assert run("fleet", mine)[0] == 0
        shutil.copytree("out", trained)
    else:
        recipe(rows_of(3), TEXT)
        shutil.copytree(trained, tmp_path / "out")
    folder = tmp_path / "out"
    with opened(folder) as registry:
        held = registry.get("user", "user1")
        registry.judged(held, "held back", "worse")
    return folder


def states(told: dict) -> dict[str, str]:
    return {one["adapter"]: one["state"] for one in told["exports"]}


def test_every_adapter_that_serves_somebody_once_over_one_base(fleet, figures, run, monkeypatch):
    loads = []
    plain = models.load_base
    monkeypatch.setattr(proof, "load_base", lambda recipe: loads.append(1) or plain(recipe))
    told = figures("export", "--all", "--fleet", fleet, "--to", "peft")
    assert states(told) == {"all all": "exported", "user user0": "exported", "user user2": "exported"}
    assert {one["adapter"]: one["users"] for one in told["exports"]}["all all"] == ["user1"]
    assert len(loads) == 1
    place = fleet / "adapters/user" / safe_name("user0") / "adapter-peft"
    assert {one["adapter"]: one["folder"] for one in told["exports"]}["user user0"] == str(place)
    assert run("export", "--verify", place)[0] == 0
    again = figures("export", "--all", "--fleet", fleet, "--to", "peft")
    assert set(states(again).values()) == {"kept"}
    assert set(states(figures("export", "--all", "--fleet", fleet, "--to", "peft", "--force")).values()) == {"exported"}


def test_what_was_stopped_damaged_or_retrained_is_made_anew(fleet, figures, monkeypatch):
    first = figures("export", "--all", "--fleet", fleet, "--to", "merged", "--out", "away")
    places = {one["adapter"]: Path(one["folder"]) for one in first["exports"]}
    assert all(place.parent == Path("away") for place in places.values())
    change_tensors(places["user user0"] / "model.safetensors", lambda name, one: one + 1e-3)
    source = fleet / "adapters/user" / safe_name("user2") / "adapter/adapter_model.safetensors"
    change_tensors(source, lambda name, one: one * 1.5)
    shutil.rmtree(places["all all"])
    again = figures("export", "--all", "--fleet", fleet, "--to", "merged", "--out", "away")
    assert set(states(again).values()) == {"exported"}
    shutil.rmtree(places["user user0"])
    plain = every.export
    monkeypatch.setattr(
        every, "export", lambda folder, *rest: pytest.fail("kept") if "user2" in str(folder) else plain(folder, *rest)
    )
    assert states(figures("export", "--all", "--fleet", fleet, "--to", "merged", "--out", "away")) == {
        "all all": "kept", "user user0": "exported", "user user2": "kept",
    }  # fmt: skip


def test_a_failing_one_is_named_and_the_others_go_on(fleet, run, monkeypatch, tmp_path):
    weights = fleet / "adapters/user" / safe_name("user0") / "adapter/adapter_model.safetensors"
    change_tensors(weights, lambda name, one: one * 0)
    (fleet / "adapters/user" / safe_name("user2") / "adapter-peft").mkdir()
    (fleet / "adapters/user" / safe_name("user2") / "adapter-peft" / "diary.txt").touch()
    code, out, err = run("export", "--all", "--fleet", fleet, "--to", "peft", "--json", "told.json")
    assert code == 3
    told = json.loads(Path("told.json").read_text())
    assert states(told) == {"all all": "exported", "user user0": "failed", "user user2": "failed"}
    assert told["failed"] == 2
    assert "user user0: left out." in err
    assert "a no-op adapter" in err
    assert "is no export, so it is never replaced" in out

    def full(*args):
        raise DiskFullError("The disk is full")

    monkeypatch.setattr(every, "export", full)
    assert run("export", "--all", "--fleet", fleet, "--to", "merged")[0] == 2


def test_users_who_are_deleted_or_served_by_the_base_are_left_out(fleet, run, figures):
    figures("export", "--all", "--fleet", fleet, "--to", "peft")
    gone = fleet / "adapters/user" / safe_name("user0")
    assert (gone / "adapter-peft").is_dir()
    assert run("adapters", "delete", "user0", "--fleet", fleet, "--yes")[0] == 0
    assert not gone.exists(), "what was exported beside the adapter went with it"
    with opened(fleet) as registry:
        registry.judged(registry.get("all", "all"), "held back", "worse")
        serving, bare = served(registry)
    assert [one.key for one in serving] == [("user", "user2")]
    assert bare == ["user1"]
    told = figures("export", "--all", "--fleet", fleet, "--to", "peft")
    assert states(told) == {"user user2": "kept"}
    assert told["served_by_base"] == ["user1"]


def test_an_export_of_before_that_is_of_another_kind_is_made_anew(fleet, figures):
    pytest.importorskip("xllamacpp")
    for quant in ("F16", "F32"):
        told = figures("export", "--all", "--fleet", fleet, "--to", "gguf", "--quant", quant)
        assert set(states(told).values()) == {"exported"}
    assert set(states(figures("export", "--all", "--fleet", fleet, "--to", "gguf", "--quant", "F32")).values()) == {
        "kept"
    }
    place = Path(told["exports"][0]["folder"])
    change_json(place / PROOF, quant="F16")
    assert not every._holds(place.with_name("adapter"), "gguf", place, None, "F32")


def test_bad_input(fleet, run, tmp_path):
    for words, code, told in (
        (["--all"], 2, "--to TARGET"),
        (["--all", "x", "--to", "peft"], 2, "--all and --to TARGET"),
        (["x", "--fleet", fleet, "--to", "peft"], 2, "--fleet goes with --all"),
        (["--all", "--fleet", fleet, "--to", "mlx"], 2, "there is no such target"),
        (["--all", "--fleet", tmp_path / "none", "--to", "peft"], 2, "no fleet here"),
        (["--all", "--to", "peft", "--push-to-hub", "me/x"], 2, "for one adapter"),
    ):
        got, _, err = run("export", *words)
        assert got == code
        assert told in " ".join(err.split()).replace("│ │", ""), err
    with pytest.raises(ExportError, match="--quant goes with gguf"):
        every.export_all(fleet, "peft", quant="F32")
