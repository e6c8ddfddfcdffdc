"""Rows and messages of many shapes: nothing that is said is lost, and what is not trained on is refused by name."""

# ruff: noqa: E501 (records, a line each)

import json

import datasets
import pytest
import torch
import toys
from peft import LoraConfig

from perce_lite import PerCEConfig, PerCETrainer
from perce_lite.data.chat_template import dated
from perce_lite.data.pairs import IGNORED, PairMaker
from perce_lite.data.readers import read_rows
from perce_lite.data.rows import from_columns, to_records
from perce_lite.errors import DataError, RecipeError
from perce_lite.model.end_of_turn import norm_share
from perce_lite.recipe import Recipe, Template


def say(role, content, **more):
    return {"role": role, "content": content, **more}


def read(tmp_path, *records, **data):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    recipe = Recipe.model_validate({"data": {"path": "rows.jsonl", **data}})
    recipe._source = str(tmp_path / "recipe.yaml")
    return read_rows(recipe)


@pytest.mark.parametrize(
    ("record", "prompt", "completion"),
    [
        ({"instruction": "Sum up.", "input": "Rain fell.", "output": "Wet."}, "Sum up.\n\nRain fell.", "Wet."),
        ({"instruction": "Write.", "input": "", "output": "A line."}, "Write.", "A line."),
        ({"instruction": "Write.", "output": "A line."}, "Write.", "A line."),
        ({"instruction": "Write.", "context": "Of rain.", "response": "A line."}, "Write.\n\nOf rain.", "A line."),
        ({"id": 7, "instruction": "Write.", "input": "Of rain.", "output": "A line."}, "Write.\n\nOf rain.", "A line."),
    ],
)
def test_alpaca_with_a_profile_keeps_its_instruction_and_its_user(tmp_path, record, prompt, completion):
    record = {"user": "ann", "profile": "otters", **record}
    [row] = read(tmp_path, record)
    assert (row.user, row.profile) == ("ann", "otters")
    assert row.prompt == (say("user", prompt),)
    assert row.completion == (say("assistant", completion),)
    assert from_columns(record, "w").prompt == row.prompt


def test_an_instruction_is_never_lost_to_another_shape(tmp_path):
    with pytest.raises(DataError, match=r"line 1: neither instruction nor input"):
        read(tmp_path, {"profile": "otters", "instruction": "", "output": "A line."})
    mixed = [
        {"profile": "otters", "input": "Of rain", "output": "A"},
        {"profile": "otters", "instruction": "Do", "input": "", "output": "B"},
    ]
    with pytest.raises(DataError, match=r"line 2: has an instruction, which longlamp would lose"):
        read(tmp_path, *mixed)


@pytest.mark.parametrize("column", ["messages", "conversations", "conversation"])
@pytest.mark.parametrize("speakers", [("human", "gpt"), ("user", "assistant"), ("user", "chatgpt")])
def test_sharegpt_is_read(tmp_path, column, speakers):
    turns = [{"from": speakers[n % 2], "value": text} for n, text in enumerate(["Hi", "Yes?", "Rain", "Wet"])]
    [row] = read(tmp_path, {"profile": "otters", column: [{"from": "system", "value": "Be brief."}, *turns]})
    assert row.prompt == (say("system", "Be brief."), say("user", "Hi"))
    assert row.completion == (say("assistant", "Yes?"), say("user", "Rain"), say("assistant", "Wet"))


def test_a_text_profile_stays_a_text_beside_lists(tmp_path):
    rows = read(
        tmp_path, *({"profile": profile, "prompt": "p", "completion": "c"} for profile in ("a text", ["an item"]))
    )
    assert rows[0].profile == "a text"
    assert [item.text for item in rows[1].profile] == ["an item"]
    assert [record["profile"] for record in to_records(rows)] == ["a text", [{"title": "", "text": "an item"}]]


CALL = {"id": "1", "type": "function", "function": {"name": "light", "arguments": {"on": True, "colour": None}}}


def test_what_templates_read_of_a_message_is_kept_and_none_is_left_out():
    turns = [
        say("user", "Light?", name="ann"),
        say("assistant", None, tool_calls=[CALL], reasoning_content="it is dark", thinking=None),
        say("tool", "done", tool_call_id="1", name="light"),
        say("assistant", [{"type": "text", "text": "It is "}, {"type": "text", "text": "lit."}]),
    ]
    row = from_columns({"profile": "p", "messages": turns, "tools": json.dumps([{"name": "light"}])}, "w")
    shown = {**CALL, "function": {"name": "light", "arguments": {"on": True}}}
    assert row.prompt == (say("user", "Light?", name="ann"),)
    assert row.completion == (
        {"role": "assistant", "tool_calls": [shown], "reasoning_content": "it is dark"},
        say("tool", "done", tool_call_id="1", name="light"),
        say("assistant", "It is lit."),
    )
    assert row.template_options == {"tools": [{"name": "light"}]}
    [record] = to_records([row])
    assert from_columns(record, "w").fingerprint() == row.fingerprint()


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (
            say("assistant", "x", function_call={"name": "light"}),
            "a message with 'function_call', which would not be trained on",
        ),
        (say("assistant", "x", weight=0), "a message with 'weight'"),
        (say("assistant", [{"type": "image", "image": "x"}]), "content of the kind image"),
        (say("assistant", 7), "whose content is not a text"),
        (say("assistant", "x", thinking=["y"]), "whose thinking is not a text"),
        ({"role": "assistant"}, "a list of messages"),
    ],
)
def test_what_would_not_be_trained_on_is_refused_by_name(message, told):
    with pytest.raises(DataError, match=f"^w: messages .*{told}"):
        from_columns({"profile": "p", "messages": [say("user", "q"), message]}, "w")


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [
        ("tools", "{not JSON", "tools is no JSON"), ("tools", {"name": "x"}, "tools is a list of tools"),
        ("chat_template_kwargs", ["x"], "chat_template_kwargs is an object"),
    ],
)  # fmt: skip
def test_options_of_the_template_that_are_none(column, value, told):
    with pytest.raises(DataError, match=told):
        from_columns({"profile": "p", "prompt": "q", "completion": "a", column: value}, "w")


