"""API keys: who may ask, and for whom. A key may be tied to one user; then it sees nobody else."""

import hashlib
import hmac
import re
from dataclasses import dataclass
from pathlib import Path

from perce_lite.errors import ServeError

_KEY = re.compile(r"[!-~]{16,}")


@dataclass(frozen=True)
class Caller:
    """Who asks. user: the only user whom the caller may know of; None: all."""

    user: str | None = None


@dataclass(frozen=True)
class Keys:
    """Callers by the SHA-256 of their key; empty: everybody who reaches the server may ask."""

    callers: dict[bytes, Caller]

    def caller(self, authorization: str | None) -> Caller | None:
        """Whose `Authorization` header this is; None: nobody's."""
        if not self.callers:
            return Caller()
        kind, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip())
        # Every key is compared, so that the time says nothing of which one was nearly right.
        matching = [caller for digest, caller in self.callers.items() if hmac.compare_digest(digest, given)]
        return matching[0] if matching and kind.lower() == "bearer" else None


def read_keys(path: Path | None) -> Keys:
    """The keys of a file: one a line, `KEY` alone or `KEY NAME` for a key that is tied to a user; # for a comment.

    Raises:
        ServeError: the file cannot be read or holds no key; a line is no key, or its key was there before.
    """
    if path is None:
        return Keys({})
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ServeError(f"--api-key-file {path}: cannot be read: {error}") from error
    callers: dict[bytes, Caller] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key, _, user = line.strip().partition(" ")
        if not _KEY.fullmatch(key):
            raise ServeError(
                f"--api-key-file {path}, line {number}: a key is 16 or more ASCII characters without spaces, such as "
                "`openssl rand -hex 24` makes; a user's name may follow it after a space."
            )
        if _digest(key) in callers:
            raise ServeError(f"--api-key-file {path}, line {number}: this key stands there twice.")
        callers[_digest(key)] = Caller(user.strip() or None)
    if not callers:
        raise ServeError(f"--api-key-file {path}: holds no key.")
    return Keys(callers)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
