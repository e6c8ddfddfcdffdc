"""Fixtures of the tests of the Python surface: a folder as the docstrings' examples know it, and its adapter."""

import json
from pathlib import Path

import datasets
import pytest
import toys
from peft import LoraConfig

from perce_lite import PerCEConfig, PerCETrainer


def script_trainer(folder: Path, model: str | Path, **config) -> PerCETrainer:
    """What a TRL script makes of `rows.jsonl` in `folder`."""
    options = {"max_steps": 3, "learning_rate": 0.05, "report_to": "none", "disable_tqdm": True, "bf16": False}
    return PerCETrainer(
        str(model),
        PerCEConfig(str(folder / "out"), **{**options, **config}),
        train_dataset=datasets.load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train"),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    )


@pytest.fixture(scope="module")
def script_folder(tmp_path_factory) -> Path:
    """rows.jsonl, recipe.yaml, a base called toy, and out/adapter, saved by a script."""
    folder = tmp_path_factory.mktemp("script")
    toys.toy_folder(folder / "toy")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, toys.toy_rows())))
    (folder / "recipe.yaml").write_text(
        "model: toy\nquantization: none\ndtype: float32\ndevice: cpu\ndata: {path: rows.jsonl}\n"
        "train: {max_steps: 2, output_dir: fleet}\nfleet: {min_examples: 2}\n"
        "evaluation: {max_rows: 4, max_new_tokens: 2, generated_rows: 2, samples: 0}\n"
    )
    trainer = script_trainer(folder, folder / "toy")
    trainer.train()
    trainer.save_model(str(folder / "out" / "adapter"))
    return folder
