"""A disk that fills up while a checkpoint is written: one clear error, and earlier checkpoints stay whole."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from perce_lite.errors import DiskFullError
from perce_lite.training.run import Run


class Filler(TrainerCallback):
    """After the first checkpoint, fills the disk up to `left` bytes."""

    def __init__(self, disk: Path, left: int) -> None:
        self.file, self.left = disk / "filler", left

    def on_save(self, args, state, control, **kwargs):
        if not self.file.exists():
            with self.file.open("wb") as file:
                for _ in range((shutil.disk_usage(self.file.parent).free - self.left) // 4096):
                    file.write(bytes(4096))


def checkpoint_files(folder: Path) -> dict[str, bytes]:
    return {str(one.relative_to(folder)): one.read_bytes() for one in folder.rglob("*") if one.is_file()}


@pytest.mark.parametrize("share", [0, 0.3, 0.9, 0.99])
def test_a_full_disk_is_one_clear_error_and_leaves_the_earlier_checkpoint(toy_trainer, small_disk, tmp_path, share):
    """`share` of a checkpoint still fits: the disk fills up in another file each time."""
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    whole = toy_trainer(output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    size = sum(len(one) for one in checkpoint_files(tmp_path / "whole" / "checkpoint-3").values())
    trainer = toy_trainer(output_dir=str(small_disk / "out"), **options)
    filler = Filler(small_disk, int(share * size))
    trainer.add_callback(filler)
    with pytest.raises(DiskFullError, match=r"The disk is full: .*out could not be written.*last whole checkpoint"):
        trainer.train()
    first = small_disk / "out" / "checkpoint-1"
    last = Run(small_disk / "out", "x").last_checkpoint()
    assert last == str(first)
    filler.file.unlink()
    again = toy_trainer(output_dir=str(small_disk / "out"), **options)
    again.train(resume_from_checkpoint=last)
    ends = [{name: p for name, p in one.model.named_parameters() if "lora_" in name} for one in (whole, again)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
