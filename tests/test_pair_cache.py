"""A row is rendered and tokenised once a process, whoever asks for it."""

import json
import tracemalloc
from collections import Counter
from dataclasses import replace

import pytest
import toys

from perce_lite.data.pair_cache import PairCache, tokenizer_fingerprint
from perce_lite.data.pairs import IGNORED, Audit, PairMaker, Tokens
from perce_lite.data.rows import from_columns
from perce_lite.recipe import Template

pytest_plugins = ["cli_fixtures"]


@pytest.fixture
def made(monkeypatch):
    """Counts how often each row is made into a pair."""
    counts, real = Counter(), PairMaker._pair
    monkeypatch.setattr("perce_lite.data.pairs._CACHE", PairCache())
    monkeypatch.setattr(PairMaker, "_pair", lambda self, row: (counts.update([row.fingerprint()]), real(self, row))[1])
    return counts


def rows_of(count=6):
    return [from_columns(record, f"line {number}") for number, record in enumerate(toys.toy_rows()[:count])]


def test_the_second_maker_gets_the_same_pairs(made):
    rows = [*rows_of(), replace(rows_of()[0], profile="", where="line 7")]
    audits = Audit(), Audit()
    first = PairMaker(toys.toy_tokenizer("chatml"), max_length=200).make(rows, audits[0])
    second = PairMaker(toys.toy_tokenizer("chatml"), max_length=200).make(rows, audits[1])
    assert first == second
    assert audits[0] == audits[1]
    assert audits[0].dropped.total() == 1
    assert set(made.values()) == {1}


def test_what_a_pair_depends_on_is_in_its_key(made):
    (row,) = rows_of(1)
    bos = toys.toy_tokenizer("chatml")
    bos.chat_template = bos.chat_template.replace("named Toy", "named Top")
    makers = [
        PairMaker(toys.toy_tokenizer("chatml")),
        PairMaker(toys.toy_tokenizer("qwen3")),
        PairMaker(bos),
        PairMaker(toys.toy_tokenizer("chatml"), Template(position="user")),
        PairMaker(toys.toy_tokenizer("chatml"), max_length=120),
        PairMaker(toys.toy_tokenizer("chatml"), max_profile_tokens=5),
        PairMaker(toys.toy_tokenizer("chatml"), profile_pass="frozen"),
    ]
    for maker in makers:
        for asked in (row, replace(row, user="zoe"), replace(row, profile="tea")):
            maker.make([asked])
    assert made.total() == 3 * len(makers)
    (moved,) = makers[0].make([replace(row, where="elsewhere")])
    assert moved.row.where == "elsewhere"
    assert made.total() == 3 * len(makers)


def test_what_a_caller_does_to_a_pair_stays_there(made):
    maker, (row,) = PairMaker(toys.toy_tokenizer("chatml")), rows_of(1)
    (pair,) = maker.make([row])
    ids = list(pair.factual.ids)
    pair.factual.ids.append(0)
    assert maker.make([row])[0].factual.ids == ids


def test_check_training_and_measuring_share_their_pairs(made, recipe, figures):
    path = recipe(
        None, "train: {max_steps: 1, output_dir: out, eval_strategy: 'no'}\nevaluation: {max_new_tokens: 2}\n"
    )
    figures("check", path)
    figures("train", path)
    own = {row.fingerprint() for row in made_rows(path)}
    assert {made[fingerprint] for fingerprint in own} == {1}


def made_rows(path):
    from perce_lite.data.readers import read_rows
    from perce_lite.recipe import load_recipe

    return read_rows(load_recipe(path))


def test_the_least_recently_used_goes_first():
    tokens = Tokens(range(10), [IGNORED] * 10)
    cache = PairCache(limit_bytes=3 * (1024 + tokens.nbytes))
    for name in "abc":
        cache.put(name, (tokens,), name)
    assert cache.get("a") == ((tokens,), "a")
    cache.put("d", (tokens,), "d")
    assert cache.get("b") is None
    assert [cache.get(name) is not None for name in "acd"] == [True] * 3


def test_ids_and_labels_take_four_bytes_each():
    """Lists of Python's integers take some 36 for each pair of id and label; a trainer holds them while it runs."""
    ids = list(range(1000, 21000))
    tracemalloc.start()
    kept = [Tokens(ids, [IGNORED, *ids[1:]]) for _ in range(10)]
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held == pytest.approx(10 * 2 * 4 * len(ids), rel=0.02)
    assert kept[0].ids == ids
    assert kept[0].labels == [IGNORED, *ids[1:]]
    assert sum(tokens.nbytes for tokens in kept) == 10 * 2 * 4 * len(ids)


def test_a_changed_tokenizer_has_another_fingerprint():
    tokenizer = toys.toy_tokenizer("chatml")
    before = tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(toys.toy_tokenizer("chatml")) == before
    tokenizer.add_tokens(["<new>"])
    assert tokenizer_fingerprint(tokenizer) != before
    assert json.dumps(before)
