"""Users who are stopped in the middle of a slot go on, to the bit, wherever the process was killed."""

import shutil
import signal
from pathlib import Path

import pytest
import torch
import toys
from fleet_fixtures import TEXT, rows_of
from peft import LoraConfig
from safetensors.torch import load_file
from test_engine import LORA, config, pairs_of, toy_base
from test_resume import run as run_alone
from test_slots import stirred

from perce_lite.fleet import queries as roster
from perce_lite.fleet.engines.slots import engine_for
from perce_lite.fleet.fleet import fleet
from perce_lite.fleet.registry import KEPT
from perce_lite.fleet.slot_lora import attach
from perce_lite.fleet.slot_trainer import SlotTrainer
from perce_lite.fleet.slot_user import SlotUser, Unfinished, UserJob
from perce_lite.recipe import load_recipe

pytest_plugins = ["cli_fixtures"]


class Killed(BaseException):
    pass


class Killing(Unfinished):
    """Is killed at its `last` write: after it, or in the middle of it."""

    def __init__(self, file, last=0, torn=False):
        super().__init__(file)
        self.left, self.torn = last, torn

    def write(self, states):
        self.left -= 1
        if self.left == 0 and self.torn:
            (self._file.parent / f".{KEPT}.x.tmp").write_bytes(b"half of it")
            raise Killed
        super().write(states)
        if self.left == 0:
            raise Killed


OPTIONS = {
    "mixed": {"estimator": "mixed", "save_steps": 2, "lr_scheduler_type": "cosine"},
    "accumulated": {"estimator": "uniform", "gradient_accumulation_steps": 2, "save_steps": 0.5, "weight_decay": 0.1},
    "core": {"estimator": "bootstrap", "save_steps": 1, "optim": "sgd"},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("last", "torn"), [(1, False), (3, False), (2, True)])
def test_a_killed_run_goes_on_to_the_bit(tmp_path, name, last, torn):
    args = config(tmp_path, save_strategy="steps", **OPTIONS[name])
    core = name == "core"
    parents = [stirred(attach(toy_base(), LoraConfig(**LORA), 1).fresh(seed), seed) for seed in range(2)]
    jobs = [
        UserJob(
            f"user{u}", pairs_of(u, 3 + u % 2), steps=5 + u % 3, adapter=parents[u % 2] if core else None, begun="x"
        )
        for u in range(4)
    ]

    def run(jobs, kept):
        results = {}
        engine = SlotTrainer(toy_base(), toys.toy_tokenizer("chatml"), args, LoraConfig(**LORA), 2, core=core)
        try:
            engine.run(jobs, lambda result: results.update({result.user: result}), kept)
        except Killed:
            return results, True
        return results, False

    whole, _ = run(jobs, None)
    file = tmp_path / KEPT
    first, killed = run(jobs, Killing(file, last, torn))
    assert killed
    kept = Unfinished(file)
    assert list(tmp_path.glob(".*.tmp")) == []
    going_on = kept.users
    assert 1 <= len(going_on) <= 2
    order = {user: place for place, user in enumerate(going_on)}
    left = sorted((job for job in jobs if job.user not in first), key=lambda job: order.get(job.user, 9))
    second, killed = run(left, kept)
    assert not killed
    assert not file.exists(), "nobody is left in the middle"
    for user, result in {**first, **second}.items():
        assert result.error is None
        assert [step["loss"] for step in result.log] == [step["loss"] for step in whole[user].log]
        for key, tensor in whole[user].adapter.items():
            assert torch.equal(result.adapter[key], tensor), (user, key)


