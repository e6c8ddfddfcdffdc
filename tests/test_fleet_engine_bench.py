"""`perce-lite bench --fleet-engine`: a real Ray of this machine, started for the run alone; its bars."""

import pytest

from perce_lite.evaluation.bench.fleetengine import EngineCost

pytest_plugins = ["cli_fixtures"]
pytestmark = pytest.mark.xdist_group("ray")
ray = pytest.importorskip("ray")


@pytest.mark.slow
def test_every_user_goes_over_the_workers_of_a_ray_of_its_own(figures):
    cost = figures("bench", "--fleet-engine", "--users", "20")
    assert (cost["users"], cost["workers"]) == (20, 1)
    assert cost["ms"] > 0
    assert cost["mib_late"] > 10
    assert not ray.is_initialized(), "it was stopped with the run"


def test_bars():
    assert EngineCost(10_000, 2, 100.0, 49.0, 100.0, 104.0).figures()["cheap"]
    assert not EngineCost(10_000, 2, 600.0, 60.0, 100.0, 104.0).cheap
    assert not EngineCost(10_000, 2, 100.0, 10.0, 100.0, 110.0).flat
