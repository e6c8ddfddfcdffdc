"""A step of real models' shapes, four layers of each: live bytes beside the plan, waits, copies, attention kernels."""

import math

import pytest
import torch

from imitated_card.runs import step_of_shape
from perce_lite.evaluation.bench.imitation.libraries import imitated
from perce_lite.model.adapters import all_finite

T4 = {"capability": (7, 5)}
OFFLOADED = {"activation_offloading": True, "gradient_checkpointing": False}
PACKED = {"lengths": (1024, 1024), "max_length": 2048, "per_device_train_batch_size": 1, "packing": True}
WINDOW = {"lengths": (2048, 2048), "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
FLASH, EFFICIENT = "flash", "memory-efficient"

SHAPES = {
    "8B": ({}, FLASH),
    "8B, two unlike rows": ({"lengths": (2048, 1500)}, FLASH),
    "8B, a window of two batches": (WINDOW, FLASH),
    "8B, packed": (PACKED, f"{EFFICIENT} with a mask"),
    "8B without Triton": ({"card": {"triton": False}}, FLASH),
    "8B, table on the host": ({"hosted": True}, FLASH),
    "8B, nothing computed again": ({"gradient_checkpointing": False}, FLASH),
    "8B, offloaded": (OFFLOADED, FLASH),
    "Gemma 3, sliding windows": ({"shape": "Gemma-3-4B"}, f"{EFFICIENT} with a mask"),
    "Qwen3 on a T4": ({"shape": "Qwen3-4B", "lengths": (4096,), "card": T4}, EFFICIENT),
}
"""What is trained, and the attention kernel that runs."""


@pytest.mark.parametrize("name", SHAPES)
def test_live_bytes_are_those_of_the_plan(tmp_path, name):
    options, kernel = SHAPES[name]
    step = step_of_shape(tmp_path, **options)
    assert step.planned_made == pytest.approx(step.made, rel=0.01)
    assert step.scoring <= 1.03 * step.planned_scoring
    if (
        len(set(options.get("lengths", (2048,)))) == 1 and "packing" not in options
    ):  # the plan takes all rows of a batch to be as long as the longest
        assert step.planned_scoring == pytest.approx(step.scoring, rel=0.03)
    assert step.planned_peak == pytest.approx(step.peak, rel=0.03)
    assert set(step.attention) == {kernel}


def test_a_step_seldom_waits_for_the_card(tmp_path):
    """bitsandbytes waits after each of its tensors; everything else reads a few numbers a step."""
    waits, copies = [], []
    for layers in (2, 3):
        step = step_of_shape(tmp_path / str(layers), layers=layers, lengths=(256,))
        optimizer = sum(count for place, count in step.places.items() if "bitsandbytes/optim" in place)
        assert optimizer == 14 * layers
        waits.append(step.counts["synchronisations"] - optimizer)
        copies.append(step.counts["copies to the card"] + step.counts["copies to the host"])
    assert waits[0] == waits[1] <= 16
    assert copies[0] == copies[1] <= 1


def test_finite_weights_are_asked_for_once():
    with imitated() as card:
        tensors = [torch.zeros(3, device="cuda") for _ in range(5)]
        assert all_finite(tensors)
        tensors[3][1] = math.inf
        assert not all_finite(tensors)
        assert card.counts["synchronisations"] == 2


def test_torchs_own_optimizer_never_waits(tmp_path):
    step = step_of_shape(tmp_path, layers=2, lengths=(256,), optim="adamw_torch_fused")
    assert step.counts["synchronisations"] <= 16
