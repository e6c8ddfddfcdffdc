"""Held-out rows as an adapter is judged by them: jobs for the scoring, and their loss a token."""

from collections.abc import Sequence

import torch
from torch import Tensor

from perce_lite.config import PerCEConfig
from perce_lite.data.pairs import PairMaker
from perce_lite.data.rows import Row, of_split, spread_over_users
from perce_lite.model.scoring import ScoringJob
from perce_lite.recipe import Recipe
from perce_lite.training.reference_logprobs import trained_tokens

SPLITS = ("validation", "test")


def held_out_jobs(
    maker: PairMaker, recipe: Recipe, args: PerCEConfig, rows: Sequence[Row], splits: Sequence[str] = SPLITS
) -> dict[str, list[ScoringJob]]:
    """Scoring jobs of held-out rows with a profile, by split, `evaluation.max_rows` at the most; no empty split."""
    jobs = {}
    for split in splits:
        pairs = maker.make(
            spread_over_users([row for row in of_split(rows, split) if row.profile], recipe.evaluation.max_rows)
        )
        if pairs:
            jobs[split] = [ScoringJob(pair.row.user, trained_tokens(pair, args)) for pair in pairs]
    return jobs


def loss_of(scored: Sequence[Tensor]) -> float:
    """Loss a token, nats, of log-probs (R,) a row."""
    return -float(torch.cat(list(scored)).double().mean())
