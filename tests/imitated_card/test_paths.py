"""Every path of training on an imitated card: no mismatch of devices or dtypes, and the attention kernel it takes."""

import math

import pytest
import torch
from fleet_fixtures import rows_of

from imitated_card.runs import toy_recipe, train
from perce_lite.evaluation.bench import gpumeasuring, gpureport
from perce_lite.evaluation.bench.gpureport import gpu_report, markdown, planned_parts
from perce_lite.evaluation.bench.imitation.card import GIB
from perce_lite.evaluation.bench.imitation.libraries import imitated
from perce_lite.fleet.capacity import optimizer_of
from perce_lite.fleet.engines.slots import engine_for
from perce_lite.fleet.fleet import fleet
from perce_lite.recipe import with_train
from perce_lite.training.trainer import PerCETrainer

T4 = {"capability": (7, 5)}
FLASH, MASKED = "flash", "memory-efficient with a mask"

PATHS = {
    "base": ("chatml", [], {}, {FLASH}),
    "bootstrap": ("chatml", ["train.estimator=bootstrap"], {}, {FLASH}),
    "frozen and packed": ("chatml", ["train.profile_pass=frozen", "train.packing=true"], {}, {FLASH, MASKED}),
    "offloaded": ("chatml", ["train.activation_offloading=true", "train.gradient_checkpointing=false"], {}, {FLASH}),
    "without Triton": ("chatml", [], {"triton": False}, {FLASH}),
    "unquantised, DoRA, eager attention": ("gemma", ["quantization=none", "lora.use_dora=true"], {}, set()),
    "T4, a scaler, table on the host": (
        "llama3",
        ["embedding_on_host=true", "train.max_steps=5"],
        T4,
        {"memory-efficient"},
    ),
}
"""Model family, overrides, options of the card, attention kernels that run."""


@pytest.mark.parametrize("path", PATHS)
def test_a_path_trains(tmp_path, path):
    family, more, options, kernels = PATHS[path]
    recipe = toy_recipe(tmp_path, family, more)
    with imitated(**options) as card:
        losses = train(recipe)
    assert all(map(math.isfinite, losses.values()))
    assert losses["adapter"] != losses["base"]
    assert set(card.attention_kernels()) == kernels


def test_a_resumed_run_ends_where_one_without_a_break_does(tmp_path):
    recipe = toy_recipe(tmp_path, more=["train.max_steps=4", "train.save_steps=2"])
    stopped = with_train(recipe, "stopped", [f"output_dir={tmp_path / 'stopped'}"])
    save = PerCETrainer._save_checkpoint

    def save_and_stop(*args):
        save(*args)
        raise KeyboardInterrupt

    with imitated():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PerCETrainer, "_save_checkpoint", save_and_stop)
            with pytest.raises(KeyboardInterrupt):
                train(stopped)
        assert train(stopped) == train(recipe)


def test_four_users_train_at_once(tmp_path):
    more = ["train.max_steps=2", "train.warmup_steps=0", "fleet.min_examples=4", "fleet.gate=null", "fleet.slots=4"]
    recipe = toy_recipe(tmp_path, more=[*more, "fleet.init_from=none", "train.estimator=bootstrap"], rows=rows_of(4))
    with imitated() as card:
        result = fleet(recipe, engine_for)
    assert (result.trained, result.failed) == (4, 0)
    assert set(card.attention_kernels()) == {FLASH}
    assert not any("bitsandbytes/optim" in place for place in card.places)  # torch's fused AdamW had room


def test_users_at_once_take_torchs_optimizer_where_it_has_room(tmp_path):
    recipe = toy_recipe(tmp_path, more=["fleet.slots=4"])
    named = toy_recipe(tmp_path, more=["train.optim=adamw_8bit"])
    with imitated() as card:
        assert optimizer_of(recipe, 4) == "adamw_torch_fused"
        assert optimizer_of(named, 4) is None
        others = torch.empty(card.memory - GIB // 256, dtype=torch.uint8, device="cuda")
        assert optimizer_of(recipe, 4) is None
        del others
    assert optimizer_of(recipe, 4) is None  # a CPU


def test_the_gpu_report_fills_its_tables(monkeypatch):
    monkeypatch.setattr(gpureport, "USERS", (2,))
    for module in (gpureport, gpumeasuring):
        monkeypatch.setattr(module, "SPEED", ("sft", "base", "mixed"))
    with imitated():
        report = gpu_report("toy", length=96, steps=1, warmup=1, repeats=1, planned=planned_parts)
    assert report["card_bytes"] == 12 * GIB
    assert {part for found in report["memory"].values() for part in found} == set(gpureport.PARTS)
    for column in [*report["memory"].values(), report["plan"]]:
        step = sum(column[part] for part in ("base", "unquantized", "adapter", "optimizer", "working"))
        assert 0 < step <= column["total"]
        assert column["optimizer"] > 0  # 8-bit state, or that of tensors too small for it
    assert report["slots"]["2"]["peak_bytes"] > 0
    assert report["numerics"]["bfloat16"]["cosine"] > 0.99
    assert "not judged" in markdown(report)
