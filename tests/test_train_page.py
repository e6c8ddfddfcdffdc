"""`perce-lite train` writes a page: the loss curve, held-out losses, weights, answers; text stays text."""

import json
import shutil
from pathlib import Path

import toys
from test_inspect import fits_a_phone

pytest_plugins = ["cli_fixtures"]

TEXT = (
    "train: {max_steps: 4, learning_rate: 0.02, output_dir: out, store: store, logging_steps: 1}\nsplit: {test: 0.3}\n"
)
EVIL = "<script>alert(1)</script>"


def test_the_page_has_curve_losses_weights_and_answers(run, recipe, tmp_path):
    rows = [{**row, "prompt": f"{EVIL} {row['prompt']}"} for row in toys.toy_rows(users=3, per_user=5)]
    code, _, err = run("train", recipe(rows, TEXT))
    assert code == 0, err
    curve = json.loads(Path("out/figures.json").read_text())["curve"]
    assert [log["step"] for log in curve] == [1, 2, 3, 4]
    assert all(log["unweighted_loss"] > 0 and log["learning_rate"] >= 0 for log in curve)
    text = Path("out/train.html").read_text("utf-8")
    assert text.count("<svg") == 1
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    for title in ("Loss a token on held-out rows", "Training loss", "Weights", "Answers"):
        assert title in text
    shutil.copy("out/train.html", "page.html")
    fits_a_phone(tmp_path, ".wide")


def test_a_run_of_before_has_its_page_too(run, recipe):
    """Figures of an earlier version have no curve; the page is made of what is there."""
    path = recipe(text=TEXT)
    assert run("train", path)[0] == 0
    figures = json.loads(Path("out/figures.json").read_text())
    del figures["curve"]
    Path("out/figures.json").write_text(json.dumps(figures))
    Path("out/train.html").unlink()
    assert run("train", path)[0] == 0
    text = Path("out/train.html").read_text("utf-8")
    assert "Training loss" not in text
    assert "Weights" in text
