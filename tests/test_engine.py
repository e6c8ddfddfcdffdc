"""The loop over slots against the trainer, against itself alone, and with users that fail."""

import math

import datasets
import pytest
import torch
import toys
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from test_base import nf4
from transformers import set_seed

from perce_lite import PerCEConfig, PerCETrainer
from perce_lite.data.pairs import PairMaker
from perce_lite.data.rows import from_columns
from perce_lite.errors import ConfigError, DataError, NonFiniteLossError
from perce_lite.fleet.slot_lora import SlotModel
from perce_lite.fleet.slot_trainer import SlotTrainer
from perce_lite.fleet.slot_user import UserJob
from perce_lite.training.order import steps_of

LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def config(tmp_path, **options):
    """Adam's epsilon is above rounding: with the usual one a gradient of 1e-8, all rounding, would be a whole step."""
    defaults = {
        "output_dir": str(tmp_path / "out"), "max_length": 512, "per_device_train_batch_size": 2, "max_steps": 4,
        "logging_steps": 1, "learning_rate": 1e-2, "lr_scheduler_type": "linear", "warmup_steps": 2,
        "report_to": "none", "bf16": False, "save_strategy": "no", "disable_tqdm": True,
        "gradient_checkpointing": False, "clip_min": 0.1, "clip_max": 3.0, "optim": "adamw_torch", "adam_epsilon": 1e-5,
    }  # fmt: skip
    return PerCEConfig(**{**defaults, **options})


def rows_of(user, rows=5):
    return [row for row in toys.toy_rows(users=user + 1, per_user=rows) if row["user"] == f"user{user}"]


def pairs_of(user, rows=5, profile_pass="full"):
    maker = PairMaker(toys.toy_tokenizer("chatml"), max_length=512, profile_pass=profile_pass)
    return maker.make([from_columns(row, f"row {number}") for number, row in enumerate(rows_of(user, rows))])


def toy_base(dtype=torch.float32):
    return toys.toy_model("chatml", len(toys.toy_tokenizer("chatml")), dtype=dtype)


def engine(args, slots, base=None, dtype=torch.float32):
    base = toy_base(dtype) if base is None else base
    return SlotTrainer(base, toys.toy_tokenizer("chatml"), args, LoraConfig(**LORA), slots, dtype)


def run(engine, jobs):
    results = []
    engine.run(iter(jobs), results.append)
    return {result.user: result for result in results}


def trained_by_trainer(args, user, base, rows=5, family="chatml"):
    set_seed(args.seed)
    model = get_peft_model(base, LoraConfig(**LORA))
    trainer = PerCETrainer(
        model,
        args,
        train_dataset=datasets.Dataset.from_list(rows_of(user, rows)),
        processing_class=toys.toy_tokenizer(family),
    )
    trainer.train()
    return trainer


def health(trainer, names):
    logs = [log for log in trainer.state.log_history if "loss" in log]
    last = [log for log in logs if log["epoch"] > logs[-1]["epoch"] - 1]
    return {name: sum(log[name] for log in last) / len(last) for name in names}


