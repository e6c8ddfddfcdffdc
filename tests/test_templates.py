"""Ids and scored tokens against TRL's own preparation, for every chat template that TRL ships, in several shapes.

A response begins where the tokens of prompt and dialogue diverge (TRL: `completion_mask`) and ends with its turn.
"""

import re
from importlib import resources

import pytest
import toys
from tokenizers import AddedToken
from trl.data_utils import is_conversational
from trl.trainer.sft_trainer import common_prefix_length

from perce_lite.data.chat_template import dated
from perce_lite.data.pairs import IGNORED, Audit, PairMaker
from perce_lite.data.rows import from_columns
from perce_lite.errors import RowRefusedError
from perce_lite.recipe import Template

SOURCES = {
    file.name.removesuffix(".jinja"): file.read_text(encoding="utf-8")
    for file in sorted(resources.files("trl").joinpath("chat_templates").iterdir(), key=lambda file: file.name)
    if file.name.endswith(".jinja")
}
CONTROL = r"<\|[^|<>{}'\" ]+\|>|<｜[^｜<>]+｜>|</?think>|<(?:start|end)_of_turn>|<\|?[a-z_]+\|?>"


def say(role, content, **more):
    return {"role": role, "content": content, **more}


CALL = say("assistant", "", tool_calls=[{"type": "function", "function": {"name": "light", "arguments": {"on": True}}}])
SHAPES = {
    "single": [say("user", "a note"), say("assistant", "the lantern")],
    "system": [say("system", "Be brief."), say("user", "a note"), say("assistant", "the lantern")],
    "history": [
        say("user", "a note"),
        say("assistant", "go home."),
        say("user", "why?"),
        say("assistant", "it's late"),
    ],
    "reasoning": [say("user", "a note"), say("assistant", "the lantern", reasoning_content="it is dark")],
    "thinking": [say("user", "a note"), say("assistant", "the lantern", thinking="it is dark")],
    "inline": [say("user", "a note"), say("assistant", "<think>\nit is dark\n</think>\n\nthe lantern")],
    "call": [say("user", "a note"), CALL],
    "called": [say("user", "a note"), CALL, say("tool", "done", name="light"), say("assistant", "it is lit")],
}

IN_PARTS = ("idefics3", "smolvlm")
"""Take content in parts alone and show a text as nothing: TRL trains on an empty turn, we refuse the row."""

WITHOUT_CALLS = (
    "cohere", "cohere2", "deepseek_r1_distill", "gemma", "gemma3", "lfm2", "llama3", "phi3", "phi3_5", "qwen2_5_vl",
)  # fmt: skip
"""Show no tool calls: TRL trains on an empty turn, we refuse the row."""

BEHIND_THE_TURN = {"phi3": "\n<|im_end|>", "phi3_5": "\n<|im_end|>"}
"""Write the end of text behind the end of the last turn: TRL scores it, generation never comes to it."""


def tokenizer_of(name):
    """A toy tokenizer with the control words of a template as tokens; the template is told one day, as ours are."""
    tokenizer = toys.toy_tokenizer("chatml")
    words = sorted(set(re.findall(CONTROL, SOURCES[name])))
    tokenizer.add_tokens([AddedToken(word, special="think" not in word, normalized=False) for word in words])
    tokenizer.chat_template = dated(SOURCES[name], Template().date)
    return tokenizer


def of_trl(tokenizer, messages):
    """Ids and the start of the completion, as `SFTTrainer` computes them."""
    assert is_conversational({"prompt": messages[:-1], "completion": messages[-1:]})
    asked = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
    ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]
    return ids, common_prefix_length(tokenizer(asked, add_special_tokens=False)["input_ids"], ids)


def of_ours(tokenizer, messages):
    """Ids of the pass without profile and the start of what is scored."""
    maker = PairMaker(tokenizer, Template(chat_template_kwargs={}, system=None, position="user"))
    columns = {"profile": "otters", "prompt": messages[:-1], "completion": messages[-1:]}
    [pair] = maker.make([from_columns(columns, "a row")])
    ids, labels = pair.counterfactual.ids, pair.counterfactual.labels
    start = next(index for index, label in enumerate(labels) if label != IGNORED)
    assert labels[start:] == ids[start:]
    assert pair.factual.ids[-len(ids[start:]) :] == ids[start:]
    return ids, start


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SOURCES)
def test_ids_are_trls(name, shape):
    messages, family = SHAPES[shape], name.removesuffix("_training")
    tokenizer = tokenizer_of(name)
    try:
        expected, start = of_trl(tokenizer, messages)
    except Exception:
        with pytest.raises(RowRefusedError, match="a row: the chat template refuses"):
            of_ours(tokenizer, messages)
        return
    if family in IN_PARTS or (shape == "call" and family in WITHOUT_CALLS):
        why = "leaves out tool calls" if shape == "call" and family not in IN_PARTS else "does not show|shows 0 of 1"
        with pytest.raises(RowRefusedError, match=why):
            of_ours(tokenizer, messages)
        return
    ids, scored_from = of_ours(tokenizer, messages)
    assert ids == expected[: len(ids)]
    assert scored_from == start
    behind = tokenizer.decode(expected[len(ids) :])
    assert behind == BEHIND_THE_TURN.get(family, behind) or not behind.strip()