def test_words_of_control_within_calls_and_tools_are_broken():
    calls = [{"type": "function", "function": {"name": "light", "arguments": {"on<|im_end|>": "<|im_start|>system"}}}]
    tokenizer = toys.toy_tokenizer("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}{{ m.tool_calls if m.tool_calls }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    columns = {"profile": "p", "prompt": "q", "completion": [say("assistant", "", tool_calls=calls)]}
    [pair] = PairMaker(tokenizer).make([from_columns(columns, "w")])
    assert pair.broken_tokens == 2
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert [sum(token == start for token in tokens.ids) for tokens in (pair.factual, pair.counterfactual)] == [3, 3]


# Scripts


def trainer_of(tmp_path, columns, **options):
    torch.manual_seed(0)
    tokenizer = toys.toy_tokenizer("chatml")
    model = options.pop("model", None) or toys.toy_model("chatml", len(tokenizer))
    args = PerCEConfig(output_dir=str(tmp_path / "out"), use_cpu=True, report_to=[], max_steps=1, **options)
    return PerCETrainer(
        model,
        args,
        train_dataset=datasets.Dataset.from_list(columns),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
    )


def test_a_script_hears_once_of_rows_that_are_left_out(tmp_path, capsys):
    row = {"profile": "otters", "prompt": "q", "completion": "a short answer"}
    columns = [row, {**row, "completion": "word " * 300}, {**row, "profile": ""}, {**row, "profile": ""}]
    trainer = trainer_of(tmp_path, columns, max_length=128)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert told == [
        "warning: 3 of 4 train rows are left out: 1 x query and response exceed max_length (such as train row 1); "
        "2 x empty profile (such as train row 2)"
    ]
    assert len(trainer.pairs["train"]) == 1


def test_scripts_take_conversations_alpaca_and_tools(tmp_path):
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "the lantern"}]
    for columns in (
        {"conversations": turns},
        {"instruction": "q", "input": "", "output": "the lantern"},
        {"prompt": "q", "completion": "the lantern", "tools": "[]", "chat_template_kwargs": {"x": 1}},
    ):
        trainer = trainer_of(tmp_path, [{"profile": "otters", **columns}])
        [pair] = trainer.pairs["train"]
        decoded = trainer.processing_class.decode([label for label in pair.factual.labels if label != IGNORED])
        assert decoded == "the lantern<|im_end|>"
        trainer.train()


@pytest.mark.parametrize("size", [0.01, 1.0])
def test_a_base_that_never_learned_to_end_a_turn_is_told_of_once(tmp_path, capsys, size):
    tokenizer = toys.toy_tokenizer("chatml")
    model = toys.toy_model("chatml", len(tokenizer))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    with torch.no_grad():
        weight = model.get_output_embeddings().weight
        weight[end] *= size * weight.norm(dim=1).median() / weight[end].norm()
    assert norm_share(weight, end) == pytest.approx(size, rel=1e-3)
    row = {"profile": "otters", "prompt": "q", "completion": "a short answer"}
    trainer_of(tmp_path, [row], model=model)
    told = capsys.readouterr().err
    assert ("'<|im_end|>', which ends a turn" in told) is (size < 0.25)
    assert "1% of the median norm" in told or size == 1.0


# Dates

ASKS = (
    "{%- if strftime_now is defined %}{%- set today = strftime_now('%d %b %Y') %}{%- else %}{%- set today = 'never' %}{%- endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.first %}Today: {{ today }} ({{ strftime_now('%-d.%-m.%y, %A') }})\n"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_asks_for_the_day_is_told_one_for_all_days():
    tokenizer = toys.toy_tokenizer("chatml")
    tokenizer.chat_template = ASKS
    for date, shown in (("2025-02-03", "03 Feb 2025 (3.2.25, Monday)"), (None, "26 Jul 2024 (26.7.24, Friday)")):
        maker = PairMaker(tokenizer, Template(date=date) if date else Template())
        assert f"Today: {shown}\n" in tokenizer.decode(maker.prompt_ids([say("user", "q")], "p"))
    source = dated(ASKS, "2025-02-03")
    assert dated(source, "2026-01-01") == source, "a template that was saved with an adapter keeps its day"
    assert dated("{{ messages }}", "2025-02-03") == "{{ messages }}"


def test_the_day_is_a_key_of_the_recipe():
    import datetime

    assert Template(date=datetime.date(2025, 2, 3)).date == "2025-02-03"
    with pytest.raises((RecipeError, ValueError)):
        Template(date="tomorrow")
