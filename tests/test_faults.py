"""Faults at every write, rename and removal of a command: whatever the moment, the next run ends in the same bytes.

A few points of each command here; `pytest -m slow` tries every one of the short commands and more of the long ones,
`pytest -m exhaustive -s` every one of those too, which takes hours.
"""

import json

import pytest
from fault_points import COMMANDS, main
from forked import Child

SAMPLES = {"train": 53, "fleet": 150, "slots": 110, "export": 19, "import": 4, "delete": 19}
"""Every which point is tried in the fast test: some three of each command."""

LONG = ("train", "fleet", "slots")


def tried(command: str, kind: str, every: int) -> dict:
    child = Child(main, command, kind, every)
    code = child.wait(3 * 3600)
    assert code == 0, child.said()
    return json.loads(child.said().splitlines()[-1])


def check(told: dict) -> None:
    print(f"{told['command']}, {told['kind']}: {told['tried']} of {told['points']} points")
    assert told["tried"] > 1
    assert told["bad"] == []
    assert told["tracebacks"] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_a_kill_at_some_points(command):
    check(tried(command, "kill", SAMPLES[command]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kill", "raise"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_fault_at_more_points(command, kind):
    check(tried(command, kind, SAMPLES[command] // 6 if command in LONG else 1))


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["kill", "raise"])
@pytest.mark.parametrize("command", LONG)
def test_a_fault_at_every_point(command, kind):
    check(tried(command, kind, 1))
