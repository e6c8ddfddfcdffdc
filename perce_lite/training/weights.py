"""The weights themselves, row by row: what other trainers need to train PerCE on a model that is not here."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from perce_lite.config import PerCEConfig
from perce_lite.data.pairs import IGNORED, Audit, Pair, PairMaker, require
from perce_lite.data.readers import read_rows
from perce_lite.data.rows import SPLIT_NAMES, from_columns, of_split
from perce_lite.errors import DataError
from perce_lite.files import written_aside
from perce_lite.locks import one_writer
from perce_lite.model.base import load_base
from perce_lite.recipe import Recipe, training_config, with_train
from perce_lite.training import loss
from perce_lite.training.reference_logprobs import ReferenceLogProbs, reference_log_probs, trained_tokens

SCHEMA = pa.schema(
    {
        "where": pa.string(),
        "user": pa.string(),
        "split": pa.string(),
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
        "pir": pa.list_(pa.float32()),
        "weights": pa.list_(pa.float32()),
        "prefix_length": pa.int32(),
    }
)
"""Columns of the parquet file; those of `WeightedRow`."""

_ROWS_AT_ONCE = 512


class WeightedRow(TypedDict):
    """One row, as other trainers take it; the four lists are of one length, T.

    where, user, split: as the recipe's data have them; split is train, validation, test or unseen
    input_ids: the whole sequence, chat template included
    labels: `input_ids` where there is loss, -100 elsewhere; not shifted
    pir: nats at a labelled token, 0 elsewhere: how much likelier the profile makes it under the frozen base
    weights: loss weight of the token at this position, 0 where there is no loss
    prefix_length: leading tokens that `profile_pass: frozen` runs with the adapter off; else 0
    """

    where: str
    user: str
    split: str
    input_ids: list[int]
    labels: list[int]
    pir: list[float]
    weights: list[float]
    prefix_length: int


def weighted_rows(
    recipe: Recipe, records: Sequence[Mapping[str, Any]] | None = None, audit: Audit | None = None
) -> list[WeightedRow]:
    """Every row of the recipe's data that can be trained on, with its weights; scored through the recipe's store.

    records: {profile, prompt, completion} or {profile, messages}, instead of the recipe's data
    audit: counts rows that are left out

    Raises:
        DataError: an estimator whose weights change in training, no row that can be trained on, and as reading raises.
    """
    config = training_config(recipe)
    if config.estimator in ("mixed", "bootstrap"):
        raise DataError(
            f"train.estimator: {config.estimator} takes a token's weight from the model as it is in training, so there "
            "is nothing to write beforehand; use base (--set train.estimator=base)"
        )
    if config.estimator == "uniform":  # its weights are all 1; PIR is told all the same
        config = training_config(with_train(recipe, "estimator: uniform", ["estimator=base"]))
    if records is None:
        rows = read_rows(recipe)
    else:
        rows = [
            replace(from_columns(record, f"row {number}"), split="train") for number, record in enumerate(records, 1)
        ]
    base = load_base(recipe)
    maker = PairMaker.of(recipe, base.tokenizer, config.max_length)
    audit, scale, done = audit if audit is not None else Audit(), None, []
    for split in SPLIT_NAMES:  # training first: `normalize_weights` divides by its mean
        pairs = maker.make(of_split(rows, split), audit)
        if split == "train":
            require(pairs, audit, split)
        if pairs:
            reference = reference_log_probs(base.model, pairs, config, config.seed)
            scale = reference.scale if scale is None else scale
            weighting = loss.Weighting.of(config, scale)
            uniform = training_config(recipe).estimator == "uniform"
            done += list(_rows(pairs, reference, config, weighting, uniform))
    return done


def _rows(
    pairs: Sequence[Pair], reference: ReferenceLogProbs, config: PerCEConfig, weighting: loss.Weighting, uniform: bool
) -> Iterator[WeightedRow]:
    columns = zip(reference.columns["factual_log_probs"], reference.columns["counterfactual_log_probs"], strict=True)
    for pair, (factual, counterfactual) in zip(pairs, columns, strict=True):
        tokens = trained_tokens(pair, config)
        labelled = torch.tensor(tokens.after_prefix.labels) != IGNORED  # (T - P,)
        pir = loss.pir(torch.tensor(factual), torch.tensor(counterfactual))
        weights = torch.ones_like(pir) if uniform else weighting.weights(pir)
        before = [0.0] * tokens.prefix_length
        yield WeightedRow(
            where=pair.row.where,
            user=pair.row.user,
            split=str(pair.row.split),
            input_ids=tokens.ids,
            labels=tokens.labels,
            pir=before + pir.tolist(),
            weights=before + (weights * labelled).tolist(),
            prefix_length=tokens.prefix_length,
        )


def write_weights(recipe: Recipe, to: str, out: Path) -> dict[str, Any]:
    """Writes `weighted_rows` to `out`, whole or not at all; gives what `perce-lite weights --json` writes.

    to: jsonl or parquet

    Raises:
        DataError: as `weighted_rows`; DiskFullError: no space left.
    """
    audit = Audit()
    rows = weighted_rows(recipe, audit=audit)
    with one_writer(out), written_aside(out) as aside:
        (_write_parquet if to == "parquet" else _write_jsonl)(rows, aside)
        aside.chmod(0o644)
    config = training_config(recipe)
    return {
        "model": recipe.model,
        "file": str(out),
        "estimator": config.estimator,
        "weighting": loss.Weighting.of(config).formula,
        "rows": {split: sum(row["split"] == split for row in rows) for split in SPLIT_NAMES},
        "left_out": audit.summary(),
        "tokens": sum(label != IGNORED for row in rows for label in row["labels"]),
        "weights": _statistics(rows, loss.Weighting.of(config)),
    }


def _statistics(rows: Sequence[WeightedRow], weighting: loss.Weighting) -> dict[str, float]:
    labelled = [pir for row in rows for pir, label in zip(row["pir"], row["labels"], strict=True) if label != IGNORED]
    return loss.weight_statistics(torch.tensor(labelled), weighting)


def _write_jsonl(rows: Sequence[WeightedRow], path: Path) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def _write_parquet(rows: Sequence[WeightedRow], path: Path) -> None:
    with pq.ParquetWriter(path, SCHEMA) as writer:
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            writer.write_table(pa.Table.from_pylist(list(rows[start : start + _ROWS_AT_ONCE]), SCHEMA))
