"""Faults at every write, rename and removal of a command: whatever the moment, the next run ends in the same bytes.

A few points of each command here; `pytest -m slow` tries every one of the short commands and more of the long ones,
`pytest -m exhaustive -s` every one of those too, which takes hours.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fault_points import COMMANDS

SAMPLES = {"train": 53, "fleet": 150, "slots": 110, "export": 19, "import": 4, "delete": 19}
"""Every which point is tried in the fast test: some three of each command."""

LONG = ("train", "fleet", "slots")


def tried(command: str, kind: str, every: int) -> dict:
    words = [sys.executable, str(Path(__file__).with_name("fault_points.py")), command, kind, str(every)]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


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
