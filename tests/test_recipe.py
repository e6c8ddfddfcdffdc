"""Recipes: YAML 1.2, defaults, and every fault in one error that names its line."""

import subprocess
import sys
from pathlib import Path

import pytest

from perce_lite.errors import RecipeError
from perce_lite.recipe import Recipe, load_recipe, lora_config, training_config

RECIPES = Path(__file__).parents[1] / "recipes"
DATA = "data: {path: rows.jsonl}\n"


@pytest.fixture
def load(tmp_path: Path):
    """Loads a recipe of the given text, which follows a data section in line 1 unless it has its own."""

    def make(text: str = "", *overrides: str, raw: bytes | None = None) -> Recipe:
        path = tmp_path / "mine.yaml"
        path.write_bytes(raw if raw is not None else (text if "data:" in text else DATA + text).encode())
        return load_recipe(path, overrides)

    return make


@pytest.fixture
def faults(load):
    """The faults of such a recipe."""

    def make(text: str = "", *overrides: str, raw: bytes | None = None) -> list[str]:
        with pytest.raises(RecipeError) as caught:
            load(text, *overrides, raw=raw)
        assert all(fault in str(caught.value) for fault in caught.value.faults)
        assert "mine.yaml" in str(caught.value)
        return caught.value.faults

    return make


def test_a_number_is_a_number_and_a_word_a_word(load):
    recipe = load("model: no\ndata: {path: yes, users: [no, on, off]}\ntrain: {learning_rate: 1e-4, run_name: no}\n")
    assert (recipe.model, recipe.data.path, recipe.data.users) == ("no", "yes", ["no", "on", "off"])
    assert recipe.train["run_name"] == "no"
    assert type(recipe.train["learning_rate"]) is float
    assert recipe.train["learning_rate"] == 0.0001


def test_defaults(load, tmp_path):
    recipe = load()
    assert (recipe.model, recipe.quantization, recipe.dtype, recipe.device) == ("smollm2-135m", "nf4", "auto", "auto")
    assert (recipe.data.format, recipe.data.columns, recipe.data.max_rows) == ("auto", {}, None)
    assert (recipe.profile.select, recipe.profile.top_k, recipe.profile.max_tokens) == ("bm25", 4, None)
    assert (recipe.split.by, recipe.split.validation, recipe.split.test, recipe.split.seed) == ("auto", 0.1, 0.1, 0)
    assert recipe.template.chat_template_kwargs == {"enable_thinking": False}
    assert (recipe.train, recipe.lora) == ({}, {})
    assert recipe.output_dir == Path("runs/mine")
    assert recipe.data_path == tmp_path / "rows.jsonl"
    assert load("train: {output_dir: /elsewhere/x}").output_dir == Path("/elsewhere/x")
    assert load("data: {path: /elsewhere/rows.jsonl}").data_path == Path("/elsewhere/rows.jsonl")
    assert load("data: {hub: some/data}").data_path is None


