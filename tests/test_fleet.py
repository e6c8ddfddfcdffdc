"""Fleets: who is due, two stages, failures, the gate, slots, and stopping at any moment."""

import shutil
from pathlib import Path

import pytest
import torch
import toys
from fleet_fixtures import TEXT, Clock, names, rows_of
from peft import PeftModel
from safetensors.torch import load_file
from test_inspect import full_logits

from perce_lite.data.pairs import PairMaker
from perce_lite.data.readers import read_rows
from perce_lite.fleet.engines import slots as slotted
from perce_lite.fleet.engines.sequential import SequentialEngine
from perce_lite.fleet.engines.slots import SlotsEngine, engine_for
from perce_lite.fleet.fleet import fleet
from perce_lite.fleet.registry import opened
from perce_lite.model import fingerprint as hashing
from perce_lite.recipe import load_recipe
from perce_lite.training.trainer import PerCETrainer

pytest_plugins = ["cli_fixtures"]


def test_who_is_due(recipe):
    rows = rows_of(4)[:-5]
    path, engine = recipe(rows, TEXT), Clock()
    first = fleet(load_recipe(path), engine)
    assert first.due == {"user": 3, "cohort": 0, "all": 1}
    assert names(engine) == ["all", "user0", "user1", "user2"], "user3 has too few rows"
    assert fleet(load_recipe(path), engine).trained == 0
    # new text of one user retrains that one user
    more = {**rows[2], "prompt": "Something new?"}
    fleet(load_recipe(recipe([*rows, more], TEXT)), engine)
    assert names(engine) == ["user0"]
    fleet(load_recipe(path), engine, retrain=["user2"])
    assert names(engine) == ["user2"]
    fleet(load_recipe(path), engine, retrain=["all"])
    assert names(engine) == ["all", "user0", "user1", "user2"]
    fleet(load_recipe(path, ["lora.r=4"]), engine, only=["user1"])
    assert names(engine) == ["all", "user1"]
    assert fleet(load_recipe(path, ["lora.r=4"]), engine, dry_run=True).due["user"] == 2
    assert names(engine) == []


def test_cohorts_come_before_their_users(recipe):
    engine = Clock()
    fleet(load_recipe(recipe(rows_of(4, cohorts=2), TEXT)), engine)
    assert names(engine) == ["c0", "c1", "user0", "user1", "user2", "user3"]
    with opened(Path("out")) as registry:
        one = registry.get("user", "user1")
    assert (one.parent_kind, one.parent_name) == ("cohort", "c1")
    fleet(load_recipe(recipe(rows_of(4, cohorts=2), TEXT)), engine, retrain=["cohort:c1"])
    assert names(engine) == ["c1", "user1", "user3"]


def test_a_failing_user_is_left_out_and_the_fleet_goes_on(run, recipe, figures, monkeypatch):
    path, engine = recipe(rows_of(3), TEXT), Clock(fails=("user1",))
    monkeypatch.setattr("perce_lite.fleet.engines.slots.engine_for", engine)
    code, out, err = run("fleet", path)
    assert code == 3
    assert "user user1: left out. The loss is nan" in err
    assert "failed 1" in out
    told = figures("adapters", "who", "user1", "--fleet", "out")
    assert told["adapter"] == ["all", "all"]
    assert "user user1's adapter is failed: The loss is nan" in told["why"]
    engine.trained.clear()
    assert run("fleet", path)[0] == 3
    assert names(engine) == ["user1"], "it is tried again, the others are not"


def test_a_chat_with_a_fleets_folder_is_with_the_adapter_that_serves_the_user(recipe, run, figures, monkeypatch):
    asked = []
    monkeypatch.setattr("perce_lite.fleet.engines.slots.engine_for", Clock(fails=("user1",)))
    monkeypatch.setattr("perce_lite.cli.chat.read_metadata", lambda folder, said: asked.append(folder) or 1 / 0)
    run("fleet", recipe(rows_of(3), TEXT))
    for user in ("user0", "user1"):
        with pytest.raises(ZeroDivisionError):
            run("chat", "out", "--user", user)
        assert asked[-1] == Path(figures("adapters", "who", user, "--fleet", "out")["folder"])
    assert "the fleet knows no such user" in run("chat", "out", "--user", "nobody")[2]


