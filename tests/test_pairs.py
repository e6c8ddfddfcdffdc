"""Pairs against renderings made here, message by message: same response in both passes, profile in one of them."""

import re

import pytest
import toys

from perce_lite.data.pairs import (
    IGNORED,
    NO_PROFILE,
    NO_RESPONSE,
    PROFILE_TOO_LONG,
    TOO_LONG,
    Audit,
    PairMaker,
    require,
)
from perce_lite.data.retrieval import Item
from perce_lite.data.rows import Row, from_columns
from perce_lite.errors import DataError, TemplateError
from perce_lite.recipe import Template

END = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "qwen3": "<|im_end|>"}
FAMILIES = tuple(END)
SYSTEM = "You are a helpful assistant."  # the recipe's, where a row has none of its own
ITEMS = [{"title": "Rain", "text": "the otter hides"}, {"title": "", "text": "my fjord, again"}]
ITEMS_TEXT = "Rain\nthe otter hides\n\nmy fjord, again"
DIALOGUE = [("user", "what now?"), ("assistant", "go home."), ("user", "why?"), ("assistant", "it's late")]


def say(role, content):
    return {"role": role, "content": content}


def row(**columns):
    given = {"user": "ann", "profile": ITEMS, "prompt": "a note, please", "completion": "the saffron lantern"}
    if "messages" in columns:
        del given["prompt"], given["completion"]
    return from_columns({**given, **columns}, "notes.jsonl, line 7")


def maker(family, max_length=None, max_profile_tokens=None, **template):
    return PairMaker(toys.toy_tokenizer(family), Template(**template), max_length, max_profile_tokens)


def make(pair_maker, one):
    return pair_maker.make([one])[0]


def scored(tokens):
    """The scored ids, each of which must stand at its own place in the ids."""
    assert len(tokens.ids) == len(tokens.labels)
    assert all(label in (IGNORED, token) for token, label in zip(tokens.ids, tokens.labels, strict=True))
    return [label for label in tokens.labels if label != IGNORED]


def context(tokens):
    return tokens.ids[: next(index for index, label in enumerate(tokens.labels) if label != IGNORED)]


def encode(tokenizer, messages, **kwargs):
    text = tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False, **kwargs)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def with_profile(family, messages, profile=ITEMS_TEXT, position=None):
    """`messages` with the profile as the default template puts it; without a profile: with the system message."""
    said = f"Texts by this user:\n\n{profile}" if profile else ""
    system, rest = [], list(messages)
    if family != "gemma":
        system = [rest.pop(0)["content"] if rest[0]["role"] == "system" else SYSTEM]
    if said and (position or ("user" if family == "gemma" else "system")) == "system":
        system, said = ["\n\n".join([*system, said])], ""
    if said:
        rest[0] = say("user", f"{said}\n\n{rest[0]['content']}")
    return [*(say("system", one) for one in system), *rest]


BOTH_SYSTEMS = [(family, own) for family in FAMILIES for own in (False, True) if not (own and family == "gemma")]


@pytest.mark.parametrize("profile", [ITEMS, "a text: the otter, my fjord"], ids=["items", "text"])
@pytest.mark.parametrize(("family", "own_system"), BOTH_SYSTEMS)
def test_single_turn_is_what_generation_will_see_then_the_response(family, own_system, profile):
    prompt = [say("system", "Be brief.")] * own_system + [say("user", "a note, please")]
    pair_maker = maker(family)
    tokenizer, pair = pair_maker.tokenizer, make(pair_maker, row(prompt=prompt, profile=profile))
    text = profile if isinstance(profile, str) else ITEMS_TEXT
    for tokens, said in ((pair.factual, text), (pair.counterfactual, "")):
        assert context(tokens) == encode(tokenizer, with_profile(family, prompt, said), add_generation_prompt=True)
        assert tokenizer.decode(scored(tokens)) == "the saffron lantern" + END[family]
        assert tokens.ids[-len(scored(tokens)) :] == scored(tokens)
    assert scored(pair.factual) == scored(pair.counterfactual)
    asked = pair_maker.prompt_ids(pair.row.prompt, pair.row.profile)
    assert asked == context(pair.factual)
    assert pair_maker.prompt_ids(pair.row.prompt, "") == context(pair.counterfactual)


@pytest.mark.parametrize("as_messages", [True, False], ids=["messages", "prompt and completion"])
@pytest.mark.parametrize(("family", "own_system"), BOTH_SYSTEMS)
def test_every_turn_of_a_dialogue_is_scored_in_the_rendering_of_the_whole(family, own_system, as_messages):
    messages = [say("system", "Be brief.")] * own_system + [say(*turn) for turn in DIALOGUE]
    head = 1 + own_system
    columns = {"messages": messages} if as_messages else {"prompt": messages[:head], "completion": messages[head:]}
    pair_maker = maker(family)
    tokenizer, pair = pair_maker.tokenizer, make(pair_maker, row(**columns))
    for tokens, said in ((pair.factual, ITEMS_TEXT), (pair.counterfactual, "")):
        whole = encode(tokenizer, with_profile(family, messages, said))
        last = max(i for i, token in enumerate(whole) if token == tokenizer.convert_tokens_to_ids(END[family]))
        assert tokens.ids == whole[: last + 1]  # nothing is computed behind the last scored token
        assert tokenizer.decode(scored(tokens)) == f"go home.{END[family]}it's late{END[family]}"
    assert scored(pair.factual) == scored(pair.counterfactual)