def test_defaults_of_training_and_lora(load):
    config = training_config(load("device: cpu\ndtype: bfloat16\ntrain: {learning_rate: 3}"), max_steps=7)
    assert (config.learning_rate, config.max_steps, config.per_device_train_batch_size) == (3, 7, 2)
    assert (config.output_dir, config.optim, config.use_cpu) == ("runs/mine", "adamw_torch", True)
    assert (config.bf16, config.fp16) == (True, False)
    lora = lora_config(load("lora: {r: 3}"))
    assert (lora.r, lora.lora_alpha, lora.target_modules, lora.lora_dropout) == (3, 32, "all-linear", 0.0)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("modle: x", ["line 2", "unknown key modle", "model"]),
        ("profile:\n  select: all\n  topk: 3", ["line 4", "unknown key profile.topk", "top_k"]),
        ("data:\n  path: x\n  colums: {}", ["line 3", "unknown key data.colums", "columns"]),
        (
            "data:\n  path: x\n  columns:\n    query: subject\n    text: body\n    title: subject\n",
            ["line 6", "query and title are both taken from the column subject", "leave all but one"],
        ),
        ("train:\n  max_length: 3\n  lerning_rate: 1", ["line 4", "unknown key train.lerning_rate", "learning_rate"]),
        ("lora:\n  lora_alfa: 3", ["line 3", "unknown key lora.lora_alfa", "lora_alpha"]),
        ("nothing_like_it: 1", ["line 2", "unknown key nothing_like_it", "allowed: data, device, dtype"]),
        ("quantization: int8", ["line 2", "quantization", "'int8'", "'nf4' or 'none'"]),
        ("profile: {top_k: 0}", ["line 2", "profile.top_k", "0", "greater than or equal to 1"]),
        ("profile: {top_k: many}", ["line 2", "profile.top_k", "'many'", "integer"]),
        ("split: {test: 1.0}", ["line 2", "split.test", "1.0", "less than 1"]),
        ("split: [a]", ["line 2", "split", "dictionary"]),
        ("data: {path: x, users: [a, 5]}", ["line 1", "data.users.1", "5", "string"]),
        ("data: {path: [x]}", ["line 1", "data.path", "string"]),
        ("train: {learning_rate: fast}", ["line 2", "train.learning_rate", "'fast'", "a number"]),
        ("train: {learning_rate: '1e-4'}", ["line 2", "train.learning_rate", "'1e-4'", "a number"]),
        ("train: {learning_rate: true}", ["line 2", "train.learning_rate", "True", "a number"]),
        ("train: {max_steps: 1.5}", ["line 2", "train.max_steps", "1.5", "a whole number"]),
        ("train: {clip_min: null}", ["line 2", "train.clip_min", "None", "a number"]),
        ("train: {max_length: long}", ["line 2", "train.max_length", "a whole number or null"]),
        ("train: {fp16: 7}", ["line 2", "train.fp16", "7", "true or false"]),
        ("train: {store: 5}", ["line 2", "train.store", "5", "a text or null"]),
        ("train: 5", ["line 2", "train", "5", "dictionary"]),
        ("lora: {r: big}", ["line 2", "lora.r", "'big'", "a whole number"]),
        ("data:", ["line 1", "data", "None", "dictionary"]),
        ("template: {profile: About the user}", ["line 2", "template.profile", "{profile}"]),
        ("template: {item: '- {title}'}", ["line 2", "template.item", "{text}"]),
        ("data: {format: rows}", ["line 1", "path", "hub", "one of them"]),
        ("data: {path: x, hub: y/z}", ["line 1", "path", "hub", "one of them"]),
    ],
)
def test_a_fault_says_where_and_what(faults, text, told):
    (fault,) = faults(text)
    assert [part for part in told if part not in fault] == []


def test_no_data_at_all(faults, tmp_path):
    (fault,) = faults(raw=b"model: x\n")
    assert fault.startswith("data")
    assert "missing" in fault


@pytest.mark.parametrize(
    "text", ["train: {max_length: null, learning_rate: 1, lr_scheduler_kwargs: {}}", "lora: {target_modules: [q_proj]}"]
)
def test_values_of_other_allowed_types_pass(load, text):
    assert load(text)


def test_all_faults_at_once(faults):
    text = "modle: x\ndata: {pth: a}\nprofile: {top_k: 0}\ntrain: {lr: 1, clip_max: big}\nlora: {rr: 2}\n"
    found = faults(text, "template.profile=none", "nonsense")
    named = ["modle", "data.pth", "top_k", "train.lr", "train.clip_max", "lora.rr", "template.profile", "nonsense"]
    assert [name for name in named if sum(name in fault for fault in found) != 1] == []
    assert any("path" in fault and "hub" in fault for fault in found)
    assert len(found) == len(named) + 1