def test_an_adapter_that_is_worse_is_held_back(recipe, run, figures, monkeypatch):
    path, engine = recipe(rows_of(2), TEXT.replace("gate: null", "gate: 0.0")), Clock(gain=-0.2)
    monkeypatch.setattr("perce_lite.fleet.engines.slots.engine_for", engine)
    told = figures("fleet", path)
    assert told["held_back"] == 2
    assert told["states"]["in service"] == 1
    why = figures("adapters", "who", "user0", "--fleet", "out")
    assert why["adapter"] == ["all", "all"]
    assert "user user0's adapter is held back: -0.200 nats" in why["why"]
    assert "held back (worse than what it replaces)" in Path("out/fleet.html").read_text("utf-8")


def test_users_start_from_the_shared_adapter_and_the_base_stays_bare(recipe, figures, run):
    """For real: three toy users over one base; each adapter loads with plain peft."""
    path = recipe(rows_of(3), TEXT + "lora: {r: 4}\n")
    told = figures("fleet", path)
    assert (told["trained"], told["failed"]) == (4, 0)
    with opened(Path("out")) as registry:
        by_name = {one.name: one for one in registry.all()}
        shared, own = by_name["all"], by_name["user1"]
        losses = own.metrics["losses"]["test"]
    assert own.gain == pytest.approx(losses["start"] - losses["own"])
    assert losses["own"] != losses["start"] != losses["base"]
    # The loss of what it started from is that of the shared adapter, by full logits and plain peft.
    read = load_recipe(path)
    maker = PairMaker(toys.toy_tokenizer("chatml"), read.template, 1024)
    pairs = maker.make([row for row in read_rows(read) if row.user == "user1" and row.split == "test"])
    for name, adapter in (("start", shared), ("own", own)):
        folder = Path("out") / adapter.folder / "adapter"
        model = PeftModel.from_pretrained(toys.toy_model("chatml", 600), folder).eval().double()
        by_hand = torch.cat([full_logits(model, pair.factual) for pair in pairs])
        assert losses[name] == pytest.approx(-float(by_hand.mean()), abs=1e-4)
    assert not list(Path("out").rglob("checkpoint-*"))
    assert run("adapters", "verify", "--fleet", "out")[0] == 0
    weights = Path("out") / own.folder / "adapter/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    code, out, _ = run("adapters", "verify", "--fleet", "out")
    assert code == 2
    assert "user user1's adapter" in out
    assert "3 of 4 adapters are whole" in out


def test_the_base_is_hashed_once(recipe, monkeypatch):
    """One by one and in slots: as many tensors are hashed as the base has, whatever the number of users."""
    hashed = []
    path = recipe(rows_of(3), TEXT.replace("gate: null", "gate: null, slots: 2"))
    base = toys.toy_model("chatml", 600)
    for engine in (SequentialEngine, engine_for):
        with monkeypatch.context() as patch:
            patch.setattr(hashing, "hash_parameter", lambda state, name, parameter: hashed.append(name))
            fleet(load_recipe(path), engine, retrain=["all"])
        assert sorted(hashed) == sorted(name for name, _ in base.named_parameters()), engine
        hashed.clear()


def test_order_does_not_matter_for_a_user(recipe, tmp_path):
    """A user's adapter is the same whether trained first or after others: the base is given back as it was."""
    path = recipe(rows_of(3), TEXT.replace("gate: null", "gate: null, init_from: none"))
    fleet(load_recipe(path), SequentialEngine)
    shutil.move("out", "first")
    fleet(load_recipe(path), SequentialEngine, only=["user2"])
    [alone] = Path("out").rglob("user2-*/adapter/adapter_model.safetensors")
    [later] = Path("first").rglob("user2-*/adapter/adapter_model.safetensors")
    one, other = load_file(alone), load_file(later)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("profile_pass", ["full", "frozen"])
