"""Planted out-of-memory errors: the message names what is kept and a line that fits; that line then works."""

import re
import shlex
import weakref
from pathlib import Path

import pytest
import torch
import toys
from cli_fixtures import TRAIN
from fleet_fixtures import rows_of
from safetensors.torch import load_file
from transformers import PreTrainedModel

from perce_lite import PerCETrainer
from perce_lite.evaluation import compare, evaluate
from perce_lite.fleet.slot_trainer import SlotTrainer
from perce_lite.fleet.slot_user import SlotUser
from perce_lite.model import scoring as score
from perce_lite.model.scoring import compute_log_probs
from perce_lite.planning import parts as memory

pytest_plugins = ["cli_fixtures"]

TELLS = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 7.79 GiB of which 1 is free."


@pytest.fixture
def out_of_memory(monkeypatch):
    """Makes the training step of a number fail as torch does on a full GPU; None: none does."""
    original, full = PerCETrainer.training_step, {}

    def step(self, *args, **kwargs):
        if self.state.global_step == full["at"]:
            raise torch.OutOfMemoryError(TELLS)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(PerCETrainer, "training_step", step)
    monkeypatch.setattr(memory, "VOCABULARY_CHUNK_SIZE", toys.VOCAB_SIZE)  # else a toy's head outweighs all else
    return lambda at: full.update(at=at)


def recipe_text(**train) -> str:
    options = {"output_dir": "out", "max_steps": 4, "save_steps": 1, "estimator": "uniform", **train}
    listed = ", ".join(f"{name}: {str(value).lower()}" for name, value in options.items())
    return f"train: {{{listed}}}\n" + TRAIN.splitlines()[1] + "\n"


def overrides(told: str) -> list[str]:
    """The `--set` words that a message names."""
    return shlex.split(re.search(r"same command with ((?:--set \S+ ?)+)", told)[1].rstrip(", "))


def adapter(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "adapter" / "adapter_model.safetensors")


def test_what_spares_memory_alone_goes_on_from_the_checkpoint(recipe, run, out_of_memory):
    path = recipe(text=recipe_text(gradient_checkpointing=False))
    out_of_memory(None)
    assert run("train", path, "--set", "train.output_dir=whole")[0] == 0
    out_of_memory(2)
    code, out, err = run("train", path)
    assert (code, out, "Traceback" in err) == (2, "", False)
    told = err[err.index("error: ") :]
    assert "GPU out of memory: CUDA out of memory." in told
    assert "out/checkpoint-2 is kept" in told
    assert overrides(told) == ["--set", "train.gradient_checkpointing=true"]
    assert "resumes from there" in told
    out_of_memory(None)
    code, _, err = run("train", path, *overrides(told))
    assert (code, "Resuming from out/checkpoint-2" in err) == (0, True)
    one, other = adapter("whole"), adapter("out")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_another_batch_is_another_run_in_a_folder_of_its_own(recipe, run, out_of_memory):
    path = recipe(text=recipe_text(gradient_checkpointing=True, per_device_train_batch_size=4))
    out_of_memory(1)
    code, _, err = run("train", path)
    told = err[err.index("error: ") :]
    assert (code, "out/checkpoint-1 is kept" in told, "starts at the first step" in told) == (2, True, True)
    words = overrides(told)
    assert "train.output_dir=out-smaller" in words
    assert re.search(r"per_device_train_batch_size=[12] ", " ".join(words))
    out_of_memory(None)
    assert run("train", path, *words)[0] == 0
    assert adapter("out-smaller")
    assert Path("out/checkpoint-1").is_dir()
    assert run("train", path)[0] == 0  # and the old run can still go on


def test_out_of_memory_before_the_first_checkpoint(recipe, run, out_of_memory):
    out_of_memory(0)
    code, _, err = run("train", recipe(text=recipe_text(save_steps=100)))
    assert (code, "No checkpoint had been written" in err) == (2, True)
    assert "goes on" not in err


