"""Early stopping: the best step by validation rows is kept, the same by trainer and slots, and by a resumed run."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from fleet_fixtures import Clock, names, rows_of
from safetensors.torch import load_file
from test_cores import folder_of
from test_unfinished import Killed, Killing

from perce_lite.evaluation.summary import train_and_measure
from perce_lite.fleet.engines.sequential import SequentialEngine
from perce_lite.fleet.engines.slots import SlotsEngine, engine_for
from perce_lite.fleet.fleet import fleet
from perce_lite.fleet.registry import KEPT, opened
from perce_lite.fleet.slot_user import Unfinished
from perce_lite.model import adapter_weights, adapters
from perce_lite.model.adapter_files import read_metadata
from perce_lite.model.base import load_base
from perce_lite.recipe import EarlyStopping, load_recipe
from perce_lite.training.early_stopping import BestStep
from perce_lite.training.train import open_run, train
from perce_lite.training.trainer import PerCETrainer

pytest_plugins = ["cli_fixtures"]

TRAIN = """
train: {max_steps: 24, learning_rate: 0.05, lr_scheduler_type: constant, warmup_steps: 0, output_dir: out, store: null,
  save_steps: 2, adam_epsilon: 1e-4}
lora: {r: 4}
evaluation: {max_rows: 4, max_new_tokens: 2}
"""
STOPPING = "early_stopping: {patience: 2, every: 2}\n"
CALM = TRAIN.replace("0.05", "0.02").replace("1e-4", "1e-3")
"""Rounding, which differs between trainer and slots, stays rounding over its steps."""
FLEET = (
    CALM + "early_stopping: {every: 2}\nfleet: {min_examples: 4, gate: null, init_from: none, patience: 2, slots: 2}\n"
)


def test_what_is_due_what_is_kept_and_when_it_ends():
    best, weight = BestStep(patience=2, every=3, total=11), torch.zeros(2)
    assert [step for step in range(13) if best.is_due(step)] == [3, 6, 9, 11, 12]
    assert (best.kept, best.stopped) == (None, False)
    for step, loss in ((3, 2.0), (6, 1.0), (9, 1.0)):
        weight += 1
        best.add(step, loss, [weight])
        assert not best.is_due(step)
        assert not best.stopped
    best.add(11, math.nan, [weight])
    assert (best.kept, best.stopped) == (6, True), "the first of equals; what is no number is not better"
    again = BestStep(patience=2, every=3, total=11)
    again.restore(best.state())
    assert (again.kept, again.stopped, again.losses.keys()) == (6, True, best.losses.keys())
    again.put_back([weight])
    assert weight.tolist() == [2, 2]
    assert again.figures(11)["kept_step"] == 6
    nothing = BestStep(patience=2, every=1, total=5)
    for step in (1, 2):
        nothing.add(step, math.nan, [weight])
    assert (nothing.kept, nothing.stopped, nothing.figures(2)["kept_step"]) == (None, True, 2)
    nothing.put_back([weight])
    assert weight.tolist() == [2, 2], "where there is no best step, the last one stays"


def adapter_in(folder="out"):
    return load_file(Path(folder) / "adapter/adapter_model.safetensors")


def equal(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_the_best_steps_adapter_is_the_one_that_is_kept(recipe, figures, run):
    """It is the adapter of a training of so many steps; what came after it, and that it came, is told."""
    path = recipe(rows_of(2, 12), TRAIN + STOPPING)
    told = figures("train", path)
    stopping = told["early_stopping"]
    losses = {one["step"]: one["loss"] for one in stopping["validation"]}
    kept = stopping["kept_step"]
    assert kept == min(losses, key=losses.get)
    assert stopping["steps"] == kept + 4 < stopping["of"] == 24, "two measurements, two steps apart"
    metadata = read_metadata(Path("out"))
    assert (metadata["steps"], metadata["early_stopping"]) == (kept, stopping)
    shown = run("train", path)[1]
    assert f"kept step {kept}" in " ".join(shown.split())
    stopped = adapter_in()
    shutil.rmtree("out")
    figures("train", path, "--set", "early_stopping.patience=null", "--set", f"train.max_steps={kept}")
    assert equal(stopped, adapter_in())
    assert "early_stopping" not in read_metadata(Path("out"))


@pytest.mark.parametrize(
    "options", [[], ["train.profile_pass=frozen", "train.estimator=mixed"], ["lora.lora_dropout=0.1"]]
)
def test_measuring_changes_nothing_of_the_training(recipe, options):
    path, logs = recipe(rows_of(2), TRAIN), []
    for patience in ("null", "99"):
        loaded = load_recipe(path, [*options, "train.max_steps=5", f"early_stopping.patience={patience}"])
        trainer = train(loaded, load_base(loaded), *open_run(loaded))
        logs.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
        shutil.rmtree("out")
    assert len(logs[0]) == 5
    assert logs[0] == logs[1]


def bomb(monkeypatch, owner, name, at):
    real, calls = getattr(owner, name), []

    def explode(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, explode)


MOMENTS = {
    "after the best step": lambda patch, end: bomb(patch, PerCETrainer, "training_step", end),
    "while a checkpoint is written": lambda patch, end: bomb(patch, PerCETrainer, "_save_rng_state", end // 2),
    "when the training has ended": lambda patch, end: bomb(patch, adapters, "model_card", 1),
}


def test_killed_and_resumed_keeps_the_same_step_to_the_bit(recipe):
    path = recipe(rows_of(2, 12), TRAIN + STOPPING)
    whole = train_and_measure(load_recipe(path))
    shutil.move("out", "whole")
    end = whole["early_stopping"]["steps"]
    for moment, explode in MOMENTS.items():
        with pytest.MonkeyPatch.context() as patch:
            explode(patch, end)
            with pytest.raises(Killed):
                train_and_measure(load_recipe(path))
        assert not Path("out/adapter").exists(), moment
        assert list(Path("out").glob("checkpoint-*/best_step.pt")), moment
        with pytest.MonkeyPatch.context() as patch:
            if moment == "when the training has ended":  # its last checkpoint is that of the last step
                bomb(patch, PerCETrainer, "training_step", 1)
            resumed = train_and_measure(load_recipe(path))
        assert resumed["early_stopping"] == whole["early_stopping"], moment
        assert equal(adapter_in(), adapter_in("whole")), moment
        shutil.rmtree("out")


def test_trainer_and_slots_keep_the_same_step_of_each_user(recipe, figures, run):
    path = recipe(rows_of(3, 10), FLEET)
    told = figures("fleet", path)
    assert (told["trained"], told["failed"]) == (3, 0)
    with opened(Path("out")) as registry:
        slots = {adapter.name: adapter.metrics["early_stopping"] for adapter in registry.all()}
    shutil.move("out", "slots")
    fleet(load_recipe(path), SequentialEngine)
    with opened(Path("out")) as registry:
        alone = {adapter.name: adapter.metrics["early_stopping"] for adapter in registry.all()}
    assert slots.keys() == alone.keys() == {"user0", "user1", "user2"}
    for user, one in slots.items():
        other = alone[user]
        assert (one["kept_step"], one["steps"], one["of"]) == (other["kept_step"], other["steps"], 24)
        assert one["steps"] < 24
        for mine, theirs in zip(one["validation"], other["validation"], strict=True):
            assert (mine["step"], mine["loss"]) == (theirs["step"], pytest.approx(theirs["loss"], abs=1e-2))
        for name, tensor in adapter_weights.tensors(folder_of("slots", user)).items():
            torch.testing.assert_close(tensor, adapter_weights.tensors(folder_of("out", user))[name], rtol=0, atol=1e-2)
        metadata = read_metadata(folder_of("slots", user))
        assert (metadata["steps"], metadata["early_stopping"]) == (one["kept_step"], one)
    code, out, _ = run("fleet", path, "--set", "train.output_dir=slots")
    assert code == 0
    assert "of 3 adapters 3 ended before their last step" in " ".join(out.split())


@pytest.mark.parametrize("core", [False, True])
def test_slots_that_were_killed_keep_the_same_step_to_the_bit(recipe, monkeypatch, core):
    text = FLEET.replace("init_from: none", "init_from: auto, train: {learning_rate: 0.1}") if core else FLEET
    path = recipe(rows_of(3, 10), text.replace("r: 4", "r: 4, core_only: true") if core else text)
    with monkeypatch.context() as patch:
        leaving: list[bool] = []  # the last writes leave no file, for nobody is unfinished

        def told(kept: Unfinished, states: dict) -> None:
            write(kept, states)
            leaving.append(Path("out", KEPT).is_file())

        write = Unfinished.write
        patch.setattr(Unfinished, "write", told)
        fleet(load_recipe(path), engine_for)
    writes = sum(leaving)
    shutil.move("out", "whole")
    for last in sorted({1, (writes + 1) // 2, writes}):
        with monkeypatch.context() as patch:
            patch.setattr("perce_lite.fleet.engines.slots.Unfinished", lambda file, last=last: Killing(file, last))
            with pytest.raises(Killed):
                fleet(load_recipe(path), engine_for)
        assert Path("out", KEPT).is_file()
        fleet(load_recipe(path), engine_for)
        for user in ("user0", "user1", "user2"):
            one, other = (folder_of(place, user) for place in ("whole", "out"))
            assert equal(adapter_weights.tensors(one), adapter_weights.tensors(other)), (last, user)
            first, second = (read_metadata(folder)["early_stopping"] for folder in (one, other))
            assert first == second
            assert first["kept_step"] < first["of"]
        shutil.rmtree("out")


def test_a_recipe_without_validation_rows_is_refused(recipe, run):
    rows = [{**row, "split": "test" if row["split"] == "validation" else row["split"]} for row in rows_of(3)]
    for words in (
        ("train", "--set", "early_stopping.patience=2"),
        ("fleet", "--set", "early_stopping.patience=2"),
        ("fleet", "--set", "fleet.patience=2", "--set", "fleet.min_examples=4"),
    ):
        code, _, err = run(words[0], recipe(rows, TRAIN), *words[1:])
        assert code == 2
        told = " ".join(err.split())
        assert "patience needs validation rows: rows with a profile that are held out of training" in told
        assert "Raise split.validation" in told
    assert not Path("out/adapter").exists()


def test_users_without_validation_rows_are_named_and_train_to_their_last_step(recipe, run):
    rows = [row for row in rows_of(3, 10) if (row["user"], row["split"]) != ("user1", "validation")]
    for slots in (1, 2):
        code, _, err = run("fleet", recipe(rows, FLEET), "--set", f"fleet.slots={slots}", "--set", "train.max_steps=6")
        assert code == 0
        assert "1 user has no validation rows, so training goes to its last step (fleet.patience): user1" in err
        assert "early_stopping" not in read_metadata(folder_of("out", "user1"))
        assert "early_stopping" in read_metadata(folder_of("out", "user0"))
        shutil.rmtree("out")


def test_commands_of_equal_steps_refuse_it(recipe, run):
    path = recipe(rows_of(2), TRAIN + STOPPING)
    for words in (("compare", path, "--arms", "uniform,base"), ("bench", path), ("bench", path, "--fleet")):
        code, _, err = run(*words)
        assert code == 2
        assert "early_stopping.patience=null" in " ".join(err.split())


def test_who_is_due_when_it_is_asked_for(recipe):
    path, engine = recipe(rows_of(2), "fleet: {min_examples: 4, gate: null}\ntrain: {output_dir: out}\n"), Clock()
    fleet(load_recipe(path), engine)
    names(engine)
    fleet(load_recipe(path, ["fleet.patience=3"]), engine)
    assert names(engine) == ["user0", "user1"], "what they start from is as it was"
    assert fleet(load_recipe(path, ["fleet.patience=3", "fleet.adapter_dtype=bfloat16"]), engine).trained == 0
    fleet(load_recipe(path, ["fleet.patience=3", "early_stopping.patience=3"]), engine)
    assert names(engine)[0] == "all"


def test_without_it_a_recipe_trains_what_it_trained(recipe):
    """No run of before is due because the section exists; what the section says does not count without a patience."""
    plain = load_recipe(recipe(None, TRAIN))
    assert plain.early_stopping == EarlyStopping()
    assert load_recipe(recipe(None, TRAIN), ["early_stopping.every=5"]).fingerprint() == plain.fingerprint()
    one = load_recipe(recipe(None, TRAIN), ["early_stopping.patience=5"])
    more = load_recipe(recipe(None, TRAIN), ["early_stopping.patience=5", "evaluation.max_rows=9"])
    assert len({plain.fingerprint(), one.fingerprint(), more.fingerprint()}) == 3


def test_slots_of_one_are_the_trainer(recipe):
    """A fleet whose `slots` is 1 measures the same rows; the engine of slots with one slot keeps the same step."""
    path = recipe(rows_of(1, 10), FLEET)
    fleet(load_recipe(path), lambda loaded: SlotsEngine(loaded, 1))
    one = read_metadata(folder_of("out", "user0"))["early_stopping"]
    shutil.rmtree("out")
    fleet(load_recipe(path, ["fleet.slots=1"]), engine_for)
    assert read_metadata(folder_of("out", "user0"))["early_stopping"]["kept_step"] == one["kept_step"]
