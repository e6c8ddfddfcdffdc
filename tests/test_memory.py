"""What the plan counts, against real toy models of every family in training: exact where it can be, else within 10 %."""

import contextlib
import itertools
from pathlib import Path

import bitsandbytes as bnb
import datasets
import pytest
import torch
import toys
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

from perce_lite import PerCEConfig, PerCETrainer, memory
from perce_lite.models import load_base, with_adapter
from perce_lite.recipe import Recipe, load_recipe
from perce_lite.shapes import FAMILIES, shape_of

TOKENIZERS = {"qwen2": "qwen3", "qwen3": "qwen3", "gemma2": "gemma", "gemma3_text": "gemma"}
SMALL = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16, "max_position_embeddings": 2048,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "tie_word_embeddings": True,
}  # fmt: skip
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8}


def recipe_for(folder: Path, kind: str, shape: dict, lora: str = "r: 4", quantization: str = "nf4") -> Recipe:
    """A recipe over a random model of the family, saved to `folder`."""
    tokenizer = toys.toy_tokenizer(TOKENIZERS.get(kind, "chatml"))
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **{**SMALL, **shape})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    path = folder / "mine.yaml"
    path.write_text(
        f"model: model\nquantization: {quantization}\ndtype: float32\ndevice: cpu\ndata: {{path: rows.jsonl}}\n"
        f"lora: {{{lora}}}\n"
    )
    return load_recipe(path)


def trainer_for(recipe: Recipe, dtype=torch.float32, words: int = 1, **options) -> PerCETrainer:
    """The trainer over the recipe's model as a GPU would hold it: what stays unquantised in the compute dtype."""
    base = load_base(recipe)
    for module in base.model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype = dtype
    for parameter in base.model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    rows = [{**row, "completion": row["completion"] * words} for row in toys.toy_rows(users=1, per_user=4)]
    defaults = {"max_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "max_length": 4096,
                "estimator": "uniform", "gradient_checkpointing": False}  # fmt: skip
    return PerCETrainer(
        with_adapter(base.model, recipe),
        PerCEConfig(str(recipe.output_dir), **{**defaults, "bf16": dtype == torch.bfloat16, **options}),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=base.tokenizer,
    )


class Seen(Exception):
    """Ends a training whose forward was looked at."""


def saved_in_training(trainer: PerCETrainer, flash: bool = True) -> tuple[int, memory.Step]:
    """Bytes that the loss of one real step saved, each storage once and parameters left out; and what the batch was."""
    found = {}
    original = trainer.compute_loss

    def watched(model, inputs, **kwargs):
        parameters = {one.untyped_storage().data_ptr() for one in model.parameters()}
        storages, alive = {}, []

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                storages[storage.data_ptr()] = storage.nbytes()
                alive.append(tensor)  # so that no storage takes the place of another
            return tensor

        found["ids"], found["labels"], found["mask"] = inputs["input_ids"], inputs["labels"], inputs["attention_mask"]
        kernel = contextlib.nullcontext() if flash else sdpa_kernel(SDPBackend.MATH)
        with kernel, torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one):
            loss = original(model, inputs, **kwargs)
        assert loss.requires_grad
        found["bytes"] = sum(storages.values())
        raise Seen

    trainer.compute_loss = watched
    with pytest.raises(Seen):
        trainer.train()
    rows, length = found["ids"].shape
    scored = int((found["labels"][:, 1:] != -100).sum()) // rows
    padded = not bool(found["mask"].all())
    itemsize = 2 if trainer.args.bf16 else 4
    return found["bytes"], memory.Step(rows, length, scored, itemsize=itemsize, padded=padded, flash=flash)


class Gradients(TrainerCallback):
    """Adds up the gradients ahead of the optimizer's step; afterwards they are gone."""

    def __init__(self, trainer: PerCETrainer) -> None:
        trainer.add_callback(self)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.bytes = size_of([one.grad for one in model.parameters() if one.grad is not None])


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """peft asks whether autocast is on for CUDA; on a CPU it would copy every input of LoRA."""
    asked = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cpu": asked(device))


def estimate(recipe: Recipe, step: memory.Step, checkpointing: bool = False) -> int:
    config = AutoConfig.from_pretrained(recipe.model_folder)
    weights = memory.weights_of(config, recipe, step.itemsize)
    return memory.saved(shape_of(config), weights, step, checkpointing)


