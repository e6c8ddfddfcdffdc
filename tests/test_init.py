"""`perce-lite init`: recipes that check takes, with a base that fits the GPU by the plan, for what somebody has."""

import json
import sys
from pathlib import Path

import pytest
import toys
from cli_fixtures import figures, run, toy  # noqa: F401

from perce_lite.cli import init as cli_init
from perce_lite.planning.drafting import Draft, choose, recipe_text
from perce_lite.planning.gpus import gpu
from perce_lite.planning.plan import Plan
from perce_lite.recipe import load_recipe

SCRIPT = """
from trl import SFTConfig, SFTTrainer
MODEL = "org/some-model"
rows = load_dataset("json", data_files="rows.jsonl", split="train")
args = SFTConfig(output_dir="x", learning_rate=3e-5, max_length=256, seed=7, num_train_epochs=steps(),
                 dataset_text_field="text", unheard_of=1)
SFTTrainer(model=MODEL, args=args, train_dataset=rows,
           peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj", "v_proj"), task_type="CAUSAL_LM"))
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with rows and a script."""
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, toys.toy_rows())))
    Path("train.py").write_text(SCRIPT)
    Path("notes").mkdir()
    return tmp_path


def made(path: str = "recipe.yaml"):
    return load_recipe(path, ["device=cpu", "dtype=float32"])


@pytest.mark.parametrize("want", ["chat", "fleet", "ollama"])
def test_check_takes_what_it_writes(run, figures, here, toy, want):  # noqa: F811
    words = ["--have", "rows", "--data", "rows.jsonl", "--gpu", "cpu", "--want", want, "--model", toy]
    told = figures("init", "a dir/mine.yaml", *words)
    assert [command.split()[1] for command in told["commands"]] == {
        "chat": ["check", "train", "chat"],
        "fleet": ["check", "fleet", "chat"],
        "ollama": ["check", "train", "chat", "export"],
    }[want]
    assert figures("check", "a dir/mine.yaml", "--set", "device=cpu", "--set", "dtype=float32")["splits"]["train"][
        "kept"
    ]
    recipe = made("a dir/mine.yaml")
    assert recipe.export.to == (["ollama"] if want == "ollama" else [])
    assert ("fleet" in recipe.model_fields_set) is (want == "fleet")
    assert sorted(path.name for path in Path("a dir").iterdir()) == ["mine.yaml"]


@pytest.mark.parametrize("card", ["6GB", "8GB", "12GB", "T4", "RTX 4090", "80GB"])
@pytest.mark.parametrize("want", ["chat", "fleet"])
def test_the_base_fits_the_gpu_by_the_plan(here, real_model, card, want):
    draft = Draft("rows", want, gpu(card), {"path": "rows.jsonl"})
    chosen = choose(draft)
    Path("recipe.yaml").write_text(recipe_text(draft, chosen, Path("recipe.yaml")))
    plan = Plan(load_recipe("recipe.yaml", ["data.path=nowhere.jsonl"]))
    assert (plan.recipe.model, plan.rows.length) == (chosen.model, chosen.length)
    assert plan.fits(plan.choice, gpu(card))
    assert plan.most_users(plan.choice, gpu(card)) >= (4 if want == "fleet" else 1)


def test_a_larger_gpu_gets_no_smaller_base(here, real_model):
    order = ["smollm2-135m", "HuggingFaceTB/SmolLM2-1.7B-Instruct", "Qwen/Qwen3-4B", "Qwen/Qwen3-8B"]
    sizes = [order.index(choose(Draft("rows", "chat", gpu(f"{size}GB"), {})).model) for size in (2, 4, 6, 8, 12, 24)]
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (0, 3)


def test_a_folder_of_writing_goes_through_import(run, figures, here, toy):  # noqa: F811
    for number in range(6):
        Path(f"notes/{number}.txt").write_text(f"Note {number} of the sea and the boats in the harbour of the town.")
    words = ["--have", "writing", "--data", "notes", "--want", "chat", "--gpu", "cpu", "--user", "ann", "--model", toy]
    told = figures("init", *words)
    assert told["commands"][0] == "perce-lite import notes --user ann"
    assert run(*told["commands"][0].split()[1:], "--yes")[0] == 0
    assert figures(*told["commands"][1].split()[1:])["splits"]["train"]["kept"] > 0
    assert told["commands"][-1] == "perce-lite chat runs/recipe/adapter --user ann"


def test_a_trl_script_is_read_and_not_run(run, here):  # noqa: F811
    code, _, err = run("init", "--have", "trl", "--data", "train.py", "--want", "chat", "--gpu", "cpu")
    assert code == 0
    recipe = made()
    assert (recipe.model, recipe.data.path) == ("org/some-model", "rows.jsonl")
    assert recipe.train["learning_rate"] == 3e-5
    assert (recipe.train["seed"], recipe.train["max_length"]) == (7, 256)
    assert recipe.lora == {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    text = Path("recipe.yaml").read_text()
    for told in ("num_train_epochs: its value is computed; set train.num_train_epochs", "unknown key train.unheard_of"):
        assert told in text
        assert told in " ".join(err.split())


def test_questions_on_a_terminal(run, here, monkeypatch):  # noqa: F811
    answers = iter(["rows", "rows.jsonl", "a yacht", "chat", "8GB"])
    asked = []
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(cli_init.typer, "prompt", lambda text, **more: asked.append(text) or next(answers))
    assert run("init")[0] == 0
    assert asked == [
        "What do you have?",
        "Where is it?",
        "What do you want?",
        "What do you want?",
        "Which GPU (8GB, RTX 4070, cpu)?",
    ]
    assert made().model == choose(Draft("rows", "chat", gpu("8GB"), {})).model


ROWS = ["--have", "rows", "--data", "rows.jsonl", "--want", "chat", "--gpu", "cpu"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "--have is missing, and there is no terminal to ask on"),
        (["--have", "books"], "--have books: is not one of writing"),
        (ROWS[:2], "--data is missing"),
        ([*ROWS[:2], "--data", "none.jsonl"], "--data none.jsonl: there is no such file or folder"),
        (ROWS[:4], "--want is missing"),
        ([*ROWS[:6], "--gpu", "RTX 9999"], "--gpu RTX 9999: no such GPU"),
        (["--have", "trl", "--data", "notes", *ROWS[4:]], "cannot be read as a Python script"),
        (["--have", "trl", "--data", "other.py", *ROWS[4:]], "no TRL script"),
        (["--have", "rows", "--data", "odd.jsonl", *ROWS[4:]], "odd.jsonl"),
    ],
)
def test_what_is_wrong_is_one_clear_line_and_writes_nothing(run, here, words, told):  # noqa: F811
    Path("other.py").write_text("print(1)")
    Path("odd.jsonl").write_text('{"a": 1}\n')
    before = sorted(path.name for path in here.iterdir())
    code, _, err = run("init", *words)
    assert (code, "Traceback" in err) == (2, False)
    assert told in " ".join(err.replace("│", " ").split())
    assert sorted(path.name for path in here.iterdir()) == before


def test_a_recipe_that_is_there_is_replaced_by_word_alone(run, here):  # noqa: F811
    Path("recipe.yaml").write_text("mine")
    code, _, err = run("init", *ROWS)
    assert (code, Path("recipe.yaml").read_text(), "replace it with --force" in err) == (2, "mine", True)
    assert run("init", *ROWS, "--force")[0] == 0
    assert made().model == "smollm2-135m"
