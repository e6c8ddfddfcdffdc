"""Figures of a bench from raw numbers: ratios, their spread, and the bars."""

import statistics

import pytest

from perce_lite.evaluation.bench import bench


def raw(steps: list[float], peak: int = 100, scoring: float = 0.0, adapter: int = 50, store: int = 0) -> dict:
    return {
        **{"step_seconds": steps, "peak_bytes": peak, "scoring_seconds": scoring},
        **{"adapter_bytes": adapter, "store_bytes": store, "tokens": 600, "activation_bytes": 2 * peak},
    }


RUNS = [
    {
        "sft": raw([1.0, 2.0, 3.0]),
        "base": raw([0.9, 2.2, 2.4], 103, 0.1, 100, 10),
        "base-cold": raw([1.1, 2.0, 2.7], 110, 3.6, 100, 10),
    },
    {
        "sft": raw([2.0, 4.0, 5.0], 110),
        "base": raw([2.0, 2.0, 7.5], 110, 0.1, 100, 10),
        "base-cold": raw([2.0, 4.4, 5.0], 99, 6.6, 100, 10),
    },
]


def test_ratios_are_those_of_the_raw_numbers():
    found = bench.summary(["sft", "base", "base-cold"], RUNS, epochs=3)
    assert found["sft"]["time"]["runs"] == [1, 1]
    assert found["base"]["time"]["runs"] == pytest.approx([0.9, 1.0])  # of 0.9 1.1 0.8 and of 1.0 0.5 1.5
    assert found["base"]["time"]["median"] == pytest.approx(0.95)
    assert (found["base"]["time"]["min"], found["base"]["time"]["max"]) == pytest.approx((0.9, 1.0))
    assert found["base"]["memory"]["runs"] == pytest.approx([1.03, 1.0])
    assert found["base"]["disk"]["median"] == pytest.approx(2.2)
    # 1.1 1.0 0.9 and 3.6 s of scoring over 18 s of plain SFT; 1.0 1.1 1.0 and 6.6 s over 33 s.
    assert found["base-cold"]["time"]["runs"] == pytest.approx([1.2, 1.2])
    assert found["base-cold"]["tokens_per_second"] == pytest.approx(
        statistics.median([1800 / (3.6 + 3 * 5.8), 1800 / (6.6 + 3 * 11.4)])
    )
    assert found["base"]["tokens_per_second"] == pytest.approx(statistics.median([600 / 5.5, 600 / 11.5]))
    assert found["base"]["step_seconds"] == pytest.approx(statistics.median([2.2, 2.0]))


def test_bars():
    found = bench.summary(["sft", "base", "base-cold"], RUNS, epochs=3)
    found["counterfactual"] = {"time": {"median": 0.5}, "memory": {"median": 0.9}}
    found["frozen"] = {"time": {"median": 0.71}, "activations": {"median": 0.6}}
    bars = {(one["arm"], one["of"]): one for one in bench.judged(found, 0.5, 3)}
    assert bars["base", "time"]["met"] is True
    assert bars["base", "memory"]["met"] is True  # 1.015
    assert bars["base-cold", "time"]["met"] is False
    assert bars["mixed", "time"]["met"] is None
    assert bars["mixed", "time"]["why"] == "not measured"
    assert bars["counterfactual", "time"]["met"] is None
    assert "here 50%" in bars["counterfactual", "time"]["why"]
    assert all(one["met"] is None for one in bench.judged(found, 0.66, 3, on_cpu=False))
    loaded = {(one["arm"], one["of"]): one["met"] for one in bench.judged(found, 0.66, 3, loading_counts=True)}
    assert (loaded["base", "time"], loaded["base", "memory"]) == (True, None)
    assert bars["frozen", "activations"]["met"] is None
    bars = {(one["arm"], one["of"]): one for one in bench.judged(found, 0.66, 3)}
    assert bars["counterfactual", "time"]["met"] is True
    assert (bars["frozen", "time"]["met"], bars["frozen", "activations"]["met"]) == (False, True)


def test_plain_sft_without_memory_leaves_figures_without_ratios():
    runs = [{"sft": {"out_of_memory": "none left"}, "base": raw([1.0])}]
    found = bench.summary(["sft", "base"], runs, epochs=3)
    assert found["base"]["time"] is None
    assert found["base"]["step_seconds"] == 1.0
    assert all(bar["met"] is None for bar in bench.judged(found, 0.7, 3))
