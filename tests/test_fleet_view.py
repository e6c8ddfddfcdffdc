"""What a fleet shows while it works: adapters done with the parts that are under way, rate, loss, failures."""

import math

import pytest
from fleet_fixtures import TEXT, rows_of

from perce_lite.console import progress_bar
from perce_lite.fleet import fleet as room
from perce_lite.fleet.engines.slots import engine_for
from perce_lite.fleet.fleet import fleet
from perce_lite.recipe import load_recipe

pytest_plugins = ["cli_fixtures"]


@pytest.fixture
def shown(monkeypatch):
    """What the bar was given, in order: adapters done, and the note beside it."""
    given: list[tuple[float, str]] = []

    def bar():
        made = progress_bar()
        update = made.update

        def kept(task, completed, note):
            given.append((completed, note))
            update(task, completed=completed, note=note)

        made.update = kept
        return made

    monkeypatch.setattr(room, "progress_bar", bar)
    return given


@pytest.mark.parametrize("slots", [1, 3])
def test_the_bar_moves_with_every_step(recipe, shown, slots):
    rows = [{**row, "completion": ""} if row["user"] == "user4" else row for row in rows_of(5)]
    path = recipe(rows, TEXT.replace("gate: null", f"gate: null, init_from: none, slots: {slots}"))
    told = fleet(load_recipe(path), engine_for)
    assert (told.trained, told.failed) == (4, 1)
    done = [completed for completed, _ in shown]
    assert done == sorted(done), "never back"
    assert done[-1] == 5
    assert any(completed % 1 for completed in done), "steps of those at work count"
    losses = [float(note.partition("loss ")[2].split(",")[0]) for _, note in shown if "loss " in note]
    assert len(losses) >= (4 * 3 if slots == 1 else 3)
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)
    assert "1 failed" in shown[-1][1]
    assert "1 failed" not in shown[0][1]
