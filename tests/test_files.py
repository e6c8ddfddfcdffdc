"""Writing so that nothing is lost, and names that no text can break out of."""

import errno
import json
import os
import shutil
import subprocess
from collections import deque
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from perce_lite.errors import DiskFullError, PerceLiteError
from perce_lite.files import (
    digest,
    disk_full_is_clear,
    folder_written_aside,
    home,
    read_json,
    safe_name,
    settle,
    write_json,
    write_text,
    written_aside,
)
from perce_lite.model.logprob_store import Store

ODD = ["../../etc", "", *"/.~🎉éeE\0\n", "..", "a/b", "a\\b", "e\u0301", "a" * 300, "a" * 301, "con", "\ud800"]


@settings(deadline=None)
@given(st.text() | st.text(alphabet="./\\~\0\n ", max_size=8) | st.text(st.characters(categories=["Cs", "Cc"])))
@example("../../etc")
@example("a" * 300)
def test_a_name_is_one_plain_part_of_a_path(text):
    name = safe_name(text)
    assert 0 < len(name) <= 60
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert (Path("/store") / name).resolve().parent == Path("/store")
    assert name == safe_name(text)


@settings(deadline=None)
@given(st.lists(st.text(), unique=True, max_size=20))
def test_two_texts_never_share_a_name(texts):
    names = {safe_name(text) for text in [*texts, *ODD]}
    assert len(names) == len({*texts, *ODD})


def test_a_name_can_be_read_and_used(tmp_path):
    assert safe_name("Crème Brûlée!").startswith("creme-brulee-")
    for text in ODD:
        (tmp_path / safe_name(text)).write_text("x")
    assert len(list(tmp_path.iterdir())) == len(ODD)


def test_digest_knows_content_not_order():
    assert digest({"a": 1, "b": [2, "é"]}) == digest({"b": [2, "é"], "a": 1})
    assert len({digest(value) for value in (1, "1", [1], [[1]], {"1": 1}, None, 1.5, "\ud800")}) == 8


def test_home_is_where_the_variable_says(monkeypatch, tmp_path):
    monkeypatch.setenv("PERCE_LITE_HOME", str(tmp_path))
    assert home() == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PERCE_LITE_HOME", "~/kept")
    assert home() == tmp_path / "kept"


def test_a_file_takes_its_place_at_the_end(tmp_path):
    path = tmp_path / "new folder" / "a.txt"
    with written_aside(path) as aside:
        assert aside.parent == path.parent
        aside.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert [one.name for one in path.parent.iterdir()] == ["a.txt"]
    write_text(path, "é\n")
    assert path.read_bytes() == "é\n".encode()


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), OSError(errno.EACCES, "no")], ids=repr)
def test_a_failure_keeps_the_old_file(tmp_path, error):
    path = tmp_path / "a.json"
    write_json(path, {"old": "é"})

    def fail() -> None:
        with written_aside(path) as aside:
            aside.write_text("half")
            raise error

    with pytest.raises(type(error)) as caught:
        fail()
    assert caught.value is error
    assert json.loads(path.read_text("utf-8")) == {"old": "é"}
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_takes_its_place_at_the_end(tmp_path):
    path = tmp_path / "adapter"
    for version in ("one", "two"):
        with folder_written_aside(path) as aside:
            (aside / version).write_text(version)
            assert not (path / version).exists()
        assert [one.name for one in path.iterdir()] == [version]
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt()], ids=repr)
def test_a_failure_keeps_the_old_folder(tmp_path, error):
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "weights").write_text("old")

    def fail() -> None:
        with folder_written_aside(path) as aside:
            (aside / "weights").write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert (path / "weights").read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(tmp_path, monkeypatch):
    path, rename = tmp_path / "adapter", os.replace
    path.mkdir()
    (path / "weights").write_text("old")

    def replace(source: Path, target: Path) -> None:
        if target == path and str(source).endswith(".tmp"):
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(DiskFullError), folder_written_aside(path) as aside:
        (aside / "weights").write_text("new")
    assert (path / "weights").read_text() == "old"


FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError("[enforce fail at inline_container.cc] . No space left on device"),
]


@pytest.mark.parametrize("error", FULL, ids=repr)
def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch, error):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def write(self: Path, *args, **kwargs) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", write)
        with pytest.raises(DiskFullError, match="is full") as caught:
            write_text(path, "new")
    assert str(path) in str(caught.value)
    assert "Free some space" in str(caught.value)
    assert caught.value.__cause__ is error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(DiskFullError, match=r"Do this\."), disk_full_is_clear(path, "Do this."):
        raise error


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "Permission denied"), ValueError("x")], ids=repr)
def test_another_error_stays_what_it_is(tmp_path, error):
    with pytest.raises(type(error)) as caught, disk_full_is_clear(tmp_path):
        raise error
    assert caught.value is error


