"""The peak of one real training step, by torch's own record of what it allocates and frees, beside the plan's.

On a CPU, as a GPU would compute: the plan may be a little high, never much too low. The head's tile is made narrow,
since TRL folds it with many copies where there is no Triton.
"""

import pytest
import torch
import trl.trainer.utils
from memory_fixtures import prefix_of, recipe_for, trainer_for, weights
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig

from perce_lite.model import compat, repeated_heads
from perce_lite.model.compat import attention_implementation
from perce_lite.model.fused_head import base_of
from perce_lite.planning import parts as memory
from perce_lite.planning.shapes import shape_of

SIZES = {
    "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 32,
}  # fmt: skip
ASLEEP = {"profile_pass": "frozen", "profile": 4}
CASES = {
    "llama": ("llama", True, {}, True),
    "qwen3, unlike rows": ("qwen3", True, {"per_device_train_batch_size": 2, "words": 6}, True),
    "gemma3": ("gemma3_text", True, {}, True),
    "gemma2": ("gemma2", True, {}, True),
    "llama behind a prefix": ("llama", True, ASLEEP, True),
    "llama behind a prefix without checkpointing": ("llama", False, ASLEEP, True),
    "llama behind a prefix, heads repeated": ("llama", True, ASLEEP, False),
    "llama without checkpointing": ("llama", False, {}, True),
    "llama on a GPU that takes no shared heads": ("llama", True, {}, False),
}


@pytest.mark.parametrize(("kind", "checkpointing", "options", "shared"), CASES.values(), ids=CASES)
def test_peak_of_a_step(tmp_path, monkeypatch, kind, checkpointing, options, shared):
    asked = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cpu": asked(device))  # as peft sees it on a GPU
    monkeypatch.setattr(trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 64)
    for module in (compat, memory):
        monkeypatch.setattr(module, "VOCABULARY_CHUNK_SIZE", 64)
    recipe = recipe_for(tmp_path, kind, SIZES, "r: 8")
    given = {"per_device_train_batch_size": 1, "words": 12, "gradient_checkpointing": checkpointing, **options}
    given |= {"gradient_accumulation_steps": 2}  # the last batch then finds the gradients of the one before
    trainer = trainer_for(recipe, torch.bfloat16, **given)
    if not shared:
        base = base_of(trainer.model)
        behind = attention_implementation(base).startswith("perce_lite_")  # as a GPU's base would be loaded
        base.set_attn_implementation(f"perce_lite_{repeated_heads.NAME}" if behind else repeated_heads.NAME)
    original, found = trainer.training_step, {}

    def watched(model, inputs, *args, **kwargs):
        found.update(inputs)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            loss = original(model, inputs, *args, **kwargs)
        events = [one for one in record.profiler.kineto_results.events() if one.name() == "[memory]"]
        live = found["peak"] = 0
        for event in sorted(events, key=lambda one: one.start_ns()):
            live += event.nbytes()
            found["peak"] = max(found["peak"], live)
        return loss

    trainer.training_step = watched
    trainer.train()
    rows, length = found["input_ids"].shape
    scored = int((found["labels"][:, 1:] != -100).sum()) // rows
    prefix = prefix_of(trainer, found)
    step = memory.Step(rows, prefix + length, scored, prefix, shared=shared)
    counted, shape = weights(recipe, 2), shape_of(AutoConfig.from_pretrained(recipe.model_folder))
    at_work = max(
        memory.layer_at_work(shape, counted, step, checkpointing),
        memory.head_at_work(shape, step) + memory.casts(counted, step),
    )
    estimate = memory.prefixes(shape, step) + memory.saved(shape, counted, step, checkpointing) + at_work
    assert 0.95 * found["peak"] < estimate < 1.15 * found["peak"]
