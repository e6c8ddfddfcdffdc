"""Known metrics and honest intervals: ROUGE, chrF and METEOR of texts, a bootstrap over rows grouped by user."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from perce_lite.evaluation.interval_rules import FEWEST_ROWS, FEWEST_USERS

RESAMPLES = 2000

Array = NDArray[np.float64]


class Interval(NamedTuple):
    """A figure with its 95 % interval; without one (None) where there are too few rows or users."""

    value: float
    low: float | None
    high: float | None


class Bootstrap:
    """One set of draws over rows, grouped by user, for every figure of these rows: figures stay paired.

    Users are drawn with replacement, then each drawn user's rows. With fewer than 2 users or 5 rows there are no
    intervals. Source: Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8.
    """

    def __init__(self, users: Sequence[str], seed: int = 0) -> None:
        self.rows = len(users)
        by_user: dict[str, list[int]] = {}
        for index, user in enumerate(users):
            by_user.setdefault(user, []).append(index)
        self.users = len(by_user)
        groups = [np.array(rows) for rows in by_user.values()]
        self._counts: Array | None = None  # (RESAMPLES, rows): how often a draw holds a row
        if self.users < FEWEST_USERS or self.rows < FEWEST_ROWS:
            return
        generator = np.random.default_rng(seed)
        drawn = generator.multinomial(self.users, np.full(self.users, 1 / self.users), size=RESAMPLES)
        self._counts = np.zeros((RESAMPLES, self.rows))
        for number, group in enumerate(groups):
            size = len(group)
            self._counts[:, group] = generator.multinomial(drawn[:, number] * size, np.full(size, 1 / size))

    def ratio(self, totals: Sequence[float] | Array, sizes: Sequence[float] | Array | None = None) -> Interval:
        """`sum(totals) / sum(sizes)` with its interval: a loss a token of rows of `sizes` tokens; sizes None: a mean.

        Both (rows,). NaN where there is nothing to divide by.
        """
        totals = np.asarray(totals, dtype=np.float64)
        sizes = np.ones(self.rows) if sizes is None else np.asarray(sizes, dtype=np.float64)
        value = float(totals.sum() / sizes.sum()) if sizes.sum() else float("nan")
        if self._counts is None:
            return Interval(value, None, None)
        drawn = self._counts @ sizes
        ratios = (self._counts @ totals)[drawn > 0] / drawn[drawn > 0]
        if not ratios.size:
            return Interval(value, None, None)
        low, high = (float(bound) for bound in np.quantile(ratios, [0.025, 0.975]))
        return Interval(value, low, high)


class _Words:
    """rouge-score's tokenizer for every script: what it keeps of ASCII text is the same."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


def text_scores(written: str, generated: str) -> dict[str, float]:
    """ROUGE-1 and ROUGE-L (F1, no stemming) and chrF, each 0 to 1; METEOR where its word data are installed.

    Sources: rouge-score, sacrebleu (chrF2), nltk.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import sentence_chrf

    rouge = RougeScorer(["rouge1", "rougeL"], tokenizer=_Words()).score(written, generated)
    scores = {name: float(score.fmeasure) for name, score in rouge.items()}
    scores["chrf"] = sentence_chrf(generated, [written]).score / 100
    if has_meteor():
        from nltk.translate.meteor_score import meteor_score

        words = _Words()
        scores["meteor"] = float(meteor_score([words.tokenize(written)], words.tokenize(generated)))
    return scores


def has_meteor() -> bool:
    """Whether nltk finds WordNet, which METEOR needs and no package brings along."""
    import nltk

    try:
        nltk.data.find("corpora/wordnet.zip")
    except LookupError:
        return False
    return True
