"""Help and refusals need no torch; a command is imported when it is called, and says what the list says of it."""

import ast
import inspect
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import typer

import perce_lite
from perce_lite import __version__
from perce_lite.cli.app import COMMANDS
from perce_lite.cli.views import reference

pytest_plugins = ["cli_fixtures"]

PACKAGE = Path(perce_lite.__file__).parent
RECIPE = str(PACKAGE.parent / "recipes" / "quickstart.yaml")


def heavy_after(*words: str) -> tuple[int, str, str]:
    """Exit code, standard output, and which heavy packages were imported, of the command in a process of its own."""
    code = (
        "import sys\nfrom perce_lite.cli.app import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit as stop: code = stop.code\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'bm25s'} & set(sys.modules)\n"
        "print(f'heavy: {sorted(heavy)}', file=sys.stderr)\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ([], 2),
        (["--help"], 0),
        (["--version"], 0),
        (["train", "--help"], 0),
        (["fleet", "--help"], 0),
        (["train", "nowhere.yaml"], 2),
        (["trian"], 2),
        (["adapters", "list", "--fleet", "nowhere"], 2),
        (["store", "show", "--path", "nowhere", "--bad"], 2),
        (["import", "nowhere", "--user", "ann"], 2),
        (["train", RECIPE, "--set", "nope=1"], 2),
        (["train", RECIPE, "--set", "learning_rate=1"], 2),
        (["train", RECIPE, "--set", "train.lr=1"], 2),
        (["train", RECIPE, "--set", "evaluation.generation={topp: 1}"], 2),
        (["train", RECIPE, "--set", "data.path=nowhere.jsonl"], 2),
        (["fleet", RECIPE, "--only", "nobody"], 2),
        (["eval", RECIPE, "--adapter", "nowhere"], 2),
        (["compare", RECIPE, "--arms", "bass"], 2),
        (["compare", RECIPE, "--arms", "base:clip=1"], 2),
        (["compare", RECIPE, "--rates", "fast"], 2),
        (["compare", RECIPE, "--judge-on", "nowhere.yaml"], 2),
        (["export", "nowhere", "--to", "peft"], 2),
        (["export", "nowhere", "--to", "nothing"], 2),
        (["export", "--verify", "nowhere"], 2),
        (["export", "nowhere", "--to", "peft", "--evaluation", "nowhere.json"], 2),
        (["bench", RECIPE, "--arms", "bass"], 2),
        (["bench", RECIPE, "--fleet", "--lengths", "long"], 2),
        (["bench", RECIPE, "--fleet", "--slots", "0"], 2),
        (["bench", "--gpu-report", "--shape", "round"], 2),
        (["bench", "--serve", "nowhere"], 2),
        (["generate", "--adapter", "nowhere", "hello"], 2),
        (["chat", "nowhere"], 2),
        (["serve", "nowhere"], 2),
    ],
)
def test_help_and_refusals_import_nothing_heavy(words, code):
    returned, _, err = heavy_after(*words)
    assert returned == code
    assert err.endswith("heavy: []\n"), err


def test_commands_are_listed_in_the_order_of_work(run):
    _, out, _ = run("--help")
    names = [line.split()[1] for line in out.splitlines() if line.startswith("│ ") and line[2] not in " -"]
    assert names == list(COMMANDS)
    assert names[:6] == ["init", "import", "check", "inspect", "plan", "train"]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_says_what_the_command_says(name):
    command = COMMANDS[name].load(name)
    if not hasattr(command, "commands"):
        assert inspect.getdoc(command.callback).splitlines()[0] == COMMANDS[name].help
    else:
        assert all(sub in COMMANDS[name].help for sub in command.commands), "the line names every sub-command"


def test_no_command_imports_inside_a_function():
    for path in (PACKAGE / "cli").rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(function, ast.FunctionDef):
                inside = [node for node in ast.walk(function) if isinstance(node, ast.Import | ast.ImportFrom)]
                assert not inside, f"{path.name}: {function.name}"


def test_a_misspelt_command_is_told_its_name(run):
    code, _, err = run("trian")
    assert (code, "Did you mean 'train'?" in err) == (2, True)


def test_version_and_module(run):
    assert run("--version")[:2] == (0, f"perce-lite {__version__}\n")
    done = subprocess.run([sys.executable, "-m", "perce_lite", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"perce-lite {__version__}\n")


def test_the_reference_in_the_package_is_what_the_command_prints(run):
    code, out, _ = run("recipe", "--keys")
    assert (code, out) == (0, reference.markdown())
    assert (PACKAGE / "RECIPE.md").read_text("utf-8") == out, "perce-lite recipe --keys > perce_lite/RECIPE.md"
    assert run("recipe")[0] == 2


def test_figures_go_through_what_is_no_file(run, tmp_path):
    """A pipe, a device and a link stay what they are; - is standard output."""
    pipe, link, target = tmp_path / "pipe", tmp_path / "link.json", tmp_path / "target.json"
    os.mkfifo(pipe)
    target.write_text("old")
    link.symlink_to(target)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text("utf-8")))
    reader.start()
    for path in (pipe, link, "/dev/null"):
        assert run("store", "show", "--path", tmp_path / "store", "--json", path)[0] == 0
    reader.join(timeout=20)
    assert json.loads(read[0]) == json.loads(target.read_text("utf-8"))
    assert pipe.is_fifo()
    assert link.is_symlink()
    assert Path("/dev/null").is_char_device()
    code, out, _ = run("store", "show", "--path", tmp_path / "store", "--json", "-")
    assert (code, json.loads(out[: out.index("}\n") + 1])["bases"]) == (0, [])
    words = [sys.executable, "-m", "perce_lite", "store", "show", "--path", str(tmp_path), "--json", "/dev/stdout"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, Path("/dev/stdout").is_symlink()) == (0, True)
    assert '"store"' in done.stdout


def test_typer_still_has_what_the_lazy_group_needs():
    group = typer.main.get_group(typer.Typer(callback=lambda: None))
    assert {"list_commands", "resolve_command"} <= set(dir(group))
