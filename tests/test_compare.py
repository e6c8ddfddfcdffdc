"""`perce-lite compare`: one budget for all, rates by validation alone, paired differences, nothing trained twice."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toys
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_inspect import fits_a_phone, full_logits
from test_loss import adapters_off_until

from perce_lite.data.pairs import PairMaker
from perce_lite.data.readers import read_rows
from perce_lite.data.rows import of_split, spread_over_users
from perce_lite.errors import DataError, NonFiniteLossError, RecipeError, RunError
from perce_lite.evaluation import compare as comparing
from perce_lite.evaluation.arms import arms_of, grid
from perce_lite.evaluation.compare import Training
from perce_lite.evaluation.conditions import cases
from perce_lite.recipe import load_recipe, training_config

pytest_plugins = ["cli_fixtures"]

TEXT = """
train: {max_steps: 3, output_dir: out, store: store, clip_min: 0.05, seed: 3, warmup_steps: 0}
split: {test: 0.3, validation: 0.2, unseen_users: 0.34}
evaluation: {max_rows: 20}
"""
BRIEF = TEXT.replace("max_rows: 20", "max_rows: 20, generated_rows: 2, max_new_tokens: 8")
"""For tests of losses, in which answers have no part."""
ARMS = "uniform,shuffled,base,base:train_on=counterfactual,uniform:train_on=counterfactual"
WORDS = ("--arms", ARMS, "--rates", "0.002,0.02,0.05", "--seeds", "2")


@pytest.fixture
def path(recipe) -> Path:
    return recipe(toys.toy_rows(users=6, per_user=6), BRIEF)


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """What was trained, in order."""
    done: list[str] = []
    real = comparing.train

    def fit(recipe, base, rows, run, what):
        done.append(what)
        return real(recipe, base, rows, run, what)

    monkeypatch.setattr(comparing, "train", fit)
    return done


def loss_by_hand(path: Path, folder: Path, split: str, profile: str, profile_pass: str = "full") -> torch.Tensor:
    """Summed loss of each row under the adapter in `folder`, float64, by full logits."""
    recipe = load_recipe(path)
    rows = read_rows(recipe)
    maker = PairMaker(toys.toy_tokenizer("chatml"), recipe.template, 1024, profile_pass=profile_pass)
    found = cases(maker, spread_over_users(of_split(rows, split), 20), None, of_split(rows, "train"))
    model = PeftModel.from_pretrained(toys.toy_model("chatml", 600), folder).double().eval()
    losses = []
    for passes in (case.passes[profile] for case in found):
        with adapters_off_until(model, passes.prefix_length):
            losses.append(-full_logits(model, passes).sum())
    return torch.stack(losses)


def test_an_arm_that_sleeps_through_the_profile_is_judged_asleep(path, figures):
    arms = "base,base:profile_pass=frozen"
    told = figures("compare", path, "--arms", arms, "--rates", "0.02,0.05", "--seeds", "1")
    recipe = load_recipe(path)
    rows = read_rows(recipe)
    table = {(one["arm"], one["profile"]): one["all"]["value"] for one in told["splits"]["test"]["losses"]}
    rates = {one["arm"]: one["rate"] for one in told["arms"]}
    tokens = told["splits"]["test"]["tokens"]["all"]
    for arm in arms_of(recipe, arms):
        folder = Training(arm, rates[arm.name], 3).run(rows)[1].adapter
        for profile in ("own", "none"):
            by_hand = loss_by_hand(path, folder, "test", profile, arm.recipe.profile_pass)
            assert table[arm.name, profile] == pytest.approx(float(by_hand.sum()) / tokens, abs=1e-4)
    [one] = told["splits"]["test"]["differences"]
    assert (one["arm"], one["against"]) == ("base:profile_pass=frozen", "base")
    apart = table["base:profile_pass=frozen", "own"] - table["base", "own"]
    assert one["all"]["value"] == pytest.approx(apart, abs=1e-6)
    for over in ("none", "other user's", "topical match"):
        worth = {name: table[name, over] - table[name, "own"] for name in ("base", one["arm"])}
        told_worth = one["worth"][over]["all"]
        assert told_worth["value"] == pytest.approx(worth[one["arm"]] - worth["base"], abs=1e-6)
        assert told_worth["low"] <= told_worth["value"] <= told_worth["high"]
        assert told_worth["seeds"] == pytest.approx([told_worth["value"]])
    awake = loss_by_hand(path, folder, "test", "own")
    assert abs(float(awake.sum()) / tokens - table[arm.name, "own"]) > 1e-4, "which way is told apart"


def test_arms_are_judged_on_the_recipes_own_cases(path, monkeypatch):
    """Not on those of the arm that happens to come last."""
    recipe = load_recipe(path)
    arms = arms_of(recipe, "base:profile_pass=frozen,base,base:max_length=64,uniform:max_length=64:profile_pass=frozen")
    made = []

    def held_out(recipe, maker, rows, topics, candidates):
        made.append((maker.max_length, maker.frozen_profile))
        return {}

    def stop(*_):
        raise DataError("enough")

    monkeypatch.setattr(comparing, "held_out", held_out)
    monkeypatch.setattr(comparing, "_train", stop)
    with pytest.raises(DataError, match="enough"):
        comparing.compare(recipe, arms, [0.02], 1)
    assert made == [(1024, True), (1024, False)]


def test_rates_come_from_validation_and_differences_are_paired(path, figures, trained):
    told = figures("compare", path, *WORDS)
    assert told["seeds"] == [3, 4]
    assert len(trained) == 5 * (3 + 1)
    assert trained[0] == "1 of 20: uniform, rate 0.002, seed 3"
    recipe = load_recipe(path)
    rows = read_rows(recipe)
    arms = {arm.name: arm for arm in arms_of(recipe, ARMS)}
    folder = {
        (name, rate, seed): Training(arm, rate, seed).run(rows)[1].adapter
        for name, arm in arms.items()
        for rate in (0.002, 0.02, 0.05)
        for seed in (3, 4)
    }
    chosen = {}
    for one in told["arms"]:
        profile = "none" if "counterfactual" in one["arm"] else "own"
        assert one["profile"] == profile
        losses = {}
        for rate in (0.002, 0.02, 0.05):
            summed = loss_by_hand(path, folder[one["arm"], rate, 3], "validation", profile)
            losses[rate] = float(summed.sum())
        ratios = [one["validation"][f"{rate:g}"] / losses[rate] for rate in losses]
        assert ratios == pytest.approx([ratios[0]] * 3, rel=1e-4)
        chosen[one["arm"]] = min(losses, key=losses.get)
        assert one["rate"] == chosen[one["arm"]]
    for split in ("test", "unseen"):
        tokens = told["splits"][split]["tokens"]["all"]
        pairs = {(one["arm"], one["against"]): one for one in told["splits"][split]["differences"]}
        assert set(pairs) == {
            ("shuffled", "uniform"), ("base", "uniform"), ("base", "shuffled"),
            ("base:train_on=counterfactual", "uniform:train_on=counterfactual"),
        }  # fmt: skip
        for (name, against), one in pairs.items():
            profile = one["profile"]
            each = [
                float((loss_by_hand(path, folder[name, chosen[name], seed], split, profile)
                       - loss_by_hand(path, folder[against, chosen[against], seed], split, profile)).sum()) / tokens
                for seed in (3, 4)
            ]  # fmt: skip
            assert one["all"]["seeds"] == pytest.approx(each, abs=1e-4)
            assert one["all"]["value"] == pytest.approx(sum(each) / 2, abs=1e-4)
            assert one["all"]["low"] <= one["all"]["value"] <= one["all"]["high"]
    assert Path("out/compare.html").is_file()


def test_equal_loss_is_the_nearest_step_of_plain_sft(recipe, figures):
    path = recipe(toys.toy_rows(users=6, per_user=6), BRIEF.replace("max_steps: 3", "max_steps: 6"))
    told = figures("compare", path, "--arms", "uniform,base", "--rates", "0.02,0.05", "--seeds", "2")
    uniform, base = told["arms"]
    assert uniform["equal_loss"] is None
    rows = read_rows(load_recipe(path))
    plain = Training(arms_of(load_recipe(path), "uniform")[0], uniform["rate"], 3)
    steps = {step: replace(plain, step=step).folder(rows) for step in range(1, 7)}
    assert {int(folder.name) for folder in steps[1].parent.iterdir()} == set(steps)
    losses = {step: float(loss_by_hand(path, folder, "validation", "own").sum()) for step, folder in steps.items()}
    assert len({round(value, 4) for value in losses.values()}) == 6, "the adapters on the way differ"
    end = float(loss_by_hand(path, plain.folder(rows), "validation", "own").sum())
    assert losses[6] == pytest.approx(end, abs=1e-4), "the last step is the end"
    tokens = end / uniform["validation"][f"{uniform['rate']:g}"]
    mine = base["validation"][f"{base['rate']:g}"] * tokens
    nearest = min(losses, key=lambda step: abs(losses[step] - mine))
    assert base["equal_loss"]["step"] == nearest
    assert base["equal_loss"]["validation"] * tokens == pytest.approx(losses[nearest], abs=1e-3)
    [one] = told["splits"]["test"]["equal_loss"]
    folder = Training(arms_of(load_recipe(path), "base")[0], base["rate"], 3).folder(rows)
    apart = [loss_by_hand(path, where, "test", "own").sum() for where in (folder, steps[nearest])]
    by_hand = float(apart[0] - apart[1]) / told["splits"]["test"]["tokens"]["all"]
    assert one["all"]["value"] == pytest.approx(by_hand, abs=1e-4)
    assert "at equal loss" in Path("out/compare.html").read_text("utf-8")


def test_finished_arms_are_not_trained_again(path, figures, trained):
    words = ("--arms", "uniform,base", "--rates", "0.002,0.02", "--seeds", "2")
    first = figures("compare", path, *words)
    assert len(trained) == 6
    assert figures("compare", path, *words) == first
    assert len(trained) == 6
    gone = next(one for one in Path("out/compare").glob("base-*/rate-*") if (one / "adapter").is_dir())
    shutil.rmtree(gone)
    assert figures("compare", path, *words) == first, "the same training again gives the same figures"
    assert len(trained) == 7
    figures("compare", path, "--arms", "uniform,base,mixed", "--rates", "0.002,0.02", "--seeds", "2")
    assert len(trained) == 7 + 3


def test_trainings_over_other_weights_are_refused_not_taken(path, figures, run, trained, toy, tmp_path):
    own = shutil.copytree(toy, tmp_path / "own-model")
    words = ("compare", path, "--arms", "uniform", "--rates", "0.02", "--seeds", "1", "--set", f"model={own}")
    first = figures(*words)
    weights = own / "model.safetensors"
    os.utime(weights, (1, 1))
    assert figures(*words) == first, "a file that was only touched"
    changed = load_file(weights)
    changed["model.layers.1.mlp.down_proj.weight"][0, 0] += 0.5
    save_file(changed, weights, {"format": "pt"})
    code, _, err = run(*words)
    assert code == 2
    assert "holds trainings over other weights" in err
    assert "--set train.output_dir=FOLDER" in err
    assert len(trained) == 1


def test_a_second_comparison_beside_the_first_is_refused(path, trained):
    """Both would write checkpoints into the same folders."""
    recipe = load_recipe(path)
    arm = arms_of(recipe, "base")[0]
    _, run = Training(arm, 0.02, training_config(recipe).seed).run(read_rows(recipe))
    with run.locked(), pytest.raises(RunError, match="another run is training here"):
        comparing.compare(recipe, [arm], [0.02], 1)
    assert not trained


def test_one_base_scores_every_split_and_each_adapter_is_loaded_once(path, figures, monkeypatch):
    figures("compare", path, "--arms", "uniform,base", "--rates", "0.01", "--seeds", "1")
    loaded, put_on = [], []
    base, on = comparing.load_base, comparing.adapters.attached
    monkeypatch.setattr(comparing, "load_base", lambda recipe: loaded.append(1) or base(recipe))
    monkeypatch.setattr(
        comparing.adapters, "attached", lambda model, folder: put_on.append(folder) or on(model, folder)
    )
    told = figures("compare", path, "--arms", "uniform,base", "--rates", "0.01", "--seeds", "1")
    assert list(told["splits"]) == ["test", "unseen"]
    assert (len(loaded), len(put_on)) == (1, 3)


def test_one_rate_needs_no_validation(recipe, figures, trained):
    path = recipe(toys.toy_rows(users=6, per_user=6), TEXT.replace("validation: 0.2", "validation: 0"))
    told = figures("compare", path, "--arms", "uniform,base", "--rates", "0.01", "--seeds", "1")
    assert len(trained) == 2
    assert [one["rate"] for one in told["arms"]] == [0.01, 0.01]
    assert told["arms"][0]["validation"] == {"0.01": None}


def test_an_arm_that_comes_to_no_loss_is_told_and_left_out(path, figures, monkeypatch):
    real = comparing.train

    def fit(recipe, base, rows, run, what):
        if recipe.train["estimator"] == "base" and recipe.train["learning_rate"] > 0.01:
            raise NonFiniteLossError("The loss is nan")
        return real(recipe, base, rows, run, what)

    monkeypatch.setattr(comparing, "train", fit)
    told = figures("compare", path, "--arms", "uniform,base", "--rates", "0.002,0.02", "--seeds", "1")
    base = told["arms"][1]
    assert (base["rate"], base["failed"]) == (0.002, ["rate 0.02, seed 3"])
    assert base["validation"]["0.02"] is None


def test_page_fits_a_phone(path, run, tmp_path):
    arms = "uniform,base,base:clip_min=0.2:normalize_weights=mean"
    code, out, err = run("compare", path, "--arms", arms, "--rates", "0.01", "--seeds", "1", "--out", "page.html")
    assert code == 0, err
    text = Path("page.html").read_text("utf-8")
    assert "<script" not in text
    assert text.count("<svg") == 8, "two splits, each against uniform and against base: losses and worth"
    assert "base: clip_min=0.2: normalize_weights=mean" in text
    assert "difference from base" in text
    said = " ".join(out.split())
    assert any(f"{group}, test, against uniform: " in said for group in ("Better", "Worse", "Not told from chance"))
    assert "loss on all tokens: base" in said
    assert "Primary figure: what the own profile is worth" in " ".join((out + err).split())
    fits_a_phone(tmp_path, ".wide")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--arms", "uniform,bass"], "'bass' is not one of base, mixed"),
        (["--arms", "base:clip_mn=0.2"], "did you mean clip_min"),
        (["--arms", "base,base"], "base: named twice"),
        (["--arms", "base:clip_min=lots"], "'lots' is not a number"),
        (["--arms", "mixed:train_on=counterfactual"], "does not go with estimator 'mixed'"),
        (["--arms", ","], "name some, such as uniform"),
        (["--rates", "fast"], "write it as 1e-4,3e-4"),
        (["--rates", "1e-4,1e-4"], "stands there once"),
        (["--set", "split.test=0"], "must judge on others. Raise split.test"),
        (["--set", "split.validation=0"], "No validation rows"),
    ],
)
def test_what_cannot_be_compared_is_one_error_before_any_training(path, run, trained, words, expected):
    code, _, err = run("compare", path, *words)
    assert code == 2, err
    assert expected in " ".join(err.split())
    assert "Traceback" not in err
    assert trained == []


def test_grid_is_around_the_recipes_rate(path):
    recipe = load_recipe(path, ["train.learning_rate=2e-4"])
    assert grid(recipe, None) == pytest.approx([1e-4, 2e-4, 4e-4])
    assert grid(recipe, "1e-4, 3e-4") == [1e-4, 3e-4]
    with pytest.raises(RecipeError, match="above 0"):
        grid(recipe, "-1")


def test_answers_of_arms_are_paired_by_query_and_seed(recipe, figures):
    """Answers of each training, means over seeds; an arm that needs no profile is asked without one."""
    arms = "uniform,base,base:train_on=counterfactual"
    path = recipe(toys.toy_rows(users=6, per_user=6), TEXT)
    texts = figures("compare", path, "--arms", arms, "--rates", "0.02", "--seeds", "2")["texts"]
    count = {(one["arm"], one["profile"], one["sampled"]): (one["rows"], one["answers"]) for one in texts["table"]}
    assert count["base", "own", False] == (7, 14)
    assert count["base", "own", True] == (7, 42)
    assert count["untrained", "own", True] == (7, 21)
    assert count["base:train_on=counterfactual", "none", False] == (7, 14)
    assert ("base:train_on=counterfactual", "own", False) not in count
    pairs = {(one["arm"], one["against"]) for one in texts["differences"]}
    assert ("base", "uniform") in pairs
    assert ("base:train_on=counterfactual", "uniform") not in pairs
    [change] = [
        one["change"]
        for one in texts["differences"]
        if (one["arm"], one["against"], one["sampled"]) == ("base", "uniform", False)
    ]
    by_arm = {
        arm: {(one["arm"].rpartition("seed")[2], one["row"]): one["scores"]["chrf"] for one in texts["answers"]
              if one["arm"].startswith(f"{arm}, rate") and not one["sampled"] and one["profile"] == "own"}
        for arm in ("base", "uniform")
    }  # fmt: skip
    assert len(by_arm["base"]) == 14
    by_hand = [value - by_arm["uniform"][key] for key, value in by_arm["base"].items()]
    assert change["chrf"]["value"] == pytest.approx(sum(by_hand) / 14)
    page = Path("out/compare.html").read_text("utf-8")
    assert "Generated text: difference from uniform" in page


def test_adapters_are_judged_on_another_task(recipe, figures, run, tmp_path):
    """The rows of the other recipe, its users' words, its queries; rates by the own validation rows."""
    rows = toys.toy_rows(users=6, per_user=6)
    path = recipe(rows, TEXT)
    other = tmp_path / "other.yaml"
    turned = [{**row, "prompt": row["completion"], "completion": row["prompt"]} for row in rows]
    recipe(turned, TEXT + "profile: {max_tokens: 60}").rename(other)
    other.write_text(other.read_text().replace("rows.jsonl", "turned.jsonl"))
    Path("rows.jsonl").rename("turned.jsonl")
    recipe(rows, TEXT)
    own = figures("compare", path, "--arms", "uniform,base", "--rates", "0.002,0.02", "--seeds", "1")
    judged = figures(
        "compare", path, "--arms", "uniform,base", "--rates", "0.002,0.02", "--seeds", "1", "--judge-on", other
    )
    assert judged["judged_on"] == str(other)
    assert judged["arms"] == own["arms"]
    assert judged["splits"]["test"]["losses"] != own["splits"]["test"]["losses"]
    known = {row["completion"] for row in turned}
    assert {one["written"] for one in judged["texts"]["answers"]} <= known
    assert not {one["written"] for one in own["texts"]["answers"]} & known
    other.write_text(other.read_text().replace("quantization: none", "quantization: nf4"))
    code, _, err = run("compare", path, "--judge-on", other)
    assert code == 2
    assert "quantization" in err
