"""`perce-lite weights`: what other trainers get is what ours trains with."""

import json

import pyarrow.parquet as pq
import pytest
import torch

from perce_lite.data.pairs import IGNORED
from perce_lite.data.readers import read_rows
from perce_lite.model.base import load_base
from perce_lite.model.scoring import compute_log_probs
from perce_lite.recipe import load_recipe
from perce_lite.training.train import make_trainer
from perce_lite.training.weights import weighted_rows

pytest_plugins = ["cli_fixtures"]

TRAIN = "train: {max_steps: 1, output_dir: out, clip_min: 0.1, clip_max: 2.0, store: store}\n"


def of_trainer(path, *overrides):
    """Ids, labels and weights (T,) of the trainer's rows, by row."""
    recipe = load_recipe(path, overrides)
    trainer = make_trainer(recipe, load_base(recipe), read_rows(recipe))
    trainer.prepare()
    rows = {}
    for row in trainer.train_dataset:
        factual, counterfactual = (torch.tensor(row[f"{name}_log_probs"]) for name in ("factual", "counterfactual"))
        labels = torch.tensor(row["labels"])
        scale, args = trainer.weight_scale, trainer.args
        pir = factual - counterfactual
        if args.weighting == "clip":
            weights = pir.clamp(args.clip_min, args.clip_max)
        else:
            weights = 1 + args.strength * pir.clamp(0, args.clip_max)
        where = trainer.pairs["train"][row["row"][0]].row.where
        rows[where] = (row["input_ids"], row["labels"], (weights * scale * (labels != IGNORED)).tolist())
    return rows


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.weighting=clip"],
        ["train.normalize_weights=mean"],
        ["train.estimator=shuffled"],
        ["train.train_on=counterfactual"],
    ],
    ids=str,
)
def test_weights_are_those_of_the_trainer(recipe, overrides):
    path = recipe(text=TRAIN)
    rows = {row["where"]: row for row in weighted_rows(load_recipe(path, overrides)) if row["split"] == "train"}
    trained = of_trainer(path, *overrides)
    assert set(rows) == set(trained)
    for where, (ids, labels, weights) in trained.items():
        assert (rows[where]["input_ids"], rows[where]["labels"]) == (ids, labels)
        assert rows[where]["weights"] == pytest.approx(weights, rel=1e-6)
    assert any(weight not in (0.0, 1.0) for _, _, weights in trained.values() for weight in weights)


def test_pir_is_what_the_profile_does_under_the_bare_base(recipe):
    path = recipe(text=TRAIN)
    loaded = load_recipe(path)
    row = weighted_rows(loaded)[0]
    trainer = make_trainer(loaded, base := load_base(loaded), read_rows(loaded))
    pair = next(pair for pair in trainer.pairs["train"] if pair.row.where == row["where"])
    scored = {}
    compute_log_probs(base.model, [pair.factual, pair.counterfactual], False, None, scored.__setitem__)
    pirs = [pir for pir, label in zip(row["pir"], row["labels"], strict=True) if label != IGNORED]
    assert pirs == pytest.approx((scored[0] - scored[1]).tolist(), abs=1e-5)


def test_files_hold_the_same_rows_and_the_store_is_used(recipe, run, tmp_path):
    path = recipe(text=TRAIN)
    code, out, err = run("weights", path, "--json", "figures.json")
    assert code == 0, err
    figures = json.loads((tmp_path / "figures.json").read_text("utf-8"))
    rows = [json.loads(line) for line in (tmp_path / "out" / "weights.jsonl").read_text("utf-8").splitlines()]
    assert sum(figures["rows"].values()) == len(rows) == 18
    assert figures["rows"]["train"] < 18, "held-out rows are there too, and say so"
    assert figures["tokens"] == sum(label != IGNORED for row in rows for label in row["labels"])
    assert "weights.jsonl" in out
    code, _, err = run("weights", path, "--to", "parquet", "--out", "w.parquet")
    assert code == 0, err
    table = pq.read_table(tmp_path / "w.parquet").to_pylist()
    for ours, theirs in zip(rows, table, strict=True):
        assert theirs["weights"] == pytest.approx(ours["weights"])
        assert {name: theirs[name] for name in ("where", "user", "split", "input_ids", "labels")} == {
            name: ours[name] for name in ("where", "user", "split", "input_ids", "labels")
        }


def test_what_was_scored_is_not_scored_again(recipe, monkeypatch):
    path = recipe(text=TRAIN)
    weighted_rows(load_recipe(path))
    monkeypatch.setattr("perce_lite.model.scoring.compute_log_probs", lambda *args: pytest.fail("scored again"))
    assert len(weighted_rows(load_recipe(path))) == 18


def test_uniform_weights_are_ones_and_frozen_profiles_keep_their_length(recipe):
    path = recipe(text=TRAIN)
    uniform = weighted_rows(load_recipe(path, ["train.estimator=uniform"]))
    for row in uniform:
        assert row["weights"] == [float(label != IGNORED) for label in row["labels"]]
    assert any(pir != 0 for pir in uniform[0]["pir"])
    frozen = weighted_rows(load_recipe(path, ["train.profile_pass=frozen"]))
    for row in frozen:
        assert 0 < row["prefix_length"] < len(row["input_ids"])
        assert len({len(row[name]) for name in ("input_ids", "labels", "pir", "weights")}) == 1


@pytest.mark.parametrize("estimator", ["mixed", "bootstrap"])
def test_weights_that_change_in_training_are_refused(recipe, run, estimator):
    code, _, err = run("weights", recipe(text=TRAIN), "--set", f"train.estimator={estimator}")
    assert (code, "takes a token's weight from the model as it is in training" in err) == (2, True)


def test_rows_that_are_left_out_are_named(recipe, run):
    code, out, err = run("weights", recipe(text=TRAIN), "--set", "train.max_length=75", "--to", "jsonl")
    assert code == 0, err
    assert "Left out:" in out
    code, _, err = run("weights", recipe(text=TRAIN), "--set", "train.max_length=5")
    assert (code, "No train rows are left" in err) == (2, True)
