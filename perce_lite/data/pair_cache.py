"""Pairs by content: a row is rendered and tokenised once a process, whichever command step asks for it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import xxhash
from transformers import PreTrainedTokenizerBase

if TYPE_CHECKING:  # pairs imports this file
    from perce_lite.data.pairs import Tokens

LIMIT_BYTES = 64 * 2**20
"""Token ids and labels that are kept, four bytes each; the least recently used go first."""


class PairCache:
    """Maps (settings, row fingerprint) to what was made of the row: its token sequences, and what goes with them."""

    def __init__(self, limit_bytes: int = LIMIT_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self._bytes = 0
        self._entries: OrderedDict[Hashable, tuple[tuple[Tokens, ...], Any]] = OrderedDict()

    def get(self, key: Hashable) -> tuple[tuple[Tokens, ...], Any] | None:
        """The sequences, and what was put beside them; None where nothing is kept."""
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def put(self, key: Hashable, sequences: tuple[Tokens, ...], beside: Any) -> None:
        """Keeps the very `sequences`, which are not to be changed."""
        self._entries[key] = sequences, beside
        self._bytes += _size(sequences)
        while self._bytes > self.limit_bytes:
            self._bytes -= _size(self._entries.popitem(last=False)[1][0])


def _size(sequences: tuple[Tokens, ...]) -> int:
    return 1024 + sum(sequence.nbytes for sequence in sequences)


_fingerprints: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[tuple[Any, ...], str]] = WeakKeyDictionary()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Hash of all that a tokenizer makes ids by, its chat template included; None for a slow tokenizer."""
    if not tokenizer.is_fast:
        return None
    state = (len(tokenizer), str(tokenizer.chat_template), tuple(tokenizer.all_special_tokens))
    known = _fingerprints.get(tokenizer)
    if known is None or known[0] != state:
        content = tokenizer.backend_tokenizer.to_str() + repr(state)
        known = state, xxhash.xxh3_128_hexdigest(content.encode("utf-8", "surrogatepass"))
        _fingerprints[tokenizer] = known
    return known[1]
