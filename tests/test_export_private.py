"""What an export says of where it came from: no path of this machine, no user's name or text, on disk or on the Hub."""

import json
from pathlib import Path
from typing import Any

import pytest
import toys

import perce_lite
from perce_lite.data.readers import known_users
from perce_lite.errors import DataError
from perce_lite.export import hub
from perce_lite.export.export import export, verify
from perce_lite.export_targets import TARGETS
from perce_lite.files import METADATA
from perce_lite.model import adapter_files
from perce_lite.model.adapter_files import recipe_of

pytest_plugins = ["cli_fixtures"]


@pytest.fixture(scope="module")
def trained(adapter_folder) -> Path:
    """An adapter whose recipe says more of its machine than it must."""
    path = adapter_folder / METADATA
    metadata = json.loads(path.read_text("utf-8"))
    recipe = metadata["recipe"]
    recipe["data"]["users"] = ["user0", "user1", "user2"]
    recipe["template"]["separator"] = "/"
    recipe["train"] |= {"store": "~/store", "hub_token": "hf_secret", "logging_dir": str(adapter_folder)}
    path.write_text(json.dumps(metadata), encoding="utf-8")
    return adapter_folder


def strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for pair in value.items() for part in pair for text in strings(part)]
    return [text for part in value for text in strings(part)] if isinstance(value, list) else [str(value)]


def their_texts() -> list[str]:
    """Every text of the users' own in the rows."""
    rows = toys.toy_rows()
    profiles = [row["profile"] if isinstance(row["profile"], list) else [row["profile"]] for row in rows]
    items = [item["text"] if isinstance(item, dict) else item for profile in profiles for item in profile]
    return sorted({row["completion"] for row in rows} | set(items))


@pytest.mark.parametrize("target", TARGETS)
def test_no_export_holds_places_names_or_texts(trained, tmp_path, target):
    out = tmp_path / "out"
    export(trained, target, out, force=False)
    written = {file.name: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    private = [*their_texts(), "hf_secret", "~/store"]
    for name, content in written.items():
        assert not [
            text for text in private if text.encode() in content or json.dumps(text)[1:-1].encode() in content
        ], name
        assert str(trained).encode() not in content, f"{name}: the run's folder"
    if METADATA not in written:
        assert target not in ("peft", "vllm")
        return
    said = strings(json.loads(written[METADATA]))
    assert [text for text in said if Path(text).is_absolute()] == ["/"], "the template's separator is no place"
    assert not {"user0", "user1", "user2", str(trained.parent)} & set(said)
    assert verify(out)["target"] == target, "the base is found again all the same"


def test_an_export_answers_and_knows_no_users(trained, tmp_path):
    export(trained, "peft", tmp_path / "out", force=False)
    metadata = adapter_files.read_metadata(tmp_path / "out")
    assert recipe_of(metadata).data.path is None
    with pytest.raises(DataError, match="it is an export, which does not say where they lie"):
        known_users(recipe_of(metadata))
    answers = [
        perce_lite.load(folder).generate("hello", profile="likes cats", max_new_tokens=4)
        for folder in (trained, tmp_path / "out")
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("target", hub.TARGETS)
@pytest.mark.parametrize("links", [True, False])
def test_what_is_uploaded_calls_a_local_base_by_its_name(trained, toy, tmp_path, monkeypatch, target, links):
    out, uploaded = tmp_path / "out", {}
    export(trained, target, out, force=False)
    before = {file.name: file.read_bytes() for file in out.iterdir()}

    class Api:
        def create_repo(self, *args, **kwargs):
            pass

        def upload_folder(self, repo_id, folder_path, commit_message):
            uploaded.update({file.name: file.read_bytes() for file in Path(folder_path).iterdir()})

    def no_links(*args):
        raise OSError

    monkeypatch.setattr(hub, "HfApi", Api)
    if not links:
        monkeypatch.setattr(hub.os, "link", no_links)
    hub.push(out, "me/mine", public=False)
    assert uploaded.keys() == before.keys()
    assert not [name for name, content in uploaded.items() if str(toy.parent.parent).encode() in content]
    assert json.loads(uploaded["proof.json"])["model"] == toy.name
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before, "the export here stays as it is"
    assert [file for file in tmp_path.iterdir() if file not in (out, tmp_path / ".out.lock")] == [], (
        "nothing is left aside"
    )
