"""The Python surface: its names, its examples, and adapters that a script or another trainer saved."""

import doctest
import inspect
import io
import json
import shutil
import subprocess
import sys

import pytest
import torch
import toys
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import perce_lite
from perce_lite.errors import AdapterError, DataError, RecipeError, TemplateError
from perce_lite.files import METADATA, read_json, write_json
from perce_lite.model import adapters
from perce_lite.model.adapter_files import Said, read_metadata
from perce_lite.model.base import Base
from perce_lite.model.generate import LoadedAdapter, generate
from perce_lite.training import metadata, trainer

pytest_plugins = ["cli_fixtures", "script_fixtures"]

SHOWN = [
    perce_lite.load,
    perce_lite.score,
    perce_lite.fleet,
    perce_lite.export,
    perce_lite.PerCETrainer,
    perce_lite.PerCEConfig,
    LoadedAdapter.generate,
]


@pytest.fixture
def here(script_folder, tmp_path, monkeypatch):
    """A copy of the script's folder, as the current one."""
    folder = tmp_path / "here"
    shutil.copytree(script_folder, folder)
    about = read_json(folder / "out" / "adapter" / METADATA)
    about["recipe"]["model"] = "toy"
    write_json(folder / "out" / "adapter" / METADATA, about)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def foreign(here, tmp_path):
    """An adapter that peft saved: another trainer's."""
    base = AutoModelForCausalLM.from_pretrained(here / "toy", dtype=torch.float32)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(tmp_path / "foreign")
    return tmp_path / "foreign"


@pytest.mark.parametrize("shown", SHOWN, ids=lambda shown: shown.__name__.rpartition(".")[2])
def test_the_examples_run(shown, here):
    names = {**vars(trainer), **vars(perce_lite), "perce_lite": perce_lite}
    example = doctest.DocTestParser().get_doctest(inspect.getdoc(shown), names, shown.__name__, None, 0)
    assert example.examples, "every public name has an example"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    assert runner.run(example).failed == 0


