"""The order of rows in training: samplers, accumulation windows, optimizer steps; the same for trainer and slots."""

import itertools
import math
from collections.abc import Iterator, Sequence

import datasets
from torch.utils.data import Sampler, SequentialSampler

from perce_lite.config import PerCEConfig
from perce_lite.data.collator import EpochSampler
from perce_lite.errors import DataError


def train_sampler(args: PerCEConfig, input_ids: Sequence[Sequence[int]], seed: int) -> Sampler[int]:
    """The order of rows, which a resumed run repeats; `args.data_seed` takes precedence over `seed`."""
    if args.train_sampling_strategy == "sequential":
        return SequentialSampler(input_ids)
    seed = seed if args.data_seed is None else args.data_seed
    if args.train_sampling_strategy == "random":
        return EpochSampler(len(input_ids), seed)
    return EpochSampler(len(input_ids), seed, [len(ids) for ids in input_ids], args.train_batch_size)


def steps_of(args: PerCEConfig, rows: int) -> int:
    """Optimizer steps that transformers' Trainer takes over `rows` rows."""
    if args.max_steps > 0:
        return args.max_steps
    return math.ceil(args.num_train_epochs * steps_of_an_epoch(args, rows))


def steps_of_an_epoch(args: PerCEConfig, rows: int) -> int:
    """Optimizer steps of one pass over `rows` rows."""
    batches = len(_batches(range(rows), args))
    return max(1, math.ceil(batches / args.gradient_accumulation_steps))


def windows(
    args: PerCEConfig, input_ids: Sequence[Sequence[int]], seed: int
) -> Iterator[tuple[list[list[int]], float]]:
    """Accumulation windows in the trainer's order, without end: batches of row numbers, and the epoch at their end.

    Raises:
        DataError: `dataloader_drop_last` leaves no batch.
    """
    rows = list(range(len(input_ids)))
    if args.shuffle_dataset:  # the trainer shuffles with datasets too: the same order
        rows = list(datasets.Dataset.from_dict({"row": rows}).shuffle(seed=seed)["row"])
    sampler = train_sampler(args, [input_ids[row] for row in rows], seed)
    for epoch in itertools.count():
        if isinstance(sampler, EpochSampler):
            sampler.set_epoch(epoch)
        batches = _batches([rows[index] for index in sampler], args)
        if not batches:
            raise DataError(f"dataloader_drop_last: {len(rows)} rows do not fill one batch; leave it out")
        for start in range(0, len(batches), args.gradient_accumulation_steps):
            window = batches[start : start + args.gradient_accumulation_steps]
            yield window, epoch + (start + len(window)) / len(batches)


def _batches(rows: Sequence[int], args: PerCEConfig) -> list[list[int]]:
    size = args.per_device_train_batch_size
    batches = [list(rows[start : start + size]) for start in range(0, len(rows), size)]
    return batches[:-1] if args.dataloader_drop_last and len(batches[-1]) < size else batches
