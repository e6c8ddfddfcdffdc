"""The command `perce-lite compare`."""

from pathlib import Path
from typing import Annotated

import typer

from perce_lite.cli.lazy import Lazy
from perce_lite.cli.options import Json, PagePath, RecipePath, Set, open_recipe, readable_recipe, write
from perce_lite.cli.views import compare_sections, terminal
from perce_lite.words import counted

device = Lazy("perce_lite.device")
arms_asked_for = Lazy("perce_lite.evaluation.arms")
comparison = Lazy("perce_lite.evaluation.compare")
oom_advice = Lazy("perce_lite.planning.oom_advice")
pages = Lazy("perce_lite.cli.views.page")


def compare(
    recipe: RecipePath,
    arms: Annotated[
        str | None, typer.Option(help="Estimators, else all; with other fields of PerCEConfig as base:clip_min=0.2.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each arm at its best rate.")] = 3,
    rates: Annotated[
        str | None, typer.Option(help="Rates to choose from by validation; else half, once and twice the recipe's.")
    ] = None,
    judge_on: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Another recipe: judge on its held-out rows, of another task.")
    ] = None,
    out: PagePath = None,
    set_: Set = None,
    json: Json = None,
) -> None:
    """Train ways of weighting under one budget and judge them on held-out rows. Takes hours; resumes."""
    loaded = open_recipe(recipe, set_, trains=True)
    other = None if judge_on is None else readable_recipe(judge_on, None)
    grid = arms_asked_for.grid(loaded, rates)
    named = arms_asked_for.arms_of(loaded, arms or arms_asked_for.ARMS)
    device.say_device(loaded)
    with oom_advice.explain_out_of_memory_in_scoring(loaded, own_folder=True):
        figures = comparison.compare(loaded, named, grid, seeds, other)
    page = out or loaded.output_dir / "compare.html"
    sentences, tables = compare_sections.comparison_sentences(figures), compare_sections.comparison(figures)
    lead = f"{recipe}, {figures['model']}; {counted(len(figures['arms']), 'arm')}, {counted(seeds, 'seed')}."
    pages.write_figures("Ways of weighting, compared", lead, sentences, tables, page)
    write(json, {**figures, "sentences": sentences})
    terminal.show_sections(sentences, tables, page)