def test_overrides_set_scalars_lists_and_sections_that_are_not_there(load):
    where = ["split.by=user", "data.path=a=b.jsonl", " profile.top_k = 7"]
    recipe = load("train: {max_steps: 3, learning_rate: 5}", *where, "train.learning_rate=1e-4", "data.users=[a, b]")
    assert recipe.train == {"learning_rate": 1e-4, "max_steps": 3}
    assert (recipe.data.users, recipe.split.by, recipe.data.path) == (["a", "b"], "user", "a=b.jsonl")
    assert recipe.profile.top_k == 7
    assert load("", "train.max_length=null").train == {"max_length": None}


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.max_steps", "write it as --set train.learning_rate=1e-4"),
        ("=3", "write it as --set"),
        ("train..x=3", "write it as --set"),
        ("train.max_steps=[", "not YAML"),
        ("train.lerning_rate=1", "did you mean learning_rate?"),
        ("profle.top_k=1", "did you mean profile?"),
        ("profile.top_k=many", "integer"),
        ("train.max_steps=many", "a whole number"),
    ],
)
def test_a_faulty_override_is_named(faults, override, told):
    (fault,) = faults("train: {max_steps: 2}", override)
    assert fault.startswith(f"--set {override}: ")
    assert told in fault


def test_a_recipe_that_is_not_there_suggests_the_near_one(tmp_path, monkeypatch):
    (tmp_path / "quickstart.yaml").write_text(DATA)
    with pytest.raises(RecipeError, match=rf"no such recipe\. Did you mean {tmp_path}/quickstart\.yaml"):
        load_recipe(tmp_path / "quikstart.yaml")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="Give the path of a YAML file"):
        load_recipe("nowhere/zzz")


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        (b"model: x\ndata: [a\n", ["line 3", "not YAML"]),
        (b"model: a\ndata: {path: x}\nmodel: b\n", ["line 3", "duplicate key", "model"]),
        (b"a: 1\n---\nb: 2\n", ["line 2", "another document"]),
        (b"model: !!python/object:os.system x\n", ["line 1", "tag"]),
        (b"- model\n", ["mapping"]),
        (b"", ["mapping"]),
        ("model: é\n".encode("latin-1"), ["UTF-8"]),
        (DATA.encode("utf-16"), ["UTF-8"]),
        (b"? {a: b}\n: 1\n", ["line 1", "unhashable"]),
        (b"1: 2\ndata: {path: x}\n", ["1", "string"]),
    ],
)
def test_a_file_that_is_no_recipe(faults, raw, told):
    (fault,) = faults(raw=raw)
    assert [part for part in told if part not in fault] == []


@pytest.mark.parametrize(
    ("raw", "override"),
    [
        pytest.param(b"data: {path: 'x\x07'}\n", "split.seed=1", id="control character: ReaderError"),
        pytest.param(DATA.encode(), "data.path=x\x07", id="control character in --set: ReaderError"),
        pytest.param(DATA.encode() + b"? [a, b]\n: 1\n", "split.seed=1", id="a list as key: TypeError in _mark"),
        pytest.param(
            b"data: &d {path: x, columns: *d}\n", "split.seed=1", id="an alias of itself: RecursionError in _mark"
        ),
    ],
)
def test_odd_yaml_is_a_fault_too(load, raw, override):
    with pytest.raises(RecipeError):
        load("", override, raw=raw)


def test_source_is_no_key_of_a_recipe(faults):
    (fault,) = faults("source: https://example.org/data")
    assert "unknown key source" in fault


def test_fingerprint_changes_with_what_trains_and_with_nothing_else(load):
    def made(*overrides: str) -> str:
        return load("train: {learning_rate: 1e-4}", *overrides).fingerprint()

    here = made()
    elsewhere = ["train.output_dir=x", "train.logging_steps=5", "train.report_to=tensorboard", "evaluation.max_rows=3"]
    assert {made(one) for one in [*elsewhere, "train.save_steps=3", "data.path=moved.jsonl"]} == {here}
    other = ["train.learning_rate=2e-4", "train.estimator=mixed", "lora.r=3", "model=x", "profile.top_k=2"]
    assert len({here, *map(made, other)}) == len(other) + 1
    recipe = load("train: {output_dir: kept}")
    recipe.fingerprint()
    assert recipe.output_dir == Path("kept")


