"""A run that is killed at any moment goes on where it was and ends in the very same adapter."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import toys
from filelock import Timeout
from forked import Child, killed
from forked import run as run_command
from safetensors.torch import load_file

from perce_lite.errors import RunError
from perce_lite.files import write_json
from perce_lite.training.run import Run

BOMBS = {
    "while scoring": ("perce_lite.model.logprob_store:Store.put", 2),
    "between steps": ("perce_lite.training.trainer:PerCETrainer.training_step", 6),
    # The checkpoint's folder and weights are there, its optimizer and trainer_state.json are not.
    "while a checkpoint is written": ("transformers.trainer:Trainer._save_optimizer_and_scheduler", 2),
    "while the adapter is written": ("perce_lite.model.adapters:model_card", 1),
}


def recipe(folder: Path) -> Path:
    toys.toy_folder(folder / "toy")
    rows = [json.dumps(row) for row in toys.toy_rows(per_user=6)]
    (folder / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    path = folder / "toy.yaml"
    path.write_text(
        "model: toy\nquantization: nf4\ndtype: float32\ndata: {path: rows.jsonl}\nsplit: {test: 0.2, validation: 0}\n"
        "evaluation: {max_rows: 2, max_new_tokens: 4}\nlora: {lora_dropout: 0.1}\n"
        "train: {max_steps: 9, save_steps: 2, per_device_train_batch_size: 2, estimator: mixed, learning_rate: 1e-2, "
        "lr_scheduler_type: constant}\n"
    )
    return path


def run(path: Path, *bomb: str | int, command: str = "train") -> tuple[int, str]:
    """Exit code and output of the command in a process of its own; `bomb`: at which call it is killed."""
    work = (killed, [command, str(path)], *bomb) if bomb else (run_command, [command, str(path)])
    child = Child(*work, folder=path.parent)
    return child.wait(300), child.said()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """By a process that shares nothing with those that are killed and resumed, no seed of its hashes either."""
    path = recipe(tmp_path_factory.mktemp("whole"))
    words = [sys.executable, "-m", "perce_lite", "train", str(path)]
    home = {"PERCE_LITE_HOME": str(path.parent / "home")}
    done = subprocess.run(words, cwd=path.parent, env={**os.environ, **home}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return load_file(path.parent / "runs/toy/adapter/adapter_model.safetensors")


@pytest.mark.parametrize("moment", BOMBS)
def test_killed_and_resumed_is_bit_identical(tmp_path, uninterrupted, moment):
    path = recipe(tmp_path)
    code, said = run(path, *BOMBS[moment])
    assert code == -signal.SIGKILL, said
    assert not (tmp_path / "runs/toy/adapter").exists()
    code, said = run(path)
    assert code == 0, said
    assert ("Resuming from" in said) == (moment != "while scoring")
    adapter = load_file(tmp_path / "runs/toy/adapter/adapter_model.safetensors")
    assert adapter.keys() == uninterrupted.keys()
    assert all(adapter[name].equal(uninterrupted[name]) for name in adapter)
    assert not list((tmp_path / "runs/toy").glob(".adapter*")), "what the killed run left is cleared away"


def test_torn_checkpoints_are_passed_over(tmp_path):
    whole, torn, empty = (tmp_path / f"checkpoint-{step}" for step in (2, 10, 12))
    for folder in (whole, torn, empty):
        folder.mkdir()
    write_json(whole / "trainer_state.json", {})
    (torn / "trainer_state.json").write_text('{"global_st')
    assert Run(tmp_path, "x").last_checkpoint() == str(whole)


@pytest.mark.parametrize("removal", [Run.drop_checkpoints, Run.forget])
def test_a_checkpoint_that_is_half_removed_is_passed_over(tmp_path, monkeypatch, removal):
    own = Run(tmp_path, "x")
    own.claim("base")
    whole = tmp_path / "checkpoint-2"
    whole.mkdir()
    write_json(whole / "trainer_state.json", {})

    def killed(folder, *args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        removal(own)
    assert whole.is_dir()
    assert own.last_checkpoint() is None


def test_a_folder_belongs_to_one_run(tmp_path):
    run_ = Run(tmp_path / "out", "mine")
    run_.claim("base")
    run_.claim("base")
    (tmp_path / "out" / "checkpoint-3").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("keep me")
    with pytest.raises(RunError, match="--restart"):
        Run(tmp_path / "out", "another").claim("base")
    with pytest.raises(RunError, match="output_dir"):
        run_.claim("another base")
    assert (tmp_path / "out" / "checkpoint-3").is_dir()
    Run(tmp_path / "out", "another").forget()
    assert [one.name for one in (tmp_path / "out").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("folder", ["checkpoint-3", "adapter"])
@pytest.mark.parametrize("marker", [None, "[]", '{"note": "mine"}', "{"])
def test_restart_deletes_nothing_that_may_be_anothers(tmp_path, folder, marker):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "weights").write_text("of another program")
    (tmp_path / "figures.json").write_text("[]")
    if marker is not None:
        (tmp_path / "run.json").write_text(marker)
    there = sorted(tmp_path.rglob("*"))
    with pytest.raises(RunError, match=rf"holds {folder}, but no run\.json.*--set train\.output_dir"):
        Run(tmp_path, "mine").forget()
    assert sorted(tmp_path.rglob("*")) == there


def test_restart_where_there_is_nothing_and_where_all_is_ours(tmp_path):
    Run(tmp_path / "absent", "mine").forget()
    assert not (tmp_path / "absent").exists()
    write_json(
        tmp_path / "adapter" / "perce_lite.json", {"run": "older", "base": {}}
    )  # as it was copied here, without its run.json
    write_json(tmp_path / "figures.json", {"whose": "unknown"})
    Run(tmp_path, "mine").forget()
    assert [one.name for one in tmp_path.iterdir()] == ["figures.json"]
    write_json(tmp_path / "run.json", {"run": "older", "base": "b"})
    (tmp_path / "checkpoint-3").mkdir()
    Run(tmp_path, "mine").forget()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", ["checkpoint-3", "adapter"])
def test_a_run_does_not_begin_over_what_may_be_anothers(tmp_path, folder):
    (tmp_path / folder).mkdir()
    with pytest.raises(RunError, match=r"no run\.json.*--restart does not"):
        Run(tmp_path, "mine").claim("base")


def test_a_second_run_in_the_folder_is_refused(tmp_path):
    """While one trains, another neither clears its files away nor shares its checkpoints."""
    path = recipe(tmp_path)
    with Run(tmp_path / "runs/toy", "another").locked():
        code, said = run(path)
    assert code == 2
    assert "another run is training here" in said
    assert not list((tmp_path / "runs/toy").glob("checkpoint-*"))
    assert run(path)[0] == 0, "the lock goes with its holder"


def test_a_lock_that_the_run_itself_waits_for_in_vain_is_not_told_as_another_run(tmp_path):
    with pytest.raises(Timeout, match=r"store\.lock"), Run(tmp_path, "mine").locked():
        raise Timeout("store.lock")
    with Run(tmp_path, "mine").locked():
        pass
