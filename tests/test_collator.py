"""Batches column by column, and the order of rows."""

import doctest
import random

import pytest
import torch

from perce_lite.data import collator
from perce_lite.data.collator import EpochSampler, PairCollator


def test_the_docstring_shows_what_happens():
    assert doctest.testmod(collator) == (0, 2)  # failed, attempted


def example(start, length, row, scored):
    """A row of `length` ids from `start` on, the last `scored` of them scored."""
    ids = list(range(start, start + length))
    labels = [-100] * (length - scored) + ids[length - scored :]
    log_probs = [0.0] * (length - scored) + [-0.5 - n for n in range(scored)]
    return {"input_ids": ids, "labels": labels, "row": [row] * length, "counterfactual_log_probs": log_probs}


def packed(*rows):
    """Rows as `pack_dataset` joins them."""
    joined = {name: [value for row in rows for value in row[name]] for name in rows[0]}
    return {**joined, "seq_lengths": [len(row["input_ids"]) for row in rows]}


ROWS = [example(10, 3, 4, 2), example(20, 2, 0, 1), example(30, 4, 2, 2)]


def as_lists(batch):
    """Its tensors, but for what TRL derives from the position ids for attention kernels."""
    derived = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k")
    return {k: value.tolist() for k, value in batch.items() if isinstance(value, torch.Tensor) and k not in derived}


def test_packed_rows_are_laid_end_to_end():
    batch = PairCollator(pad_token_id=0)([packed(ROWS[0], ROWS[1]), packed(ROWS[2])])
    assert as_lists(batch) == {
        "input_ids": [[10, 11, 12, 20, 21, 30, 31, 32, 33]],
        "labels": [[-100, 11, 12, -100, 21, -100, -100, 32, 33]],
        "position_ids": [[0, 1, 2, 0, 1, 0, 1, 2, 3]],
        "row": [[4, 4, 4, 0, 0, 2, 2, 2, 2]],
        "counterfactual_log_probs": [[0.0, -0.5, -1.5, 0.0, -0.5, 0.0, 0.0, -0.5, -1.5]],
    }
    assert "counterfactual" not in batch
    assert batch["row"].dtype == torch.long
    assert batch["counterfactual_log_probs"].dtype == torch.float32


def test_both_log_prob_columns_are_padded_like_the_labels():
    rows = [{**row, "factual_log_probs": [value * 2 for value in row["counterfactual_log_probs"]]} for row in ROWS[:2]]
    batch = as_lists(PairCollator(pad_token_id=9, pad_to_multiple_of=4)(rows))
    assert batch == {
        "input_ids": [[10, 11, 12, 9], [20, 21, 9, 9]],
        "labels": [[-100, 11, 12, -100], [-100, 21, -100, -100]],
        "attention_mask": [[1, 1, 1, 0], [1, 1, 0, 0]],
        "row": [[4, 4, 4, -1], [0, 0, -1, -1]],
        "factual_log_probs": [[0.0, -1.0, -3.0, 0.0], [0.0, -1.0, 0.0, 0.0]],
        "counterfactual_log_probs": [[0.0, -0.5, -1.5, 0.0], [0.0, -0.5, 0.0, 0.0]],
    }


def test_packed_rows_are_padded_to_a_multiple_as_well():
    batch = as_lists(PairCollator(pad_token_id=9, pad_to_multiple_of=8)([packed(ROWS[0], ROWS[1])]))
    assert batch["input_ids"] == [[10, 11, 12, 20, 21, 9, 9, 9]]
    assert batch["labels"] == [[-100, 11, 12, -100, 21, -100, -100, -100]]
    assert batch["position_ids"][0][:5] == [0, 1, 2, 0, 1]
    assert batch["row"] == [[4, 4, 4, 0, 0, -1, -1, -1]]
    assert batch["counterfactual_log_probs"] == [[0.0, -0.5, -1.5, 0.0, -0.5, 0.0, 0.0, 0.0]]


