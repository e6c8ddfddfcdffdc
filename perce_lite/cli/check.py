"""The command `perce-lite check`."""

from perce_lite.cli.lazy import Lazy
from perce_lite.cli.options import Json, RecipePath, Set, write
from perce_lite.cli.views import terminal
from perce_lite.recipe import load_recipe

checking = Lazy("perce_lite.evaluation.check")


def check(recipe: RecipePath, set_: Set = None, json: Json = None) -> None:
    """Look at the rows, their lengths and one example; no training."""
    figures = checking.check(load_recipe(recipe, set_ or []))
    write(json, figures)
    terminal.show_check(figures)
