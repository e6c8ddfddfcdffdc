"""Wrong input: one clear error that names the file and the mend, exit code 2, no trace, no torch where none is needed.

Each case runs the real command in a process of its own where `sys.modules` is looked at, and in this one otherwise.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import toys
from datasets import Dataset
from peft import LoraConfig

from perce_lite import PerCEConfig, PerCETrainer
from perce_lite.cli.app import main
from perce_lite.errors import DataError, PathError
from perce_lite.files import METADATA, refuse_unwritable
from perce_lite.model.adapter_files import CONFIG, WEIGHTS, read_metadata

pytest_plugins = ["cli_fixtures"]

CHECKED_AT_ONCE = """
import os, sys
from perce_lite.cli.app import main
for line in sys.stdin.read().splitlines():
    words = line.split("\\t")
    print("\\n>>>", line, file=sys.stderr)
    try:
        main(words)
        code = 0
    except SystemExit as stop:
        code = stop.code
    heavy = sorted({"torch", "transformers", "trl", "peft", "datasets", "matplotlib"} & set(sys.modules))
    print(f"\\n<<< {code} {heavy}", file=sys.stderr)
"""

LIGHT = {
    "train nowhere.yaml": "there is no such recipe",
    "train nodata.yaml": "there is no such file; data.path",
    "train norows.yaml": "holds no records",
    "train torn.yaml": "line 1: not JSON",
    "train latin.yaml": "not UTF-8 text",
    "train gonemodel.yaml": "model: ./gone/model: there is no such folder",
    "train broken.yaml": "not YAML",
    "train list.yaml": "a recipe is a mapping",
    "train binary.yaml": "cannot be read as YAML in UTF-8",
    "train mine.yaml --set train.output_dir=file": "is a file and must be a folder",
    "train mine.yaml --set train.output_dir=file/below": "file is a file. Take another folder",
    "train mine.yaml --set train.lerning_rate=1": "did you mean learning_rate?",
    "train mine.yaml --set train.learning_rate=fast": "'fast' is not a number",
    "train mine.yaml --set train.estimator=bas": "did you mean base?",
    "train mine.yaml --set lora.rank=1": "did you mean r?",
    "train mine.yaml --set train.report_to=mlflow": "pip install mlflow",
    "train mine.yaml --set train.report_to=wand": "did you mean wandb?",
    "train mine.yaml --json file/x.json": "file is a file. Give another file.",
    "check nodata.yaml": "there is no such file",
    "check norows.yaml": "holds no records",
    "plan mine.yaml --gpu nonsuch": "no such GPU",
    "inspect mine.yaml --user nobody": "it has user0, user1, user2",
    "inspect mine.yaml --adapter nowhere": "there is no such folder",
    "inspect mine.yaml --out file/x.html": "file is a file",
    "generate --adapter nowhere --prompt hi": "there is no such folder",
    "generate --adapter file --prompt hi": "there is no such folder",
    "generate --adapter weights_empty --prompt hi --no-profile": "adapter_model.safetensors",
    "generate --adapter weights_torn --prompt hi --no-profile": "adapter_model.safetensors",
    "generate --adapter config_empty --prompt hi --no-profile": "adapter_config.json",
    "generate --adapter config_torn --prompt hi --no-profile": "adapter_config.json",
    "generate --adapter metadata_torn --prompt hi --no-profile": "perce_lite.json is empty or cut off",
    "generate --adapter weights_gone --prompt hi --no-profile": "adapter_model.safetensors is missing",
    "generate --adapter whole --prompt hi --user nobody": "it has user0, user1, user2",
    "generate --adapter whole --prompt hi --profile @nowhere": "No such file",
    "generate --adapter whole --prompt hi": "Give --profile",
    "chat whole --user nobody": "it has user0, user1, user2",
    "chat weights_torn": "adapter_model.safetensors",
    "eval mine.yaml --adapter nowhere": "there is no such folder",
    "eval mine.yaml --adapter weights_torn": "adapter_model.safetensors",
    "eval mine.yaml --adapter whole --out file/x.html": "file is a file",
    "compare nodata.yaml": "there is no such file",
    "fleet mine.yaml --only nobody": "it has user0, user1, user2",
    "fleet mine.yaml --set train.output_dir=file": "is a file and must be a folder",
    "serve nowhere": "there is no such folder",
    "serve weights_torn": "adapter_model.safetensors",
    "serve --fleet empty": "no fleet here",
    "export nowhere --to peft": "there is no such folder",
    "export whole --to nonsuch": "There is: peft, merged",
    "export whole --to gguf --quant Q9": "There is: F32",
    "export whole --to peft --user nobody": "it has user0, user1, user2",
    "export whole --to peft --out file/x": "file is a file",
    "export weights_torn --to merged": "adapter_model.safetensors",
    "adapters list --fleet empty": "no fleet here",
    "adapters list --fleet badfleet": "is not a fleet's registry",
    "import nowhere --user a": "there is no such file or folder",
    "import mine.yaml --user a --out file/x.jsonl": "file is a file",
    "store show --path file": "is a file",
    "recipe": "give --keys",
    "nonsuch": "No such command",
}
"""Command lines, and a part of what they are answered."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, adapter_folder, toy) -> Path:
    """Recipes, rows and adapters, most of them spoilt."""
    place = tmp_path_factory.mktemp("wrong")
    rows = "\n".join(map(json.dumps, toys.toy_rows()))
    spoilt = {"rows": rows.encode(), "norows": b"", "torn": b'{"user": "a', "latin": b"\xff\xfe\x00{}"}
    for name, content in spoilt.items():
        (place / f"{name}.jsonl").write_bytes(content)
    head = f"model: {toy}\nquantization: none\ndtype: float32\ndevice: cpu\ndata: {{path: rows.jsonl}}\n"
    for name in ("mine", "norows", "torn", "latin", "nodata"):
        data = "rows" if name == "mine" else name
        (place / f"{name}.yaml").write_text(head.replace("rows.jsonl", f"{data}.jsonl") + "train: {max_steps: 1}\n")
    (place / "gonemodel.yaml").write_text(head.replace(str(toy), "./gone/model"))
    recipes = {"broken": b"a: [b", "list": b"- a", "binary": bytes(range(256))}
    for name, content in recipes.items():
        (place / f"{name}.yaml").write_bytes(content)
    (place / "file").write_text("x")
    (place / "empty").mkdir()
    (place / "badfleet").mkdir()
    (place / "badfleet/fleet.sqlite").write_bytes(b"not a database at all")
    for name, file, kept in (
        ("whole", CONFIG, None),
        ("weights_empty", WEIGHTS, 0),
        ("weights_torn", WEIGHTS, 500),
        ("config_empty", CONFIG, 0),
        ("config_torn", CONFIG, 100),
        ("metadata_torn", METADATA, 100),
    ):
        shutil.copytree(adapter_folder, place / name)
        path = place / name / file
        path.write_bytes(path.read_bytes()[:kept])
    shutil.copytree(adapter_folder, place / "weights_gone")
    (place / "weights_gone" / WEIGHTS).unlink()
    return place