def test_slots_train_what_one_by_one_trains(recipe, profile_pass):
    """Three users in two slots, one of them refilled: the registry and the adapters are those of one after another."""
    text = TEXT.replace("gate: null", "gate: null, slots: 2") + "lora: {r: 4}\n"
    slow = f"learning_rate: 0.01, adam_epsilon: 1e-4, profile_pass: {profile_pass}"
    path = recipe(rows_of(3), text.replace("learning_rate: 0.05", slow))
    engine = engine_for(load_recipe(path))
    assert isinstance(engine, SlotsEngine)
    assert fleet(load_recipe(path), engine_for).trained == 4
    shutil.move("out", "slots")
    fleet(load_recipe(path), SequentialEngine)
    for user in ("user0", "user1", "user2"):
        [one], [other] = (
            list(Path(name).rglob(f"{user}-*/adapter/adapter_model.safetensors")) for name in ("slots", "out")
        )
        one, other = load_file(one), load_file(other)
        far = {name: float((one[name] - other[name]).abs().max()) for name in one | other}
        assert max(far.values()) < 2e-5, (user, far)
    with opened(Path("slots")) as one, opened(Path("out")) as other:
        for mine, theirs in zip(one.all(), other.all(), strict=True):
            assert (mine.name, mine.state, mine.trained_run) == (theirs.name, theirs.state, theirs.run)
            assert mine.gain == pytest.approx(theirs.gain, abs=1e-4)
            for split, losses in mine.metrics["losses"].items():
                assert losses == pytest.approx(theirs.metrics["losses"][split], abs=1e-4)


def test_a_user_that_fails_in_a_slot_is_left_out(recipe, figures):
    rows = [{**row, "completion": ""} if row["user"] == "user1" else row for row in rows_of(3)]
    path = recipe(rows, TEXT.replace("gate: null", "gate: null, slots: 2"))
    told = fleet(load_recipe(path), engine_for)
    assert (told.trained, told.failed) == (3, 1)
    why = figures("adapters", "who", "user1", "--fleet", "out")
    assert why["adapter"] == ["all", "all"]
    assert "empty response" in why["why"]


def test_what_slots_cannot_do_is_done_one_by_one(recipe, run):
    path = recipe(rows_of(2), TEXT + "lora: {lora_dropout: 0.1}\n")
    code, _, err = run("fleet", path, "--set", "fleet.slots=auto")
    assert code == 0, err
    code, _, err = run("fleet", path, "--set", "fleet.slots=2", "--retrain", "user0")
    assert code == 2
    assert "lora_dropout" in err


def test_lora_on_the_head_is_refused_in_slots_too(recipe, run):
    path = recipe(rows_of(2), TEXT.replace("gate: null", "gate: null, init_from: none"))
    code, _, err = run("fleet", path, "--set", "fleet.slots=2", "--set", "lora.target_modules=[q_proj, lm_head]")
    assert code == 2
    assert "fused head" in err


def test_a_slot_whose_weights_are_no_numbers_is_one_users_failure(recipe, monkeypatch):
    path = recipe(rows_of(2), TEXT.replace("gate: null", "gate: null, init_from: none, slots: 2"))
    real = slotted.save_slot

    def save(model, state, folder, about, storage):
        if "user0" in str(folder):
            state = {name: tensor * float("nan") for name, tensor in state.items()}
        real(model, state, folder, about, storage)

    monkeypatch.setattr(slotted, "save_slot", save)
    told = fleet(load_recipe(path), engine_for)
    assert (told.trained, told.failed) == (1, 1)


def test_a_stopped_fleet_goes_on(recipe):
    path = recipe(rows_of(3), TEXT)
    engine, stopping = Clock(), Clock()

    def stops(task, real=stopping.train):
        if task.folder.name.startswith("user1"):
            raise KeyboardInterrupt
        return real(task)

    stopping.train = stops
    with pytest.raises(KeyboardInterrupt):
        fleet(load_recipe(path), stopping)
    fleet(load_recipe(path), engine)
    assert names(engine) == ["user1", "user2"]


def test_what_is_half_trained_does_not_go_on_with_other_rows(recipe, monkeypatch):
    """The shared adapter is stopped after a checkpoint; with another set of rows it starts anew."""
    text = TEXT.replace("max_steps: 3", "max_steps: 4, save_steps: 2")
    path = recipe(rows_of(3), text)

    class Stopped(BaseException):
        pass

    def stops(trainer, *args, **kwargs):
        real(trainer, *args, **kwargs)
        raise Stopped

    def stopped(path):
        with monkeypatch.context() as patch:
            patch.setattr(PerCETrainer, "_save_checkpoint", stops)
            with pytest.raises(Stopped):
                fleet(load_recipe(path), SequentialEngine)

    real, resumed = PerCETrainer._save_checkpoint, []
    monkeypatch.setattr("perce_lite.training.run.say", resumed.append)
    stopped(path)
    assert list(Path("out").rglob("checkpoint-2"))
    fleet(load_recipe(recipe(rows_of(2), text)), SequentialEngine)
    assert resumed == []
    shutil.rmtree("out")
    stopped(path)
    fleet(load_recipe(path), SequentialEngine)
    assert len(resumed) == 1, "with the very same rows it goes on"