def test_out_of_memory_while_scoring(recipe, run, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError(TELLS)

    monkeypatch.setattr(score, "batch_log_probs", full)
    code, out, err = run("train", recipe(text=TRAIN))
    assert (code, out, "What was scored under the base is kept." in err, "Traceback" in err) == (2, "", True, False)


def test_scoring_halves_a_batch_that_does_not_fit(toy_trainer, monkeypatch):
    """Nothing is lost or swapped: values are those of rows scored alone."""
    trainer = toy_trainer(estimator="uniform")
    sequences = [pair.factual for pair in trainer.pairs["train"]][:7]
    alone: dict[int, torch.Tensor] = {}
    compute_log_probs(trainer.model, sequences, False, None, alone.__setitem__)
    original, sizes = score.batch_log_probs, []

    def narrow(forward, inputs, autocast):
        sizes.append(inputs["input_ids"].shape[0])
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError(TELLS)
        return original(forward, inputs, autocast)

    monkeypatch.setattr(score, "batch_log_probs", narrow)
    monkeypatch.setattr(score, "_batches", lambda sequences, alone: iter([list(range(len(sequences)))]))
    together: dict[int, torch.Tensor] = {}
    compute_log_probs(trainer.model, sequences, False, None, together.__setitem__)
    assert sizes == [7, 3, 1, 2, 4, 2, 2]
    assert sorted(together) == sorted(alone)
    for index, values in alone.items():
        torch.testing.assert_close(together[index], values, rtol=0, atol=1e-4)


@pytest.fixture
def no_room(monkeypatch):
    """The base itself does not fit, as torch says it."""

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError(TELLS)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", full)
    monkeypatch.setattr(memory, "VOCABULARY_CHUNK_SIZE", toys.VOCAB_SIZE)


@pytest.mark.parametrize("command", ["train", "inspect", "compare", "fleet"])
def test_a_base_that_does_not_fit(recipe, run, no_room, command):
    """Each command that takes a recipe says what would."""
    text = recipe_text(gradient_checkpointing=False, per_device_train_batch_size=4)
    code, out, err = run(command, recipe(rows_of(2), text))
    told = err[err.index("error: ") :]
    assert (code, out, "Traceback" in err) == (2, "", False)
    assert "GPU out of memory: CUDA out of memory." in told
    assert "What was scored under the base is kept." in told or "Who was trained stays so." in told
    assert "--set" in overrides(told)


def test_a_base_that_does_not_fit_and_no_recipe_to_change(recipe, run, monkeypatch):
    assert run("train", recipe(text=TRAIN))[0] == 0

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError(TELLS)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", full)
    code, _, err = run("generate", "--adapter", "out/adapter", "--prompt", "Hello?", "--no-profile")
    assert (code, "does not fit the GPU" in err, "CUDA_VISIBLE_DEVICES=" in err) == (2, True, True)


@pytest.mark.parametrize("command", ["eval", "compare"])
def test_out_of_memory_while_adapters_are_judged(recipe, run, monkeypatch, command):
    """Nothing is trained there, so what spares memory in training alone is not named; the named line works."""
    path = recipe(rows_of(2), recipe_text(gradient_checkpointing=False, per_device_train_batch_size=4))
    assert run("train", path)[0] == 0
    words = {
        "eval": ("eval", path, "--adapter", "out/adapter", "--set", "train.store=elsewhere"),
        "compare": ("compare", path, "--arms", "base,uniform", "--seeds", "1", "--rates", "1e-3"),
    }[command]
    monkeypatch.setattr(memory, "VOCABULARY_CHUNK_SIZE", toys.VOCAB_SIZE)

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError(TELLS)

    with monkeypatch.context() as patched:
        patched.setattr({"eval": evaluate, "compare": compare}[command], "score_cases", full)
        code, _, err = run(*words)
    told = err[err.index("error: ") :]
    assert (code, "What was scored under the base is kept." in told, "Traceback" in err) == (2, True, False)
    named = {word.partition("=")[0] for word in overrides(told) if "=" in word}
    folder = {"train.output_dir"} if command == "compare" else set()
    assert folder <= named <= folder | {"quantization", "embedding_on_host", "train.max_length"}
    code, _, err = run(*words, *overrides(told))
    assert code == 0, err


FLEET = "fleet: {min_examples: 4, gate: null, init_from: none, slots: 4}\n"


def test_out_of_memory_with_many_users_at_once(recipe, run, monkeypatch):
    """Fewer at once fit; the line says how many, and with exactly that the fleet resumes from what is kept."""
    original, most = SlotTrainer._step, {"users": 4}

    def step(self, trainings):
        if len(trainings) > most["users"] and trainings[0].log:
            raise torch.OutOfMemoryError(TELLS)
        return original(self, trainings)

    monkeypatch.setattr(SlotTrainer, "_step", step)
    monkeypatch.setattr(memory, "VOCABULARY_CHUNK_SIZE", toys.VOCAB_SIZE)
    path = recipe(rows_of(4), recipe_text(gradient_checkpointing=True) + FLEET)
    most["users"] = 3
    code, _, err = run("fleet", path)
    told = err[err.index("error: ") :]
    assert (code, "Who was trained stays so." in told, "Traceback" in err) == (2, True, False)
    [_, word] = overrides(told)
    most["users"] = int(word.removeprefix("fleet.slots="))
    assert 1 < most["users"] < 4
    restored, real = [], SlotUser.restore
    monkeypatch.setattr(SlotUser, "restore", lambda self, state: (restored.append(self.job.user), real(self, state)))
    code, _, err = run("fleet", path, "--set", word)
    assert (code, restored) == (0, ["user0", "user1", "user2", "user3"])


def test_users_have_options_of_their_own(recipe, run, out_of_memory):
    """What `fleet.train` sets is lowered there, since it would win over `train`."""
    out_of_memory(0)
    text = recipe_text(gradient_checkpointing=True) + FLEET.replace("init_from: none", "init_from: all")
    path = recipe(rows_of(2), text.replace("slots: 4", "slots: 1, train: {per_device_train_batch_size: 4}"))
    out_of_memory(None)
    assert run("fleet", path, "--set", "fleet.group_by=all")[0] == 0
    out_of_memory(0)
    code, _, err = run("fleet", path)
    assert code == 3
    assert "fleet.train.per_device_train_batch_size=" in err
    assert " train.per_device_train_batch_size=" not in err


def test_one_user_whose_rows_do_not_fit_leaves_the_others_alone(recipe, run, monkeypatch):
    """The next user has the whole GPU: nothing of the one who failed is kept."""
    original, failed = PerCETrainer.training_step, []

    def step(self, *args, **kwargs):
        if self.pairs["train"][0].row.user == "user0":
            failed.append(weakref.ref(self))
            raise torch.OutOfMemoryError(TELLS)
        assert all(one() is None for one in failed)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(PerCETrainer, "training_step", step)
    monkeypatch.setattr(memory, "VOCABULARY_CHUNK_SIZE", toys.VOCAB_SIZE)
    path = recipe(rows_of(2), recipe_text(gradient_checkpointing=True) + FLEET.replace("slots: 4", "slots: 1"))
    code, out, err = run("fleet", path)
    assert (code, err.count("left out. GPU out of memory"), len(failed)) == (3, 1, 1)
    assert "Trained 1" in out
    assert overrides(err)
