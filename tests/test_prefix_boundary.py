"""Where a prefix ends: it holds the profile and nothing of the query; a template that hides where is refused."""

import pytest
import toys
from test_prefix import FAMILIES, maker, toy_pairs
from transformers.models.llama.modeling_llama import LlamaAttention

from perce_lite.data.pairs import IGNORED, PairMaker
from perce_lite.data.rows import from_columns
from perce_lite.errors import ConfigError, TemplateError
from perce_lite.recipe import Template


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prefix_holds_the_profile_and_nothing_of_the_query(family):
    tokenizer = toys.toy_tokenizer(family)
    for pair in toy_pairs(family, 9):
        before, after = tokenizer.decode(pair.factual.prefix_ids), tokenizer.decode(pair.factual.after_prefix.ids)
        assert pair.profile in before
        assert pair.row.query in after
        assert pair.row.query not in before
        assert all(label == IGNORED for label in pair.factual.labels[: pair.factual.prefix_length + 1])
        assert tokenizer.decode(pair.counterfactual.after_prefix.ids).endswith(after.strip()[-20:])


def test_where_the_prefix_ends_is_asked_once_a_pass_however_long_the_search_for_what_fits(monkeypatch):
    asked = []
    own = PairMaker.activation_offset
    monkeypatch.setattr(PairMaker, "activation_offset", lambda self, *args: asked.append(1) or own(self, *args))
    row = {**toys.toy_rows()[0], "profile": "tea and otters " * 200}
    (pair,) = PairMaker(toys.toy_tokenizer("chatml"), max_length=120, profile_pass="frozen").make(
        [from_columns(row, "a row")]
    )
    assert pair.items_left_out > 0
    assert len(asked) == 2
    PairMaker(toys.toy_tokenizer("chatml")).prompt(pair.row.prompt, "tea")
    assert len(asked) == 2, "with profile_pass full nothing is asked"


def test_a_system_message_ends_with_its_own_turn():
    """So that other programs can activate the adapter at the header of the user's message."""
    tokenizer = toys.toy_tokenizer("chatml")
    for pair in toy_pairs():
        for tokens in (pair.factual, pair.counterfactual):
            assert tokenizer.decode(tokens.after_prefix.ids).startswith("\n<|im_start|>user\n")


def test_a_prompt_to_answer_has_the_prefix_of_training():
    for family in FAMILIES:
        own = maker(family)
        for pair in toy_pairs(family):
            asked = own.prompt(pair.row.prompt, pair.row.profile)
            assert asked.ids == own.prompt_ids(pair.row.prompt, pair.row.profile)
            assert (asked.prefix_length, asked.prefix_ids) == (pair.factual.prefix_length, pair.factual.prefix_ids)


def test_a_token_that_reaches_from_the_profile_into_the_query_belongs_to_the_prefix():
    tokenizer = toys.toy_tokenizer("gemma")
    row = from_columns({"user": "u", "profile": "likes tea\n", "prompt": "?", "completion": "yes"}, "a row")
    template = {"profile": "{profile}", "separator": "\n"}
    (pair,) = maker("gemma", **template).make([row])
    text = tokenizer.decode(pair.factual.ids)
    assert "tea" in tokenizer.decode(pair.factual.prefix_ids)
    assert tokenizer.decode(pair.factual.prefix_ids) + tokenizer.decode(pair.factual.after_prefix.ids) == text


SYSTEM_LAST = r"""
{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' -%}
{%- for message in messages if message['role'] != 'system' -%}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] -}}
    {%- if message['role'] == 'user' and system -%} {{- '\n' + system -}} {%- endif -%}
    {{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%} {{- '<|im_start|>assistant\n' -}} {%- endif -%}
"""


def test_a_profile_behind_the_query_is_refused():
    tokenizer = toys.toy_tokenizer("chatml")
    tokenizer.chat_template = SYSTEM_LAST
    row = from_columns(toys.toy_rows()[0], "rows.jsonl line 1")
    PairMaker(tokenizer, profile_pass="full").make([row])
    with pytest.raises(TemplateError, match=r"rows.jsonl line 1.*before every query"):
        PairMaker(tokenizer, profile_pass="frozen").make([row])
    (pair,) = PairMaker(tokenizer, Template(position="user"), profile_pass="frozen").make([row])
    assert pair.factual.prefix_length


def test_nothing_to_freeze_is_a_fault_of_the_config(toy_trainer):
    with pytest.raises(ConfigError, match="has no profile"):
        toy_trainer(profile_pass="frozen", train_on="counterfactual")
    with pytest.raises(ConfigError, match="'asleep' is not one of full, frozen"):
        toy_trainer(profile_pass="asleep")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_dropout": 0.1}, "attention_dropout of 0, not 0.1"),
        ({"_attn_implementation": "flex_attention"}, "sdpa or eager, not flex_attention"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "also has linear_attention"),
    ],
)
def test_an_attention_that_cannot_is_refused(toy_trainer, change, message):
    model = toys.toy_model("chatml", toys.VOCAB_SIZE)
    for name, value in change.items():
        setattr(model.config, name, value)
    with pytest.raises(ConfigError, match=message):
        toy_trainer(model=model, profile_pass="frozen")


def test_a_layer_that_does_not_reach_the_prefix_is_refused(toy_trainer, monkeypatch):
    own = LlamaAttention.forward
    monkeypatch.setattr(
        LlamaAttention, "forward", lambda self, *args, batch_prefixes=None, **rest: own(self, *args, **rest)
    )
    with pytest.raises(ConfigError, match="does not reach every layer of LlamaForCausalLM"):
        toy_trainer(profile_pass="frozen")