def test_a_dry_run_changes_nothing(recipe, run):
    path, engine = recipe(rows_of(3), TEXT), Clock()
    fleet(load_recipe(path), engine)
    with opened(Path("out")) as registry:
        before = registry.all()
    for changes, retrain in ((["lora.r=4"], []), ([], ["user1"]), ([], ["all"])):
        assert sum(fleet(load_recipe(path, changes), engine, retrain=retrain, dry_run=True).due.values()) > 0
    with opened(Path("out")) as registry:
        assert registry.all() == before
    code, out, _ = run("fleet", path, "--dry-run")
    assert (code, "Page" in out, Path("out/fleet.html").exists()) == (0, False, False)
    engine.trained.clear()
    assert fleet(load_recipe(path), engine).trained == 0


def test_what_is_not_judged_or_held_back_is_not_served(recipe, figures):
    path = recipe(rows_of(2), TEXT.replace("gate: null", "gate: 0.0"))
    fleet(load_recipe(path), Clock(gain=-0.2))
    more = {**rows_of(2)[2], "prompt": "Something new?"}
    path = recipe([*rows_of(2), more], TEXT.replace("gate: null", "gate: 0.0"))

    def killed(task):
        Clock().train(task)  # the adapter lies there, the registry does not know
        raise KeyboardInterrupt

    engine = Clock()
    engine.train = killed
    with pytest.raises(KeyboardInterrupt):
        fleet(load_recipe(path), engine)
    assert figures("adapters", "who", "user0", "--fleet", "out")["adapter"] == ["all", "all"]
    # the gate is moved: those who were held back are judged anew, from the figures of before
    fleet(load_recipe(path, ["fleet.gate=-1.0"]), Clock(), only=["user0"])
    assert figures("adapters", "who", "user1", "--fleet", "out")["adapter"] == ["user", "user1"]


@pytest.mark.parametrize("gain", [float("nan"), 0.0, -0.1])
def test_a_gain_that_is_none_is_held_back(recipe, gain):
    told = fleet(load_recipe(recipe(rows_of(2), TEXT.replace("gate: null", "gate: 0.0"))), Clock(gain=gain))
    assert told.held_back == 2


def test_children_wait_for_a_parent_whose_retraining_failed(recipe):
    path = recipe(rows_of(2), TEXT)
    fleet(load_recipe(path), Clock())
    told = fleet(load_recipe(path), Clock(fails=("all",)), retrain=["all"])
    assert (told.trained, told.failed) == (0, 3)
    engine = Clock()
    fleet(load_recipe(path), engine)
    assert names(engine) == ["all", "user0", "user1"]


def test_rows_that_are_put_back_need_no_training(recipe):
    path = recipe(rows_of(2), TEXT)
    fleet(load_recipe(path), Clock())
    more = {**rows_of(2)[2], "prompt": "Something new?"}
    assert fleet(load_recipe(recipe([*rows_of(2), more], TEXT)), Clock(fails=("user0",))).states["failed"] == 1
    told = fleet(load_recipe(recipe(rows_of(2), TEXT)), Clock())
    assert (told.trained, told.states["in service"]) == (0, 3)


def test_other_users_and_their_number_retrain_nobody(recipe):
    engine = Clock()
    fleet(load_recipe(recipe(rows_of(3), TEXT), ["data.users=[user0, user1]", "data.max_rows=40"]), engine)
    assert names(engine) == ["all", "user0", "user1"]
    fleet(load_recipe(recipe(rows_of(3), TEXT), ["data.users=[user0, user1, user2]", "data.max_rows=40"]), engine)
    assert names(engine) == ["user2"]
    told = fleet(load_recipe(recipe(rows_of(3), TEXT), ["data.users=[user0]", "lora.r=4"]), engine)
    assert told.due == {"user": 1, "cohort": 0, "all": 1}, "users who are not in the data are not due"


def test_changed_weights_of_the_base_are_noticed(recipe, toy):
    shutil.copytree(toy, "mine")
    path, engine = recipe(rows_of(2), TEXT), Clock()
    fleet(load_recipe(path, ["model=mine"]), engine)
    file = Path("mine/model.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    names(engine)
    fleet(load_recipe(path, ["model=mine"]), engine)
    assert names(engine) == ["all", "user0", "user1"]
