"""`perce-lite bench --fleet-scale`: real commands, a process each; what is due in each phase; its bars and options."""

import pytest

from perce_lite.evaluation.bench.fleetscale import Phase, bars

pytest_plugins = ["cli_fixtures"]


@pytest.mark.slow
def test_each_phase_runs_the_real_command(figures, real_model):
    """Two users on the built-in model: what is due in each phase says that it did its work."""
    scale = figures("bench", "--fleet-scale", "--users", "2")
    due = {phase["name"]: phase["due"] for phase in scale["phases"]}
    assert due == {
        "dry run": 3, "enrolment": None, "nothing due": 0, "one changed user": 1, "adapters list": None,
        "adapters who": None,
    }  # fmt: skip
    assert all(phase["seconds"] > 0 and phase["mib"] > 10 for phase in scale["phases"])
    assert all(phase["cpu_seconds"] > 0 for phase in scale["phases"])
    assert (scale["texts"], scale["bars"]) == (20, [])


def test_bars_judge_ten_thousand_users():
    names = ("dry run", "nothing due", "one changed user", "adapters list", "adapters who")
    phases = [Phase(users, name, users / 5000, 500.0) for users in (5000, 10_000) for name in names]
    judged = {(bar.name, bar.unit): bar.met for bar in bars(phases)}
    assert len(judged) == 3 * 3 + 2
    assert {key for key, met in judged.items() if not met} == {("adapters list", "s"), ("adapters who", "s")}
    assert bars(phases[:5]) == (), "only 5,000 were measured"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fleet-scale", "--users", "0"], "whole numbers"),
        (["--fleet-scale", "--users", "many"], "whole numbers"),
        (["--fleet-scale", "--gpu-report"], "give one of"),
        (["--fleet-scale", "--slots", "2"], "has no part in --fleet-scale"),
        (["--fleet-engine", "--users", "5,10"], "takes one number"),
        (["--fleet-engine", "--slots", "2"], "has no part in --fleet-engine"),
        (["--users", "5"], "goes with --fleet-scale or --fleet-engine"),
    ],
)
def test_options_that_do_not_go_together(run, arguments, message):
    code, out, err = run("bench", *arguments)
    assert code == 2
    assert message in " ".join((out + err).replace("│", " ").split())
