"""What goes to the Hub, with the Hub's own calls replaced: private, after a warning; and what a card says."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from export_fixtures import adapter_for, toy_base
from huggingface_hub.errors import LocalTokenNotFoundError

from perce_lite.cli import export as cli_export
from perce_lite.cli import options
from perce_lite.errors import ExportError
from perce_lite.export import export as exports
from perce_lite.export import hub
from perce_lite.model.model_card import model_card

pytest_plugins = ["cli_fixtures"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    return adapter_for(toy_base(folder / "toy"), folder / "run")


class Api:
    """Stands for huggingface_hub.HfApi: takes down what it is asked for."""

    calls: list
    private: bool | None  # of the repository; None: there is none

    def __init__(self):
        self.seen = []

    def whoami(self):
        return {"name": "me"}

    def repo_exists(self, repo):
        return Api.private is not None

    def repo_info(self, repo):
        return SimpleNamespace(private=Api.private)

    def create_repo(self, repo, private, exist_ok):
        Api.calls.append(("create", repo, private))

    def upload_folder(self, repo_id, folder_path, commit_message):
        Api.calls.append(("upload", repo_id, sorted(one.name for one in Path(folder_path).iterdir())))


@pytest.fixture
def api(monkeypatch):
    monkeypatch.setattr(hub, "HfApi", Api)
    Api.calls, Api.private = [], None
    return Api


@pytest.mark.parametrize(("words", "private"), [(["--yes"], True), (["--yes", "--public"], False)])
@pytest.mark.parametrize("target", ["peft", "merged"])
def test_it_is_private_unless_asked_otherwise(adapter, tmp_path, run, api, target, words, private):
    code, out, err = run(
        "export", adapter, "--to", target, "--out", tmp_path / "out", "--push-to-hub", "me/mine", *words
    )
    assert code == 0, err
    told = " ".join(err.split())
    assert "can leak the texts that it was trained on" in told
    assert ("private: you" if private else "everybody, with --public") in told
    assert "Pushed: https://huggingface.co/me/mine" in out
    (_, repo, made_private), (_, _, files) = api.calls
    assert (repo, made_private) == ("me/mine", private)
    assert {"README.md", "BASE_LICENCE.txt", "proof.json"} <= set(files)


def test_it_asks_and_no_is_no(adapter, tmp_path, run, api, monkeypatch):
    words = ("export", adapter, "--to", "peft", "--out", tmp_path / "out", "--push-to-hub", "me/mine")
    code, _, err = run(*words)
    assert code == 2
    assert "nobody can be asked here" in err
    monkeypatch.setattr(options, "sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True)))
    for answer in (False, True):
        monkeypatch.setattr(cli_export.typer, "confirm", lambda *_, answer=answer, **__: answer)
        code, _, err = run(*words)
        assert code == (0 if answer else 2), err
        assert bool(api.calls) == answer == (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words", "told"),
    [
        ({}, ["--to", "gguf", "--push-to-hub", "me/mine"], "goes with peft and merged, not with gguf"),
        ({}, ["--to", "peft", "--push-to-hub", "mine"], "is no repository. Give YOU/NAME"),
        ({"private": False}, ["--to", "peft", "--push-to-hub", "me/mine"], "everybody can read that repository"),
        ({"whoami": None}, ["--to", "peft", "--push-to-hub", "me/mine"], "hf auth login"),
    ],
)
def test_what_cannot_be_pushed_is_said_before_any_work(adapter, tmp_path, run, api, monkeypatch, change, words, told):
    def nobody(self):
        raise LocalTokenNotFoundError("Token is required, but no token found.")

    for name, value in change.items():
        monkeypatch.setattr(Api, name, nobody if value is None else value, raising=False)
    code, _, err = run("export", adapter, *words, "--yes", "--out", tmp_path / "out")
    assert (code, len(err.splitlines())) == (2, 1)
    assert told in err
    assert not (tmp_path / "out").exists()
    assert not api.calls


def test_a_push_that_fails_keeps_the_export(adapter, tmp_path, run, api, monkeypatch):
    def gone(self, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(Api, "upload_folder", gone)
    code, _, err = run(
        "export", adapter, "--to", "peft", "--out", tmp_path / "out", "--push-to-hub", "me/mine", "--yes"
    )
    assert code == 2
    assert "the Hub did not take it: no route" in err
    assert run("export", "--verify", tmp_path / "out")[0] == 0
    assert run("export", adapter, "--to", "peft", "--public")[0] == 2


# The card


def test_the_card_says_what_a_reader_needs(adapter, tmp_path):
    judged = {"arms": {"base": None, "mine": str(adapter.parent)}, "sentences": ["Own profile: 0.1 nats better."]}
    (tmp_path / "eval.json").write_text(json.dumps(judged))
    exports.export(adapter, "peft", tmp_path / "out", False, evaluation=tmp_path / "eval.json")
    card = (tmp_path / "out/README.md").read_text()
    for told in (
        "license: mit",
        "licence mit",
        "fingerprint `x`",
        "of 1 user",
        "MiB of weights",
        "## Intended use",
        "with the user's profile in the prompt: give the profile when you use it",
        "Own profile: 0.1 nats better.",
    ):
        assert told in card
    assert "base_model" not in card, "a folder is no name on the Hub"


def test_an_evaluation_of_another_adapter_is_refused(adapter, tmp_path):
    (tmp_path / "eval.json").write_text(json.dumps({"arms": {"base": None, "mine": "other"}, "sentences": []}))
    with pytest.raises(ExportError, match=r"it judges .*other, not"):
        exports.export(adapter, "peft", tmp_path / "out", False, evaluation=tmp_path / "eval.json")
    for text in ("{}", "no"):
        (tmp_path / "eval.json").write_text(text)
        with pytest.raises(ExportError, match="is not what `perce-lite eval --json FILE` writes"):
            exports.export(adapter, "peft", tmp_path / "out", False, evaluation=tmp_path / "eval.json")
    assert not (tmp_path / "out").exists()


def test_what_a_card_says_of_training(adapter):
    about = json.loads((adapter / "perce_lite.json").read_text())
    about["recipe"] |= {"model": "smollm2-135m", "lora": {"r": 4}, "train": {"learning_rate": 0.1, "logging_steps": 1}}
    about |= {"train_on": "counterfactual", "steps": 7, "recipe_fingerprint": "abc"}
    about["metrics"]["losses"] = [{"profile": "own", "base": 3.0, "adapter": 2.5}]
    card = model_card(about, merged=True, size=2**20)
    for told in (
        "library_name: transformers",
        "base_model: HuggingFaceTB/SmolLM2-135M-Instruct",
        "license: apache-2.0",
        "- Recipe `abc`: r 4, 7 steps; learning_rate 0.1",
        "- Size: 1.0 MiB",
        "without the profile in the prompt: use it without one",
        "| own | 3.000 | 2.500 |",
    ):
        assert told in card
    assert "logging_steps" not in card