def test_what_was_kept_of_others_stays_and_of_another_training_does_not(tmp_path):
    file = tmp_path / KEPT
    Unfinished(file).write({"ann": {"begun": "a"}, "ben": {"begun": "b"}, "cy": {"begun": "c"}})
    kept = Unfinished(file)
    assert kept.users == ["ann", "ben", "cy"]
    assert kept.take(UserJob("ann", [], begun="a")) == {"begun": "a"}
    assert kept.take(UserJob("ann", [], begun="a")) is None, "once"
    assert kept.take(UserJob("ben", [], begun="other rows")) is None
    kept.write({"dan": {"begun": "d"}})
    assert Unfinished(file).users == ["dan", "cy"]
    file.write_bytes(file.read_bytes()[:40])
    assert Unfinished(file).users == []


def test_a_stopped_fleet_goes_on_in_its_slots(recipe, monkeypatch):
    """A user who failed stands ahead of those who go on; they share their batches as before all the same."""
    rows = [{**row, "completion": ""} if row["user"] == "user0" else row for row in rows_of(5)]
    text = TEXT.replace("gate: null", "gate: null, slots: 2, init_from: none").replace("max_steps: 3", "max_steps: 4")
    path = recipe(rows, text.replace("train: {", "train: {save_steps: 3, ") + "lora: {r: 4}\n")
    restored, real = [], SlotUser.restore
    monkeypatch.setattr(SlotUser, "restore", lambda self, state: (restored.append(self.job.user), real(self, state)))
    assert fleet(load_recipe(path), engine_for).failed == 1
    shutil.move("out", "whole")
    with monkeypatch.context() as patch:
        patch.setattr("perce_lite.fleet.engines.slots.Unfinished", lambda file: Killing(file, 2))
        with pytest.raises(Killed):
            fleet(load_recipe(path), engine_for)
    assert Path("out", KEPT).is_file()
    told = fleet(load_recipe(path), engine_for)
    assert (told.trained, told.failed, restored) == (2, 1, ["user3", "user4"])
    assert not Path("out", KEPT).exists()
    for user in ("user1", "user2", "user3", "user4"):
        [mine], [theirs] = (list(Path(at).rglob(f"{user}-*/adapter/*.safetensors")) for at in ("out", "whole"))
        one, other = load_file(mine), load_file(theirs)
        assert all(torch.equal(one[name], other[name]) for name in other), user
    Unfinished(Path("out", KEPT)).write({"user9": {"begun": "who was trained one by one since"}})
    fleet(load_recipe(path, ["data.users=[user1, user2, user3, user4]"]), engine_for, retrain=["user4"])
    assert not Path("out", KEPT).exists(), "nobody is due"


def test_a_fleet_that_the_system_kills_goes_on_to_the_bit(recipe):
    """SIGKILL in the middle of a step of two users; the second two have not begun."""
    text = TEXT.replace("gate: null", "gate: null, slots: 2, init_from: none").replace("max_steps: 3", "max_steps: 6")
    path = Path(recipe(rows_of(4), text.replace("train: {", "train: {save_steps: 2, "))).absolute()
    assert run_alone(path, command="fleet")[0] == 0
    shutil.move("out", "whole")
    code, said = run_alone(path, "perce_lite.fleet.slot_trainer:SlotTrainer._step", 6, command="fleet")
    assert code == -signal.SIGKILL, said
    assert Unfinished(Path("out", KEPT)).users == ["user0", "user1"]
    code, said = run_alone(path, "perce_lite.fleet.slot_trainer:SlotTrainer._step", 99, command="fleet")
    assert code == 0, said
    for user in ("user0", "user1", "user2", "user3"):
        [mine], [theirs] = (list(Path(at).rglob(f"{user}-*/adapter/*.safetensors")) for at in ("out", "whole"))
        one, other = load_file(mine), load_file(theirs)
        assert all(torch.equal(one[name], other[name]) for name in other), user


def test_deleting_a_user_removes_what_slots_kept(recipe):
    fleet(load_recipe(recipe(rows_of(2), TEXT.replace("gate: null", "gate: null, group_by: all"))), engine_for)
    Unfinished(Path("out", KEPT)).write({"user0": {"begun": ""}})
    receipt = roster.delete(Path("out"), "user0")
    assert str(Path("out", KEPT)) in receipt.removed