def test_what_the_template_writes_behind_its_generation_prompt_belongs_to_the_response():
    pair_maker = maker("qwen3", chat_template_kwargs={})
    pair, tokenizer = make(pair_maker, row()), pair_maker.tokenizer
    for tokens in (pair.factual, pair.counterfactual):
        assert tokenizer.decode(context(tokens)).endswith("<|im_start|>assistant\n")  # without <think></think>
        assert tokenizer.decode(scored(tokens)) == "<think>\n\n</think>\n\nthe saffron lantern<|im_end|>"


def test_assistant_turns_of_the_prompt_are_context_and_a_trailing_user_turn_is_not_kept():
    turns = [say(*turn) for turn in DIALOGUE]
    pair = make(maker("chatml"), row(prompt=turns[:3], completion=[turns[3], say("user", "bye")]))
    tokenizer = toys.toy_tokenizer("chatml")
    assert tokenizer.decode(pair.factual.ids).count("go home.") == 1
    assert tokenizer.decode(scored(pair.factual)) == "it's late<|im_end|>"


@pytest.mark.parametrize("position", ["system", "user"])
@pytest.mark.parametrize("family", ["chatml", "llama3", "qwen3"])
def test_position_puts_the_profile_where_it_says(family, position):
    pair_maker, asked = maker(family, position=position), [say("user", "a note, please")]
    pair = make(pair_maker, row())
    for tokens, said in ((pair.factual, ITEMS_TEXT), (pair.counterfactual, "")):
        expected = with_profile(family, asked, said, position)
        assert context(tokens) == encode(pair_maker.tokenizer, expected, add_generation_prompt=True)


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ({}, "q"),
        ({"position": "user"}, "q"),
        ({"position": "user", "system": None}, "q"),  # the chat template's own default, then, in both
        ({}, [say("system", "Be brief."), say("user", "q")]),
        ({"system": None}, "q"),
        ({}, [say("system", ""), say("user", "q")]),
    ],
)
def test_the_chat_template_s_default_system_message_stands_in_both_passes_or_in_none(template, prompt):
    pair_maker = maker("chatml", **template)
    pair = make(pair_maker, row(prompt=prompt))
    texts = [pair_maker.tokenizer.decode(tokens.ids) for tokens in (pair.factual, pair.counterfactual)]
    assert texts[0].count("named Toy") == texts[1].count("named Toy")
    assert texts[0].count("<|im_start|>") == texts[1].count("<|im_start|>")


def test_system_message_given_to_gemma_is_one_clear_error():
    asked = [say("system", "Be brief."), say("user", "q")]
    for pair_maker, one in ((maker("gemma"), row(prompt=asked)), (maker("gemma", position="system"), row())):
        with pytest.raises(TemplateError, match=r"line 7.*system, user.*System role not supported"):
            pair_maker.make([one])


# Templates that do not serve


def test_no_chat_template():
    tokenizer = toys.toy_tokenizer("chatml")
    tokenizer.chat_template = None
    with pytest.raises(TemplateError, match="no chat template"):
        PairMaker(tokenizer)


