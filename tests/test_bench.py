"""The bench: every arm trains the same tokens, ratios are those of the raw numbers, nothing is left behind.

Most of these run the measurements in this process, by the very function that a child runs; none looks at a clock.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import toys
from trl import SFTTrainer

from perce_lite.errors import BenchError, RecipeError
from perce_lite.evaluation.bench import arms, bench, children, measuring, workload
from perce_lite.recipe import load_recipe
from perce_lite.training.trainer import PerCETrainer

pytest_plugins = ["cli_fixtures"]

SMALL = "train: {output_dir: out, per_device_train_batch_size: 2, max_length: 400}\n"


@pytest.fixture
def here(in_this_process):
    """Measurements in this process; gives the jobs as they come."""
    return in_this_process(measuring, measuring.Job)


def scratch_folders(place: Path) -> list[Path]:
    return list(place.glob("perce-lite-bench-*"))


# Rows


def test_rows_are_whole_batches_in_the_recipes_order_and_hold_the_longest(recipe):
    rows = toys.toy_rows()
    rows[7] = {**rows[7], "completion": rows[7]["completion"] + " and so on" * 20}
    for strategy in ("random", "sequential", "group_by_length"):
        path = recipe(rows, SMALL + "split: {test: 0, validation: 0}\n")
        read = load_recipe(path, [f"train.train_sampling_strategy={strategy}", "train.gradient_accumulation_steps=2"])
        load = workload.workload(read, 3)
        assert (load.steps, len(load.pairs), load.batch) == (3, 12, 4)
        assert len({pair.row.where for pair in load.pairs}) == 12
        assert max(len(pair.factual.ids) for pair in load.pairs) == load.told()["longest"]
        assert any(pair.row.completion[0]["content"].endswith("and so on") for pair in load.pairs)
        assert workload.workload(read, 99).steps == 4, "as many as there are rows for: 18 // 4"


def test_share_of_the_profile(recipe):
    load = workload.workload(load_recipe(recipe(text=SMALL)), 2)
    longer = sum(len(pair.factual.ids) - len(pair.counterfactual.ids) for pair in load.pairs)
    assert load.profile_share == pytest.approx(longer / sum(len(pair.factual.ids) for pair in load.pairs))
    assert 0 < load.profile_share < 1


def test_rows_for_not_even_one_step(recipe):
    read = load_recipe(recipe(text=SMALL), ["train.per_device_train_batch_size=500"])
    with pytest.raises(BenchError, match=r"training rows, and one step takes 500: lower"):
        workload.workload(read, 2)


# All arms


def test_every_arm_trains_the_same_tokens(recipe, here):
    found = bench.bench(load_recipe(recipe(text=SMALL)), steps=2, warmup=1, repeats=1, epochs=3)
    [once] = found["runs"]
    assert list(once) == list(arms.ARMS)
    with_profile = {name: one for name, one in once.items() if name != "counterfactual"}
    assert len({one["digest"] for one in with_profile.values()}) == 1
    assert {one["tokens"] for one in with_profile.values()} == {found["rows"]["tokens"]}
    assert once["counterfactual"]["tokens"] == found["rows"]["tokens_without_profile"]
    for name, one in once.items():
        assert len(one["step_seconds"]) == 2, name
        assert min(one["step_seconds"]) > 0
        # Two batches an epoch and three steps: the first batch is seen twice, as warm-up and as a measured step.
        if name == "frozen":  # the profile's tokens are not trained on
            assert one["trained_tokens"] < once["base"]["trained_tokens"]
        elif name != "hand-written":
            assert one["tokens"] < one["trained_tokens"] < 2 * one["tokens"], name
        assert one["peak_bytes"] > 0
        assert one["adapter_bytes"] > 0
        assert name == "hand-written" or one["activation_bytes"] > 0
    assert once["frozen"]["activation_bytes"] < once["uniform"]["activation_bytes"] < once["sft"]["activation_bytes"]
    assert Path(here[0].scratch).parent == Path.cwd()
    assert not scratch_folders(Path.cwd())
    # Over a base that is not in 4 bit TRL's adapter is in float32 too: these are the same training.
    assert once["sft"]["loss"] == once["sft-fp32"]["loss"] == pytest.approx(once["uniform"]["loss"], rel=1e-5)
    # The model in training judges itself in both; only the head differs.
    assert once["hand-written"]["loss"] == pytest.approx(once["bootstrap"]["loss"], rel=1e-4)
    assert once["base-cold"]["loss"] == once["base"]["loss"] != once["mixed"]["loss"]


def test_a_cold_store_scores_and_a_warm_one_does_not(recipe, here):
    spec = arms.arms_of("base,base-cold,mixed,mixed-cold,counterfactual")
    found = bench.bench(load_recipe(recipe(text=SMALL)), spec, steps=1, warmup=0, repeats=2, epochs=3)
    for once in found["runs"]:
        assert {name: one["store_hits"] for name, one in once.items()} == {
            "sft": None, "base": 1.0, "base-cold": 0.0, "mixed": 1.0, "mixed-cold": 0.0, "counterfactual": 1.0,
        }  # fmt: skip
        assert once["base"]["store_bytes"] == once["base-cold"]["store_bytes"] > once["mixed"]["store_bytes"] > 0
        assert once["sft"]["store_bytes"] == 0
    fills = [job for job in here if job.steps == 0]
    assert len(fills) == 2, "one scoring pass for each store, whatever the number of arms"
    starts = [job.arm for job in here if job.steps][:: len(found["arms"])]
    assert len(set(starts)) == 2, "the arm that comes first changes from repeat to repeat"


def test_the_users_own_store_and_output_are_not_touched(recipe, here, tmp_path):
    path = recipe(text=SMALL + "split: {test: 0}\n")
    read = load_recipe(path, ["train.store=mine", "train.save_steps=1", "train.logging_steps=1", "train.packing=true"])
    bench.bench(read, ["base"], steps=1, warmup=0, repeats=1)
    left = {one.name for one in tmp_path.iterdir()}
    assert left == {"rows.jsonl", "mine.yaml"}


def test_model_and_template_are_found_from_the_recipe_on(recipe, plain, here, tmp_path, monkeypatch):
    path = recipe(text=SMALL)
    read = load_recipe(path, [f"model={plain}", "train.chat_template_path=mine.jinja"])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    found = bench.bench(read, ["base"], steps=1, warmup=0, repeats=1)
    assert found["arms"]["base"]["time"]["median"] > 0


def test_what_an_arm_refuses_is_told_before_anything_is_measured(recipe, here):
    read = load_recipe(recipe(text=SMALL), ["train.neftune_noise_alpha=5"])
    with pytest.raises(RecipeError, match="neftune_noise_alpha"):
        bench.bench(read, ["base", "mixed"], steps=1, repeats=1)
    assert not here


def test_plain_sft_is_trls_own_and_float32_is_told_apart(recipe):
    """TRL makes a 4-bit model's adapter bf16; one arm leaves it so, one undoes it, PerCE's are float32."""
    read = load_recipe(recipe(text=SMALL), ["quantization=nf4"])
    jobs = bench._Measurements(read, workload.workload(read, 1), 0, Path.cwd())
    found = {}
    for name in ("sft", "sft-fp32", "base", "hand-written"):
        job = jobs.job(name)
        own = measuring.recipe_of(job)
        trainer = measuring.make(arms.ARMS[name], own, measuring.load_base(own), job.rows)
        found[name] = {str(one.dtype) for one in trainer.model.parameters() if one.requires_grad}, type(trainer)
    assert found == {
        "sft": ({"torch.bfloat16"}, SFTTrainer),
        "sft-fp32": ({"torch.float32"}, SFTTrainer),
        "base": ({"torch.float32"}, PerCETrainer),
        "hand-written": ({"torch.bfloat16"}, measuring.HandWrittenTrainer),
    }


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel's peak cannot be started anew")
def test_peak_memory_is_that_of_what_came_after_the_start():
    cpu, size = torch.device("cpu"), 2**28
    held = bytearray(b"x") * size
    before = measuring.peak_bytes(cpu)
    del held
    assert measuring.reset_peak(cpu) == "training"
    after = measuring.peak_bytes(cpu)
    assert after < before - size / 2, "what was there before does not count"
    held = bytearray(b"x") * size
    assert measuring.peak_bytes(cpu) > after + size / 2
    del held
    assert measuring.peak_bytes(cpu) > after + size / 2, "what is gone again does"


# What goes wrong


def test_an_arm_without_memory_is_told_and_the_others_go_on(recipe, run, here, monkeypatch):
    real = measuring.measure

    def measure(job):
        if job.arm == "hand-written":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
        return real(job)

    monkeypatch.setattr(measuring, "measure", measure)
    options = ("--arms", "uniform,hand-written", "--steps", "1", "--warmup", "0", "--repeats", "2")
    code, out, err = run("bench", recipe(text=SMALL), *options, "--json", "out.json")
    assert code == 0, err
    assert "out of memory" in out
    written = json.loads(Path("out.json").read_text())
    assert written["arms"]["hand-written"] == {"out_of_memory": "CUDA out of memory. Tried to allocate 9 GiB."}
    assert written["arms"]["uniform"]["time"]["median"] > 0
    assert [job.arm for job in here].count("hand-written") == 1, "it is not tried again"


def test_memory_that_is_short_is_known_by_what_is_raised():
    wrapped = ValueError("could not be loaded")
    wrapped.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    on_cpu = RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried")
    assert all(map(children.out_of_memory, (MemoryError(), wrapped, on_cpu)))
    assert not children.out_of_memory(RuntimeError("shapes do not match"))


def test_other_tokens_are_an_error(recipe, here, monkeypatch):
    monkeypatch.setattr(workload.Workload, "digest", lambda self, profile: "other")
    with pytest.raises(BenchError, match="sft was trained on other tokens"):
        bench.bench(load_recipe(recipe(text=SMALL)), ["sft"], steps=1, warmup=0, repeats=1)
    assert not scratch_folders(Path.cwd())


def test_unknown_arms():
    assert arms.arms_of(None) == list(arms.ARMS)
    assert arms.arms_of("mixed, base") == ["mixed", "base"]
    with pytest.raises(BenchError, match=r"'boostrap' is no arm; did you mean bootstrap\? Arms are sft,"):
        arms.arms_of("base,boostrap")
    with pytest.raises(BenchError, match="name some"):
        arms.arms_of(" , ")


# Real processes


def test_a_child_that_fails_is_one_clear_error(recipe, run, monkeypatch, tmp_path):
    path = recipe(text=SMALL)
    broken = Path("broken/trl")
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise OSError('the disk is on fire')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path("broken").absolute()), *sys.path]))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code, _, err = run("bench", path, "--arms", "uniform", "--steps", "1", "--repeats", "1")
    assert code == 2
    told = [line for line in err.splitlines() if line.startswith("error: ")]
    assert told == ["error: The measurement of sft failed: OSError: the disk is on fire"]
    assert "Traceback" not in err
    assert not scratch_folders(Path.cwd())


def processes_of(pid: int) -> list[int]:
    """Processes whose parent `pid` is."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