OPTIONS = {
    "base": {"estimator": "base"},
    "mixed": {"estimator": "mixed", "normalize_weights": "mean", "weight_decay": 0.1, "lr_scheduler_type": "cosine"},
    "uniform": {"estimator": "uniform", "max_steps": -1, "num_train_epochs": 1.5, "dataloader_drop_last": True},
    "shuffled": {"estimator": "shuffled", "train_sampling_strategy": "group_by_length", "seed": 7},
    "bootstrap": {"estimator": "bootstrap", "max_grad_norm": 0.1, "shuffle_dataset": True},
    "accumulated": {"estimator": "mixed", "gradient_accumulation_steps": 2, "train_sampling_strategy": "sequential"},
    "counterfactual": {"estimator": "base", "train_on": "counterfactual", "data_seed": 3},
    "checkpointed": {"estimator": "mixed", "gradient_checkpointing": True},
    "clip": {"estimator": "base", "weighting": "clip", "normalize_weights": "mean"},
    "additive": {"estimator": "mixed", "weighting": "additive", "strength": 1.5},
    "frozen": {"estimator": "mixed", "profile_pass": "frozen"},
    "frozen bootstrap": {"estimator": "bootstrap", "profile_pass": "frozen", "gradient_checkpointing": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_slot_trains_what_the_trainer_trains(tmp_path, name):
    args = config(tmp_path, **OPTIONS[name])
    trainer = trained_by_trainer(args, 1, toy_base())
    # User 1 shares its batches with two others; user 0's rows are fewer.
    jobs = [UserJob(f"user{u}", pairs_of(u, 3 if u == 0 else 5, args.profile_pass)) for u in range(3)]
    loop = engine(args, 3)
    results = run(loop, jobs)
    assert len(loop.prefixes) == 0, "of users who are done nothing is kept"
    logs = [log for log in trainer.state.log_history if "loss" in log]
    ours = results["user1"]
    assert ours.error is None
    assert ours.steps == trainer.state.global_step == steps_of(args, 5)
    for mine, theirs in zip(ours.log, logs, strict=True):
        assert mine["epoch"] == pytest.approx(theirs["epoch"], abs=1e-4)
        assert mine["learning_rate"] == pytest.approx(theirs["learning_rate"], rel=1e-6)
        for figure in {"loss", "unweighted_loss", "grad_norm", "weight_mean", "effective_tokens"} & set(theirs):
            assert mine[figure] == pytest.approx(theirs[figure], rel=2e-3, abs=2e-4), figure
    assert ours.weights == pytest.approx(health(trainer, ours.weights), rel=2e-3, abs=2e-4)
    assert bool(ours.weights) == (args.estimator != "uniform")
    state = get_peft_model_state_dict(trainer.model)
    assert max(tensor.abs().max() for key, tensor in state.items() if "lora_B" in key) > 1e-3
    for key, tensor in state.items():
        torch.testing.assert_close(ours.adapter[key], tensor, rtol=0, atol=1e-5)


def test_in_4_bit_too(tmp_path):
    folder = toys.toy_folder(tmp_path / "toy")
    args = config(tmp_path, estimator="mixed")
    trainer = trained_by_trainer(args, 1, nf4(folder))
    ours = run(engine(args, 2, nf4(folder)), [UserJob(f"user{u}", pairs_of(u)) for u in range(2)])["user1"]
    for key, tensor in get_peft_model_state_dict(trainer.model).items():
        torch.testing.assert_close(ours.adapter[key], tensor, rtol=0, atol=1e-5)


def test_other_families_and_bf16(tmp_path):
    for family, options in (("gemma", {"estimator": "bootstrap"}), ("chatml", {"estimator": "base", "bf16": True})):
        folder = toys.toy_folder(tmp_path / family, family)
        args = config(tmp_path, gradient_checkpointing=True, **options)
        trainer = trained_by_trainer(args, 1, nf4(folder), family=family)
        job = UserJob("user1", trainer.pairs["train"])
        ours = run(engine(args, 1, nf4(folder)), [job])["user1"]
        # One user alone has the trainer's own shapes, so that bf16 rounds alike.
        for key, tensor in get_peft_model_state_dict(trainer.model).items():
            torch.testing.assert_close(ours.adapter[key], tensor, rtol=0, atol=1e-3 if args.bf16 else 1e-5)


def exact_head(base):
    """A head in the base's own dtype, in place of TRL's, which computes in float32 whatever it is given."""

    def forward(labels, **inputs):
        scored = labels[:, 1:] != -100
        log_probs = base(**inputs).logits[:, :-1][scored].log_softmax(-1)
        return log_probs.gather(-1, labels[:, 1:][scored][:, None])[:, 0]

    return forward


@pytest.fixture
def exact(monkeypatch):
    monkeypatch.setattr("perce_lite.fleet.slot_trainer.training_forward", exact_head)


@pytest.mark.parametrize("users", [2, 8])
def test_float64_parity_with_training_alone(tmp_path, exact, users):
    args = config(tmp_path, estimator="uniform", max_steps=50, per_device_train_batch_size=1)
    jobs = [UserJob(f"user{user}", pairs_of(user, 2 + user % 3), seed=user) for user in range(users)]
    together = run(engine(args, users, dtype=torch.float64), jobs)
    for job in jobs[:: users - 1]:
        alone = run(engine(args, 1, dtype=torch.float64), [job])[job.user]
        assert alone.adapter.keys() == together[job.user].adapter.keys()
        for key, tensor in alone.adapter.items():
            torch.testing.assert_close(together[job.user].adapter[key], tensor, rtol=0, atol=1e-9)


def test_4_bit_parity_with_training_alone(tmp_path):
    folder = toys.toy_folder(tmp_path / "toy")
    args = config(tmp_path, estimator="base", max_steps=50, per_device_train_batch_size=1, learning_rate=2e-3)
    jobs = [UserJob(f"user{user}", pairs_of(user, 2 + user % 2), seed=user) for user in range(2)]
    together = run(engine(args, 2, nf4(folder)), jobs)
    alone = run(engine(args, 1, nf4(folder)), jobs[1:])
    for key, tensor in alone["user1"].adapter.items():
        torch.testing.assert_close(together["user1"].adapter[key], tensor, rtol=0, atol=1e-4)


def other_texts(pairs):
    """Pairs of the same shapes that say something else: every scored token and its neighbours are moved by one."""
    changed = []
    for pair in pairs:
        moved = [
            type(one)([3 + (token + 1) % 500 for token in one.ids], [
                label if label == -100 else 3 + (label + 1) % 500 for label in one.labels
            ])
            for one in (pair.factual, pair.counterfactual)
        ]  # fmt: skip
        changed.append(type(pair)(pair.row, *moved, pair.profile, 0, 0))
    return changed


@pytest.mark.parametrize("estimator", ["base", "bootstrap"])
def test_an_adapter_does_not_depend_on_what_others_wrote(tmp_path, estimator):
    args = config(tmp_path, estimator=estimator)
    adapters = []
    for others in (pairs_of(0), other_texts(pairs_of(0))):
        jobs = [UserJob("other", others), UserJob("mine", pairs_of(1)), UserJob("third", others)]
        results = run(engine(args, 3), jobs)
        adapters.append((results["mine"].adapter, results["other"].adapter))
    assert all(torch.equal(adapters[0][0][key], tensor) for key, tensor in adapters[1][0].items())
    assert not all(torch.equal(adapters[0][1][key], tensor) for key, tensor in adapters[1][1].items())


def poisoned(seed_state):
    return {key: tensor.clone().fill_(math.nan) if "lora_A" in key else tensor for key, tensor in seed_state.items()}


def test_a_failing_user_is_dropped_and_reported_and_changes_nobody(tmp_path, exact):
    args = config(tmp_path, estimator="uniform")
    jobs = [UserJob("bad", pairs_of(0)), UserJob("mine", pairs_of(1)), UserJob("next", [])]
    calm = run(engine(args, 2, dtype=torch.float64), jobs)
    assert isinstance(calm["next"].error, DataError)
    failing = engine(args, 2, dtype=torch.float64)
    fresh = failing.model.fresh(args.seed)
    jobs = [
        UserJob("bad", pairs_of(0), adapter=poisoned(fresh)),  # its first loss is nan
        UserJob("mine", pairs_of(1)),
    ]
    results = run(failing, jobs)
    error = results["bad"].error
    assert isinstance(error, NonFiniteLossError)
    assert "The loss is nan at step 1" in str(error)
    assert "row " in str(error)
    assert "user0" in str(error)
    assert "user1" not in str(error)
    assert results["bad"].adapter == {}
    assert results["mine"].error is None
    # The batch is smaller once the other has left, so equal to rounding, not to the bit.
    for key, tensor in calm["mine"].adapter.items():
        torch.testing.assert_close(results["mine"].adapter[key], tensor, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_failure_midway_leaves_others_bit_identical_where_the_slot_is_refilled(tmp_path, monkeypatch, dtype):
    if dtype == torch.float64:
        monkeypatch.setattr("perce_lite.fleet.slot_trainer.training_forward", exact_head)
    args = config(tmp_path, estimator="uniform", max_steps=6, train_sampling_strategy="sequential")

    def adapters(fails_at):
        training = engine(args, 2, dtype=dtype)
        step, losses = 0, training._losses

        def spoiled(trainings, batch):
            nonlocal step
            step += 1
            found = losses(trainings, batch)
            return [found[0] * math.nan, *found[1:]] if step == fails_at else found

        monkeypatch.setattr(training, "_losses", spoiled)
        # Four rows in batches of two: the refilled slot meets the shapes that the failed one would have met.
        same = pairs_of(0, 1) * 4
        return run(training, [UserJob("first", same), UserJob("mine", pairs_of(1, 4)), UserJob("second", same)])

    calm, shaken = adapters(None), adapters(3)
    assert calm["first"].error is None
    assert isinstance(shaken["first"].error, NonFiniteLossError)
    assert "at step 3" in str(shaken["first"].error)
    assert shaken["first"].steps == 2
    for key, tensor in calm["mine"].adapter.items():
        assert torch.equal(shaken["mine"].adapter[key], tensor), key
    # The one that came into the spoiled slot trains as if nothing had been there before, here in other company: in
    # float32 that is another rounding, which some steps of Adam make larger.
    for key, tensor in calm["second"].adapter.items():
        tolerance = 1e-9 if dtype == torch.float64 else 1e-3
        torch.testing.assert_close(shaken["second"].adapter[key], tensor, rtol=0, atol=tolerance)


def test_a_gradient_that_is_not_finite_drops_its_user_before_the_step(tmp_path, monkeypatch):
    hand = SlotModel.hand_gradients
    calls = []

    def spoiled(self, slot, parameters):
        hand(self, slot, parameters)
        calls.append(slot)
        if slot == 0 and calls.count(0) == 2:
            parameters[0].grad[0, 0] = math.inf

    args = config(tmp_path, gradient_accumulation_steps=2)
    jobs = [UserJob("bad", pairs_of(0)), UserJob("mine", pairs_of(1))]
    calm = run(engine(args, 2), jobs)["mine"]
    monkeypatch.setattr(SlotModel, "hand_gradients", spoiled)
    results = run(engine(args, 2), jobs)
    assert isinstance(results["bad"].error, NonFiniteLossError)
    assert "The gradient's norm is inf at step 2" in str(results["bad"].error)
    assert results["bad"].steps == 1
    assert results["mine"].log[:2] == calm.log[:2]
    assert results["mine"].error is None


def test_slots_are_refilled_until_all_users_are_done(tmp_path, exact):
    args = config(tmp_path, estimator="uniform")
    jobs = [UserJob(f"user{user}", pairs_of(user, 3), steps=1 + user % 3, seed=user) for user in range(5)]
    order = []
    two = engine(args, 2, dtype=torch.float64)
    two.run(iter(jobs), lambda result: order.append(result.user))
    assert sorted(order) == [job.user for job in jobs]
    assert order[0] == "user0"
    results = run(two, jobs)  # an engine can run again
    for job in jobs:
        assert results[job.user].steps == job.steps
        alone = run(engine(args, 1, dtype=torch.float64), [job])[job.user]
        for key, tensor in alone.adapter.items():
            torch.testing.assert_close(results[job.user].adapter[key], tensor, rtol=0, atol=1e-9)
    assert not two.model.base.training


def test_training_goes_on_from_a_given_adapter(tmp_path):
    args = config(tmp_path, estimator="base", lr_scheduler_type="constant")
    first = run(engine(args, 1), [UserJob("user0", pairs_of(0))])["user0"]
    second = run(engine(args, 1), [UserJob("user0", pairs_of(0), adapter=first.adapter)])["user0"]
    assert second.log[0]["loss"] < first.log[0]["loss"]


def test_scores_are_shared_with_the_trainer(tmp_path):
    args = config(tmp_path, estimator="base", store=str(tmp_path / "store"))
    trained_by_trainer(args, 0, toy_base())
    assert run(engine(args, 1), [UserJob("user0", pairs_of(0))])["user0"].store_hits == 1


def test_what_the_loop_cannot_do_is_refused(tmp_path):
    with pytest.raises(ConfigError) as caught:
        engine(config(tmp_path, packing=True, neftune_noise_alpha=5.0, optim="galore_adamw"), 2)
    assert [fault.split()[0] for fault in caught.value.faults] == ["packing", "neftune_noise_alpha", "optim"]
