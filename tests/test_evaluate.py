"""`perce-lite eval`: figures against full logits, four controls, a stopped run that goes on, a page that is safe."""

import json
from pathlib import Path

import pytest
import torch
import toys
from peft import PeftModel
from test_inspect import EVIL, fits_a_phone, full_logits

from perce_lite.cli import app as cli
from perce_lite.data.pairs import PairMaker
from perce_lite.data.readers import library, read_rows
from perce_lite.data.retrieval import Item
from perce_lite.data.rows import Row, of_split, spread_over_users
from perce_lite.evaluation import answers
from perce_lite.evaluation.conditions import Topics, cases
from perce_lite.evaluation.evaluate import short_names
from perce_lite.recipe import load_recipe

pytest_plugins = ["cli_fixtures"]

PROFILES = ("own", "none", "other user's", "topical match")

TEXT = """
train: {max_steps: 3, learning_rate: 0.05, output_dir: out, store: store, clip_min: 0.05}
split: {test: 0.4, unseen_users: 0.34}
evaluation: {max_rows: 20, max_new_tokens: 3, generated_rows: 2}
"""


@pytest.fixture
def trained(run, recipe) -> Path:
    path = recipe(toys.toy_rows(users=6, per_user=5), TEXT)
    assert run("train", path)[0] == 0
    return path


def by_hand(path: Path, split: str) -> dict[tuple[str, str], list[tuple[str, torch.Tensor]]]:
    """(arm, profile) -> user and log-probs (R,) of each row, from full logits in float64."""
    recipe = load_recipe(path)
    rows = read_rows(recipe)
    maker = PairMaker(toys.toy_tokenizer("chatml"), recipe.template, 1024)
    topics = Topics(library(recipe), recipe.profile.top_k)
    found = cases(maker, spread_over_users(of_split(rows, split), 20), topics, of_split(rows, "train"), candidates=3)
    model = PeftModel.from_pretrained(toys.toy_model("chatml", 600), "out/adapter").double().eval()
    scored: dict[tuple[str, str], list[tuple[str, torch.Tensor]]] = {}
    for name in found[0].passes:
        for case in found:
            scored.setdefault(("out", name), []).append((case.pair.row.user, full_logits(model, case.passes[name])))
            with model.disable_adapter():
                values = full_logits(model, case.passes[name])
            scored.setdefault(("base", name), []).append((case.pair.row.user, values))
    return scored


def test_figures_equal_full_logits(trained, figures):
    told = figures("eval", trained, "--adapter", "out/adapter")
    assert list(told["splits"]) == ["test", "unseen"]
    for split in ("test", "unseen"):
        scored, said = by_hand(trained, split), told["splits"][split]
        pirs = [own - none for (_, own), (_, none) in zip(scored["base", "own"], scored["base", "none"], strict=True)]
        parts = {
            "all": [torch.ones_like(pir) > 0 for pir in pirs],
            "personal": [pir > 0.05 for pir in pirs],
            "others": [pir <= 0.05 for pir in pirs],
            "against topic": [
                own - match > 0.05
                for (_, own), (_, match) in zip(scored["base", "own"], scored["base", "topical match"], strict=True)
            ],
        }
        counted = {part: int(sum(one.sum() for one in mask)) for part, mask in parts.items()}
        assert {part: said["tokens"][part] for part in parts} == counted
        assert said["tokens"]["personal"] > 0
        assert said["tokens"]["against topic"] > 0

        def loss(arm, profile, part, scored=scored, parts=parts):
            values = torch.cat([one[mask] for (_, one), mask in zip(scored[arm, profile], parts[part], strict=True)])
            return -float(values.mean())

        assert len(said["losses"]) == 2 * len(PROFILES)
        for one in said["losses"]:
            for part in parts:
                mine = loss(one["arm"], one["profile"], part)
                assert one[part]["value"] == pytest.approx(mine, abs=1e-4), (split, one["arm"], one["profile"], part)
                assert one[part]["low"] <= one[part]["value"] <= one[part]["high"]
                if one["arm"] != "base":
                    change = mine - loss("base", one["profile"], part)
                    assert one["change"][part]["value"] == pytest.approx(change, abs=1e-4)
        for one in said["worth"]:
            worth = loss(one["arm"], one["over"], "all") - loss(one["arm"], "own", "all")
            assert one["all"]["value"] == pytest.approx(worth, abs=1e-4)
            assert one["gives"]["value"] + one["costs"]["value"] == pytest.approx(worth, abs=1e-4)
            assert one["gives"]["value"] >= 0 >= one["costs"]["value"]
            if one["arm"] != "base":
                before = loss("base", one["over"], "all") - loss("base", "own", "all")
                assert one["change"]["all"]["value"] == pytest.approx(worth - before, abs=1e-4)
        writers_by_hand(scored, said["who"], 5 if split == "test" else 6)  # training knows four users
    changed = [one["change"]["all"]["value"] for one in told["splits"]["test"]["losses"] if one["change"]]
    assert all(abs(value) > 0.01 for value in changed), "the adapter does something"


