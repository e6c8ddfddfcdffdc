"""Which of a user's texts go into a row's profile: BM25 against the query, or the newest."""

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_UNSPACED = (
    "\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # Hiragana, Katakana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"  # Han
    "\u0e00-\u0e7f\u0e80-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
)
"""Scripts that put no spaces between words."""

_TOKEN = re.compile(rf"[{_UNSPACED}]+|[^\W{_UNSPACED}]{{2,}}")
_UNSPACED_RUN = re.compile(rf"[{_UNSPACED}]+")


@dataclass(frozen=True)
class Item:
    """One text of a user's history."""

    title: str
    text: str


def word_spans(text: str) -> Iterator[tuple[str, int, int]]:
    """(word, start, end) of the lower-case words of two letters or more in `text`.

    Of scripts without spaces, every two neighbouring characters are a word: what search engines index such scripts by
    when they have no dictionary.
    """
    for match in _TOKEN.finditer(text):
        start, end = match.span()
        if not _UNSPACED_RUN.match(text, start):
            yield match.group().lower(), start, end
            continue
        for at in range(start, max(start + 1, end - 1)):
            yield text[at : min(at + 2, end)], at, min(at + 2, end)


def tokens_of(text: str) -> list[str]:
    """The words of `text`, see `word_spans`."""
    if text.isascii():  # no script without spaces, and no letter that is longer in lower case
        return _TOKEN.findall(text.lower())
    return [word for word, _, _ in word_spans(text)]


class Bm25Index:
    """BM25 over N texts, for any number of queries (bm25s, Lucene's variant, no stop words, no stemming)."""

    def __init__(self, texts: Sequence[str]) -> None:
        import bm25s

        self._size = len(texts)
        corpus = [tokens_of(text) for text in texts]
        self._vocabulary = {token for tokens in corpus for token in tokens}
        self._index = bm25s.BM25()
        if self._vocabulary:
            self._index.index(corpus, show_progress=False)

    def scores(self, query: str) -> list[float]:
        """The score of each text for `query`, (N,); zeros where they share no word."""
        known = [token for token in tokens_of(query) if token in self._vocabulary]
        if not known:
            return [0.0] * self._size
        scores: list[float] = self._index.get_scores(known).tolist()
        return scores


class History:
    """A user's texts, oldest first, with one BM25 index for all queries, built when the first needs it.

    How rare a word is and how long a text is on average is counted over the whole history, later texts included; which
    texts may be chosen for a query is the caller's (`among`).
    """

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = tuple(items)

    @functools.cached_property
    def _index(self) -> Bm25Index:
        return Bm25Index([f"{item.title}\n{item.text}" for item in self.items])

    def choose(self, query: str, select: str, top_k: int, among: Sequence[int] | None = None) -> list[Item]:
        """The `top_k` items that fit `query` best, best first.

        select: "bm25" (the newer of two equal scores first), "recency" (newest first) or "all" (newest first, no top_k)
        among: places in `items` to choose from, ascending; None: all
        """
        newest_first = list(reversed(range(len(self.items)) if among is None else among))
        if select == "bm25" and len(newest_first) > 1:
            scores = self._index.scores(query)
            newest_first.sort(key=lambda place: -scores[place])  # stable
        chosen = newest_first if select == "all" else newest_first[:top_k]
        return [self.items[place] for place in chosen]
