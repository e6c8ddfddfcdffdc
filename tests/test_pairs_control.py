"""User text never becomes a control token; and what user text must not do to a pair otherwise."""

import signal
from collections import Counter

import pytest
import toys
from test_pairs import END, FAMILIES, context, make, maker, row, say, scored
from tokenizers import AddedToken

from perce_lite.data.pairs import Audit, PairMaker
from perce_lite.data.retrieval import Item
from perce_lite.data.rows import Row
from perce_lite.errors import TemplateError

START = {
    "chatml": "<|im_start|>",
    "llama3": "<|start_header_id|>",
    "gemma": "<start_of_turn>",
    "qwen3": "<|im_start|>",
}


def control_words(family):
    return [token.content for token in toys.toy_tokenizer(family).added_tokens_decoder.values()]


def control_ids(family, tokens):
    """How often each control token stands in the ids."""
    control = set(toys.toy_tokenizer(family).added_tokens_decoder)
    return Counter(token for token in tokens.ids if token in control)


def everywhere(text):
    """Columns of a row with `text` in every place that users write."""
    return {
        "profile": [{"title": f"my {text} title", "text": f"and {text} text"}, f"{text}{text}"],
        "prompt": [say("user", f"first {text}"), say("assistant", f"so {text} what"), say("user", f"then {text}?")],
        "completion": [
            say("assistant", f"an {text} answer"),
            say("user", f"{text}!"),
            say("assistant", f"{text} it is"),
        ],
    }


PLACES = 10  # in `everywhere`


@pytest.mark.parametrize("family", FAMILIES)
def test_control_words_in_user_text_add_no_control_ids_and_are_counted(family):
    benign = make(maker(family), row(**everywhere("plain")))
    for word in control_words(family):
        audit = Audit()
        (pair,) = maker(family).make([row(**everywhere(word))], audit)
        assert control_ids(family, pair.factual) == control_ids(family, benign.factual), word
        assert control_ids(family, pair.counterfactual) == control_ids(family, benign.counterfactual), word
        assert pair.broken_tokens == audit.broken_tokens == audit.summary()["control_tokens_broken"] == PLACES
        spoken = toys.toy_tokenizer(family).decode(scored(pair.factual)).split(END[family])
        assert [turn.replace(" ", "") for turn in spoken] == [f"an{word}answer", f"{word}itis", ""]  # still legible
        asked = maker(family).prompt_ids([say("user", word)], f"{word} and {word}")
        plain = maker(family).prompt_ids([say("user", "plain")], "plain and plain")
        count = [sum(one in toys.toy_tokenizer(family).added_tokens_decoder for one in ids) for ids in (asked, plain)]
        assert count[0] == count[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_nested_and_halved_spellings(family):
    start, end = START[family], END[family]
    tricks = [
        f"{end[:6]}{end}{end[6:]}",
        f"{end[:1]}{start}{end[1:]}",
        f"{end[:3]}{start[:3]}{end}{start[3:]}{end[3:]}",
        f"{start}{start}{end}{end}",
        f"before {end[:5]}",  # the template's own end of turn follows
        f"before {end[:-1]}",
        f"before {end[:1]}",
        f"{end[5:]} after",
        f"{end[1:]} after",
    ]
    benign = make(maker(family), row(**everywhere("plain")))
    for trick in tricks:
        pair = make(maker(family), row(**everywhere(trick)))
        assert control_ids(family, pair.factual) == control_ids(family, benign.factual), trick
        assert control_ids(family, pair.counterfactual) == control_ids(family, benign.counterfactual), trick
        broken = (trick.count(start) + trick.count(end)) * PLACES
        halves = f"{trick}{trick}".count(end) - 2 * trick.count(end)  # one item says it twice in a row
        assert pair.broken_tokens == broken + halves, trick


def test_only_what_the_template_writes_is_broken():
    """Qwen3's <think> is in the template and is broken; a line break that is an added token is ordinary text."""
    tokenizer = toys.toy_tokenizer("qwen3")
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in ("\n\n", "<h1>", "  ")])
    text = "one\n\ntwo <h1>  three"
    pair = make(PairMaker(tokenizer), row(profile=text, prompt=text, completion=text))
    assert pair.broken_tokens == 0
    rendered = tokenizer.decode(pair.factual.ids)
    assert rendered.count(text) == 3
    assert tokenizer.convert_tokens_to_ids("<h1>") in scored(pair.factual)
    pair = make(PairMaker(tokenizer), row(completion=f"<think>{text}</think>"))
    assert pair.broken_tokens == 2
    assert tokenizer.decode(scored(pair.factual)) == f"< think>{text}< /think><|im_end|>"
    assert scored(pair.factual) == scored(pair.counterfactual)


def test_text_that_spells_the_placeholders_is_text():
    text = "response0slot0. response1slot0. {profile} {text} {title} response2slot"
    pair = make(maker("llama3"), row(profile=[text], prompt=text, completion=text))
    rendered = toys.toy_tokenizer("llama3").decode(pair.factual.ids)
    assert rendered.count(text) == 3
    assert toys.toy_tokenizer("llama3").decode(scored(pair.factual)) == text + "<|eot_id|>"


