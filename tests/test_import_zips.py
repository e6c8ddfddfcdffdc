"""Folders and ZIPs, hostile ones too."""

import os
import zipfile
from pathlib import Path

import pytest
import writing_fixtures as planted
from hypothesis import given, settings
from hypothesis import strategies as st
from writing_fixtures import mail, mbox, prose, read

from perce_lite.data.importers import archives as unpacking
from perce_lite.data.importers.archives import files_of
from perce_lite.data.importers.reading import Reader
from perce_lite.data.importers.writings import Notes
from perce_lite.errors import DataError


def zipped(path: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_a_zip_reads_as_the_folder_does(tmp_path):
    files = {
        "b/2.txt": prose(1),
        "b/10.txt": prose(2),
        "chat.txt": planted.whatsapp(["1/1/21", "1/2/21"]),
        "Inbox": mbox(mail("a@x.org", "S", prose(3))),
    }
    folder = planted.write(tmp_path / "f", files)
    archive = zipped(tmp_path / "f.zip", {name: (folder / name).read_bytes() for name in files})
    there = read(folder, "Ann")[0]
    assert [one.text for one in there] == [prose(1), prose(2), prose(3), prose(1)]
    assert read(archive, "Ann")[0] == there


def test_names_in_the_order_of_their_numbers(tmp_path):
    names = ["a1", "a02", "a2b", "a10", "a" + "9" * 5000, "a", "a²", "²"]
    archive = zipped(tmp_path / "z.zip", {f"{name}.txt": b"x" for name in reversed(names)})
    assert [one.name.removesuffix(".txt") for one in files_of(archive)] == sorted(names, key=names.index)


def test_names_that_lead_out_of_a_zip_write_nothing(tmp_path):
    (tmp_path / "deep").mkdir()
    names = ["../../out.txt", "/abs.txt", "a/../../../b.txt", "C:\\x.txt", "__MACOSX/._a.txt"]
    archive = zipped(tmp_path / "deep/z.zip", {name: prose(number).encode() for number, name in enumerate(names)})
    before = sorted(tmp_path.rglob("*"))
    found, notes = read(archive)
    assert {one.text for one in found} == {prose(number) for number in range(4)}
    assert notes.skipped == {"hidden file": ["__MACOSX/._a.txt"]}
    assert sorted(tmp_path.rglob("*")) == before


def test_names_that_are_no_text_or_steer_a_terminal_are_shown_harmlessly(tmp_path):
    (tmp_path / "in").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/in/caf\xe9.txt")).write_text(prose(1))
    assert [one.source for one in read(tmp_path / "in")[0]] == ["caf\ufffd.txt"]
    archive = zipped(tmp_path / "z.zip", {"a\x1b[2Jb.txt": prose(2).encode(), "\u202egpj.txt": prose(3).encode()})
    assert sorted(one.source for one in read(archive)[0]) == ["a\ufffd[2Jb.txt", "\ufffdgpj.txt"]


def test_names_in_a_zip_that_are_no_utf8_after_all(tmp_path):
    """The directory's are an error, for nothing can be found by it; those beside a file cost that file alone."""
    whole = zipped(tmp_path / "z.zip", {"aé.txt": prose(1).encode(), "b.txt": prose(2).encode()}).read_bytes()
    name = "aé.txt".encode()
    (tmp_path / "z.zip").write_bytes(whole.replace(name, b"a\xff\xff.txt", 1))
    found, notes = read(tmp_path / "z.zip")
    assert [one.text for one in found] == [prose(2)]
    assert notes.skipped["cannot be read"][0].startswith("aé.txt (")
    (tmp_path / "z.zip").write_bytes(whole.replace(name, b"a\xff\xff.txt"))
    with pytest.raises(DataError, match="not a ZIP that can be read"):
        files_of(tmp_path / "z.zip")


def test_a_zip_bomb_is_stopped_by_what_comes_out_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(unpacking, "LARGEST_ZIP", 2**20)
    archive = zipped(tmp_path / "bomb.zip", {f"{number}.txt": b"a " * 2**18 for number in range(4)})
    assert archive.stat().st_size < 2**14
    with pytest.raises(DataError, match="unpacks to more than 1 MiB"):
        read(archive)


def test_a_size_that_is_a_lie_is_not_believed(tmp_path, monkeypatch):
    """The directory says ten bytes; what comes out is counted all the same, or is no good."""
    monkeypatch.setattr(unpacking, "LARGEST_FILE", 2**10)
    archive = zipped(tmp_path / "lie.zip", {"a.txt": b"a " * 2**14, "b.txt": prose(1).encode()})
    content = archive.read_bytes().replace((2**15).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    archive.write_bytes(content)
    found, notes = read(archive)
    assert [one.text for one in found] == [prose(1)]
    assert [where for where in notes.skipped.values() if where[0].startswith("a.txt")]


def test_a_file_that_is_too_large_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(unpacking, "LARGEST_FILE", 2**10)
    found, notes = read(planted.write(tmp_path, {"a.txt": "a " * 2**10, "b.txt": prose(1)}))
    assert ([one.text for one in found], list(notes.skipped.values())) == ([prose(1)], [["a.txt"]])


def test_torn_locked_and_nested_zips(tmp_path):
    archive = zipped(tmp_path / "z.zip", {"a.txt": prose(1).encode() * 50, "b.txt": prose(2).encode()})
    content = bytearray(archive.read_bytes())
    content[60] ^= 0xFF  # within a.txt
    archive.write_bytes(content)
    found, notes = read(archive)
    assert [one.text for one in found] == [prose(2)]
    assert notes.skipped["cannot be read"][0].startswith("a.txt (")
    locked = zipped(tmp_path / "l.zip", {"a.txt": prose(1).encode()}, zipfile.ZIP_STORED)
    content = bytearray(locked.read_bytes())
    content[6] |= 1  # encrypted, says its own head
    content[content.rindex(b"PK\x01\x02") + 8] |= 1  # and the directory's
    locked.write_bytes(content)
    assert "password" in read(locked)[1].skipped["cannot be read"][0]
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 nothing more")
    with pytest.raises(DataError, match="not a ZIP that can be read"):
        files_of(tmp_path / "broken.zip")
    nested = zipped(tmp_path / "n.zip", {"in.zip": archive.read_bytes()})
    assert read(nested)[1].skipped == {"not a kind that is read: .zip": ["in.zip"]}


def test_a_file_without_rights_and_a_link_in_a_circle(tmp_path):
    planted.write(tmp_path, {"a.txt": prose(1), "sub/b.txt": prose(2)})
    (tmp_path / "sub/round").symlink_to(tmp_path)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    assert [one.name for one in files_of(tmp_path) if one.left_out is None] == ["a.txt", "sub/b.txt"]
    assert {name: len(where) for name, where in read(tmp_path)[1].skipped.items()} == {
        "a broken link, or no regular file": 1,
        "a link to a folder": 1,
    }


def test_too_many_files(tmp_path, monkeypatch):
    monkeypatch.setattr(unpacking, "MOST_FILES", 2)
    planted.write(tmp_path, {f"{number}.txt": prose(number) for number in range(3)})
    with pytest.raises(DataError, match="3 files; at most 2 are read"):
        files_of(tmp_path)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300), st.sampled_from([".txt", ".md", ".csv", ".json", ".jsonl", ".eml", ".mbox", ""]))
def test_no_bytes_break_a_reader(tmp_path_factory, content, ending):
    folder = planted.write(tmp_path_factory.mktemp("in"), {f"a{ending}": content})
    reader = Reader(Notes())
    reader.read(files_of(folder))
    assert all(isinstance(one.text, str) for one in reader.texts)
