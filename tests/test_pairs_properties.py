"""Whatever users write: a row is a whole pair or dropped with a reason, and nothing raises."""

import pytest
import toys
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_pairs import END, FAMILIES, SYSTEM, encode, say, scored

from perce_lite.data.pairs import IGNORED, NO_PROFILE, NO_RESPONSE, PROFILE_TOO_LONG, TOO_LONG, Audit, PairMaker
from perce_lite.data.rows import from_columns
from perce_lite.recipe import Template

TOKENIZERS = {family: toys.toy_tokenizer(family) for family in FAMILIES}
WORDS = {family: [one.content for one in TOKENIZERS[family].added_tokens_decoder.values()] for family in FAMILIES}
FRAGMENTS = [
    *sorted({word for words in WORDS.values() for word in words}),
    *("<|im_", "end|>", "<", ">", "<|", "|>", "_of_turn>", "</th", "ink>", "\ud800", "\udfff", "{text}", "{profile}"),
    *(
        "response0slot0.",
        "response",
        " ",
        "\n\n",
        "\t",
        "\x00",
        "\u200b",
        "\u2028",
        "é",
        "e\u0301",
        "抹茶",
        "🦦",
        "word ",
    ),
]

texts = st.one_of(
    st.text(st.characters(), max_size=40),  # surrogates, too
    st.text(max_size=40),
    st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join),
)
spoken = texts.filter(str.strip)
items = st.one_of(texts, st.fixed_dictionaries({"title": texts, "text": texts}))
profiles = st.one_of(
    texts,
    st.lists(items, max_size=4),
    st.tuples(st.lists(items, min_size=1, max_size=3), st.integers(20, 120)).map(lambda drawn: drawn[0] * drawn[1]),
    st.tuples(texts, st.integers(20, 200)).map(lambda drawn: drawn[0] * drawn[1]),
)
users = st.one_of(st.sampled_from(["../../etc", "", ".", "a" * 300, "\ud800", None, "CON"]), st.text(max_size=10))
limits = st.one_of(st.none(), st.integers(1, 160))


@st.composite
def records(draw, family):
    """A record and the roles of its messages: one turn or several, with a system message or without."""
    roles = ["user"] + ["assistant", "user"] * draw(st.integers(0, 1))
    if family != "gemma" and draw(st.booleans()):
        roles = ["system", *roles]
    prompt = [say(role, draw(spoken)) for role in roles]
    later = ["assistant"] + ["user", "assistant"] * draw(st.integers(0, 2))
    completion = [say(role, draw(texts)) for role in later]
    return {"user": draw(users), "profile": draw(profiles), "prompt": prompt, "completion": completion}


def broken(family, text):
    """`text` as the template may show it: no surrogates, a space in every control word; computed word by word."""
    text = "".join("?" if "\ud800" <= one <= "\udfff" else one for one in text)
    while any(word in text for word in WORDS[family]):
        for word in WORDS[family]:
            text = text.replace(word, f"{word[0]} {word[1:]}")
    return text


def turns_of(tokens):
    """The scored runs, each with the index at which it starts."""
    runs, open_run = [], False
    for index, label in enumerate(tokens.labels):
        if label != IGNORED and not open_run:
            runs.append((index, []))
        open_run = label != IGNORED
        if open_run:
            runs[-1][1].append(label)
    return runs


def control_count(family, ids):
    return sum(token in TOKENIZERS[family].added_tokens_decoder for token in ids)


def expected_controls(family, record):
    """Control tokens of a benign dialogue of the same shape, up to the end of the last turn that says something."""
    messages = [say(one["role"], "x") for one in (*record["prompt"], *record["completion"])]
    behind = next(
        n for n, one in enumerate(record["completion"][::-1]) if one["role"] == "assistant" and one["content"].strip()
    )
    if family != "gemma" and messages[0]["role"] != "system":
        messages = [say("system", SYSTEM), *messages]
    ids = encode(TOKENIZERS[family], messages)
    end = TOKENIZERS[family].convert_tokens_to_ids(END[family])
    ends = [index for index, token in enumerate(ids) if token == end]
    return control_count(family, ids[: ends[-1 - behind] + 1])