def writers_by_hand(scored: dict, who: dict, candidates: int) -> None:
    """Top-1 and MRR of the own profile, counted row by row."""
    assert who["candidates"] == candidates
    assert who["chance"]["top1"] == pytest.approx(1 / candidates)
    names = {name for _, name in scored} - {"own", "none"}
    for one in who["arms"]:
        ranks = []
        for row in range(len(scored["base", "own"])):
            own, *others = (-float(scored[one["arm"], name][row][1].sum()) for name in ("own", *names))
            ranks.append(1 + sum(other < own for other in others))
        assert one["top1"]["value"] == pytest.approx(sum(rank == 1 for rank in ranks) / len(ranks))
        assert one["mrr"]["value"] == pytest.approx(sum(1 / rank for rank in ranks) / len(ranks))


def test_unseen_users_are_in_no_training_row(trained):
    rows = read_rows(load_recipe(trained))
    unseen = {row.user for row in of_split(rows, "unseen")}
    assert len(unseen) == 2
    assert unseen.isdisjoint(row.user for name in ("train", "validation", "test") for row in of_split(rows, name))


def test_topical_match_is_the_nearest_text_of_others():
    texts = {
        "ann": [Item("", "the zeppelin over the harbour"), Item("", "rain")],
        "bob": [Item("", "soup with leeks"), Item("", "a zeppelin landed in the harbour at noon")],
        "cyd": [Item("", "leeks in the garden")],
    }
    row = Row("1", "ann", (), ({"role": "user", "content": "Write about the zeppelin in the harbour"},), ())
    matched = Topics(texts, 2).match(row)
    assert matched.profile[0] == texts["bob"][1]
    assert not set(matched.profile) & set(texts["ann"])
    assert Topics({"ann": texts["ann"]}, 2).match(row) is None


def test_general_text_and_answers_are_scored(trained, figures, recipe):
    Path("general.jsonl").write_text(json.dumps({"prompt": "Why?", "completion": "Because it rains."}))
    words = ("eval", trained, "--adapter", "out/adapter", "--set", "evaluation.general=general.jsonl")
    told = figures(*words)
    assert [one["arm"] for one in told["general"]] == ["base", "out"]
    assert told["general"][0]["tokens"] < 20
    ways = [("own", False, 0, 2), ("none", False, 0, 2), ("own", True, 0, 6), ("own", False, 0.25, 2)]
    ways += [("own", False, 0.5, 2), ("own", False, 1, 2)]
    assert [(one["arm"], one["profile"], one["sampled"], one["personal"], one["answers"]) for one in told["texts"]] == [
        *((arm, *way) for way in ways for arm in ("base", "out")),
        ("the person", "–", False, 0, 2),
    ]
    assert [one["arm"] for one in told["spill_over"]] == [one["arm"] for one in told["memory"]] == ["base", "out"]
    assert {"rouge1", "rougeL", "chrf"} <= set(told["texts"][0]["scores"])
    assert len(told["answers"]) == 2 * 2 * (2 + 3 + 3)
    assert "Answers" in Path("out/eval.html").read_text("utf-8")