@pytest.fixture(scope="module")
def answers(folder) -> dict[str, str]:
    """What each of `LIGHT` is answered, all asked of one process: what one imports, the next ones would show."""
    lines = "\n".join(line.replace(" ", "\t") for line in LIGHT)
    words = [sys.executable, "-c", CHECKED_AT_ONCE]
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(words, input=lines, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    parts = done.stderr.split("\n>>> ")[1:]
    return {part.partition("\n")[0].replace("\t", " "): part.partition("\n")[2] for part in parts}


@pytest.mark.parametrize("line", LIGHT)
def test_wrong_input_is_answered_without_torch(answers, line):
    said = answers[line]
    assert "<<< 2 []" in said, said
    assert LIGHT[line] in " ".join(said.split()), said
    assert "Traceback" not in said


def test_nothing_was_written(answers, folder):
    assert not (folder / "runs").exists()
    assert (folder / "file").read_text() == "x"


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, METADATA])
@pytest.mark.parametrize("kept", [0, 1, 40])
def test_files_of_an_adapter_that_are_cut_off_anywhere_are_named(adapter_folder, tmp_path, run, name, kept):
    place = tmp_path / "cut"
    shutil.copytree(adapter_folder, place)
    (place / name).write_bytes((adapter_folder / name).read_bytes()[:kept])
    code, _, err = run("generate", "--adapter", place, "--prompt", "hi", "--no-profile")
    assert (code, name in err, "train it anew" in err) == (2, True, True), err


def test_a_whole_adapter_is_not_refused(adapter_folder):
    assert read_metadata(adapter_folder)["folder"] == str(adapter_folder)


def test_places_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    refuse_unwritable(tmp_path / "new/folder", "", folder=True)
    refuse_unwritable(tmp_path / "file", "")
    for path, folder in ((tmp_path / "file", True), (tmp_path / "file/below", False)):
        with pytest.raises(PathError, match="Give another"):
            refuse_unwritable(path, "Give another.", folder)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PathError, match="nothing may be written"):
        refuse_unwritable(tmp_path / "new", "")


@pytest.mark.parametrize("kind", [PermissionError, IsADirectoryError, NotADirectoryError, OSError])
def test_an_error_of_the_system_on_a_named_file_is_one_line(capfd, monkeypatch, kind):
    def fails(words, prog_name):
        raise kind(13, "Permission denied", "there/it.json")

    monkeypatch.setattr("perce_lite.cli.app.app", fails)
    with pytest.raises(SystemExit) as stop:
        main(["train"])
    assert stop.value.code == 2
    assert capfd.readouterr().err.startswith("error: there/it.json: Permission denied.")


def test_a_fault_of_no_file_keeps_its_trace(monkeypatch):
    def fails(words, prog_name):
        raise OSError("no file at all")

    monkeypatch.setattr("perce_lite.cli.app.app", fails)
    with pytest.raises(OSError, match="no file at all"):
        main(["train"])


def test_a_reader_that_has_read_enough_is_no_error():
    code = "import sys; from perce_lite.cli.app import main; main(['recipe', '--keys'])"
    words = f'{sys.executable} -c "{code}" | head -n 1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert done.stdout.startswith("#")


@pytest.mark.parametrize(
    "columns", [{}, {"profile": [], "prompt": [], "completion": []}], ids=["no columns", "no rows"]
)
def test_an_empty_data_set_in_a_script_says_so(tmp_path, columns):
    tokenizer = toys.toy_tokenizer("chatml")
    with pytest.raises(DataError, match="train_dataset: there is no row in it"):
        PerCETrainer(
            toys.toy_model("chatml", len(tokenizer)),
            PerCEConfig(output_dir=str(tmp_path), report_to="none", bf16=False, use_cpu=True),
            train_dataset=Dataset.from_dict(columns),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules="all-linear"),
        )
