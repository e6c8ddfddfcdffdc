"""What tells users apart without a model: words, style, content, copies; and the ranks that tell a text's writer."""

import math

import numpy as np
import pytest
import torch
import toys
from hypothesis import given
from hypothesis import strategies as st

from perce_lite.data.pairs import IGNORED, PairMaker
from perce_lite.data.retrieval import Item
from perce_lite.data.rows import Row
from perce_lite.evaluation.answer_metrics import TrainingText, grounded_recall, informative_words, repetition
from perce_lite.evaluation.answers import WrittenTexts
from perce_lite.evaluation.authorship import (
    Style,
    UserWords,
    function_words,
    mask_content,
    tokens_by_words,
    training_texts,
)
from perce_lite.evaluation.conditions import Case, cases
from perce_lite.evaluation.judging import ArmSums, Judge, chance, identify

ANN = ["the otter swam and the otter slept near the bridge", "an otter again and then one more otter by the bridge"]
BOB = ["the soup was hot and the leeks were soft near the stove", "a soup again and then one more soup by the stove"]


def row(user: str, completion: str, profile=("x",), split: str = "train") -> Row:
    items = tuple(Item("", text) for text in profile)
    prompt = ({"role": "user", "content": "Write it."},)
    return Row(f"{user} {completion[:9]}", user, items, prompt, ({"role": "assistant", "content": completion},), split)


def test_training_texts_hold_nothing_that_is_held_out():
    rows = [row("ann", ANN[0], [ANN[1]]), row("ann", "secret", ["a later one"], "test"), row("bob", BOB[0], [BOB[1]])]
    assert training_texts(rows) == {"ann": [ANN[1], ANN[0]], "bob": [BOB[1], BOB[0]]}


def test_log_odds_are_those_of_the_formula():
    words = UserWords({"ann": ANN * 6, "bob": BOB * 6})
    assert {"otter", "bridge"} <= words.of("ann")
    assert {"soup", "stove"} <= words.of("bob")
    assert words.of("ann").isdisjoint({"the", "and", "again", "then", "one", "more"} | words.of("bob"))
    assert UserWords({"ann": ANN}).of("ann") == frozenset(), "nobody to be told from"


@pytest.mark.parametrize("count", range(1, 12))
def test_a_word_is_typical_from_the_count_that_the_formula_gives(count):
    """`kayak` stands `count` times in 200 words of ann's and in none of bob's 1,000."""
    words = UserWords({"ann": ["kayak " * count + "boat " * (200 - count)], "bob": ["boat " * 1000]})
    prior = 200 * count / 1200
    own, other = count + prior, prior
    odds = math.log(own / (400 - own)) - math.log(other / (1200 - other))
    assert ("kayak" in words.of("ann")) == (odds / math.sqrt(1 / own + 1 / other) > 2)


def test_a_user_without_training_texts_is_known_by_the_profile():
    words = UserWords({"ann": ANN * 6, "bob": BOB * 6})
    assert "kayak" in words.of("cyd", ["a kayak and a kayak and the kayak on the lake"] * 4)
    assert words.of("cyd") == frozenset()


def test_tokens_of_typical_words_are_whole_words():
    maker = PairMaker(toys.toy_tokenizer("chatml"))
    pair = maker.make([row("ann", "The otter, an OTTER!", ["An otter swam."])])[0]
    case = Case(pair, {})
    words = UserWords({"ann": ANN * 6, "bob": BOB * 6})
    [mask] = tokens_by_words([case], words, maker.tokenizer)
    ids = [label for label in pair.factual.labels if label != IGNORED]
    assert mask.numel() == len(ids)
    chosen = maker.tokenizer.decode([token for token, taken in zip(ids, mask.tolist(), strict=True) if taken])
    assert "otter" in chosen.lower()
    assert chosen.lower().count("otter") == 2
    assert "the" not in chosen.lower().split()


def test_style_is_attributed_to_the_nearest_and_masking_hides_the_words():
    texts = {"ann": ["i dunno... maybe we go?? idk..."] * 3, "bob": ["Indeed; therefore, we shall go forth."] * 3}
    style = Style(texts, masked=False)
    said = style.attributed(["hm... dunno?? maybe...", "Therefore; indeed, we shall."], ["ann", "bob"])
    assert said.tolist() == [1, 1]
    assert style.attributed(["hm... dunno?? maybe..."], ["bob"]).tolist() == [0]
    kept = function_words(["the cat is on the mat and it was not in the house"])
    assert mask_content("The Cat is on 12 mats", kept) == "The Xxx is on 00 xxxx"
    assert mask_content("the OTTER", kept) == mask_content("the SALAD", kept)