@pytest.mark.parametrize(
    "override",
    ["logging_strategy=epoch", "logging_first_step=true", "log_level=info", "save_strategy=no", "disable_tqdm=false",
     "gradient_checkpointing=true", "gradient_checkpointing_kwargs={use_reentrant: false}",
     "activation_offloading=true"],
)  # fmt: skip
def test_how_a_run_is_logged_saved_and_fitted_is_not_in_the_fingerprint(load, override):
    assert load("", f"train.{override}").fingerprint() == load("").fingerprint()


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_the_recipes_that_come_along_are_sound(path):
    recipe = load_recipe(path)
    assert recipe.data.hub == "LongLaMP/LongLaMP" or recipe.data_path.is_file()
    assert recipe.data_path is None or recipe.data_path.parent == RECIPES / "data"
    assert training_config(recipe).learning_rate == recipe.train["learning_rate"]


def test_faults_of_the_config_become_faults_of_the_recipe(load):
    text = "train: {clip_min: 3, clip_max: 1, lr_scheduler_type: linear, loss_type: dft}"
    with pytest.raises(RecipeError, match=r"mine\.yaml") as caught:
        training_config(load(text))
    assert {fault.split(": ")[1] for fault in caught.value.faults} == {"clip_max", "loss_type"}
    with pytest.raises(RecipeError, match=r"train.estimator: .*best"):
        load("train: {estimator: best}")
    with pytest.raises(RecipeError, match="train: bogus is not a valid SchedulerType"):
        training_config(load("train: {lr_scheduler_type: bogus}"))


@pytest.mark.parametrize("text", ["{task_type: FOO}", "{layers_pattern: h, target_modules: x}", "{corda_config: 5}"])
def test_faults_of_the_lora_config_become_faults_of_the_recipe(load, text):
    with pytest.raises(RecipeError):
        lora_config(load(f"lora: {text}"))


def test_torch_is_not_imported_for_a_recipe(tmp_path):
    (tmp_path / "r.yaml").write_text(DATA)
    code = (
        "import sys, perce_lite.recipe, perce_lite.data.readers\n"
        f"perce_lite.recipe.load_recipe({str(tmp_path / 'r.yaml')!r}, ['split.seed=3'])\n"
        "print([name for name in ('torch', 'transformers', 'peft', 'trl') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_a_chat_template_is_looked_for_beside_the_recipe_first(load, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine.jinja").write_text("of the current folder")
    monkeypatch.chdir(tmp_path / "here")
    recipe = load("train: {chat_template_path: mine.jinja}")
    assert recipe.chat_template_file == tmp_path / "here" / "mine.jinja", "as it stands"
    first = recipe.fingerprint()
    (tmp_path / "mine.jinja").write_text("beside the recipe")
    assert recipe.chat_template_file == tmp_path / "mine.jinja"
    assert training_config(recipe).chat_template_path == str(tmp_path / "mine.jinja")
    second = recipe.fingerprint()
    (tmp_path / "mine.jinja").write_text("of the current folder")
    assert (second == first, recipe.fingerprint() == first) == (False, True), "what it says counts"
    assert load("train: {chat_template_path: none.jinja}").chat_template_file is None


def test_faults_of_all_kinds_are_told_at_once(tmp_path):
    """Of a section, of a key's spelling, of another program's name, and of a word that is none of a few."""
    path = tmp_path / "r.yaml"
    path.write_text(
        "learning_rate: 1e-4\ndata: {path: x}\nlora: {rank: 16}\ntrain: {estimator: bas, num_train_epoch: 2}\n"
        "fleet: {slots: many, train: {learning_rat: 1e-3}}\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    told = "\n".join(caught.value.faults)
    for fault in (
        "line 1: unknown key learning_rate; did you mean train.learning_rate?",
        "line 3: unknown key lora.rank; did you mean r?",
        "line 4: unknown key train.num_train_epoch; did you mean num_train_epochs?",
        "line 4: train.estimator: 'bas' is not one of base, mixed, bootstrap, uniform, shuffled; did you mean base?",
        "line 5: fleet.slots: 'many' is neither auto nor a whole number of at least 1",
        "line 5: unknown key fleet.train.learning_rat; did you mean learning_rate?",
    ):
        assert fault in told
    assert len(caught.value.faults) == 6
