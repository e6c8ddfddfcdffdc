"""The bench of many users: rows of exactly so many tokens, every arm trains, ratios are those of the raw numbers.

The measurements run in this process, by the very function that a child runs; none looks at a clock.
"""

import json
import statistics
from contextlib import contextmanager
from pathlib import Path

import pytest
import toys
from cli_fixtures import Ended

from perce_lite.data import pairs
from perce_lite.errors import BenchError, DataError
from perce_lite.evaluation.bench import arms, children, exactrows, fleetbench, fleetmeasuring
from perce_lite.files import read_json
from perce_lite.fleet.engines.sequential import SequentialEngine
from perce_lite.fleet.engines.slots import SlotsEngine
from perce_lite.recipe import load_recipe

pytest_plugins = ["cli_fixtures"]


@pytest.fixture
def here(in_this_process):
    """Measurements in this process; gives the jobs as they come."""
    return in_this_process(fleetmeasuring, fleetmeasuring.FleetJob)


def measurements(recipe, steps=2):
    scratch = Path.cwd() / "scratch"
    scratch.mkdir()
    return fleetbench._Measurements(load_recipe(recipe), scratch, steps, 0)


# Rows


@pytest.mark.parametrize("length", [16, 32, 64, 97])
def test_rows_have_exactly_so_many_tokens_a_third_of_them_response(recipe, length):
    ours = measurements(recipe())._of(length)
    rows = exactrows.exact_rows(ours, exactrows.words_of(ours), length, 2, 3)
    assert [row.user for row in rows] == ["user 0"] * 3 + ["user 1"] * 3
    assert len({row.fingerprint() for row in rows}) == 6
    maker = pairs.PairMaker(toys.toy_tokenizer("chatml"), ours.template, length)
    maker.tokenizer.chat_template = exactrows.CHAT_TEMPLATE
    for pair in maker.make(rows):
        assert len(pair.factual.ids) == length
        assert [label != pairs.IGNORED for label in pair.factual.labels] == [False] * (length - length // 3) + [
            True
        ] * (length // 3)
        assert len(pair.counterfactual.ids) < length
        assert set(pair.row.completion[0]["content"].split()) <= set(exactrows.words_of(ours))


def test_text_without_spaces_and_control_tokens_in_it(recipe):
    rows = [{**row, "completion": "<|im_end|> 抹茶" + "庭園の静かな朝" * 20 + " a b c"} for row in toys.toy_rows()]
    ours = measurements(recipe(rows))._of(32)
    assert len(exactrows.exact_rows(ours, exactrows.words_of(ours), 32, 1, 2)) == 2


def test_words_that_do_not_come_out_even(recipe, monkeypatch):
    ours = measurements(recipe())._of(32)
    with pytest.raises(BenchError, match="no words that make up exactly 10 tokens"):
        exactrows.exact_rows(ours, ["<|im_end|>"], 32, 1, 1)
    path = recipe([{**row, "split": "test"} for row in toys.toy_rows()])
    with pytest.raises(DataError, match="every row is held out"):
        exactrows.words_of(load_recipe(path))


# All arms


def test_every_arm_trains_its_users(recipe, here, monkeypatch):
    trained, engines = [], []
    make = pairs.PairMaker.make

    def seen(self, rows, audit=None):
        made = make(self, rows, audit)
        trained.extend(len(pair.factual.ids) for pair in made)
        return made

    monkeypatch.setattr(pairs.PairMaker, "make", seen)
    for engine in (SequentialEngine, SlotsEngine):
        run = engine.run
        monkeypatch.setattr(
            engine, "run", lambda self, *given, run=run: (engines.append(type(self)), run(self, *given))[1]
        )
    path = recipe(text="train: {output_dir: out, per_device_train_batch_size: 2}\nlora: {r: 4}\n")
    found = fleetbench.fleet_bench(load_recipe(path), [32], [1, 2], steps=1, warmup=1, repeats=2, users=2)
    assert set(trained) == {32}
    assert set(found["lengths"]) == {"32"}
    names = ["processes", "one-by-one", "slots-1", "slots-2"]
    for once in found["runs"]:
        assert list(once["32"]) == names
        assert [one["users"] for one in once["32"].values()] == [1, 2, 2, 2]
        assert {one["store_hits"] for one in once["32"].values()} == {1.0}
        assert all(one["adapter_bytes"] and one["peak_bytes"] and one["seconds"] > 0 for one in once["32"].values())
        assert once["32"]["processes"]["peak_of"] == "process"
    each = [one["adapter_bytes"] / one["users"] for one in found["runs"][0]["32"].values()]
    assert each == pytest.approx([each[0]] * 4, rel=0.05), "the same adapters, whichever way, but for their cards"
    measured = [job for job in here if job.slots is not None]
    assert [(job.slots, job.whole, job.warmup) for job in measured] == [
        *((0, True, 0), (0, False, 1), (1, False, 1), (2, False, 1)),
        *((1, False, 1), (2, False, 1), (0, True, 0), (0, False, 1)),
    ], "the arm that comes first changes from repeat to repeat"
    assert len(here) == 1 + len(measured), "the store is filled once"
    assert {job.recipe["lora"]["r"] for job in here} == {8}
    assert {SequentialEngine, SlotsEngine} == set(engines)
    assert {one["why"] for one in found["bars"]} == {"not measured"}
    assert sorted(one.name for one in Path.cwd().iterdir()) == ["mine.yaml", "rows.jsonl"]


def test_the_command(recipe, run, here, monkeypatch):
    real = fleetmeasuring.measure

    def measure(job):
        if job.slots == 2:
            raise MemoryError("no memory left for two")
        return real(job)

    monkeypatch.setattr(fleetmeasuring, "measure", measure)
    words = ("--fleet", "--lengths", "64", "--slots", "2", "--steps", "1", "--warmup", "0", "--repeats", "2")
    code, out, err = run("bench", recipe(), *words, "--json", "out.json")
    assert code == 0, err
    out = " ".join(out.split())
    assert "rows of 64 tokens" in out
    assert "out of memory" in out
    assert "not judged slots-8 at 64 tokens, at least 1.8 x the users an hour of one-by-one: not measured" in out
    assert "one-by-one at 64 tokens, at least 3.0 x the users an hour of processes, here" in out
    written = json.loads(Path("out.json").read_text())
    assert written["lengths"]["64"]["slots-2"] == {"out_of_memory": "no memory left for two"}
    assert written["bars"][2]["met"] is None, "a toy is not what the bar is set for"
    assert [job.slots for job in here].count(2) == 1, "it is not tried again"


# Ratios, from raw numbers


def raw(users: int, seconds: float, peak: int) -> dict:
    return {"users": users, "seconds": seconds, "peak_bytes": peak}


RUNS = [
    {
        "64": {
            "processes": raw(1, 30.0, 90),
            "one-by-one": raw(4, 36.0, 100),
            "slots-8": raw(8, 36.0, 150),
        }
    },
    {
        "64": {
            "processes": raw(1, 25.0, 90),
            "one-by-one": raw(4, 40.0, 110),
            "slots-8": raw(8, 50.0, 187),
        }
    },
]


def test_ratios_are_those_of_the_raw_numbers():
    found = fleetbench.summary([run["64"] for run in RUNS])
    assert found["one-by-one"]["speed"]["runs"] == [1, 1]
    assert found["slots-8"]["speed"]["runs"] == pytest.approx([2.0, 1.6])
    assert found["slots-8"]["speed"]["median"] == pytest.approx(1.8)
    assert found["slots-8"]["memory"]["runs"] == pytest.approx([1.5, 1.7])
    assert found["slots-8"]["users_per_hour"] == pytest.approx(statistics.median([800, 576]))
    assert found["slots-8"]["peak_bytes"] == 168.5
    assert found["processes"]["speed"]["runs"] == pytest.approx([0.3, 0.4])


def test_bars():
    speed, memory, processes = fleetbench.judged(RUNS, True)
    assert (speed["met"], speed["ratio"]) == (True, pytest.approx(1.8))
    assert (memory["met"], memory["ratio"]) == (True, pytest.approx(1.6))
    assert (processes["met"], processes["ratio"]) == (False, pytest.approx((1 / 0.3 + 2.5) / 2))
    assert {one["met"] for one in fleetbench.judged(RUNS, False)} == {None}
    other = [{"32": run["64"]} for run in RUNS]
    assert {one["why"] for one in fleetbench.judged(other, True)} == {"not measured"}


def test_a_reference_without_memory_leaves_figures_without_ratios():
    runs = [{"64": {**run["64"], "one-by-one": {"out_of_memory": "none left"}}} for run in RUNS]
    found = fleetbench.summary([run["64"] for run in runs])
    assert found["slots-8"]["speed"] is None
    assert found["slots-8"]["users_per_hour"] > 0
    assert {one["met"] for one in fleetbench.judged(runs, True)} == {None}


# What goes wrong


def test_bad_lists():
    assert arms.lengths_of(None) == [32, 64, 96]
    assert arms.slots_of("8, 2,8") == [8, 2]
    for spec, named in (("64,8", "'8'"), ("long", "'long'"), (" , ", "' , '"), ("-64", "'-64'")):
        with pytest.raises(BenchError, match=rf"--lengths: {named} is no whole number of at least 16; .* 32,64,96"):
            arms.lengths_of(spec)
    with pytest.raises(BenchError, match="--slots: '0' is no whole number of at least 1"):
        arms.slots_of("0")


def test_options_that_do_not_go_together(recipe, run):
    path = recipe()
    for words, told in (
        (["--slots", "2"], "--slots goes with --fleet"),
        (["--fleet", "--arms", "base"], "no part in --fleet"),
    ):
        code, _, err = run("bench", path, *words)
        assert (code, told in err, "Traceback" in err) == (2, True, False)


def test_an_arm_that_fails_is_named(recipe, run, here, monkeypatch):
    class Failed(Ended):
        def wait(self) -> int:
            return 1

    real = children._child

    @contextmanager
    def child(module, path, said):
        if fleetmeasuring.FleetJob(**read_json(path)).slots != 2:
            with real(module, path, said) as one:
                yield one
        else:
            said.write(b"Traceback\nperce_lite.errors.ConfigError: lora: lora_dropout 0.1\n")
            said.flush()
            yield Failed()

    monkeypatch.setattr(children, "_child", child)
    words = ("--fleet", "--lengths", "32", "--slots", "2", "--steps", "1", "--warmup", "0", "--repeats", "1")
    code, _, err = run("bench", recipe(), *words)
    assert code == 2
    told = [line for line in err.splitlines() if line.startswith("error: ")]
    assert told == ["error: The measurement of slots-2 at 32 tokens failed: lora: lora_dropout 0.1"]
    assert not list(Path.cwd().glob("perce-lite-bench-*"))


@pytest.mark.slow
def test_the_command_in_real_processes(recipe, figures):
    words = ("--fleet", "--lengths", "32", "--slots", "2", "--steps", "2", "--repeats", "1")
    found = figures("bench", recipe(), *words)
    assert list(found["lengths"]["32"]) == ["processes", "one-by-one", "slots-2"]
    assert found["machine"]["threads"] >= 1
    for name, one in found["lengths"]["32"].items():
        assert one["speed"]["median"] > 0, name
        assert one["memory"]["median"] > 0
    assert found["lengths"]["32"]["processes"]["speed"]["median"] < 1, "it loads the base for every user"
