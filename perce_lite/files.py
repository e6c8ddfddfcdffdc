"""The disk: the cache folder, safe names, and writing so that a kill or a full disk loses nothing."""

import errno
import glob
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

from safetensors import SafetensorError

from perce_lite.errors import DiskFullError, PathError

METADATA = "perce_lite.json"
"""The file beside an adapter's weights that says where they come from."""


def home() -> Path:
    """The cache folder: `PERCE_LITE_HOME` where it is set, else the platform's own."""
    import platformdirs

    folder = os.environ.get("PERCE_LITE_HOME")
    return Path(folder).expanduser() if folder else Path(platformdirs.user_cache_dir("perce_lite", appauthor=False))


_CACHES = {
    "HF_HOME": "~/.cache/huggingface",
    "MPLCONFIGDIR": "~/.config/matplotlib",
    "TRITON_CACHE_DIR": "~/.triton/cache",
    "NLTK_DATA": "~/nltk_data",
}
"""Where other libraries keep what they write, by the variable that moves it."""


def keep_to_writable_folders() -> None:
    """Lets other libraries write under `home()` what has no place elsewhere: a container may have a read-only root.

    Temporary files go to `home()/tmp` where the machine has no folder for them, and a library's cache to `home()` where
    neither it nor a folder to make it in can be written; one that is there stays in use, to be read. Call it before
    the libraries are imported.
    """
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        scratch = home() / "tmp"
        scratch.mkdir(parents=True, exist_ok=True)
        tempfile.tempdir = os.environ["TMPDIR"] = str(scratch)
    for variable, usual in _CACHES.items():
        place = Path(usual).expanduser()
        standing = next(folder for folder in (place, *place.parents) if folder.exists())
        if variable not in os.environ and standing != place and not os.access(standing, os.W_OK):
            os.environ[variable] = str(home() / place.name.lstrip("."))


def safe_name(text: str) -> str:
    """A file name for any text: a readable slug and 96 bits of a hash. Two texts never share one, no text is a path."""
    return f"{_slug(text)[:35]}-{hash_of(text)}"


def earlier_name(text: str) -> str:
    """What `safe_name` gave in earlier versions, with 48 bits of the hash; what was made then keeps it."""
    return f"{_slug(text)[:40]}-{hash_of(text)[:12]}"


def named(parent: Path, text: str, suffix: str = "") -> Path:
    """The file or folder of `text` in `parent`: by `safe_name`, or by `earlier_name` where only that is there."""
    path, earlier = parent / f"{safe_name(text)}{suffix}", parent / f"{earlier_name(text)}{suffix}"
    return earlier if earlier.exists() and not path.exists() else path


def hash_of(text: str) -> str:
    """96 bits of the hash of any text, surrogates included, in hexadecimal."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]


def _slug(text: str) -> str:
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-") or "x"


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
    except Exception as error:  # tokenizers raises nothing narrower
        if disk_is_full(error, path):
            message = f"The disk is full: {path} could not be written. What was there before is unharmed. {advice}"
            raise DiskFullError(message) from error
        raise


_FULL = (errno.ENOSPC, errno.EDQUOT)

_SAYS_FULL = re.compile(rf"No space left on device|Disk quota exceeded|\(os error ({errno.ENOSPC}|{errno.EDQUOT})\)")

_SAYS_NOT_WRITTEN = re.compile(
    r"\[enforce fail at inline_container\.cc|PytorchStreamWriter failed|unexpected pos \d+ vs \d+|basic_ios::clear: "
    r"iostream error|\d+ requested and \d+ written"
)
"""What torch.save and numpy say of any write that fails, whatever the reason."""

_PROBE = 2**16


def disk_is_full(error: BaseException, path: Path) -> bool:
    """Whether `error`, of writing to `path`, is that of a full disk or quota: told by its number, not by its words.

    safetensors, tokenizers and torch hand on words alone; theirs count only in errors of their own types, and where
    they do not say why nothing could be written, the disk is asked.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    of_words = isinstance(error, SafetensorError) or type(error) in (RuntimeError, Exception)
    if not isinstance(error, OSError) and not of_words:
        return False
    if of_words and _SAYS_FULL.search(str(error)):
        return True
    return _SAYS_NOT_WRITTEN.search(str(error)) is not None and not _has_room(path)


def _has_room(path: Path) -> bool:
    """Whether a small file can be written where `path` lies, or would."""
    folder = next(place for place in (path.absolute(), *path.absolute().parents) if place.is_dir())
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(_PROBE))
    except OSError as error:
        return error.errno not in _FULL
    return True


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
    if is_special(path):
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
        with disk_full_is_clear(path):  # the disk may be asked whether it is full: what was written still stands
            yield aside
            os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def is_special(path: Path) -> bool:
    """Whether `path`, or what it links to, exists and is neither a regular file nor a folder."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


@contextmanager
def folder_written_aside(path: Path, once: bool = False) -> Iterator[Path]:
    """As `written_aside`, for a whole folder: `path` is replaced only when the block ends well.

    One process at a time writes a folder: whoever calls this holds a lock, and leftovers of a killed one are removed.

    once: no lock is held, several processes may write the same at once; the folder is never replaced, the first stays

    Raises:
        DiskFullError: no space left; the old folder stays.
    """
    with disk_full_is_clear(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not once:
            settle(path)
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name[:40]}.", suffix=".tmp", dir=path.parent))
    try:
        with disk_full_is_clear(path):
            yield aside
            aside.chmod(0o755)
            if once:
                _take_name(aside, path)
            else:
                _replace_folder(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _take_name(aside: Path, path: Path) -> None:
    """Gives `aside` the name `path`, or leaves it where another process was faster."""
    try:
        os.replace(aside, path)
    except OSError:
        if not path.is_dir():
            raise


def _replace_folder(aside: Path, path: Path) -> None:
    """Gives `aside` the name `path`. A folder cannot replace a full one in one step: the old one is `.old` between."""
    if not path.exists():
        os.replace(aside, path)
        return
    old = _old(path)
    os.replace(path, old)
    try:
        os.replace(aside, path)
    except OSError:
        os.replace(old, path)
        raise
    shutil.rmtree(old)


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def settle(path: Path) -> None:
    """Ends what a killed write of `path`, a file or a folder, has left: the old one is back, or what is new is whole.

    Only for who holds the lock under which `path` is written.
    """
    old = _old(path)
    if old.is_dir() and path.exists():
        shutil.rmtree(old)
    elif old.is_dir():
        os.replace(old, path)
    for leftover in path.parent.glob(f".{glob.escape(path.name[:40])}*.tmp"):
        if re.fullmatch(rf"\.({re.escape(path.name[:100])}|{re.escape(path.name[:40])})\.\w+\.tmp", leftover.name):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


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
