"""Known metrics, and intervals that hold what they say on data whose truth is known."""

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from perce_lite.evaluation.metrics import Bootstrap, has_meteor, text_scores


def test_ratio_is_the_loss_a_token_and_its_interval_holds_it():
    users = ["a", "a", "b", "b", "c", "c"]
    totals, sizes = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), np.array([2.0, 2.0, 2.0, 4.0, 4.0, 4.0])
    one = Bootstrap(users).ratio(totals, sizes)
    assert one.value == pytest.approx(21 / 18)
    assert one.low < one.value < one.high
    assert Bootstrap(users).ratio(totals, sizes) == one, "the draws are seeded"
    assert Bootstrap(users).ratio(totals).value == pytest.approx(3.5)


def test_equal_rows_leave_no_room():
    assert Bootstrap(["a", "b", "c"] * 3).ratio([0.5] * 9) == pytest.approx((0.5, 0.5, 0.5))


@pytest.mark.parametrize("users", [["a"] * 8, ["a", "b", "c", "d"], []])
def test_too_little_to_tell_gives_no_interval(users):
    one = Bootstrap(users).ratio([1.0] * len(users), [2.0] * len(users))
    assert one[1:] == (None, None)
    assert np.isnan(one.value) == (not users)


@pytest.mark.parametrize(("users", "rows"), [(12, 4), (30, 2), (60, 1)])
def test_interval_covers_the_truth(users, rows):
    """Rows of a user share an effect, so they are not independent; the true ratio is 0.3 nats a token."""
    generator = np.random.default_rng(7)
    covered, runs = 0, 300
    for _ in range(runs):
        effects = np.repeat(generator.normal(0, 0.2, users), rows)
        sizes = generator.integers(20, 120, users * rows).astype(float)
        totals = (0.3 + effects + generator.normal(0, 0.3, users * rows)) * sizes
        one = Bootstrap([str(user) for user in range(users) for _ in range(rows)]).ratio(totals, sizes)
        covered += one.low <= 0.3 <= one.high
    assert 0.9 <= covered / runs <= 0.995


def test_rows_of_a_user_are_not_taken_for_independent():
    """The same values as rows of 6 users and as rows of 60: shared effects must widen the interval."""
    generator = np.random.default_rng(1)
    values = np.repeat(generator.normal(0, 1, 6), 10)
    grouped = Bootstrap([str(index // 10) for index in range(60)]).ratio(values)
    alone = Bootstrap([str(index) for index in range(60)]).ratio(values)
    assert grouped.high - grouped.low > 1.8 * (alone.high - alone.low)


def test_text_scores_are_those_of_the_libraries():
    written, said = "Fix the memory leak in lib/url.c, found by CI.", "Fixed a leak in the URL code found by a CI job"
    scores = text_scores(written, said)
    rouge = RougeScorer(["rouge1", "rougeL"]).score(written, said)
    assert scores["rouge1"] == pytest.approx(rouge["rouge1"].fmeasure)
    assert scores["rougeL"] == pytest.approx(rouge["rougeL"].fmeasure)
    # 4 of 5 words on one side, 4 of 4 on the other: F1 is 8 / 9
    assert text_scores("the cat sat down here", "the cat sat down")["rouge1"] == pytest.approx(8 / 9)
    assert ("meteor" in scores) == has_meteor()


def test_texts_of_every_script_are_scored():
    assert text_scores("привет мир", "привет мир")["rougeL"] == 1
    assert text_scores("こんにちは", "こんにちは")["chrf"] == pytest.approx(1)
    assert text_scores("anything", "") == pytest.approx({**dict.fromkeys(text_scores("a", ""), 0.0)})