def test_names_are_listed_and_need_no_torch():
    code = (
        "import sys, perce_lite; from perce_lite import fleet, export\n"
        "names = {name for name in dir(perce_lite) if name[:2] != '__'}\n"
        "assert names == set(perce_lite.__all__), names\n"
        "import perce_lite.fleet.queries as room; assert room.__name__ == 'perce_lite.fleet.queries'\n"
        "assert callable(perce_lite.fleet) and callable(perce_lite.export) and perce_lite.fleet is fleet\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert list(inspect.signature(perce_lite.export).parameters)[:3] == ["adapter", "to", "out"]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        perce_lite.nothing  # noqa: B018


def test_a_script_adapter_says_what_trained_it(here):
    about = read_metadata(here / "out" / "adapter")
    assert about[metadata.SCRIPT] is True
    assert about["recipe"]["quantization"] == "none"
    assert about["recipe"]["lora"] == {"r": 4, "target_modules": about["recipe"]["lora"]["target_modules"]}
    assert about["recipe"]["train"]["learning_rate"] == 0.05
    assert (about["steps"], about["data"]["rows"], about["data"]["users"]) == (3, 18, 3)
    told = json.dumps(about)
    assert not any(row["completion"] in told for row in toys.toy_rows()), "nothing of the user's texts"
    checkpoint = perce_lite.load(here / "out" / "checkpoint-3", model="toy")
    assert checkpoint.generate("hello", profile="", max_new_tokens=4) == perce_lite.load("out/adapter").generate(
        "hello", profile="", max_new_tokens=4
    )


def test_a_batch_a_user_a_profile_greedy_or_drawn(here):
    writer = perce_lite.load("out/adapter", data="rows.jsonl")
    profiles = ["short words", "the quiet otter hides every morning in the village"]
    asked = [{"prompt": "write a note about the garden", "profile": profile} for profile in profiles]
    alone = [writer.generate(one, max_new_tokens=8) for one in asked]
    assert writer.generate(asked, max_new_tokens=8) == alone
    assert alone[0] != alone[1], "each answer has its own profile"
    messages = [{"role": "user", "content": "write a note about the garden"}]
    assert writer.generate(messages, profile=profiles[0], max_new_tokens=8) == alone[0]
    theirs = generate(writer.model, writer.maker, messages, profiles[0], 8)
    assert theirs == alone[0]
    drawn = [writer.generate(asked, temperature=1.0, seed=seed, max_new_tokens=8) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    state = torch.get_rng_state()
    writer.generate(asked, temperature=1.0, max_new_tokens=2)
    assert torch.equal(state, torch.get_rng_state()), "the script's own draws stay what they are"
    assert isinstance(writer.generate("a note", user="user1", max_new_tokens=4), str)
    bare = writer.generate(asked, use_adapter=False, max_new_tokens=8)
    assert bare != alone
    with pytest.raises(AdapterError, match=r"prompt 1: this adapter was trained with the user's profile"):
        writer.generate("hello")
    with pytest.raises(DataError, match="knows no such user; it has user0, user1, user2"):
        writer.generate("hello", user="nobody")
    with pytest.raises(DataError, match="prompt 1: has both a profile and a user"):
        writer.generate({"prompt": "hello", "profile": "x", "user": "user0"})
    with pytest.raises(DataError, match="ends with an answer"):
        writer.generate([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], profile="")


def test_without_its_data_a_script_adapter_knows_no_users(here):
    with pytest.raises(DataError, match=r"The data are not known: .*Give --data FILE"):
        perce_lite.load("out/adapter").generate("hello", user="user0")


def test_the_commands_take_a_script_adapter(here, run, monkeypatch):
    words = ("generate", "--adapter", "out/adapter", "--prompt", "a note")
    code, out, err = run(*words, "--user", "user0", "--data", "rows.jsonl", "--max-new-tokens", 4)
    assert code == 0, err
    assert out.strip()
    code, _, err = run(*words, "--user", "user0")
    assert (code, "Give --data FILE" in err) == (2, True)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    code, out, err = run("chat", "out/adapter", "--profile", "short words", "--max-new-tokens", 4)
    assert code == 0, err
    code, _, err = run("eval", "recipe.yaml", "--adapter", "out/adapter", "--json", "eval.json")
    assert code == 0, err
    assert "was not trained by a recipe" in err
    assert len(read_json(here / "eval.json")["arms"]) == 2
    for target in ("peft", "merged"):
        code, _, err = run("export", "out/adapter", "--to", target)
        assert code == 0, err


def test_the_adapter_of_another_trainer(foreign, here, run):
    about = read_metadata(foreign)
    assert about["recipe"]["model"] == str(here / "toy")
    assert about["chat_template"] == toys.TEMPLATES["chatml"].strip("\n") or about["chat_template"]
    writer = perce_lite.load(foreign)
    assert writer.generate("hello", max_new_tokens=6) != writer.generate("hello", max_new_tokens=6, use_adapter=False)
    code, out, err = run("generate", "--adapter", foreign, "--prompt", "hello", "--max-new-tokens", 6)
    assert (code, out.strip()) == (0, writer.generate("hello", max_new_tokens=6)), err
    code, _, err = run("eval", "recipe.yaml", "--adapter", foreign)
    assert code == 0, err
    code, _, err = run("export", foreign, "--to", "merged", "--out", "merged")
    assert code == 0, err
    card = (here / "merged" / "README.md").read_text("utf-8")
    assert "Trained by another program than PerCE Lite" in card
    assert "SFT" not in card


def test_another_trainers_adapter_needs_a_template_where_nothing_says_one(foreign, here, run):
    (here / "toy" / "chat_template.jinja").rename(here / "mine.jinja")
    with pytest.raises(TemplateError, match=r"has no chat template, nor has its base .*--template FILE.jinja"):
        perce_lite.load(foreign)
    writer = perce_lite.load(foreign, template="mine.jinja")
    assert writer.generate("hello", max_new_tokens=3)
    code, _, err = run("export", foreign, "--to", "peft", "--out", "exported", "--template", "mine.jinja")
    assert code == 0, err
    (here / "section.yaml").write_text("position: user\nprofile: 'About me: {profile}'\n")
    (here / "mine.jinja").rename(foreign / "chat_template.jinja")
    sectioned = perce_lite.load(foreign, template="section.yaml")
    assert "About me: otters" in sectioned.maker.tokenizer.decode(
        sectioned.maker.prompt([{"role": "user", "content": "x"}], "otters").ids
    )
    (here / "section.yaml").write_text("positoin: user\n")
    with pytest.raises(RecipeError, match="line 1: unknown key positoin"):
        perce_lite.load(foreign, template="section.yaml")
    with pytest.raises(TemplateError, match="there is no such file"):
        perce_lite.load(foreign, template="nowhere.yaml")


def test_what_is_no_adapter_is_refused_by_name(foreign, here, tmp_path):
    with pytest.raises(AdapterError, match="--template is for adapters of other trainers"):
        read_metadata(here / "out" / "adapter", Said(template=here / "mine.jinja"))
    config = read_json(foreign / "adapter_config.json")
    write_json(foreign / "adapter_config.json", {**config, "peft_type": "IA3"})
    with pytest.raises(AdapterError, match="a LoRA is needed, and this is IA3"):
        read_metadata(foreign)
    write_json(foreign / "adapter_config.json", {**config, "base_model_name_or_path": None})
    with pytest.raises(AdapterError, match="names no base: give --model FOLDER"):
        read_metadata(foreign)
    write_json(foreign / "adapter_config.json", {**config, "r": 8})
    with pytest.raises(AdapterError, match="does not go on its base"):
        perce_lite.load(foreign)
    toys.toy_folder(tmp_path / "other", "qwen3")
    with pytest.raises(AdapterError, match="does not go on its base"):
        perce_lite.load(foreign, model=str(tmp_path / "other"))
    with pytest.raises(AdapterError, match="nor another trainer's: it needs"):
        read_metadata(here / "toy")


def test_a_recipes_checkpoint_is_an_adapter_of_that_recipe(here, run):
    code, _, err = run("train", "recipe.yaml", "--set", "train.save_steps=1", "--set", "train.output_dir=trained")
    assert code == 0, err
    about = read_metadata(here / "trained" / "checkpoint-1")
    assert about[metadata.SCRIPT] is False
    assert about["recipe"]["data"]["path"] == str(here / "rows.jsonl")
    code, _, err = run("generate", "--adapter", "trained/checkpoint-1", "--user", "user0", "--prompt", "x")
    assert code == 0, err


def test_scoring_gives_the_weights_of_training(here):
    rows = {row["where"]: row for row in perce_lite.score("recipe.yaml") if row["split"] == "train"}
    recipe = perce_lite.load_recipe("recipe.yaml")
    from perce_lite.data.readers import read_rows
    from perce_lite.model.base import load_base
    from perce_lite.training.train import make_trainer

    base = load_base(recipe)
    made = make_trainer(recipe, Base(base.model, base.tokenizer), read_rows(recipe))
    made.prepare()
    assert len(made.train_dataset) == len(rows)
    for pair, row in zip(made.pairs["train"], made.train_dataset, strict=True):
        mine = rows[pair.row.where]
        assert (mine["input_ids"], mine["labels"]) == (row["input_ids"], row["labels"])
        factual, counterfactual = (torch.tensor(row[f"{name}_log_probs"]) for name in ("factual", "counterfactual"))
        labelled = torch.tensor(row["labels"]) != -100
        expected = (1 + 0.5 * (factual - counterfactual).clamp(0, 5)) * labelled
        assert torch.equal(torch.tensor(mine["weights"]), expected)
    adapters.strip(base.model)


def test_loaded_recipes_take_no_overrides(here):
    with pytest.raises(RecipeError, match="overrides go with the path"):
        perce_lite.score(perce_lite.load_recipe("recipe.yaml"), set=["train.clip_max=3"])


def test_a_run_in_memory_says_that_its_base_has_no_name(here, toy_trainer, tmp_path):
    trained = toy_trainer()
    trained.train()
    trained.save_model(str(tmp_path / "nameless"))
    with pytest.raises(AdapterError, match="names no base"):
        perce_lite.load(tmp_path / "nameless")
    assert perce_lite.load(tmp_path / "nameless", model="toy").generate("x", profile="", max_new_tokens=3)