def check(family, record, pair, max_length, max_profile_tokens):
    tokenizer = TOKENIZERS[family]
    end = tokenizer.convert_tokens_to_ids(END[family])
    said = [broken(family, one["content"]).strip() for one in record["completion"] if one["role"] == "assistant"]
    said = [text for text in said if text]  # an empty turn carries no loss
    assert scored(pair.factual) == scored(pair.counterfactual)
    for tokens in (pair.factual, pair.counterfactual):
        turns = [run for _, run in turns_of(tokens)]
        assert [turn[-1] for turn in turns] == [end] * len(said)
        assert [tokenizer.decode(turn[:-1]) for turn in turns] == said
        assert control_count(family, [token for turn in turns for token in turn]) == len(said)
        assert control_count(family, tokens.ids) == expected_controls(family, record)
        assert tokens.labels[-1] == end
        assert max_length is None or len(tokens.ids) <= max_length
    assert pair.factual.ids != pair.counterfactual.ids
    starts = [[start for start, _ in turns_of(tokens)] for tokens in (pair.factual, pair.counterfactual)]
    assert all(later - other > 0 for later, other in zip(*starts, strict=True))  # the profile stands ahead of all
    units = len(pair.row.profile.split()) if isinstance(pair.row.profile, str) else len(pair.row.profile)
    assert 0 <= pair.items_left_out < units
    if max_length is None and max_profile_tokens is None:
        assert pair.items_left_out == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_is_a_whole_pair_or_dropped_with_a_reason(family):
    @settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.lists(records(family), min_size=1, max_size=3), limits, limits)
    def run(drawn, max_length, max_profile_tokens):
        rows = [from_columns(record, f"row {number}") for number, record in enumerate(drawn)]
        audit = Audit()
        pairs = PairMaker(TOKENIZERS[family], Template(), max_length, max_profile_tokens).make(rows, audit)
        kept = iter(pairs)
        pair = next(kept, None)
        reasons = []
        for record, row in zip(drawn, rows, strict=True):
            if pair is not None and pair.row is row:
                check(family, record, pair, max_length, max_profile_tokens)
                assert any(one["content"].strip() for one in record["completion"] if one["role"] == "assistant")
                pair = next(kept, None)
            else:
                reasons.append(row.user)
        assert pair is None  # pairs are the rows that were kept, in order
        assert audit.read == len(rows) == len(pairs) + audit.dropped.total()
        assert sorted(reasons) == sorted(user for (user, _), count in audit.dropped.items() for _ in range(count))
        allowed = {NO_PROFILE, NO_RESPONSE}
        allowed |= {TOO_LONG} if max_length is not None else set()
        allowed |= {PROFILE_TOO_LONG} if max_length is not None or max_profile_tokens is not None else set()
        assert {reason for _, reason in audit.dropped} <= allowed
        assert audit.broken_tokens == sum(pair.broken_tokens for pair in pairs)

    run()


@pytest.mark.parametrize("family", FAMILIES)
def test_without_limits_every_row_with_profile_and_response_is_kept(family):
    @settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(spoken, spoken, spoken, st.booleans())
    def run(profile, query, response, as_items):
        record = {"profile": [profile] if as_items else profile, "prompt": query, "completion": response}
        row = from_columns({"user": "u", **record}, "row 0")
        pair_maker = PairMaker(TOKENIZERS[family])
        (pair,) = pair_maker.make([row])
        assert TOKENIZERS[family].decode(scored(pair.factual)[:-1]) == broken(family, response).strip()
        asked = pair_maker.prompt_ids(row.prompt, row.profile)
        assert asked + scored(pair.factual) == pair.factual.ids
        assert broken(family, profile.strip()) in TOKENIZERS[family].decode(asked)
        assert asked != pair_maker.prompt_ids(row.prompt, "")

    run()
