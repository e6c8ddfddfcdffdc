"""The loss against an independent computation in float64 from full logits, and against plain SFT."""

from contextlib import contextmanager

import datasets
import pytest
import torch
import toys
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch.nn.functional import log_softmax
from trl import SFTConfig, SFTTrainer

from perce_lite.data.pairs import IGNORED

ESTIMATORS = ("base", "mixed", "bootstrap", "uniform")
WEIGHTINGS = ("clip", "additive")


def stir(model, seed=3):
    """Gives the adapter weights that are not zero, so that on and off differ."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.05


def reference_model(trainer, family="chatml"):
    """The trainer's model made anew, in float64, with plain peft and no fused head."""
    fresh = toys.toy_model(family, len(trainer.processing_class)).double()
    fresh = get_peft_model(fresh, LoraConfig(r=4, target_modules="all-linear"))
    fresh.load_state_dict({name: value.double() for name, value in trainer.model.state_dict().items()})
    return fresh.eval()


@contextmanager
def adapters_off_until(model, prefix):
    """The adapters of `model` do nothing at the first `prefix` positions of one whole forward."""

    def masked(layer, inputs, output):
        awake = torch.arange(output.shape[1])[None, :, None] >= prefix
        bare = layer.base_layer(inputs[0])
        return bare + awake * (output - bare)

    hooks = [one.register_forward_hook(masked) for one in model.modules() if isinstance(one, LoraLayer)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def scored_log_probs(model, tokens):
    """Log-probs (R,) in float64 of one sequence, alone, from full logits."""
    with adapters_off_until(model, tokens.prefix_length):
        logits = model(input_ids=torch.tensor([tokens.ids])).logits[0, :-1]
    labels = torch.tensor(tokens.labels[1:])
    mask = labels != IGNORED
    return log_softmax(logits.double(), -1)[mask].gather(1, labels[mask, None])[:, 0]


def reference_loss(model, pairs, args, total):
    """-(1/total) sum of clip(PIR) log P, written out row by row from the formulas of the method."""
    loss = torch.zeros((), dtype=torch.float64)
    for pair in pairs:
        factual = scored_log_probs(model, pair.factual)
        with torch.no_grad(), model.disable_adapter():
            off = {
                "factual": scored_log_probs(model, pair.factual),
                "twin": scored_log_probs(model, pair.counterfactual),
            }
        with torch.no_grad():
            twin_on = scored_log_probs(model, pair.counterfactual)
        pir = {
            "base": off["factual"] - off["twin"],
            "mixed": factual.detach() - off["twin"],
            "bootstrap": factual.detach() - twin_on,
        }.get(args.estimator)
        weight = torch.ones_like(factual)
        if pir is not None and args.weighting == "additive":
            weight = 1 + args.strength * pir.clamp(min=0).clamp(max=args.clip_max)
        elif pir is not None:
            weight = pir.clamp(args.clip_min, args.clip_max)
        trained = factual if args.train_on == "factual" else scored_log_probs(model, pair.counterfactual)
        loss = loss - (weight * trained).sum() / total
    return loss


def rows_of(batch):
    return sorted({int(one) for one in batch["row"].flatten() if one >= 0})


def gradients(model):
    return {name: p.grad.double().clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("estimator", ["base", "bootstrap"])
def test_each_weighting_equals_float64(toy_trainer, estimator, weighting):
    check_against_float64(toy_trainer, estimator, "accumulated", "full", weighting=weighting, strength=0.7)


@pytest.mark.parametrize("profile_pass", ["full", "frozen"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("how", ["padded", "accumulated", "checkpointed", "packed"])
def test_loss_and_gradients_equal_float64(toy_trainer, estimator, how, profile_pass):
    check_against_float64(toy_trainer, estimator, how, profile_pass)


def check_against_float64(toy_trainer, estimator, how, profile_pass, **more):
    options = {
        "padded": {},
        "accumulated": {"gradient_accumulation_steps": 2},
        "checkpointed": {"gradient_checkpointing": True},
        "packed": {"packing": True, "max_length": 400, "per_device_train_batch_size": 1},
    }[how]
    trainer = toy_trainer(estimator=estimator, profile_pass=profile_pass, **options, **more)
    stir(trainer.model)
    reference = reference_model(trainer)
    trainer.model.train()
    batches = list(trainer.get_train_dataloader())[: 2 if how == "accumulated" else 1]
    if how == "packed":
        assert len(rows_of(batches[0])) > 1, "a packed row that holds one row tests nothing"
    if how == "padded":
        assert (batches[0]["attention_mask"] == 0).any()
    indices = [index for batch in batches for index in rows_of(batch)]
    total = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
    trainer.current_gradient_accumulation_steps = len(batches)
    losses = []
    for batch in batches:
        loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=total)
        loss.backward()
        losses.append(float(loss))
    expected = reference_loss(reference, [trainer.pairs["train"][index] for index in indices], trainer.args, total)
    expected.backward()
    assert sum(losses) == pytest.approx(float(expected), rel=2e-5)
    ours, theirs = gradients(trainer.model), gradients(reference)
    assert ours.keys() == theirs.keys()
    assert any(one.abs().max() > 1e-4 for one in theirs.values())
    for name in theirs:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=2e-3, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_counterfactual_training_uses_the_same_weights_without_the_profile(toy_trainer):
    trainer = toy_trainer(estimator="base", train_on="counterfactual")
    stir(trainer.model)
    reference = reference_model(trainer)
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    pairs = [trainer.pairs["train"][index] for index in rows_of(batch)]
    assert batch["input_ids"].shape[1] == max(len(pair.counterfactual.ids) for pair in pairs)
    total = int((batch["labels"] != IGNORED).sum())
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=total)
    assert float(loss) == pytest.approx(float(reference_loss(reference, pairs, trainer.args, total)), rel=2e-5)


@pytest.mark.parametrize("profile_pass", ["full", "frozen"])
@pytest.mark.parametrize("family", ["llama3", "gemma", "qwen3"])
def test_other_families(toy_trainer, family, profile_pass):
    trainer = toy_trainer(family=family, estimator="bootstrap", profile_pass=profile_pass)
    stir(trainer.model)
    reference = reference_model(trainer, family)
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    pairs = [trainer.pairs["train"][index] for index in rows_of(batch)]
    total = int((batch["labels"] != IGNORED).sum())
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=total)
    assert float(loss) == pytest.approx(float(reference_loss(reference, pairs, trainer.args, total)), rel=5e-5)


def test_shuffled_has_the_base_weights_in_another_order(toy_trainer):
    base, shuffled = (toy_trainer(estimator=name, prepared=True) for name in ("base", "shuffled"))
    moved = 0
    for one, other in zip(base.train_dataset, shuffled.train_dataset, strict=True):
        scored = [i for i, label in enumerate(one["labels"]) if label != IGNORED]
        pirs = [
            [round(row["factual_log_probs"][i] - row["counterfactual_log_probs"][i], 6) for i in scored]
            for row in (one, other)
        ]
        assert sorted(pirs[0]) == sorted(pirs[1])
        moved += pirs[0] != pirs[1]
    assert moved == len(base.train_dataset)


@pytest.mark.parametrize("estimator", ["base", "mixed", "bootstrap", "shuffled"])
def test_mean_normalization_is_a_constant_of_the_data_set(toy_trainer, estimator):
    trainer = toy_trainer(estimator=estimator, weighting="clip", normalize_weights="mean", prepared=True)
    plain = toy_trainer(estimator="base", prepared=True)
    pirs = [
        row["factual_log_probs"][i] - row["counterfactual_log_probs"][i]
        for row in plain.train_dataset
        for i, label in enumerate(row["labels"])
        if label != IGNORED
    ]
    mean = sum(min(max(pir, 0.1), 3.0) for pir in pirs) / len(pirs)
    assert trainer.weight_scale == pytest.approx(1 / mean, rel=1e-5)


@pytest.mark.parametrize("packing", [False, True])
def test_weights_of_one_are_plain_sft(toy_trainer, tmp_path, packing):
    # SGD: Adam divides by the size of a gradient, and makes much of the last bits of a small one.
    shared = {"max_steps": 2, "packing": packing, "train_sampling_strategy": "sequential", "optim": "sgd"}
    ours = toy_trainer(weighting="clip", clip_min=1.0, clip_max=1.0, gradient_accumulation_steps=2, **shared)
    tokenizer = toys.toy_tokenizer("chatml")
    pairs = ours.pairs["train"]
    plain = SFTTrainer(
        toys.toy_model("chatml", len(tokenizer)),
        SFTConfig(
            str(tmp_path / "plain"), max_length=512, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            learning_rate=1e-2, lr_scheduler_type="constant", report_to="none", bf16=False, save_strategy="no",
            disable_tqdm=True, gradient_checkpointing=False, use_cpu=True, **shared,
        ),
        train_dataset=datasets.Dataset.from_dict(
            {"input_ids": [p.factual.ids for p in pairs], "labels": [p.factual.labels for p in pairs]}
        ),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )  # fmt: skip
    steps = {}
    for name, trainer in (("ours", ours), ("plain", plain)):
        trainer.train()
        steps[name] = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        assert len(steps[name]) == 2 or name == "plain"
    assert float(steps["ours"][0]) > 0
    theirs = dict(plain.model.named_parameters())
    for name, parameter in ours.model.named_parameters():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-5, atol=1e-7)
    changed = [p for name, p in ours.model.named_parameters() if "lora_B" in name and p.abs().max() > 0]
    assert changed, "nothing was trained"


def test_evaluation_loss_is_unweighted(toy_trainer):
    rows = toys.toy_rows()
    held_out = datasets.Dataset.from_list(rows[:5])
    trainer = toy_trainer(eval_dataset=held_out, per_device_eval_batch_size=2)
    stir(trainer.model)
    reference = reference_model(trainer)
    with torch.no_grad():
        losses = [-scored_log_probs(reference, pair.factual) for pair in trainer.pairs["eval"]]
    by_batch = [torch.cat(losses[i : i + 2]).mean() for i in range(0, 5, 2)]
    expected = sum(float(loss) * n for loss, n in zip(by_batch, (2, 2, 1), strict=True)) / 5
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)
    assert trainer.evaluate(eval_dataset=held_out)["eval_loss"] == pytest.approx(expected, rel=1e-4)
