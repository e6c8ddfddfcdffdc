"""A path opened for reading: a file, all files of a folder, or the files in a ZIP, which is never unpacked to disk."""

import io
import lzma
import os
import re
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from perce_lite.errors import DataError

LARGEST_FILE = 64 * 2**20
"""Bytes of a file that is read whole. Mailboxes are read mail by mail and may be larger."""

LARGEST_ZIP = 2**30
"""Bytes that the files in one ZIP may unpack to, all together."""

MOST_FILES = 100_000
"""Files in a folder or a ZIP."""


LINK, HIDDEN_FOLDER, NO_FILE = "a link to a folder", "hidden folder", "a broken link, or no regular file"
"""Reasons for which something in a folder is not looked into."""


@dataclass(frozen=True)
class Found:
    """A file that was found.

    name: as it stands in the folder or the ZIP, what no terminal and no file in UTF-8 takes replaced; never a path
    open: gives it for reading; OSError where it cannot be read
    left_out: why it is not looked into, if it is a link, no regular file or a hidden folder
    """

    name: str
    open: Callable[[], IO[bytes]]
    left_out: str | None = None

    @property
    def ending(self) -> str:
        """.txt and the like, in lower case."""
        return PurePosixPath(self.name).suffix.lower()

    @property
    def hidden(self) -> bool:
        """Whether it is a system's own, such as .DS_Store or __MACOSX/."""
        return any(
            part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(self.name).parts if part != ".."
        )

    def content(self) -> bytes | None:
        """All of it; None where it is larger than LARGEST_FILE."""
        with self.open() as file:
            read = file.read(LARGEST_FILE + 1)
        return None if len(read) > LARGEST_FILE else read

    def head(self) -> bytes:
        """The first few thousand bytes."""
        with self.open() as file:
            return file.read(4096)


def files_of(path: Path) -> list[Found]:
    """The files that `path` stands for, in the order of their names; 2.txt stands ahead of 10.txt.

    Raises:
        DataError: no such file, an empty folder, a ZIP that is broken, or too many files.
    """
    if not path.exists():
        raise DataError(f"{path}: there is no such file or folder")
    if path.is_dir():
        files = _in_folder(path)
    elif path.suffix.lower() == ".zip":  # other files are ZIPs inside too, .docx and the like
        files = _in_zip(path)
    else:
        files = [Found(_shown(path.name), partial(_file, path))]
    if not files:
        raise DataError(f"{path}: there are no files in it")
    if len(files) > MOST_FILES:
        raise DataError(f"{path}: {len(files)} files; at most {MOST_FILES} are read. Name a folder in it.")
    return sorted(files, key=lambda file: _natural(file.name))


_UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Controls, which a stranger's ZIP may steer a terminal with, and what stands for bytes that are no UTF-8."""


def _shown(name: str) -> str:
    return _UNSHOWN.sub("\ufffd", name)


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts numbers in names by size: a number is its length without zeros, then its digits."""
    parts = [part.lstrip("0") if number % 2 else part for number, part in enumerate(re.split(r"([0-9]+)", name))]
    return [(len(part) if number % 2 else 0, part.casefold()) for number, part in enumerate(parts)]


def _file(path: Path) -> IO[bytes]:
    return path.open("rb")


def _in_folder(folder: Path) -> list[Found]:
    files = []
    for root, folders, names in os.walk(folder, followlinks=False):  # a link may lead round in a circle
        for path in [Path(root) / name for name in (*folders, *names)]:
            left_out = _why_left_out(path)
            if left_out is not None or path.name in names:
                files.append(Found(_shown(path.relative_to(folder).as_posix()), partial(_file, path), left_out))
        folders[:] = [name for name in folders if not name.startswith(".") or name == ".obsidian"]
    return files


def _why_left_out(path: Path) -> str | None:
    if path.is_dir():
        hidden = path.name.startswith(".") and path.name != ".obsidian"  # which says where a vault's templates are
        return LINK if path.is_symlink() else HIDDEN_FOLDER if hidden else None
    return None if path.is_file() else NO_FILE


def _in_zip(path: Path) -> list[Found]:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:  # the last: names that are no text
        raise DataError(f"{path}: not a ZIP that can be read: {error}") from error
    meter = _Meter(path)
    entries = [entry for entry in archive.infolist() if not entry.is_dir()]
    return [Found(_shown(entry.filename), partial(_opened, archive, entry, meter)) for entry in entries]


def _opened(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, meter: "_Meter") -> IO[bytes]:
    try:
        return io.BufferedReader(_Metered(archive.open(entry), meter))
    except (RuntimeError, zipfile.BadZipFile, ValueError) as error:  # a password, an unknown compression, a torn entry
        raise OSError(str(error)) from error


@dataclass
class _Meter:
    """Bytes that came out of one ZIP: what its directory says of their size may be a lie."""

    path: Path
    read: int = 0

    def count(self, more: int) -> None:
        self.read += more
        if self.read > LARGEST_ZIP:
            raise DataError(
                f"{self.path}: it unpacks to more than {LARGEST_ZIP / 2**20:.0f} MiB. If you know what is in it, "
                "unpack it yourself and give the folder."
            )


class _Metered(io.RawIOBase):
    """A file in a ZIP with every byte counted, and every way in which it can be torn an OSError."""

    def __init__(self, file: IO[bytes], meter: _Meter) -> None:
        self.file, self.meter = file, meter

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills `buffer`; gives the number of bytes."""
        try:
            read = self.file.read(len(buffer))
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError) as error:
            raise OSError(str(error)) from error
        buffer[: len(read)] = read
        self.meter.count(len(read))
        return len(read)
