"""The base stays what it was: the counterfactual is the bare base's, and no pass of ours changes a bit of it."""

import bitsandbytes as bnb
import datasets
import pytest
import torch
import toys
from peft import LoraConfig, get_peft_model
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from perce_lite import PerCEConfig, PerCETrainer
from perce_lite.data.pairs import IGNORED
from perce_lite.model.fingerprint import fingerprint, same_base, sketch
from perce_lite.model.scoring import compute_log_probs, no_grad_eval

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def nf4(folder, dtype=torch.float32):
    config = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=dtype)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


def trainer_over(model, tmp_path, **options):
    defaults = {
        "max_length": 512, "per_device_train_batch_size": 2, "max_steps": 3, "learning_rate": 1e-2, "bf16": False,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "gradient_checkpointing": False,
        "logging_steps": 1, "clip_min": 0.1,
    }  # fmt: skip
    return PerCETrainer(
        model,
        PerCEConfig(str(tmp_path / "out"), **{**defaults, **options}),
        train_dataset=datasets.Dataset.from_list(toys.toy_rows()),
        processing_class=toys.toy_tokenizer("chatml"),
        peft_config=None if hasattr(model, "peft_config") else LoraConfig(r=4, target_modules="all-linear"),
    )


def fixed_gradients(trainer, batch):
    trainer.model.train()
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, dict(batch)).backward()
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def alone(model, tokens):
    """Log-probs (R,) of one sequence from full logits of a model without peft."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens.ids]), use_cache=False).logits[0, :-1]
    labels = torch.tensor(tokens.labels[1:])
    mask = labels != IGNORED
    return log_softmax(logits.float(), -1)[mask].gather(1, labels[mask, None])[:, 0]


@pytest.mark.parametrize("quantized", [False, True])
def test_counterfactual_is_the_bare_base_loaded_alone(tmp_path, quantized):
    folder = toys.toy_folder(tmp_path / "toy")
    load = nf4 if quantized else AutoModelForCausalLM.from_pretrained
    trainer = trainer_over(load(folder), tmp_path, estimator="mixed")
    trainer.train()
    bare = load(folder)
    for module in bare.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    assert not isinstance(bare, type(trainer.model))
    for row in trainer.train_dataset:
        index = row["row"][0]
        scored = [
            value
            for value, label in zip(row["counterfactual_log_probs"], row["labels"], strict=True)
            if label != IGNORED
        ]
        expected = alone(bare, trainer.pairs["train"][index].counterfactual)
        torch.testing.assert_close(torch.tensor(scored), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scoring_leaves_a_4_bit_base_and_its_gradients_unchanged(tmp_path, monkeypatch, forced, dtype):
    model = nf4(toys.toy_folder(tmp_path / "toy"), dtype)
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(layers) == 14
    if forced:
        for layer in layers:
            layer.support_avx512bf16_for_cpu = True
    before = fingerprint(model)
    trainer = trainer_over(model, tmp_path, estimator="base", bf16=dtype == torch.bfloat16)
    batch = next(iter(trainer.get_train_dataloader()))
    first = fixed_gradients(trainer, batch)
    assert any(gradient.abs().max() > 0 for gradient in first.values())
    sequences = [pair.counterfactual for pair in trainer.pairs["train"]]
    once, again = {}, {}
    compute_log_probs(trainer.model, sequences, False, trainer.autocast, once.__setitem__)
    second = fixed_gradients(trainer, batch)
    assert fingerprint(trainer.model) == before
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    compute_log_probs(trainer.model, sequences, False, trainer.autocast, again.__setitem__)
    assert once.keys() == again.keys() == set(range(len(sequences)))
    assert all(torch.equal(once[index], again[index]) for index in once)


@pytest.mark.parametrize("estimator", ["base", "mixed", "bootstrap"])
@pytest.mark.parametrize("quantized", [False, True])
def test_base_is_bit_identical_after_training(tmp_path, estimator, quantized):
    folder = toys.toy_folder(tmp_path / "toy")
    model = nf4(folder) if quantized else AutoModelForCausalLM.from_pretrained(folder)
    before = fingerprint(model)
    trainer = trainer_over(model, tmp_path, estimator=estimator)
    trainer.train()
    assert fingerprint(trainer.model) == before
    moved = [p for name, p in trainer.model.named_parameters() if "lora_B" in name and p.abs().max() > 0]
    assert len(moved) == 14, "every layer's adapter is trained"


def test_frozen_restores_modes_and_gradients():
    model = get_peft_model(toys.toy_model("chatml", 600), LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    model.train()
    model.base_model.model.model.layers[0].eval()
    kept = next(name for name, p in model.named_parameters() if "lora_A.default" in name)
    dict(model.named_parameters())[kept].requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    with no_grad_eval(model, adapters=False):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted


def test_fingerprint_sees_one_changed_bit_and_not_the_adapter():
    model = toys.toy_model("chatml", 600)
    before = fingerprint(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    assert fingerprint(adapted) == before
    with torch.no_grad():
        adapted.base_model.model.model.layers[1].mlp.up_proj.base_layer.weight[0, 0] += 1e-3
    assert fingerprint(adapted) != before


def test_sketch_knows_a_base_in_any_dtype_and_no_other(tmp_path):
    model = toys.toy_model("chatml", 600)
    ours = sketch(model)
    assert same_base(ours, sketch(toys.toy_model("chatml", 600, dtype=torch.bfloat16)))
    assert same_base(ours, sketch(nf4(toys.toy_folder(tmp_path / "toy"))))
    assert not same_base(ours, sketch(toys.toy_model("chatml", 600, seed=1)))
    assert not same_base(ours, sketch(toys.toy_model("llama3", 600)))


def test_trained_adapter_of_a_4_bit_base_is_not_rounded_to_bfloat16(tmp_path):
    folder = toys.toy_folder(tmp_path / "toy")
    model = get_peft_model(nf4(folder), LoraConfig(r=4, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    trainer = trainer_over(model, tmp_path)
    ours = {name: p for name, p in trainer.model.named_parameters() if "lora_" in name}
    assert {p.dtype for p in ours.values()} == {torch.float32}
    assert all(torch.equal(before[name], ours[name]) for name in before)
