"""The command `perce-lite check`."""

from perce_lite.cli.lazy import Lazy
from perce_lite.cli.options import Json, RecipePath, Set, readable_recipe, write
from perce_lite.cli.views import terminal

checking = Lazy("perce_lite.evaluation.check")


def check(recipe: RecipePath, set_: Set = None, json: Json = None) -> None:
    """Look at the rows, their lengths and one example; no training."""
    loaded = readable_recipe(recipe, set_)
    figures = checking.check(loaded)
    write(json, figures)
    terminal.show_check(figures)
