"""Reference log-probs: log-probs under the frozen base, constants of the data, scored once before training."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perce_lite.config import PerCEConfig
from perce_lite.data.pairs import IGNORED, Pair, Tokens
from perce_lite.errors import DataError
from perce_lite.model.logprob_store import Store
from perce_lite.model.scoring import ScoringJob, cached_log_probs, runs, store_of
from perce_lite.training import loss

_PASSES: dict[str, tuple[str, ...]] = {
    "base": ("factual", "counterfactual"),
    "shuffled": ("factual", "counterfactual"),
    "mixed": ("counterfactual",),
    "bootstrap": (),
    "uniform": (),
}
"""The passes whose log-probs an estimator takes from the frozen base."""


@dataclass(frozen=True)
class ReferenceLogProbs:
    """Reference log-probs of a data set, as columns for the collator.

    columns: `factual_log_probs`, `counterfactual_log_probs`: a row's log-probs (T,), nats, zero where the label is
        ignored; only the columns that the estimator needs
    scale: factor of every weight: 1, or 1 / mean weight (`normalize_weights: mean`)
    store_hits: share of the scored sequences that came from the store
    """

    columns: dict[str, list[list[float]]]
    scale: float = 1.0
    store_hits: float = 0.0


def trained_tokens(pair: Pair, args: PerCEConfig) -> Tokens:
    """The pass of `pair` that the loss is computed on (`train_on`)."""
    return pair.factual if args.train_on == "factual" else pair.counterfactual


def scored_passes(args: PerCEConfig) -> tuple[str, ...]:
    """Which passes of a row have to be scored under the base before training: `factual`, `counterfactual`."""
    normalized = args.normalize_weights == "mean" and args.estimator != "uniform"
    return ("factual", "counterfactual") if normalized else _PASSES[args.estimator]


def reference_log_probs(
    model: torch.nn.Module, pairs: Sequence[Pair], args: PerCEConfig, seed: int, store: Store | None = None
) -> ReferenceLogProbs:
    """Scores `pairs` with the adapters off, or reads them from the store.

    seed: of the `shuffled` control
    store: the base's; None: found by the base's hash, if `args.store` names a folder

    Raises:
        DataError: weights are to be normalised and all of them are 0.
    """
    passes = scored_passes(args)
    if not passes:
        return ReferenceLogProbs({})
    jobs = [
        ScoringJob(pair.row.user, pair.factual if name == "factual" else pair.counterfactual)
        for name in passes
        for pair in pairs
    ]
    if store is None:
        store = store_of(args.store, model, args.autocast)
    scored = cached_log_probs(model, jobs, store, args.autocast, "Scoring under the base")
    by_pass = {name: scored.log_probs[i * len(pairs) : (i + 1) * len(pairs)] for i, name in enumerate(passes)}
    columns = {
        f"{name}_log_probs": [
            _column(trained_tokens(pair, args).after_prefix.labels, values, args, seed, row)
            for row, (pair, values) in enumerate(zip(pairs, by_pass[name], strict=True))
        ]
        for name in _PASSES[args.estimator]
    }
    normalized = args.normalize_weights == "mean"
    return ReferenceLogProbs(columns, _scale(by_pass, args) if normalized else 1.0, scored.hits / len(jobs))


def _scale(by_pass: dict[str, list[Tensor]], args: PerCEConfig) -> float:
    pirs = [loss.pir(*both) for both in zip(by_pass["factual"], by_pass["counterfactual"], strict=True)]
    mean = loss.mean_weight(pirs, loss.Weighting.of(args))
    if mean <= 0:
        raise DataError("normalize_weights: no token leans on its profile, so all weights are 0; raise clip_min")
    return 1 / mean


def _column(labels: Sequence[int], values: Tensor, args: PerCEConfig, seed: int, row: int) -> list[float]:
    """A row's log-probs (R,) at the positions of its labels (T,), zero elsewhere."""
    if args.estimator == "shuffled":  # both passes in the same order: the weights permute, the labels do not
        values = values[loss.permutation(runs(labels), seed, row)]
    scored = iter(values.tolist())
    return [0.0 if label == IGNORED else next(scored) for label in labels]