def test_a_lone_surrogate_becomes_a_question_mark_and_real_text_stays():
    text = "smörgås 抹茶 🦦 e\u0301 \u200b \x00"
    pair = make(maker("gemma"), row(profile=f"\ud800{text}", prompt=f"{text}\udfff", completion=f"{text}\ud83d."))
    rendered = toys.toy_tokenizer("gemma").decode(pair.factual.ids)
    assert f"?{text}\n\n{text}?<end_of_turn>" in rendered
    assert rendered.endswith(f"{text}?.<end_of_turn>")


# Found by these tests, mended since


def test_a_user_message_that_opens_the_completion_is_read():
    completion = [say("user", "in two words"), say("assistant", "the lantern")]
    pair = make(maker("chatml"), row(completion=completion))
    assert "in two words" in toys.toy_tokenizer("chatml").decode(context(pair.counterfactual))


def test_a_dialogue_without_a_prompt():
    one = Row("x.jsonl, line 3", "ann", "an otter", (), (say("user", "q"), say("assistant", "a")))
    assert toys.toy_tokenizer("chatml").decode(scored(make(maker("chatml"), one).factual)) == "a<|im_end|>"


def test_a_title_that_spells_the_text_placeholder():
    text = maker("chatml").profile_text((Item("how to use {text}", "an otter"),))
    assert text == "how to use {text}\nan otter"


def test_halves_on_both_sides_of_an_empty_separator():
    pair_maker = maker("chatml", position="user", separator="")
    pair = make(pair_maker, row(profile="abc <|im_", prompt="end|> q"))
    assert control_ids("chatml", pair.factual) == control_ids("chatml", pair.counterfactual)


def test_an_item_of_which_the_template_shows_nothing_gives_way_to_the_next():
    profile = [{"title": "a title alone"}, {"text": "otter " * 90}, {"text": "fjord"}]
    pair = make(maker("chatml", max_length=70, item="{text}"), row(profile=profile))
    assert "fjord" in toys.toy_tokenizer("chatml").decode(pair.factual.ids)


def test_items_of_which_the_template_shows_nothing_leave_no_gap():
    items = (Item("one", ""), Item("two", "an otter"), Item("three", " "), Item("", "fjord"))
    assert maker("chatml", item="{text}").profile_text(items) == "an otter\n\nfjord"


def test_a_prompt_without_a_user_message_is_an_error_that_names_the_row():
    with pytest.raises(TemplateError, match=r"notes.jsonl, line 7.*no user message"):
        maker("chatml", position="user").make([row(prompt=[say("system", "Be brief.")])])


def test_a_control_word_in_a_role():
    pair = make(maker("chatml"), row(prompt=[say("user<|im_end|>", "q")]))
    benign = make(maker("chatml"), row(prompt=[say("user", "q")]))
    assert control_ids("chatml", pair.factual) == control_ids("chatml", benign.factual)


def test_a_control_word_in_a_role_of_a_prompt_for_generation():
    pair_maker, one = maker("chatml"), row(prompt=[say("user<|im_end|>", "q")])
    assert pair_maker.prompt_ids(one.prompt, one.profile) == context(make(pair_maker, one).factual)


def test_a_system_message_that_spells_the_placeholder():
    pair = make(maker("chatml", system="Say response0slot0. at the end"), row())
    assert "Say response0slot0. at the end" in toys.toy_tokenizer("chatml").decode(pair.counterfactual.ids)


def test_an_end_of_turn_behind_a_space_is_scored():
    tokenizer = toys.toy_tokenizer("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace("+ '<|im_end|>\\n'", "+ ' <|im_end|>\\n'")
    pair = make(PairMaker(tokenizer), row())
    assert "assistant. <|im_end|>" in tokenizer.decode(pair.counterfactual.ids)
    assert scored(pair.factual)[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_a_turn_that_ends_in_ordinary_text_is_scored_without_it():
    tokenizer = toys.toy_tokenizer("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace("+ '<|im_end|>\\n'", "+ ' ###\\n'")
    pair = make(PairMaker(tokenizer), row(messages=[say("user", "q"), say("assistant", "a b"), say("user", "why?")]))
    assert "fjord, again ###\n<|im_start|>user" in tokenizer.decode(pair.factual.ids)
    assert tokenizer.decode(scored(pair.factual)) == "a b"


def test_a_special_token_that_starts_with_a_space():
    def give_up(*_):
        raise TimeoutError

    tokenizer = toys.toy_tokenizer("chatml")
    tokenizer.add_special_tokens({"extra_special_tokens": [" <sep>"]})
    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, 20)  # it would never end
    try:
        pair = make(PairMaker(tokenizer), row(prompt="one <sep> two"))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert tokenizer.convert_tokens_to_ids(" <sep>") not in pair.factual.ids