@pytest.mark.parametrize(("kind", "quantization"), [*((kind, "nf4") for kind in FAMILIES), ("llama", "none")])
def test_weights_gradients_and_optimizer_state_are_exact(tmp_path, kind, quantization):
    """In bytes of real tensors, each storage once: a toy is loaded, trained for a step, and looked at."""
    recipe = recipe_for(tmp_path, kind, WIDE, "r: 12", quantization)
    weights = memory.weights_of(AutoConfig.from_pretrained(recipe.model_folder), recipe, 4)
    trainer = trainer_for(recipe, optim="adamw_torch")
    seen = Gradients(trainer)
    trainer.train()
    model = trainer.model
    in_4_bit = [one for one in model.modules() if isinstance(one, bnb.nn.Linear4bit)]
    assert (len(in_4_bit) > 0) == (quantization == "nf4")
    constants = [one.weight.quant_state for one in in_4_bit]
    quantised = [
        tensor
        for layer, state in zip(in_4_bit, constants, strict=True)
        for tensor in (layer.weight, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    ]
    assert weights.base == size_of(quantised)
    weights_in_4_bit = {id(one.weight) for one in in_4_bit}
    whole = [one for one in model.parameters() if not one.requires_grad and id(one) not in weights_in_4_bit]
    assert weights.unquantized == size_of([*whole, *model.buffers()])
    trained = [one for one in model.parameters() if one.requires_grad]
    assert 4 * weights.elements == size_of(trained) == seen.bytes
    assert sorted(weights.trained) == sorted(one.numel() for one in trained)
    assert memory.optimizer_bytes(weights.trained, "adamw_torch") == size_of(states(trainer))


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_state_of_8_bit_optimizers_is_exact(tmp_path, optim):
    """Ranks of which some matrices have fewer than 4,096 elements, and some no whole number of blocks."""
    recipe = recipe_for(tmp_path, "llama", {**WIDE, "intermediate_size": 264}, "r: 17")
    weights = memory.weights_of(AutoConfig.from_pretrained(recipe.model_folder), recipe, 4)
    assert min(weights.trained) < 4096 < max(weights.trained)
    assert any(one % 256 for one in weights.trained if one > 4096)
    trainer = trainer_for(recipe, optim=optim)
    trainer.train()
    assert memory.optimizer_bytes(weights.trained, optim) == size_of(states(trainer))


def states(trainer: PerCETrainer) -> list[torch.Tensor]:
    kept = trainer.optimizer.optimizer.state.values()
    return [one for state in kept for one in state.values() if isinstance(one, torch.Tensor)]


def size_of(tensors: list[torch.Tensor]) -> int:
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize(("precision", "checkpointing"), [("float32", False), ("bfloat16", False), ("bfloat16", True)])
def test_saved_activations(tmp_path, as_on_a_gpu, kind, precision, checkpointing):
    recipe = recipe_for(tmp_path, kind, WIDE if checkpointing else {})
    trainer = trainer_for(recipe, getattr(torch, precision), gradient_checkpointing=checkpointing,
                          per_device_train_batch_size=1 + checkpointing)  # fmt: skip
    measured, step = saved_in_training(trainer)
    assert estimate(recipe, step, checkpointing) == pytest.approx(measured, rel=0.03)


SETTINGS = {
    "long": ({}, "r: 4", {"words": 8}),
    "batch of unlike rows": ({}, "r: 4", {"words": 3, "per_device_train_batch_size": 4}),
    "high rank": ({}, "r: 32", {}),
    "deep and wide": (WIDE, "r: 8", {}),
    "two projections": ({}, "r: 8, target_modules: [q_proj, v_proj]", {}),
    "the MLP alone": ({}, "r: 8, target_modules: [gate_proj, up_proj, down_proj]", {}),
    "window": ({"sliding_window": 64}, "r: 4", {"words": 4}),
    "dropout": ({}, "r: 4, lora_dropout: 0.1", {}),
}


@pytest.mark.parametrize(("shape", "lora", "options"), SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_saved_activations_of_other_shapes(tmp_path, as_on_a_gpu, kind, shape, lora, options):
    recipe = recipe_for(tmp_path, kind, shape, lora)
    measured, step = saved_in_training(trainer_for(recipe, torch.bfloat16, **{"per_device_train_batch_size": 1, **options}))
    assert estimate(recipe, step) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_saved_by_plain_attention(tmp_path, as_on_a_gpu, kind):
    """What a card without fused attention saves."""
    recipe = recipe_for(tmp_path, kind, {})
    trainer = trainer_for(recipe, torch.bfloat16, words=6, per_device_train_batch_size=1)
    measured, step = saved_in_training(trainer, flash=False)
    assert estimate(recipe, step) == pytest.approx(measured, rel=0.1)


def test_growth(tmp_path):
    recipe = recipe_for(tmp_path, "llama", {"num_hidden_layers": 4})
    config = AutoConfig.from_pretrained(recipe.model_folder)
    shape, weights = shape_of(config), memory.weights_of(config, recipe, 2)

    def at(rows=1, length=512, prefix=0, checkpointing=False, flash=True):
        return memory.saved(shape, weights, memory.Step(rows, length, 64, prefix, flash=flash), checkpointing)

    casts = 2 * weights.elements
    assert at(rows=2) - casts == pytest.approx(2 * (at() - casts), rel=0.02)
    assert at(length=1024) - casts == pytest.approx(2 * (at() - casts), rel=0.02)
    assert at(length=2048, flash=False) > 3.5 * at(length=1024, flash=False)
    steps = [at(prefix=prefix) for prefix in (0, 128, 256)]
    assert steps[0] > steps[1] > steps[2]
    assert steps[0] - steps[1] == pytest.approx(steps[1] - steps[2], rel=0.01)
    assert at(checkpointing=True) < 0.2 * at()
    tail = 4 * 64 * 512
    assert at(checkpointing=True) - tail == pytest.approx(4 * 64 * 2 * 512, rel=0.1)
    assert all(one < two for one, two in itertools.pairwise(at(length=length) for length in range(100, 1000, 100)))
