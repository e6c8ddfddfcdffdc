"""What tells one user's texts from the others': their words, and their character n-grams. No language model."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from perce_lite.data.pairs import IGNORED, Pair
from perce_lite.data.retrieval import tokens_of, word_spans
from perce_lite.data.rows import Row, items_of, of_split, written
from perce_lite.data.text_units import text_units
from perce_lite.evaluation.conditions import Case
from perce_lite.evaluation.metrics import Array

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer

Z = 2.0
"""Log-odds of a word above so many standard deviations make it a word of its user."""


def training_texts(rows: Sequence[Row]) -> dict[str, list[str]]:
    """By user, every text that training may show: the responses and the profile items of the training rows."""
    texts: dict[str, dict[str, None]] = {}
    for row in of_split(rows, "train"):
        distinct = texts.setdefault(row.user, {})
        distinct.update(dict.fromkeys(item.text for item in items_of(row.profile)))
        distinct.update(dict.fromkeys(written(row)))
    return {user: [text for text in user_texts if text.strip()] for user, user_texts in texts.items()}


class UserWords:
    """Words that a user's texts use more than the other users' do.

    Log-odds with an informative Dirichlet prior, z above `Z`. The prior is the word frequencies of all texts together
    and weighs as much as the user's own texts. Source: Monroe, Colaresi and Quinn, Fightin' Words, Political Analysis
    16, 2008.
    """

    def __init__(self, texts: Mapping[str, Sequence[str]]) -> None:
        self.counts = {user: _counted(several) for user, several in texts.items()}
        self.every: Counter[str] = Counter()
        for counts in self.counts.values():
            self.every.update(counts)

    def of(self, user: str, texts: Sequence[str] = ()) -> frozenset[str]:
        """The words of `user`; `texts` stand for one who has no training texts."""
        return self._of_known(user) if user in self.counts else self._typical(_counted(texts), self.every)

    @functools.lru_cache(maxsize=4096)  # noqa: B019 (the object lives as long as one evaluation)
    def _of_known(self, user: str) -> frozenset[str]:
        counts = self.counts[user]
        return self._typical(counts, self.every - counts)

    def _typical(self, counts: Counter[str], others: Counter[str]) -> frozenset[str]:
        together = counts + others
        total, own_total, other_total = together.total(), counts.total(), others.total()
        if not own_total or not other_total:
            return frozenset()
        typical = set()
        for word, count in counts.items():
            prior = own_total * together[word] / total
            own, other = count + prior, others[word] + prior
            odds = math.log(own / (2 * own_total - own)) - math.log(other / (other_total + own_total - other))
            if odds / math.sqrt(1 / own + 1 / other) > Z:
                typical.add(word)
        return frozenset(typical)


def _counted(texts: Sequence[str]) -> Counter[str]:
    return Counter(word for text in texts for word in tokens_of(text))


def tokens_by_words(found: Sequence[Case], words: UserWords, tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    """Which response tokens of each case are part of a word of its user, (R,) a row.

    A user without training texts is known by the row's own profile.
    """
    chosen = []
    for case in found:
        row = case.pair.row
        typical = words.of(row.user, [item.text for item in items_of(row.profile)])
        text = "".join(unit for _, _, unit in response_units(case.pair, tokenizer))
        characters = np.zeros(len(text), dtype=bool)
        for word, start, end in word_spans(text):
            characters[start:end] |= word in typical
        mask = tokens_covered(case.pair, tokenizer, Covered(text, characters))
        assert mask is not None  # it is the very text
        chosen.append(mask)
    return chosen


class Covered(NamedTuple):
    """The text of a response, and which of its characters are chosen."""

    text: str
    characters: NDArray[np.bool_]


def response_units(pair: Pair, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int, str]]:
    """`text_units` of a pair's response tokens; special tokens, such as the end of a turn, have no text."""
    ids = [label for label in pair.factual.labels if label != IGNORED]
    special = set(tokenizer.all_special_ids)
    return [(start, end, "" if ids[start] in special else text) for start, end, text in text_units(tokenizer, ids)]


def tokens_covered(pair: Pair, tokenizer: PreTrainedTokenizerBase, covered: Covered) -> Tensor | None:
    """Which response tokens of `pair` hold a chosen character, (R,); None where its text is another."""
    units, at = response_units(pair, tokenizer), 0
    if "".join(text for _, _, text in units).strip() != covered.text.strip():
        return None
    skipped = len(covered.text) - len(covered.text.lstrip())
    lead = sum(len(text) for _, _, text in units) - len("".join(text for _, _, text in units).lstrip())
    mask = torch.zeros(units[-1][1] if units else 0, dtype=torch.bool)
    for start, end, text in units:
        place = max(0, at - lead + skipped)
        mask[start:end] = bool(covered.characters[place : place + len(text)].any())
        at += len(text)
    return mask


_WORD = re.compile(r"[^\W\d_]+")


class Style:
    """Attribution of a text to one of the users by character 3- to 5-grams (tf-idf, nearest centroid by cosine).

    texts: by user, what each is known by
    masked: letters of content words become x (X), so that only function words, punctuation and layout tell
    """

    def __init__(self, texts: Mapping[str, Sequence[str]], masked: bool) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        self.users = [user for user, several in texts.items() if several]
        self.masked = masked
        self.kept = function_words([text for several in texts.values() for text in several]) if masked else frozenset()
        self.vectorizer: TfidfVectorizer = TfidfVectorizer(analyzer="char", ngram_range=(3, 5), sublinear_tf=True)
        known = [(user, self._seen(text)) for user in self.users for text in texts[user]]
        vectors = self.vectorizer.fit_transform([text for _, text in known])
        owners = np.array([user for user, _ in known])
        self.centroids = np.stack([np.asarray(vectors[owners == user].mean(axis=0))[0] for user in self.users])
        self.centroids /= np.linalg.norm(self.centroids, axis=1, keepdims=True).clip(min=1e-12)

    def _seen(self, text: str) -> str:
        return mask_content(text, self.kept) if self.masked else text

    def attributed(self, texts: Sequence[str], users: Sequence[str]) -> Array:
        """1 where a text is nearest to the centroid of its user, else 0; (len(texts),). Ties are missed."""
        scores = self.vectorizer.transform([self._seen(text) for text in texts]) @ self.centroids.T  # (texts, users)
        nearest = [[user for user, score in zip(self.users, row, strict=True) if score == row.max()] for row in scores]
        return np.array([float(best == [user]) for best, user in zip(nearest, users, strict=True)])


def mask_content(text: str, kept: frozenset[str]) -> str:
    """`text` with the letters of every word that is not in `kept` as x, capitals as X; digits as 0."""

    def masked(match: re.Match[str]) -> str:
        word = match.group()
        return word if word.lower() in kept else "".join("X" if letter.isupper() else "x" for letter in word)

    return re.sub(r"\d", "0", _WORD.sub(masked, text))


def function_words(texts: Sequence[str]) -> frozenset[str]:
    """Function words of the language of `texts`: of bm25s's stop-word lists the one that covers most of their words."""
    from bm25s import stopwords

    lists = [
        frozenset(str(word) for word in getattr(stopwords, name)) for name in dir(stopwords) if name.startswith("STOP")
    ]
    counts = Counter(word.lower() for text in texts for word in _WORD.findall(text))
    return max(lists, key=lambda words: sum(counts[word] for word in words), default=frozenset())
