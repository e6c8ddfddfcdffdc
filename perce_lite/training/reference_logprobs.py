"""What the trainer and the loop over slots share: the constant terms of a data set's PIR, and the order of its rows."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import datasets
import torch
from torch import Tensor
from torch.utils.data import Sampler, SequentialSampler

from perce_lite.config import PerCEConfig
from perce_lite.data.collator import EpochSampler
from perce_lite.data.pairs import IGNORED, Pair, Tokens
from perce_lite.data.rows import Row
from perce_lite.errors import DataError, NonFiniteLossError
from perce_lite.model.logprob_store import Store
from perce_lite.model.scoring import Job, kept_log_probs, runs, store_of
from perce_lite.training import loss as contrast

_CONSTANT_TERMS: dict[str, tuple[str, ...]] = {
    "base": ("factual", "counterfactual"),
    "shuffled": ("factual", "counterfactual"),
    "mixed": ("counterfactual",),
    "bootstrap": (),
    "uniform": (),
}
"""Terms of the PIR that do not change while the adapter learns: columns of the data set."""


@dataclass(frozen=True)
class Constants:
    """What an estimator takes as a constant of the data.

    columns: `<term>_log_probs`: a row's log-probs (T,), nats, zero where no loss falls
    scale: what every weight is multiplied by: 1, or 1 / mean weight
    hits: share of the scored sequences that came from the store
    """

    columns: dict[str, list[list[float]]]
    scale: float = 1.0
    hits: float = 0.0


def trained(pair: Pair, args: PerCEConfig) -> Tokens:
    """The pass of `pair` that the loss falls on; all of it, whatever the adapter sleeps through."""
    return pair.factual if args.train_on == "factual" else pair.counterfactual


def needed_terms(args: PerCEConfig) -> tuple[str, ...]:
    """Which passes of a row have to be scored under the base before training: `factual`, `counterfactual`."""
    normalized = args.normalize_weights == "mean" and args.estimator != "uniform"
    return ("factual", "counterfactual") if normalized else _CONSTANT_TERMS[args.estimator]


def constants(
    model: torch.nn.Module, pairs: Sequence[Pair], args: PerCEConfig, seed: int, store: Store | None = None
) -> Constants:
    """One scoring pass of `pairs` with the adapters off, or store hits; `seed` is that of the `shuffled` control.

    store: of this base, where it is at hand; else it is found by hashing the base, if `args.store` names a folder

    Raises:
        DataError: weights are to be normalised and all of them are 0.
    """
    needed = needed_terms(args)
    if not needed:
        return Constants({})
    jobs = [
        Job(pair.row.user, pair.factual if term == "factual" else pair.counterfactual)
        for term in needed
        for pair in pairs
    ]
    if store is None:
        store = store_of(args.store, model, args.autocast)
    scored = kept_log_probs(model, jobs, store, args.autocast, "Scoring under the base")
    terms = {term: scored.log_probs[i * len(pairs) : (i + 1) * len(pairs)] for i, term in enumerate(needed)}
    laid_out = {
        f"{term}_log_probs": [
            _column(trained(pair, args).awake.labels, values, args, seed, row)
            for row, (pair, values) in enumerate(zip(pairs, terms[term], strict=True))
        ]
        for term in _CONSTANT_TERMS[args.estimator]
    }
    normalized = args.normalize_weights == "mean"
    return Constants(laid_out, _scale(terms, args) if normalized else 1.0, scored.hits / len(jobs))


def _scale(terms: dict[str, list[Tensor]], args: PerCEConfig) -> float:
    pirs = [contrast.pir(*both) for both in zip(terms["factual"], terms["counterfactual"], strict=True)]
    mean = contrast.mean_weight(pirs, args.clip_min, args.clip_max)
    if mean <= 0:
        raise DataError("normalize_weights: no token leans on its profile, so all weights are 0; raise clip_min")
    return 1 / mean


def _column(labels: Sequence[int], values: Tensor, args: PerCEConfig, seed: int, row: int) -> list[float]:
    """A row's log-probs (R,) laid out on its labels (T,), zero elsewhere."""
    if args.estimator == "shuffled":  # both terms in the same order: the weights permute, the labels do not
        values = values[contrast.permutation(runs(labels), seed, row)]
    scored = iter(values.tolist())
    return [0.0 if label == IGNORED else next(scored) for label in labels]


def train_sampler(args: PerCEConfig, input_ids: Sequence[Sequence[int]], seed: int) -> Sampler[int]:
    """The order of rows, one that a resumed run meets again; `args.data_seed` goes before `seed` where it is given."""
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
    batches = len(_batches(range(rows), args))
    return math.ceil(args.num_train_epochs * max(1, math.ceil(batches / args.gradient_accumulation_steps)))


def windows(
    args: PerCEConfig, input_ids: Sequence[Sequence[int]], seed: int
) -> Iterator[tuple[list[list[int]], float]]:
    """Accumulation windows in the trainer's order, without end: batches of row numbers, and the epoch at their end."""
    rows = list(range(len(input_ids)))
    if args.shuffle_dataset:  # the trainer's own shuffle, so the same order
        rows = list(datasets.Dataset.from_dict({"row": rows}).shuffle(seed=seed)["row"])
    sampler = train_sampler(args, [input_ids[row] for row in rows], seed)
    for epoch in itertools.count():
        if isinstance(sampler, EpochSampler):
            sampler.set_epoch(epoch)
        batches = _batches([rows[place] for place in sampler], args)
        if not batches:
            raise DataError(f"dataloader_drop_last: {len(rows)} rows do not fill one batch; leave it out")
        for start in range(0, len(batches), args.gradient_accumulation_steps):
            window = batches[start : start + args.gradient_accumulation_steps]
            yield window, epoch + (start + len(window)) / len(batches)


def _batches(rows: Sequence[int], args: PerCEConfig) -> list[list[int]]:
    size = args.per_device_train_batch_size
    batches = [list(rows[start : start + size]) for start in range(0, len(rows), size)]
    return batches[:-1] if args.dataloader_drop_last and len(batches[-1]) < size else batches


def not_finite(what: str, step: int, rows: Sequence[Row]) -> NonFiniteLossError:
    """The error that names the rows of a step whose loss or gradient is no number; `what`: "The loss is nan"."""
    told = "; ".join(f"{row.where} (user {row.user})" for row in rows)
    return NonFiniteLossError(
        f"{what} at step {step}, in these rows: {told}. Nothing of this step was kept. Lower train.learning_rate, or "
        "look at the rows with `perce-lite check`."
    )