def test_personal_tokens_by_another_base(trained, figures, toy):
    """The same base as the other one chooses the very tokens, ends of turns apart; one of another family others."""
    told = figures("eval", trained, "--adapter", "out/adapter", "--set", f"evaluation.personal_by={toy}")
    scored = by_hand(trained, "test")
    pairs = zip(scored["base", "own"], scored["base", "none"], strict=True)
    expected = sum(int(((own - none)[:-1] > 0.05).sum()) for (_, own), (_, none) in pairs)
    assert told["splits"]["test"]["tokens"]["by another base"] == expected > 0
    other = toys.toy_folder(Path("other").absolute(), "llama3")
    told = figures("eval", trained, "--adapter", "out/adapter", "--set", f"evaluation.personal_by={other}")
    tokens = told["splits"]["test"]["tokens"]
    assert 0 < tokens["by another base"] < tokens["all"]
    assert "by another base" in Path("out/eval.html").read_text("utf-8")


def test_a_stopped_evaluation_goes_on(trained, run, figures, monkeypatch):
    """Stopped in the middle of the answers: what was scored and answered is not done again."""
    real, calls = answers.generate_batch, []

    def stops(*args, **options):
        calls.append(1)
        if len(calls) == 4:
            raise cli._Interrupted
        return real(*args, **options)

    monkeypatch.setattr(answers, "generate_batch", stops)
    assert run("eval", trained, "--adapter", "out/adapter")[0] == 130
    assert len(json.loads(Path("out/eval-answers.json").read_text())) == 3
    told = figures("eval", trained, "--adapter", "out/adapter")
    assert len(calls) == 4 + 11  # a batch for each of two arms and six ways, and for general questions
    again = figures("eval", trained, "--adapter", "out/adapter")
    assert len(calls) == 15
    assert told == again


def test_page_keeps_text_text_and_fits_a_phone(run, recipe, tmp_path):
    rows = toys.toy_rows(users=4, per_user=4)
    rows = [{**row, "prompt": f"{EVIL} {row['prompt']}", "completion": EVIL + row["completion"]} for row in rows]
    path = recipe(rows, TEXT)
    assert run("train", path)[0] == 0
    code, out, err = run("eval", path, "--adapter", "out/adapter", "--out", "page.html")
    assert code == 0, err
    text = Path("page.html").read_text("utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert text.count("<svg") == 6
    assert "src=" not in text
    assert "General text" in " ".join(out.split())
    fits_a_phone(tmp_path, ".wide")


def test_what_cannot_be_evaluated_is_one_line(trained, run):
    for words, expected in (
        (["--adapter", "nowhere"], "nowhere: there is no such folder"),
        (["--adapter", "out", "--adapter", "out/adapter"], "two arms would be called out"),
        (["--adapter", "out", "--set", "train.profile_pass=frozen"], "Add --set train.profile_pass=full"),
        (["--adapter", "out", "--set", "split.test=0", "--set", "split.unseen_users=0", "--set", "split.validation=0"],
         "No held-out rows"),
        (["--adapter", "out", "--set", "evaluation.general=none.jsonl"], "evaluation.general: there is no file"),
        (["--adapter", "out", "--set", "evaluation.generation={temprature: 1}"], "temprature"),
    ):  # fmt: skip
        code, _, err = run("eval", trained, *words)
        assert code == 2, words
        assert expected in " ".join(err.split())
        assert "Traceback" not in err


def test_arms_are_called_by_the_shortest_end_that_tells_them_apart():
    paths = [Path("/a/base-1/seed-0/adapter"), Path("/a/uniform-2/seed-0/adapter"), Path("/a/other")]
    assert short_names(paths) == ["base-1/seed-0", "uniform-2/seed-0", "other"]
    assert short_names([Path("out/adapter")]) == ["out"]
    assert short_names([Path("/x/out"), Path("/y/out/adapter")]) == ["x/out", "y/out"]
    assert short_names([Path("/x/out"), Path("/x/out/adapter")]) == ["out", "out"]
