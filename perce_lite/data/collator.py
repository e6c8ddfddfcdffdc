"""Collator and sampler: rows become a batch of tensors, in an order that depends on seed and epoch alone."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import Sampler
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

LOG_PROB_COLUMNS = ("factual_log_probs", "counterfactual_log_probs")
"""Columns (T,) of a row: nats at scored positions, zero elsewhere."""


@dataclass
class PairCollator(DataCollatorForLanguageModeling):
    """TRL's collator, with the columns of PerContrast padded like the labels.

    >>> collator = PairCollator(pad_token_id=0)
    >>> collator([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "row": [0, 0, 0],
    ...            "counterfactual_log_probs": [0.0, -1.5, -2.0]},
    ...           {"input_ids": [8, 9], "labels": [-100, 9], "row": [1, 1],
    ...            "counterfactual_log_probs": [0.0, -0.5]}])
    {'input_ids': tensor([[5, 6, 7],
            [8, 9, 0]]), 'labels': tensor([[-100,    6,    7],
            [-100,    9, -100]]), 'attention_mask': tensor([[1, 1, 1],
            [1, 1, 0]]), 'row': tensor([[ 0,  0,  0],
            [ 1,  1, -1]]), 'counterfactual_log_probs': tensor([[ 0.0000, -1.5000, -2.0000],
            [ 0.0000, -0.5000,  0.0000]])}

    Packed rows (those with `seq_lengths`) are laid end to end into one row without an attention mask, position ids
    starting anew at each: the only form in which transformers keeps them apart without FlashAttention.

    `prefix` (B, T), where rows have one, is the number of each token's prefix, -1 in padding (see
    `perce_lite.model.prefix_cache`).

    counterfactuals: where given (`bootstrap`), the batch also holds `counterfactual`, the same rows without the
        profile, in the same order and form: `input_ids`, `labels` and, as above, `prefix` of each row, (T,)
    """

    counterfactuals: Sequence[dict[str, list[int]]] | None = None
    _plain: DataCollatorForLanguageModeling = field(init=False, repr=False)
    _packed: DataCollatorForLanguageModeling = field(init=False, repr=False)

    def __post_init__(self) -> None:
        shared = {"pad_token_id": self.pad_token_id, "pad_to_multiple_of": self.pad_to_multiple_of}
        self._plain = DataCollatorForLanguageModeling(**shared)
        self._packed = DataCollatorForLanguageModeling(**shared, padding_free=True)

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of tensors (B, T); (1, sum of T) where the rows are packed."""
        packed = "seq_lengths" in examples[0]
        batch = (self._packed if packed else self._plain)(examples)
        length = batch["input_ids"].shape[1]
        for name, padding, dtype in (
            ("row", -1, torch.long),
            ("prefix", -1, torch.long),
            *((name, 0.0, torch.float32) for name in LOG_PROB_COLUMNS),
        ):
            if name not in examples[0]:
                continue
            columns = [list(example[name]) for example in examples]
            if packed:
                columns = [[value for column in columns for value in column]]
            batch[name] = torch.tensor([column + [padding] * (length - len(column)) for column in columns], dtype=dtype)
        if self.counterfactuals is not None and "row" in examples[0]:  # rows of evaluation have no twin
            batch["counterfactual"] = self._without_profile(examples, packed)
        return batch

    def _without_profile(self, examples: list[dict[str, Any]], packed: bool) -> dict[str, Any]:
        assert self.counterfactuals is not None
        rows = [list(dict.fromkeys(example["row"])) for example in examples]  # a packed row holds several
        twins = [[self.counterfactuals[index] for index in indices] for indices in rows]
        collated = [
            {
                **{name: [value for twin in row for value in twin[name]] for name in row[0]},
                **({"seq_lengths": [len(twin["input_ids"]) for twin in row]} if packed else {}),
            }
            for row in twins
        ]
        return self.torch_call(collated)


class EpochSampler(Sampler[int]):
    """Shuffles rows by `seed` and epoch alone, so that a resumed run meets the order it left.

    With `lengths`, rows of like length share a batch of `batch_size` (and batches come in random order).
    """

    def __init__(self, size: int, seed: int, lengths: Sequence[int] | None = None, batch_size: int = 1) -> None:
        self.size, self.seed, self.lengths, self.batch_size = size, seed, lengths, batch_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the training loop ahead of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        shuffler = random.Random(self.seed * 1_000_003 + self.epoch)
        order = list(range(self.size))
        shuffler.shuffle(order)
        if self.lengths is None:
            return iter(order)
        lengths = self.lengths
        window = 50 * self.batch_size  # rows are sorted within a window only, so that epochs differ
        batches = []
        for start in range(0, self.size, window):
            part = sorted(order[start : start + window], key=lambda index: -lengths[index])
            batches += [part[i : i + self.batch_size] for i in range(0, len(part), self.batch_size)]
        shuffler.shuffle(batches)
        batches.sort(key=lambda batch: len(batch) < self.batch_size)  # a short batch in the middle would split others
        return iter([index for batch in batches for index in batch])