SAYS_SO = [
    ValueError("row 3: 'No space left on device' is no date"),
    RuntimeError("user bo wrote: unexpected pos"),
    OSError(errno.EACCES, "No space left on device"),
    PerceLiteError("No space left on device"),
    RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 128 vs 22"),  # and the disk has room
    OSError("1000 requested and 10 written"),
]


@pytest.mark.parametrize("error", SAYS_SO, ids=repr)
def test_what_only_says_so_is_no_full_disk(tmp_path, error):
    with pytest.raises(type(error)) as caught, disk_full_is_clear(tmp_path / "not there yet" / "a.pt"):
        raise error
    assert caught.value is error


def test_torch_s_words_count_where_the_disk_is_full(small_disk):
    disk = small_disk("size=1m")
    with pytest.raises(DiskFullError, match=r"a\.pt"), written_aside(disk / "a.pt") as aside:
        torch.save({"a": torch.ones(2_000_000)}, aside)
    assert list(disk.iterdir()) == []


def test_the_next_write_ends_what_a_killed_one_has_left(tmp_path):
    path = tmp_path / "adapter"
    others = [tmp_path / name for name in (".adapter-peft.abc12345.tmp", ".adapters.old", "adapter.tmp")]
    for folder in others:
        folder.mkdir()

    def fill(folder: Path, text: str) -> None:
        folder.mkdir()
        (folder / "weights").write_text(text)

    fill(tmp_path / ".adapter.old", "old")
    fill(tmp_path / ".adapter.abc12345.tmp", "half")
    settle(path)
    assert (path / "weights").read_text() == "old", "killed between two renames: the old one is back"
    fill(tmp_path / ".adapter.old", "old")
    with folder_written_aside(path) as aside:
        (aside / "weights").write_text("new")
    assert (path / "weights").read_text() == "new"
    assert sorted(tmp_path.iterdir()) == sorted([path, *others])


def test_json_that_is_absent_or_torn_reads_as_none(tmp_path):
    assert read_json(tmp_path / "no.json") is None
    (tmp_path / "torn.json").write_text('{"a": ')
    assert read_json(tmp_path / "torn.json") is None
    (tmp_path / "latin.json").write_bytes(b'"\xe9"')
    assert read_json(tmp_path / "latin.json") is None
    write_json(tmp_path / "a.json", {"a": ["é", 1.5, None]})
    assert read_json(tmp_path / "a.json") == {"a": ["é", 1.5, None]}


# A disk that is full for real


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a small tmpfs with the options given."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a tmpfs needs root")
    mounted = []

    def mount(options: str) -> Path:
        path = tmp_path / "disk"
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", str(path)], check=True)


def test_a_disk_that_is_full_keeps_the_old_file(small_disk):
    disk = small_disk("size=1m")
    path, folder = disk / "figures.json", disk / "adapter"
    write_json(path, {"old": 1})
    with folder_written_aside(folder) as aside:
        (aside / "weights").write_bytes(b"old")
    with pytest.raises(DiskFullError, match=r"figures\.json"):
        write_json(path, "x" * 2_000_000)
    with pytest.raises(DiskFullError, match="adapter"), folder_written_aside(folder) as aside:
        (aside / "weights").write_bytes(bytes(2_000_000))
    assert read_json(path) == {"old": 1}
    assert (folder / "weights").read_bytes() == b"old"
    assert sorted(one.name for one in disk.iterdir()) == ["adapter", "figures.json"]
    store = Store(disk, "base")
    store.put("user", {"a": torch.ones(10)})
    with pytest.raises(DiskFullError, match="user"):  # written by safetensors' Rust code
        store.put("user", {"b": torch.ones(500_000)})
    assert list(store.get("user")) == ["a"]
    store.put("user", {"c": torch.ones(10)})  # what failed left nothing behind that takes up the disk
    assert sorted(store.get("user")) == ["a", "c"]


def test_a_disk_without_inodes_is_a_full_disk_to_the_store(small_disk):
    disk = small_disk("size=1m,nr_inodes=8")
    store = Store(disk, "base")
    store.put("first", {"a": torch.ones(10)})
    with pytest.raises(OSError, match="No space"):
        deque(map(Path.touch, (disk / str(number) for number in range(8))))
    with pytest.raises(DiskFullError):
        store.put("second", {"a": torch.ones(10)})