DEAF = (
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_template(source, **template):
    tokenizer = toys.toy_tokenizer("chatml")
    tokenizer.chat_template = source
    return PairMaker(tokenizer, Template(**template))


def test_a_template_that_hides_the_profile_names_the_row_and_auto_finds_the_query_instead():
    with pytest.raises(TemplateError, match=r"line 7.*no trace"):
        with_template(DEAF, position="system").make([row()])
    pair = make(with_template(DEAF), row())
    asked = f"<|im_start|>user\nTexts by this user:\n\n{ITEMS_TEXT}\n\na note, please<|im_end|>\n"
    assert toys.toy_tokenizer("chatml").decode(context(pair.factual)) == asked + "<|im_start|>assistant\n"


def test_a_template_that_drops_earlier_turns_takes_no_dialogue_but_takes_single_turns():
    with pytest.raises(TemplateError, match=r"line 7.*shows 1 of 2 assistant turns"):
        with_template(FORGETFUL).make([row(messages=[say(*turn) for turn in DIALOGUE])])
    assert make(with_template(FORGETFUL), row()).broken_tokens == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_stop_ids_hold_the_end_of_turn_and_the_end_of_text(family):
    tokenizer = toys.toy_tokenizer(family)
    tokenizer.eos_token = tokenizer.pad_token  # another than the end of turn, as in Llama 3
    turn_end = tokenizer.convert_tokens_to_ids(END[family])
    assert set(PairMaker(tokenizer).stop_ids()) == {turn_end, tokenizer.pad_token_id}


# The budget


def fitting(items, limit, length):
    """The oracle: the most of the nearest items that fit; where not even one does, the nearest alone that does."""
    for count in range(len(items), 0, -1):
        if length(items[:count]) <= limit:
            return items[:count]
    return next(([one] for one in items if length([one]) <= limit), [])


@pytest.mark.parametrize("family", ["chatml", "gemma"])
def test_whole_items_are_left_out_until_a_row_fits_and_the_response_is_never_cut(family):
    texts = ["my old mandolin at the market every weekend", "an otter", "the zeppelin and the thimble", "fjord"]
    tokenizer = toys.toy_tokenizer(family)
    response = tokenizer("the saffron lantern" + END[family], add_special_tokens=False)["input_ids"]

    def ids(chosen):
        asked = with_profile(family, [say("user", "a note, please")], "\n\n".join(chosen))
        return encode(tokenizer, asked, add_generation_prompt=True) + response

    for limit in range(len(ids([])) - 1, len(ids(texts)) + 2):
        expected, audit = fitting(texts, limit, lambda chosen: len(ids(chosen))), Audit()
        pairs = maker(family, max_length=limit).make([row(profile=texts)], audit)
        if not expected:
            reason = TOO_LONG if len(ids([])) > limit else PROFILE_TOO_LONG
            assert (pairs, dict(audit.dropped)) == ([], {("ann", reason): 1})
            continue
        assert (pairs[0].factual.ids, pairs[0].profile) == (ids(expected), "\n\n".join(expected))
        assert pairs[0].counterfactual.ids == ids([])
        assert pairs[0].items_left_out == audit.items_left_out == len(texts) - len(expected)


def test_max_profile_tokens_counts_the_profile_s_own_tokens():
    tokenizer = toys.toy_tokenizer("llama3")
    texts = ["an otter", "the zeppelin and the thimble", "fjord"]

    def length(chosen):
        return len(tokenizer("\n\n".join(chosen), add_special_tokens=False)["input_ids"])

    for limit in range(1, length(texts) + 1):
        pairs = maker("llama3", max_profile_tokens=limit).make([row(profile=texts)])
        expected = fitting(texts, limit, length)
        assert [pair.items_left_out for pair in pairs] == [len(texts) - len(expected)] * bool(expected)
        if expected:
            asked = with_profile("llama3", [say("user", "a note, please")], "\n\n".join(expected))
            assert context(pairs[0].factual) == encode(tokenizer, asked, add_generation_prompt=True)


def test_a_text_profile_is_cut_between_words():
    profile = "alpha  beta\n\ngamma delta\tepsilon"
    starts = ["alpha", "alpha  beta", "alpha  beta\n\ngamma", "alpha  beta\n\ngamma delta", profile]
    tokenizer = toys.toy_tokenizer("chatml")
    for limit in range(1, 40):
        fit = [start for start in starts if len(tokenizer(start)["input_ids"]) <= limit]
        pairs = maker("chatml", max_profile_tokens=limit).make([row(profile=profile)])
        assert len(pairs) == bool(fit)
        for pair in pairs:
            text = tokenizer.decode(pair.factual.ids)
            assert re.search(r"user:\n\n(.*)<\|im_end\|>\n<\|im_start\|>user", text, re.S)[1] == fit[-1] == pair.profile
            assert pair.items_left_out == 5 - len(fit)


# What is dropped


def test_the_audit_adds_up_by_user_and_reason():
    long = "word " * 80
    rows = [row(user="ann"), row(user="ann", completion=" \n\t"), row(user="bob", completion=""), row(user="bob")]
    rows += [row(user="bob", profile=empty) for empty in ("", " \n ", [], None, [" ", {"title": "", "text": "\t"}])]
    rows += [row(user="cy", prompt=long), row(user="cy", completion=long), row(user="cy", profile=[long])]
    rows += [Row("x.jsonl, line 3", "cy", (Item(" ", "\n"),), row().prompt, row().completion)]
    audit = Audit()
    pairs = maker("chatml", max_length=90).make(rows, audit)
    assert [pair.row.user for pair in pairs] == ["ann", "bob"]
    dropped = {
        ("ann", NO_RESPONSE): 1,
        ("bob", NO_RESPONSE): 1,
        ("bob", NO_PROFILE): 5,
        ("cy", NO_PROFILE): 1,
        ("cy", TOO_LONG): 2,
        ("cy", PROFILE_TOO_LONG): 1,
    }
    assert dict(audit.dropped) == dropped
    told = audit.summary()
    assert (told["read"], told["kept"]) == (13, 2)
    assert {(one["user"], one["reason"]): one["rows"] for one in told["dropped"]} == dropped
    assert [one["such_as"] for one in told["dropped"]][2:4] == ["notes.jsonl, line 7", "x.jsonl, line 3"]
    require(pairs, audit, "train")
    with pytest.raises(DataError, match=r"No train rows are left of 13.*6 x empty profile.*max_length"):
        require([], audit, "train")
