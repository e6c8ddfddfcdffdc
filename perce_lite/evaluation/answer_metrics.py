"""Figures of a generated answer that need no judge: content that it keeps, words that it copies, words it repeats."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

from perce_lite.data.retrieval import tokens_of

COPIED_WORDS = 8
"""Words in a row that count as copied where they stand verbatim in a training text."""

_PIECE = re.compile(r"[^\W_](?:[\w.+#/-]*\w)?")


def informative_words(text: str) -> frozenset[str]:
    """Words with a digit, with an inner capital, or capitalised and no stop word (of any language), in lower case.

    They carry names, numbers and terms: what an answer must take from its query and cannot paraphrase.
    """
    words = (match.group() for match in _PIECE.finditer(text))
    return frozenset(word.lower() for word in words if _informs(word))


def _informs(word: str) -> bool:
    if any(letter.isdigit() for letter in word) or any(letter.isupper() for letter in word[1:]):
        return True
    return len(word) > 1 and word[0].isupper() and word.lower() not in _stop_words()


@lru_cache(maxsize=1)
def _stop_words() -> frozenset[str]:
    from bm25s import stopwords

    lists = [getattr(stopwords, name) for name in dir(stopwords) if name.startswith("STOPWORDS_")]
    return frozenset(str(word) for several in lists for word in several)


def grounded_recall(written: str, query: str, answer: str) -> float | None:
    """Share of the reference's informative words that stand in the query and that the answer keeps, 0 to 1.

    None where the reference has no such word. Source of the figure: MIRROR, "grounded information recall".
    """
    grounded = informative_words(written) & {match.group().lower() for match in _PIECE.finditer(query)}
    if not grounded:
        return None
    kept = {match.group().lower() for match in _PIECE.finditer(answer)}
    return len(grounded & kept) / len(grounded)


class TrainingText:
    """A user's training texts, to tell what an answer copied from them."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.runs: set[tuple[str, ...]] = set()
        self.texts = [f" {' '.join(tokens_of(text))} " for text in texts]
        for text in self.texts:
            self.runs.update(runs_of(text.split(), COPIED_WORDS))

    def copied(self, answer: str, query: str) -> dict[str, float]:
        """`copied`, share of the answer's 8-grams that stand in the texts and not in the query; `longest_copy`, words.

        A shorter answer than eight words has none to copy: 0.
        """
        words, asked = tokens_of(answer), f" {' '.join(tokens_of(query))} "
        grams = runs_of(words, COPIED_WORDS)
        copied = [gram in self.runs and f" {' '.join(gram)} " not in asked for gram in grams]
        return {"copied": sum(copied) / max(1, len(grams)), "longest_copy": float(self._longest(words, asked))}

    def _longest(self, words: Sequence[str], asked: str) -> int:
        """Words of the longest run of `words` that stands in a text and not in `asked`."""
        longest = start = 0
        for end in range(1, len(words) + 1):
            while start < end:
                run = f" {' '.join(words[start:end])} "
                if any(run in text for text in self.texts):
                    if run not in asked:  # else a longer run may go beyond the query
                        longest = max(longest, end - start)
                    break
                start += 1
        return longest


def runs_of(words: Sequence[str], size: int) -> list[tuple[str, ...]]:
    """Every run of `size` neighbouring words."""
    return [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]


def repetition(answer: str, written: str) -> dict[str, float]:
    """`distinct2`, share of different bigrams; `repeated4`, share of 4-grams that came before; `length`, times the
    reference's words. An answer too short for any has 1, 0."""
    words = tokens_of(answer)
    pairs, fours = runs_of(words, 2), runs_of(words, 4)
    return {
        "distinct2": len(set(pairs)) / len(pairs) if pairs else 1.0,
        "repeated4": 1 - len(set(fours)) / len(fours) if fours else 0.0,
        "length": len(words) / max(1, len(tokens_of(written))),
    }
