"""Token ids as the smallest runs of whole characters: what a person can be shown, and what words are looked up in."""

import unicodedata
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


def text_units(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[tuple[int, int, str]]:
    """(start, end, text) of the smallest runs of tokens that are whole characters; the texts join to the whole.

    A token of a byte-level tokenizer may be a part of a character: it is shown with its neighbours. So is a combining
    mark, which shows nothing without the letter it belongs to. A special token stands alone.
    """
    special = set(tokenizer.all_special_ids)
    units: list[tuple[int, int, str]] = []
    before = start = 0  # the unit before is decoded along: a tokenizer may strip the space that a text begins with
    for end in range(1, len(ids) + 1):
        prefix, text = (tokenizer.decode(ids[before:to], clean_up_tokenization_spaces=False) for to in (start, end))
        text = text[len(prefix) :]
        torn = text.endswith("\ufffd") and end - start < 8
        if torn and end < len(ids) and ids[end] not in special:
            continue
        if units and special.isdisjoint((ids[start - 1], ids[start])) and _one_character(units[-1][2], text):
            first, _, head = units.pop()
            units.append((first, end, head + text))
        else:
            units.append((start, end, text))
        before, start = start, end
    return units


def _one_character(head: str, tail: str) -> bool:
    """Whether `tail` continues what a reader takes for the last character of `head`."""
    if not head or not tail:
        return True
    mark = unicodedata.category(tail[0]).startswith("M") or "\U0001f3fb" <= tail[0] <= "\U0001f3ff"  # skin tones
    return mark or "\u200d" in (head[-1], tail[0])  # the zero-width joiner of emoji