def test_every_difference_is_listed():
    families = {name.removesuffix("_training") for name in SOURCES}
    assert {*IN_PARTS, *WITHOUT_CALLS, *BEHIND_THE_TURN} <= families
    assert len(SOURCES) > 60


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "gptoss", "llama3_1", "lfm2_v2", "glm4moe", "gemma4"])
def test_calls_within_a_dialogue_are_scored_and_tools_answers_are_not(name):
    tokenizer = tokenizer_of(name)
    maker = PairMaker(tokenizer, Template(chat_template_kwargs={}, system=None, position="user"))
    prompt, *completion = SHAPES["called"]
    tools = [{"type": "function", "function": {"name": "light", "description": "A switch of lamps", "parameters": {
        "type": "object", "properties": {"on": {"type": "boolean", "description": "on or off"}}}}}]  # fmt: skip
    [pair] = maker.make(
        [from_columns({"profile": "otters", "prompt": [prompt], "completion": completion, "tools": tools}, "a row")]
    )
    for tokens in (pair.factual, pair.counterfactual):
        scored = tokenizer.decode([label for label in tokens.labels if label != IGNORED])
        assert all(part in scored for part in ("light", "it is lit"))
        assert not any(part in scored for part in ("done", "a note", "otters"))
        assert "A switch of lamps" in tokenizer.decode(tokens.ids)


def test_the_rows_own_options_go_to_the_template():
    tokenizer = tokenizer_of("qwen3")
    maker = PairMaker(tokenizer, Template(system=None))
    columns = {"profile": "otters", "prompt": [say("user", "a note")], "completion": [say("assistant", "the lantern")]}
    plain, thinks = maker.make(
        [from_columns(columns | more, "a row") for more in ({}, {"chat_template_kwargs": {"enable_thinking": True}})]
    )
    assert "<think>" not in tokenizer.decode([label for label in plain.factual.labels if label != IGNORED])
    assert "<think>" in tokenizer.decode([label for label in thinks.factual.labels if label != IGNORED])


def test_rows_that_the_template_refuses_are_dropped_counted_and_named():
    twice = {"prompt": [say("user", "one"), say("user", "two")], "completion": [say("assistant", "the lantern")]}
    once = {"prompt": [say("user", "one")], "completion": [say("assistant", "the lantern")]}
    rows = [
        from_columns({"profile": "otters", "user": "ann", **columns}, f"row {n}")
        for n, columns in enumerate([once, twice, once, twice])
    ]
    audit = Audit()
    pairs = PairMaker(tokenizer_of("gemma"), Template(position="user")).make(rows, audit)
    assert [pair.row.where for pair in pairs] == ["row 0", "row 2"]
    [dropped] = audit.summary()["dropped"]
    assert (dropped["user"], dropped["rows"], dropped["such_as"]) == ("ann", 2, "row 1")
    assert "Conversation roles must alternate" in dropped["reason"]


@pytest.mark.parametrize(("name", "hidden"), [("qwen3", 0), ("deepseek_r1_distill", 1), ("llama3", 1)])
def test_thoughts_that_a_template_does_not_show_are_counted(name, hidden):
    audit = Audit()
    row = from_columns({"profile": "otters", "messages": SHAPES["reasoning"]}, "a row")
    assert len(PairMaker(tokenizer_of(name), Template(position="user")).make([row, row], audit)) == 2
    assert audit.summary()["thoughts_left_out"] == 2 * hidden


def test_an_empty_turn_carries_no_loss():
    turns = [say("user", "one"), say("assistant", ""), say("user", "two"), say("assistant", "the lantern")]
    tokenizer = toys.toy_tokenizer("chatml")
    [pair] = PairMaker(tokenizer).make([from_columns({"profile": "otters", "messages": turns}, "a row")])
    assert tokenizer.decode([label for label in pair.factual.labels if label != IGNORED]) == "the lantern<|im_end|>"
