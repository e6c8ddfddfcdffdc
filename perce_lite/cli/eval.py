"""The command `perce-lite eval`."""

from pathlib import Path
from typing import Annotated

import typer

from perce_lite.cli.lazy import Lazy
from perce_lite.cli.options import Json, PagePath, RecipePath, Set, open_recipe, write
from perce_lite.cli.views import eval_sections, terminal
from perce_lite.fleet import queries
from perce_lite.model.adapter_files import read_metadata

device = Lazy("perce_lite.device")
evaluation = Lazy("perce_lite.evaluation.evaluate")
oom_advice = Lazy("perce_lite.planning.oom_advice")
pages = Lazy("perce_lite.cli.views.page")


def evaluate(
    recipe: RecipePath,
    adapter: Annotated[list[Path], typer.Option(help="The folder of an adapter; once for each.")],
    out: PagePath = None,
    set_: Set = None,
    json: Json = None,
) -> None:
    """Judge adapters on held-out rows: own profile, none, another user's, the best topical match."""
    loaded = open_recipe(recipe, set_)
    for folder in adapter:
        queries.refuse_deleted(folder)
        read_metadata(folder)
    device.say_device(loaded)
    with oom_advice.explain_out_of_memory_in_scoring(loaded):
        figures = evaluation.evaluate(loaded, adapter)
    page = out or loaded.output_dir / "eval.html"
    sentences, tables = eval_sections.evaluation_sentences(figures), eval_sections.evaluation(figures)
    lead = f"{recipe}, {figures['model']}; the base, and the adapters {', '.join(list(figures['arms'])[1:])}."
    pages.write_figures("Held-out texts, under every condition", lead, sentences, tables, page, figures["answers"])
    write(json, {**figures, "sentences": sentences})
    terminal.show_sections(sentences, tables, page)
