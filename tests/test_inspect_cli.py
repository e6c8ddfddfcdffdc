"""`perce-lite inspect` as a command: what it writes and prints, what it scores, and how it looks with an adapter on."""

import json
from pathlib import Path

import pytest
import torch
import toys
from cli_fixtures import TRAIN
from peft import PeftModel
from test_inspect import Page, full_logits

from perce_lite.data.pairs import PairMaker
from perce_lite.evaluation import inspect as inspection
from perce_lite.recipe import load_recipe

pytest_plugins = ["cli_fixtures"]


def test_page_figures_and_short_form_say_the_same(run, recipe):
    code, out, err = run("inspect", recipe(text=TRAIN), "--rows", 7, "--top", 3, "--json", "figures.json")
    assert code == 0, err
    figures = json.loads(Path("figures.json").read_text("utf-8"))
    text = Path("out/inspect.html").read_text("utf-8")
    page = Page(text)
    units = [unit for row in figures["rows"] for unit in row["units"]]
    assert len(figures["rows"]) == 7
    assert [one["text"] for one in page.tokens] == [unit["text"] for unit in units]
    for one, unit in zip(page.tokens, units, strict=True):
        assert f"PIR {unit['pir']:+.2f}" in one["aria-label"]
        assert f"weight {unit['weight']:.2f}" in one["aria-label"]
    said = " ".join(out.split())
    for word in figures["words"]:
        assert f"{word['word']} {word['pir']:+.1f}" in said
        assert f"<b>{word['word']}</b>" in text
    assert figures["signal"]["sentence"] in said
    for who in ("own", "swapped"):
        for form, key in (("{:+.3f}", "pir_mean"), ("{:.1%}", "share_at_min"), ("{:.1%}", "effective_tokens")):
            assert form.format(figures[who][key]) in said
            assert f"<td>{form.format(figures[who][key])}</td>" in text
    assert "out/inspect.html" in "".join(out.split()), "a long path may be wrapped"


def test_training_scores_nothing_that_inspect_has_scored(run, recipe, figures):
    path = recipe(text=TRAIN)
    assert run("inspect", path, "--out", "mine.html")[0] == 0
    assert Path("mine.html").is_file()
    assert figures("train", path)["weights"]["store_hits"] == 1.0


def test_with_an_adapter_the_factual_side_is_its_own(run, recipe, figures, toy):
    text = TRAIN.replace("max_steps: 1", "max_steps: 3, learning_rate: 0.05")
    path = recipe(toys.toy_rows(users=2, per_user=3), text)
    assert run("train", path)[0] == 0
    bare, adapted = figures("inspect", path), figures("inspect", path, "--adapter", "out/adapter")
    assert adapted["adapter"] == "out/adapter"
    base = toys.toy_model("chatml", 600)
    model = PeftModel.from_pretrained(base, "out/adapter").double()
    read = load_recipe(path)
    maker = PairMaker(toys.toy_tokenizer("chatml"), read.template, 1024)
    rows = {row.where: row for row in inspection.read_rows(read)}
    moved = 0.0
    for before, after in zip(bare["rows"], adapted["rows"], strict=True):
        [pair] = maker.make([rows[after["row"]]])
        with model.disable_adapter():
            counterfactual = full_logits(model, pair.counterfactual)
        pir = full_logits(model, pair.factual) - counterfactual
        said = [one for unit in after["units"] for one in unit["token_pirs"]]
        torch.testing.assert_close(torch.tensor(said).double(), pir, atol=1e-4, rtol=0)
        assert sum(unit["counterfactual"] for unit in after["units"]) == pytest.approx(
            sum(unit["counterfactual"] for unit in before["units"]), abs=1e-4
        )
        moved += abs(after["pir_mean"] - before["pir_mean"])
    assert moved > 0.01
    assert "the adapter's, those without it the bare base's" in Path("out/inspect.html").read_text("utf-8")


def test_what_cannot_be_inspected_is_one_line(run, recipe):
    path = recipe(text=TRAIN)
    for words, expected in (
        (["--adapter", "nowhere"], "nowhere: there is no such folder"),
        (["--user", "nobody"], "user nobody: the data knows no such user; it has user0"),
    ):
        code, _, err = run("inspect", path, *words)
        assert code == 2
        assert expected in " ".join(err.split())
        assert "Traceback" not in err
    assert not Path("out/inspect.html").exists()
