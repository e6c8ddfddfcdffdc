"""Which of a user's texts go into a row's profile: BM25 against the query, or the newest."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """One text of a user's history."""

    title: str
    text: str


def choose(items: Sequence[Item], query: str, select: str, top_k: int) -> list[Item]:
    """The `top_k` items that fit `query` best, best first; `items` are in order of time, oldest first.

    `select`: "bm25" (ties go to the newer item), "recency" (newest first) or "all" (newest first, no top_k).
    """
    newest_first = list(reversed(items))
    if select == "all":
        return newest_first
    if select == "recency" or len(newest_first) <= 1:
        return newest_first[:top_k]
    scores = bm25([f"{item.title}\n{item.text}" for item in newest_first], query)
    order = sorted(range(len(newest_first)), key=lambda index: -scores[index])  # stable: the newer one first
    return [newest_first[index] for index in order[:top_k]]


def bm25(texts: Sequence[str], query: str) -> list[float]:
    """BM25 score of each text for `query` (bm25s, Lucene's variant, no stop words, no stemming)."""
    import bm25s

    tokens = bm25s.tokenize(list(texts), stopwords=None, return_ids=False, show_progress=False)
    wanted = bm25s.tokenize([query], stopwords=None, return_ids=False, show_progress=False)[0]
    vocabulary = {token for text in tokens for token in text}
    known = [token for token in wanted if token in vocabulary]
    if not known:
        return [0.0] * len(texts)
    index = bm25s.BM25()
    index.index(tokens, show_progress=False)
    return [float(score) for score in index.get_scores(known)]
