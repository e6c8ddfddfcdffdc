"""The command line where it still fails people."""

import json
from pathlib import Path

import pytest
import toys
from cli_fixtures import TRAIN

pytest_plugins = ["cli_fixtures"]


def test_a_folder_of_no_model_is_one_line(recipe, run):
    Path("empty").mkdir(exist_ok=True)
    code, _, err = run("check", recipe(), "--set", "model=empty")
    assert (code, len(err.splitlines())) == (2, 1)


@pytest.mark.parametrize("card", [{}, {"recipe": {"newer": 1, "data": {"path": "x"}}, "train_on": "factual"}], ids=str)
def test_an_adapter_of_another_version_is_a_clear_error(run, tmp_path, card):
    (tmp_path / "adapter_model.safetensors").touch()
    (tmp_path / "perce_lite.json").write_text(json.dumps(card))
    code, _, err = run("generate", "--adapter", tmp_path, "--prompt", "x", "--no-profile")
    assert (code, tmp_path.name in err) == (2, True)


def test_a_run_that_never_began_does_not_own_its_folder(recipe, run, plain):
    words = ["train", recipe(text=TRAIN), "--set", f"model={plain}"]
    assert run(*words)[0] == 2
    assert run(*words, "--set", "train.chat_template_path=mine.jinja")[0] == 0


def test_generate_finds_the_model_from_another_folder(recipe, run, toy, tmp_path, monkeypatch):
    (tmp_path / "near").symlink_to(toy)
    path = recipe(text=TRAIN)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run("train", path, "--set", "model=near")[0] == 0
    assert run("generate", "--adapter", "out", "--prompt", "x", "--no-profile", "--max-new-tokens", "1")[0] == 0


def test_a_chat_template_is_found_from_another_folder(recipe, run, plain, tmp_path, monkeypatch):
    words = ["train", recipe(text=TRAIN), "--set", f"model={tmp_path / plain}"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run(*words, "--set", "train.chat_template_path=mine.jinja")[0] == 0


@pytest.mark.parametrize(("command", "key"), [("check", "user"), ("train", "prompt"), ("train", "user")])
def test_brackets_in_user_text_are_text(recipe, run, command, key):
    rows = [{**row, key: f"{row[key]} [/INST]"} for row in toys.toy_rows()]
    code, out, _ = run(command, recipe(rows, TRAIN))
    assert (code, "[/INST]" in out) == (0, True)


@pytest.mark.parametrize("words", [["template.separator=' ## '", "train.max_length=100"], ["profile.max_tokens=12"]])
def test_a_profile_that_was_cut_to_fit_is_shown_as_profile(recipe, figures, words):
    rows = toys.toy_rows()
    if "12" in words[0]:
        rows = [{**row, "profile": " ".join(one["text"] for one in row["profile"])} for row in rows]
    found = figures("check", recipe(rows), *(part for word in words for part in ("--set", word)))
    assert found["splits"]["train"]["rows_with_items_left_out"] > 10
    assert "profile" in [kind for _, kind in found["example"]["with_profile"]]


def test_json_to_a_folder_is_refused(recipe, run, tmp_path):
    assert run("check", recipe(), "--json", tmp_path)[0] == 2