def until(condition, what: str, seconds: float = 120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"{what} never came")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the table of processes from /proc")
@pytest.mark.parametrize(
    ("how", "words"),
    [
        (signal.SIGINT, ["--arms", "uniform"]),
        (signal.SIGKILL, ["--arms", "uniform"]),
        pytest.param(signal.SIGINT, ["--fleet"], marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, ["--fleet"], marks=pytest.mark.slow),
    ],
)
def test_no_child_and_no_folder_outlives_the_parent(recipe, how, words):
    """Ctrl-C (a signal to the command alone, the harder case) and a kill, with a measurement in progress."""
    path = recipe(text=SMALL)
    parent = subprocess.Popen(
        [sys.executable, "-c", "from perce_lite.cli.app import main; main()", "bench", str(path), *words],
        env={**os.environ, "TMPDIR": str(Path.cwd()), "PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.PIPE,
    )
    try:
        [child] = until(lambda: processes_of(parent.pid), "a measurement")
        until(lambda: threads_of(child) > 1 or parent.poll() is not None, "its watch over the parent")
        parent.send_signal(how)
        _, err = parent.communicate(timeout=60)
    finally:
        parent.kill()
        parent.wait()
    assert parent.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL), err
    until(lambda: not alive(child), "the end of the child")
    until(lambda: not scratch_folders(Path.cwd()), "the end of its folder")


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def threads_of(pid: int) -> int:
    tasks = Path(f"/proc/{pid}/task")
    return len(list(tasks.iterdir())) if tasks.exists() else 0


@pytest.mark.slow
def test_the_command_in_real_processes(recipe, figures):
    words = ("--steps", "2", "--repeats", "1", "--epochs", "2")
    found = figures("bench", recipe(text=SMALL), *words)
    assert list(found["arms"]) == list(arms.ARMS)
    assert found["machine"]["threads"] >= 1
    assert {one["peak_of"] for one in found["runs"][0].values()} <= {"training", "process"}
    for name, one in found["arms"].items():
        assert one["time"]["median"] > 0, name
        assert one["memory"]["median"] > 0
