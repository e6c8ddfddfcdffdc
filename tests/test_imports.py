"""The order of the house: a file imports from its own room and from rooms before it; no arrow runs back."""

import ast
import subprocess
import sys
from pathlib import Path

import perce_lite

HOUSE = Path(perce_lite.__file__).parent
ROOMS = ["data", "model", "training", "planning", "fleet", "evaluation", "export", "serve", "cli"]
"""In order; the ground files of `perce_lite/` itself come before them, its faces after."""
FACES = {"__init__", "__main__", "notebook"}
SIDE_BY_SIDE = {"evaluation", "export", "serve"}
"""Rooms of which none imports another."""


def floor_of(module: str) -> int:
    """0 for ground files, then the number of the room; `module` is dotted, without `perce_lite.`."""
    room = module.split(".")[0]
    return ROOMS.index(room) + 1 if room in ROOMS else 0


def imports_of(path: Path) -> set[str]:
    """Every module of ours that `path` imports, at the top or inside a function, without `perce_lite.`."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "perce_lite":
            package = node.module.removeprefix("perce_lite").lstrip(".")
            modules |= {f"{package}.{alias.name}".lstrip(".") for alias in node.names} if not package else {package}
    return modules


def test_no_import_runs_back():
    back = []
    for path in HOUSE.rglob("*.py"):
        module = ".".join(path.relative_to(HOUSE).with_suffix("").parts)
        for other in imports_of(path) if module not in FACES else ():
            rooms = {module.split(".")[0], other.split(".")[0]}
            if floor_of(other) > floor_of(module) or (len(rooms) == 2 and rooms <= SIDE_BY_SIDE):
                back.append(f"{module} imports {other}")
    assert not back


def test_every_folder_is_a_room_that_says_what_it_is_for():
    packages = [path for path in HOUSE.rglob("__init__.py") if path.parent != HOUSE]
    assert {path.parent.relative_to(HOUSE).parts[0] for path in packages} == set(ROOMS)
    for path in packages:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), path
        assert len(tree.body) == 1, path


def test_public_names_are_there():
    assert set(perce_lite.__all__) == {
        "PerCEConfig",
        "PerCETrainer",
        "PerceLiteError",
        "Recipe",
        "Template",
        "export",
        "fleet",
        "load",
        "load_recipe",
        "score",
    }
    for name in perce_lite.__all__:
        assert getattr(perce_lite, name).__doc__


def test_top_level_of_the_project():
    top = {path.name for path in HOUSE.parent.iterdir() if not path.name.startswith(".")}
    ours = {"pyproject.toml", "perce_lite", "recipes", "tests", "README.md", "LICENSE"}
    assert ours <= top
    assert top - ours <= {"runs", "build", "perce_lite.egg-info", "perce-output"}


def test_help_and_package_need_no_torch():
    modules = ", ".join(
        f"perce_lite.{module}"
        for module in ("cli.app", "recipe", "fleet.queries", "cli.views.sections", "cli.views.terminal")
    )
    code = f"import sys, perce_lite, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
