"""The disk: the cache folder, safe names, and writing so that a kill or a full disk loses nothing."""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from perce_lite.errors import DiskFullError, PathError

METADATA = "perce_lite.json"
"""The file beside an adapter's weights that says where they come from."""


def home() -> Path:
    """The cache folder: `PERCE_LITE_HOME` where it is set, else the platform's own."""
    import platformdirs

    folder = os.environ.get("PERCE_LITE_HOME")
    return Path(folder).expanduser() if folder else Path(platformdirs.user_cache_dir("perce_lite", appauthor=False))


def safe_name(text: str) -> str:
    """A file name for any text: a readable slug and a hash. Two texts never share one, no text is a path."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:40] or "x"
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"{slug}-{digest}"


def digest(value: Any) -> str:
    """A short hash of anything that JSON can hold, equal for equal content."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def disk_full_is_clear(path: Path, advice: str = "Free some space and run the same command again.") -> Iterator[None]:
    """Turns "no space left" from any writer in the block, safetensors' Rust code included, into one clear error.

    Raises:
        DiskFullError: naming `path`.
    """
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        # The last four are what torch.save and numpy make of it; they do not say so.
        messages = (
            "No space left on device|PytorchStreamWriter failed|unexpected pos|iostream error|requested and .* written"
        )
        if full or re.search(messages, str(error)):
            message = f"The disk is full: {path} could not be written. What was there before is unharmed. {advice}"
            raise DiskFullError(message) from error
        raise


def refuse_unwritable(path: Path, instead: str, folder: bool = False) -> None:
    """Refuses, before any work, a path that nothing could be written to at the end of it.

    instead: what to give, such as "Give another --out."; folder: whether `path` is to be a folder

    Raises:
        PathError: it or what it would lie in is no folder, or may not be written.
    """
    path = path.absolute()
    standing = next(place for place in (path, *path.parents) if place.exists())
    if folder and standing == path and not path.is_dir():
        raise PathError(f"{path}: is a file and must be a folder. {instead}")
    if standing != path and not standing.is_dir():
        raise PathError(f"{path}: cannot be made, for {standing} is a file. {instead}")
    if not os.access(standing, os.W_OK):
        raise PathError(f"{path}: nothing may be written in {standing if standing.is_dir() else path}. {instead}")


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yields a temporary file beside `path` that takes `path`'s place when the block ends well.

    A kill at any moment leaves either the old file or the new one, never half of one. A symbolic link stays: its target
    is replaced. What is no regular file (a pipe, a terminal, /dev/stdout) is written through, never replaced.

    Raises:
        DiskFullError: no space left; the old file stays.
    """
    if _is_special(path):
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch) / "written"
            with path.open("wb") as stream:
                stream.write((Path(scratch) / "written").read_bytes())
        return
    path = path.resolve()
    with disk_full_is_clear(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        aside = Path(name)
        try:
            yield aside
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)


def _is_special(path: Path) -> bool:
    """Whether `path`, or what it links to, exists and is neither a regular file nor a folder."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


@contextmanager
def folder_written_aside(path: Path) -> Iterator[Path]:
    """As `written_aside`, for a whole folder: `path` is replaced only when the block ends well.

    Raises:
        DiskFullError: no space left; the old folder stays.
    """
    with disk_full_is_clear(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name[:40]}.", suffix=".tmp", dir=path.parent))
        try:
            yield aside
            aside.chmod(0o755)
            if path.exists():
                # A folder cannot replace a full one in one step; a kill in between leaves the old one as `.old`.
                old = path.with_name(f".{path.name}.old")
                shutil.rmtree(old, ignore_errors=True)
                os.replace(path, old)
                try:
                    os.replace(aside, path)
                except OSError:
                    os.replace(old, path)
                    raise
                shutil.rmtree(old)
            else:
                os.replace(aside, path)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def bytes_of(path: Path) -> int:
    """Size of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def write_text(path: Path, text: str) -> None:
    """Writes `text` to `path` in UTF-8, whole or not at all."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")
        aside.chmod(0o644)


def json_text(value: Any) -> str:
    """`value` as indented JSON, with a line break at its end."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Writes `value` to `path` as JSON, whole or not at all."""
    write_text(path, json_text(value))


def read_json(path: Path) -> Any:
    """The JSON of `path`, or None where it is absent or torn."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