# By the index that the column `row` holds; rows 0, 2 and 4 are those of ROWS.
TWINS = [
    {"input_ids": [1, 21], "labels": [-100, 21]},
    {"input_ids": [7], "labels": [7]},
    {"input_ids": [2, 32, 33], "labels": [-100, 32, 33]},
    {"input_ids": [8], "labels": [8]},
    {"input_ids": [3, 3, 11, 12], "labels": [-100, -100, 11, 12]},
]


def test_twins_of_plain_rows():
    batch = PairCollator(pad_token_id=0, counterfactuals=TWINS)(ROWS)
    assert as_lists(batch["counterfactual"]) == {
        "input_ids": [[3, 3, 11, 12], [1, 21, 0, 0], [2, 32, 33, 0]],
        "labels": [[-100, -100, 11, 12], [-100, 21, -100, -100], [-100, 32, 33, -100]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]],
    }


def test_twins_of_packed_rows_have_the_scored_ids_of_the_batch_in_its_order():
    batch = PairCollator(pad_token_id=0, counterfactuals=TWINS)([packed(ROWS[0], ROWS[1]), packed(ROWS[2])])
    twin = batch["counterfactual"]
    assert as_lists(twin) == {
        "input_ids": [[3, 3, 11, 12, 1, 21, 2, 32, 33]],
        "labels": [[-100, -100, 11, 12, -100, 21, -100, 32, 33]],
        "position_ids": [[0, 1, 2, 3, 0, 1, 0, 1, 2]],
    }
    assert [part["labels"][part["labels"] != -100].tolist() for part in (twin, batch)] == [[11, 12, 21, 32, 33]] * 2


# The order of rows


def order(size, seed, epoch, *more):
    sampler = EpochSampler(size, seed, *more)
    sampler.set_epoch(epoch)
    assert len(sampler) == size
    return list(sampler)


LENGTHS = [int(random.Random(n).paretovariate(0.8) * 20) for n in range(2003)]  # a few rows are very long


@pytest.mark.parametrize("grouped", [(), (LENGTHS, 8)], ids=["random", "by length"])
def test_an_epoch_is_a_permutation_that_seed_and_epoch_decide(grouped):
    state = random.getstate()
    orders = {(seed, epoch): order(2003, seed, epoch, *grouped) for seed in (0, 1, 42) for epoch in (0, 1, 2)}
    assert random.getstate() == state
    assert all(sorted(one) == list(range(2003)) for one in orders.values())
    assert len({tuple(one) for one in orders.values()}) == 9
    assert list(range(2003)) not in orders.values()
    assert all(order(2003, *both, *grouped) == one for both, one in orders.items())
    sampler = EpochSampler(2003, 42, *grouped)
    assert list(sampler) == list(sampler) == orders[42, 0]  # reading moves nothing on


def spread(indices, size):
    """Mean over batches of longest - shortest."""
    batches = [[LENGTHS[index] for index in indices[at : at + size]] for at in range(0, len(indices), size)]
    return sum(max(batch) - min(batch) for batch in batches) / len(batches)


@pytest.mark.parametrize("size", [2, 8])
def test_rows_of_like_length_share_a_batch(size):
    for epoch in range(3):
        grouped, at_random = order(2003, 0, epoch, LENGTHS, size), order(2003, 0, epoch)
        assert spread(grouped, size) < spread(at_random, size) / 2
        long_first = [LENGTHS[index] for index in grouped[: 10 * size]]
        assert long_first != sorted(long_first, reverse=True)  # batches themselves come in random order


def test_the_short_batch_comes_last_and_holds_the_shortest_of_its_window():
    lengths = list(range(100, 203))
    for epoch in range(5):
        indices = order(103, 0, epoch, lengths, 8)
        assert sorted(indices[-7:]) == list(range(7))  # 103 = 12 x 8 + 7, sorted from the longest
        starts = range(0, 96, 8)
        assert all(max(indices[at : at + 8]) - min(indices[at : at + 8]) == 7 for at in starts)
    assert order(0, 0, 0) == order(0, 0, 0, [], 8) == []
