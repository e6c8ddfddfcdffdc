"""The README is true: its commands exist, every command stands in it, its code runs, its tables are the code's own."""

import json
import re
import shlex
from pathlib import Path

import pytest
import toys

from perce_lite.cli.app import COMMANDS as LAZY
from perce_lite.config import VERDICTS
from perce_lite.recipe import Recipe, Section

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = [ROOT / "README.md", *sorted((ROOT / "perce_lite").rglob("README.md")), ROOT / "recipes" / "README.md"]
TEXT = "\n".join(path.read_text(encoding="utf-8") for path in DOCS)
COMMANDS = [
    line.partition("&& ")[2] or line
    for line in dict.fromkeys(TEXT.splitlines())
    if re.match(r"(perce-lite |pip .*perce-lite)", line)
]


def options(command) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts if name.startswith("--")}


def commands() -> dict[str, object]:
    """Every command by the words that call it."""
    found = {}
    for name, known in LAZY.items():
        command = known.load(name)
        if hasattr(command, "commands"):
            found |= {f"{name} {sub}": one for sub, one in command.commands.items()}
        else:
            found[name] = command
    return found


def called(line: str) -> tuple[str, list[str]]:
    words = shlex.split(line)[1:]
    name = " ".join(words[:2]) if " ".join(words[:2]) in commands() else words[0]
    return name, words[len(name.split()) :]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_of_the_docs_exist(line):
    name, words = called(line)
    assert name in commands(), f"{name} is no command"
    given = {word for word in words if word.startswith("--")}
    assert given <= options(commands()[name])
    for word in words:
        if word.startswith("recipes/"):
            assert (ROOT / word).is_file()
        if "=" in word and not set(word) & {" ", ","} and not word.startswith("-"):
            section, _, field = word.partition("=")[0].partition(".")
            assert section in Recipe.model_fields
            assert field or Recipe.model_fields[section].annotation is str


def test_every_command_and_option_stands_in_the_docs():
    shown = {called(line)[0] for line in COMMANDS}
    assert shown == set(commands())
    missing = {option for command in commands().values() for option in options(command)} - {"--help"}
    assert not {option for option in missing if option not in TEXT}


def test_two_commands_set_everything_up():
    assert re.findall(r"^pip install -e .*$", README, re.M) == [
        "pip install -e . && perce-lite train recipes/quickstart.yaml",
        "pip install -e '.[test]' && pytest",
    ]


def test_the_trl_script_runs(tmp_path, monkeypatch):
    """These very lines, with a toy model where the script looks for its own."""
    [script] = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(script.strip().splitlines()) <= 20
    toys.toy_folder(tmp_path / "Qwen" / "Qwen3-0.6B", "qwen3")
    rows = [json.dumps(row) for row in toys.toy_rows(users=2, per_user=2)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(script, "README.md", "exec"), names)
    assert (tmp_path / "out/adapter/adapter_model.safetensors").is_file()
    assert list((tmp_path / "out/store").rglob("*.safetensors"))
    assert names["trainer"].state.global_step == 1


def test_every_key_and_option_has_a_row_in_the_reference():
    reference = (ROOT / "perce_lite" / "RECIPE.md").read_text(encoding="utf-8")
    assert "(perce_lite/RECIPE.md)" in README
    for name, verdict in VERDICTS.items():
        assert f"| `{name}` | {verdict.says} | {verdict.reason} |" in reference
    for name, field in Recipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            for key, inner in field.annotation.model_fields.items():
                row = rf"^\| `{name}\.{key}` \| .* \| {re.escape(str(inner.description))} \|$"
                assert re.search(row, reference, re.M), f"{name}.{key}"
        elif name not in ("source", "lora", "train"):
            assert f"| `{name}` |" in reference
    assert "\n## lora\n" in reference
    assert "\n## train\n" in reference


def test_recipes_of_the_readme_are_those_in_the_folder():
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert f"recipes/{path.name}" in TEXT


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 250
    assert len(README.encode()) <= 14_000
    assert "nothing has run on a GPU" in "\n".join(README.splitlines()[:4])


def heading_anchors(path: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        file, _, anchor = target.partition("#")
        place = (path.parent / file).resolve() if file else path
        assert "://" not in target, "no address that nobody of the project owns"
        assert place.is_file(), target
        assert not anchor or anchor in heading_anchors(place), target