def test_style_without_others_or_texts_is_unknown():
    scores = WrittenTexts({"ann": ANN}).scores("the otter", row("ann", "x"))
    assert scores["style"] is None
    assert scores["copied"] == 0
    unknown = WrittenTexts({"ann": ANN, "bob": BOB}).scores("the otter", row("cyd", "x"))
    assert set(unknown.values()) == {None}


def test_content_that_the_query_names_is_kept_or_lost():
    assert informative_words("The fix for HTTP/2 in myCurl, v8.1 by Jane") == {"http/2", "mycurl", "v8.1", "jane"}
    written, query = "Fixes HTTP/2 for Jane since v8.1", "Write about HTTP/2 and v8.1"
    assert grounded_recall(written, query, "about http/2 only") == 0.5
    assert grounded_recall(written, query, "HTTP/2, v8.1.") == 1.0
    assert grounded_recall("nothing here", query, "HTTP/2") is None


def test_copies_of_the_training_texts_are_counted():
    known = TrainingText(ANN)
    copy = known.copied("He said the otter swam and the otter slept near it", "Write it.")
    assert copy["copied"] == pytest.approx(1 / 4)  # 11 words, 4 runs of 8; one stands in the first text
    assert copy["longest_copy"] == 8
    asked = known.copied("the otter swam and the otter slept near", "say: the otter swam and the otter slept near")
    assert asked["copied"] == 0
    assert known.copied("", "x") == {"copied": 0.0, "longest_copy": 0.0}
    assert repetition("so it is so it is so it is", "one two three") == {
        "distinct2": 3 / 8, "repeated4": 1 - 3 / 6, "length": 3.0,
    }  # fmt: skip
    assert repetition("", "") == {"distinct2": 1.0, "repeated4": 0.0, "length": 0.0}


@given(st.text(max_size=60), st.text(max_size=60), st.text(max_size=60))
def test_any_text_has_figures(written, query, answer):
    recall = grounded_recall(written, query, answer)
    assert recall is None or 0 <= recall <= 1
    copied = TrainingText([written]).copied(answer, query)
    assert 0 <= copied["copied"] <= 1
    assert copied["longest_copy"] >= 0
    assert all(value >= 0 for value in repetition(answer, written).values())


def test_ranks_of_the_own_profile_and_ties():
    summed = {
        "own": np.array([1.0, 2.0, 3.0, 1.0]),
        "none": np.array([0.0, 0.0, 0.0, 0.0]),
        "other user's": np.array([2.0, 1.0, 3.0, 1.0]),
        "candidate 1": np.array([3.0, 3.0, 4.0, 1.0]),
    }
    told = identify(summed)
    assert told["top1"].tolist() == pytest.approx([1, 0, 1 / 2, 1 / 3])
    assert told["mrr"].tolist() == pytest.approx([1, 1 / 2, 3 / 4, (1 + 1 / 2 + 1 / 3) / 3])
    assert told["mrr"][3] == pytest.approx(chance(3)["mrr"])
    relative = identify(
        summed, {name: values for name, values in summed.items() if name != "own"} | {"own": np.ones(4)}
    )
    assert relative["top1"].tolist() == pytest.approx([1 / 3, 0, 0, 1 / 3])
    assert identify({"own": np.ones(2), "none": np.ones(2)}) == {}


def test_with_one_user_there_is_nobody_to_tell_from():
    maker = PairMaker(toys.toy_tokenizer("chatml"))
    found = cases(maker, [row("ann", text, [ANN[1]], "test") for text in ("one", "two", "six")], None, [], candidates=3)
    assert list(found[0].passes) == ["own", "none"]
    values = [torch.full((3,), -1.0) for _ in found]
    judge = Judge(found, {"own": values, "none": [value - 1 for value in values]}, 0.8)
    sums = judge.sums({"own": values, "none": [value - 1 for value in values]})
    assert sums.identified == {}
    assert judge.worth(sums, "none")["all"]["value"] == pytest.approx(1)
    assert ArmSums.mean([sums, sums]).gives["none"].tolist() == sums.gives["none"].tolist()
