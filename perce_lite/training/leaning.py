"""How much a text leans on the profile, unit by unit: PIR of the smallest pieces that a reader sees."""

import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from perce_lite.training.loss import pir


def leaning_units(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], factual: Tensor, counterfactual: Tensor
) -> Iterator[tuple[slice, dict[str, Any]]]:
    """The units of `text_units`, each with the tokens that it is made of and the sums of their log-probs and PIR.

    factual, counterfactual: (R,), log-probs of `ids` with the profile and without, nats
    """
    leans = pir(factual, counterfactual)
    for start, end, text in text_units(tokenizer, ids):
        tokens = slice(start, end)
        yield (
            tokens,
            {
                "text": text,
                "end_of_turn": ids[start] in tokenizer.all_special_ids,
                "pir": float(leans[tokens].sum()),
                "factual": float(factual[tokens].sum()),
                "counterfactual": float(counterfactual[tokens].sum()),
                "token_pirs": leans[tokens].tolist(),
            },
        )


def text_units(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[tuple[int, int, str]]:
    """(start, end, text) of the smallest runs of tokens that are whole characters; the texts join to the whole.

    A token of a byte-level tokenizer may be a part of a character: it is shown with its neighbours. So is a combining
    mark, which shows nothing without the letter it belongs to. A special token stands alone.
    """
    special = set(tokenizer.all_special_ids)
    units: list[tuple[int, int, str]] = []
    before = start = 0  # the unit before is decoded along: a tokenizer may strip the space that a text begins with
    for end in range(1, len(ids) + 1):
        said, text = (tokenizer.decode(ids[before:to], clean_up_tokenization_spaces=False) for to in (start, end))
        text = text[len(said) :]
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
