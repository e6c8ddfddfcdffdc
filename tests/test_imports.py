"""The order of the house: a room imports only from rooms on lines above its own."""

import ast
import subprocess
import sys
from pathlib import Path

import perce_lite

HOUSE = """
errors
targets    reuse
console    files      contrast   profiles   source     metrics    llamacpp   writings   unpacking   cards
cores      route      hashed     offline
config
faults
recipe
rows       registry   children   embedding  chats      mails
documents  texts
data       models     store      chat       reading
card       importing
pairs      adapters   footprint
collator   head       prefix     shapes     longest
score      memory
terms
plan
fullcard   plantable  capacity
trainer    slots      generate   controls   check      sections
charts     learner    proof      gguf_vocabulary   conversation
report     ggufs      modelfile  engine
gguf_model folder_proof
gguf_proof
inspection gguf_lora
train      tables     evaluate   writers
export     probe
groups     measuring  workload   exactrows
compare    bench      inprocess
fleet      slotted    cli_options   randombase
fleetmeasuring        gpumeasuring  cli_import  cli_plan
fleetbench gpureport
roster
export_all hub
cli_export cli_fleet  cli_bench
cli
notebook
"""

HOME = Path(perce_lite.__file__).parent
ROOMS = {path.stem: path for path in HOME.rglob("*.py") if path.stem != "__init__"}
WINGS = {path.parent.name: path for path in HOME.glob("*/__init__.py")}
"""Packages in the package: rooms that belong together. Floors count across them."""


def imports_of(room: str) -> set[str]:
    """Every room that `room` imports, at the top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(ROOMS[room].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "perce_lite":
            last = node.module.split(".")[-1]
            found |= {last} if last in ROOMS else {alias.name for alias in node.names}
    return found


def test_rooms_import_only_from_above():
    floors = [line.split() for line in HOUSE.strip().splitlines()]
    floor_of = {room: number for number, floor in enumerate(floors) for room in floor}
    rooms = set(ROOMS)
    assert rooms == set(floor_of), "every room stands in the house, once"
    assert len(ROOMS) == len(list(HOME.rglob("*.py"))) - len(WINGS) - 1, "no two rooms have one name"
    for wing in WINGS.values():
        assert ast.get_docstring(ast.parse(wing.read_text())), "a wing says what it is for, and holds nothing else"
        assert len(ast.parse(wing.read_text()).body) == 1
    wrong = [
        f"{room} imports {other}"
        for room in rooms
        for other in imports_of(room)
        if floor_of.get(other, 99) >= floor_of[room]
    ]
    assert not wrong


def test_public_names_are_there():
    assert set(perce_lite.__all__) == {
        "PerCEConfig",
        "PerCETrainer",
        "PerceLiteError",
        "Recipe",
        "Template",
        "load_recipe",
    }
    for name in perce_lite.__all__:
        assert getattr(perce_lite, name).__doc__


def test_top_level_of_the_project():
    top = {path.name for path in HOME.parent.iterdir() if not path.name.startswith(".")}
    ours = {"pyproject.toml", "perce_lite", "recipes", "tests", "README.md", "LICENSE"}
    assert ours <= top
    assert top - ours <= {"runs", "build", "perce_lite.egg-info", "perce-output"}


def test_help_and_package_need_no_torch():
    rooms = ", ".join(f"perce_lite.{room}" for room in ("cli", "recipe", "fleets.roster", "sections", "tables"))
    code = f"import sys, perce_lite, {rooms}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
