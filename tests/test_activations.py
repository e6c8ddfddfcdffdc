"""What the plan says a forward saves, against what torch's hooks see in real training: families, shapes, growth."""

import itertools

import pytest
import torch
from memory_fixtures import WIDE, prefix_of, recipe_for, trainer_for, weights, what_is_saved
from transformers import AutoConfig

from perce_lite import PerCETrainer
from perce_lite.model import repeated_heads
from perce_lite.model.fused_head import base_of
from perce_lite.planning import parts as memory
from perce_lite.planning.shapes import FAMILIES, Shape, shape_of
from perce_lite.recipe import Recipe


class Seen(Exception):
    """Ends a training whose forward was looked at."""


def saved_in_training(trainer: PerCETrainer, shared: bool = True) -> tuple[int, memory.Step]:
    """Bytes that the loss of one real step saved, each storage once and parameters left out; and what the batch was."""
    found = {}
    original = trainer.compute_loss

    def watched(model, inputs, **kwargs):
        found["ids"], found["labels"] = inputs["input_ids"], inputs["labels"]
        found["prefix"] = prefix_of(trainer, inputs)
        with what_is_saved(model) as saved:
            loss = original(model, inputs, **kwargs)
        assert loss.requires_grad
        found.update(saved)
        raise Seen

    trainer.compute_loss = watched
    with pytest.raises(Seen):
        trainer.train()
    rows, awake = found["ids"].shape
    scored = int((found["labels"][:, 1:] != -100).sum()) // rows
    itemsize = 2 if trainer.args.bf16 else 4
    prefix = found["prefix"]
    return found["bytes"], memory.Step(rows, prefix + awake, scored, prefix, itemsize, shared=shared)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """peft asks whether autocast is on for CUDA; on a CPU it would copy every input of LoRA."""
    asked = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cpu": asked(device))


def estimate(recipe: Recipe, step: memory.Step, checkpointing: bool = False) -> int:
    return memory.saved(shape(recipe), weights(recipe, step.itemsize), step, checkpointing)


def shape(recipe: Recipe) -> Shape:
    return shape_of(AutoConfig.from_pretrained(recipe.model_folder))


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize(("precision", "checkpointing"), [("float32", False), ("bfloat16", True)])
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


@pytest.mark.parametrize(
    ("kind", "setting"), [*(("llama", one) for one in SETTINGS), ("gemma3_text", "window"), ("qwen3", "the MLP alone")]
)
def test_saved_activations_of_other_shapes(tmp_path, as_on_a_gpu, kind, setting):
    sizes, lora, options = SETTINGS[setting]
    recipe = recipe_for(tmp_path, kind, sizes, lora)
    trainer = trainer_for(recipe, torch.bfloat16, **{"per_device_train_batch_size": 1, **options})
    measured, step = saved_in_training(trainer)
    assert estimate(recipe, step) == pytest.approx(measured, rel=0.1 if setting == "dropout" else 0.03)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_saved_where_heads_are_repeated(tmp_path, as_on_a_gpu, kind):
    """What a GPU saves whose fused attention takes no shared heads."""
    recipe = recipe_for(tmp_path, kind, {})
    trainer = trainer_for(recipe, torch.bfloat16, words=6, per_device_train_batch_size=1)
    base_of(trainer.model).set_attn_implementation(repeated_heads.NAME)
    measured, step = saved_in_training(trainer, shared=False)
    assert estimate(recipe, step) == pytest.approx(measured, rel=0.03)


ASLEEP = {
    "llama, bf16": ("llama", "r: 4", torch.bfloat16, {}),
    "llama, checkpointed": ("llama", "r: 4", torch.bfloat16, {"gradient_checkpointing": True}),
    "qwen3, unlike rows": ("qwen3", "r: 8", torch.float32, {"per_device_train_batch_size": 4}),
    "gemma2, eager": ("gemma2", "r: 4", torch.bfloat16, {}),
    "gemma3, two projections": ("gemma3_text", "r: 8, target_modules: [q_proj, v_proj]", torch.bfloat16, {}),
    "llama, the MLP alone": ("llama", "r: 8, target_modules: [gate_proj, up_proj, down_proj]", torch.float32, {}),
}


@pytest.mark.parametrize(("kind", "lora", "dtype", "options"), ASLEEP.values(), ids=ASLEEP)
def test_saved_behind_a_prefix(tmp_path, as_on_a_gpu, kind, lora, dtype, options):
    """`profile_pass: frozen`: what follows the prefix alone is saved, so a profile six times as long saves no more."""
    recipe = recipe_for(tmp_path, kind, {}, lora)
    given = {"profile_pass": "frozen", "per_device_train_batch_size": 1, "words": 3, **options}
    checkpointing = given.get("gradient_checkpointing", False)
    seen = []
    for profile in (1, 6):
        measured, step = saved_in_training(trainer_for(recipe, dtype, profile=profile, **given))
        told = estimate(recipe, step, checkpointing)
        assert told == pytest.approx(measured, rel=0.05)
        seen.append((step, measured, told))
    (short, first, told_first), (long, second, told_second) = seen
    assert long.prefix > 3 * short.prefix > 50
    assert long.length - long.prefix == short.length - short.prefix
    assert second == pytest.approx(first, rel=0.01)
    assert told_second == told_first
    facts = shape(recipe)
    assert memory.prefixes(facts, long) / memory.prefixes(facts, short) == long.prefix / short.prefix


def test_growth(tmp_path):
    recipe = recipe_for(tmp_path, "llama", {"num_hidden_layers": 4})
    counted, facts = weights(recipe, 2), shape(recipe)

    def at(rows=1, length=512, prefix=0, checkpointing=False, shared=True):
        return memory.saved(facts, counted, memory.Step(rows, length, 64, prefix, shared=shared), checkpointing)

    casts = 2 * counted.elements(1)
    assert at(rows=2) - casts == pytest.approx(2 * (at() - casts), rel=0.02)
    assert at(length=1024) - casts == pytest.approx(2 * (at() - casts), rel=0.02)
    assert at(length=2048, shared=False) - casts == pytest.approx(2 * (at(length=1024, shared=False) - casts), rel=0.02)
    assert at(shared=False) > 1.05 * at()
    steps = [at(prefix=prefix) for prefix in (128, 256, 384)]
    assert at() > steps[0] > steps[1] > steps[2]
    assert steps[0] - steps[1] == pytest.approx(steps[1] - steps[2], rel=0.01)
    assert at(checkpointing=True) < 0.2 * at()
    tail = 4 * 64 * 512
    assert at(checkpointing=True) - tail == pytest.approx(4 * 64 * 2 * 512, rel=0.1)
    assert all(one < two for one, two in itertools.pairwise(at(length=length) for length in range(100, 1000, 100)))
