"""On real commit messages: training helps with the own profile, and the own profile beats another user's."""

import json

import pytest
from conftest import DATA

import perce_lite
from perce_lite.evaluation.summary import train_and_measure
from perce_lite.model.adapter_files import read_metadata
from perce_lite.recipe import load_recipe

DOCS = DATA / "curl_commits" / "docs.jsonl"


@pytest.mark.slow
@pytest.mark.skipif(not DOCS.is_file(), reason=f"the real text is not here: {DOCS}")
def test_short_training_on_commit_messages(real_model, tmp_path):
    recipe = load_recipe(
        "recipes/documents.yaml",
        [
            f"data.path={DOCS}",
            "data.max_rows=40",
            "evaluation.max_rows=32",
            "evaluation.max_new_tokens=8",
            "train.max_length=320",
            "profile.max_tokens=120",
            "train.learning_rate=1e-3",
            f"train.output_dir={tmp_path / 'out'}",
            f"train.store={tmp_path / 'store'}",
        ],
    )
    figures = train_and_measure(recipe)
    losses = {one["profile"]: one for one in figures["losses"]}
    assert losses["own"]["adapter"] < losses["own"]["base"] - 0.05, "training lowered the held-out loss"
    assert losses["own"]["adapter"] < losses["other user's"]["adapter"], "the own profile beats another user's"
    assert losses["own"]["rows"] == 30, "eight rows do not tell the profiles apart"
    card = read_metadata(tmp_path / "out" / "adapter")
    texts = [json.loads(line)["text"] for line in DOCS.read_text(encoding="utf-8").splitlines()]
    assert not any(text in json.dumps(card, ensure_ascii=False) for text in texts if len(text) > 40)
    again = train_and_measure(recipe)
    assert again["losses"] == figures["losses"], "a finished run is not trained again"
    writer, options = perce_lite.load(tmp_path / "out" / "adapter"), {"profile": "", "max_new_tokens": 12}
    adapter, base = (writer.generate("Write a commit message.", use_adapter=on, **options) for on in (True, False))
    assert adapter != base
