"""The command that measures: one recipe beside plain SFT, many users, or what a GPU does with an 8B model."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from perce_lite.cli.lazy import Lazy
from perce_lite.cli.options import Json, Set, write
from perce_lite.cli.views import terminal
from perce_lite.console import console
from perce_lite.files import json_text
from perce_lite.locks import write_alone
from perce_lite.model.adapter_files import read_metadata
from perce_lite.recipe import load_recipe

asked_for = Lazy("perce_lite.evaluation.bench.arms")
benchmark = Lazy("perce_lite.evaluation.bench.bench")
fleet_benchmark = Lazy("perce_lite.evaluation.bench.fleetbench")
fleet_engines = Lazy("perce_lite.evaluation.bench.fleetengine")
fleet_scales = Lazy("perce_lite.evaluation.bench.fleetscale")
serve_benchmark = Lazy("perce_lite.serve.bench")
generating = Lazy("perce_lite.evaluation.bench.generating")
gpu_reports = Lazy("perce_lite.evaluation.bench.gpureport")

_GPU_REPORT = Path("runs/gpu-report.md")


def bench(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe, such as recipes/quickstart.yaml.")] = None,
    arms: Annotated[str | None, typer.Option(help="Ways to train, such as base,mixed; else all.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps a measurement; else 6, --gpu-report: 3.")] = None,
    warmup: Annotated[int, typer.Option(min=0, help="Steps ahead of them that do not count.")] = 1,
    repeats: Annotated[int | None, typer.Option(min=1, help="Measurements of each; else 3, --gpu-report: 2.")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Over which the scoring of a cold store is spread.")] = 3,
    fleet: Annotated[bool, typer.Option("--fleet", help="Many users: one by one beside several at once.")] = False,
    fleet_scale: Annotated[
        bool, typer.Option("--fleet-scale", help="No recipe: what a fleet's commands take for thousands of users.")
    ] = False,
    fleet_engine: Annotated[
        bool, typer.Option("--fleet-engine", help="No recipe: what a fleet on a Ray cluster costs beside the training.")
    ] = False,
    users: Annotated[
        str | None,
        typer.Option(help="--fleet-scale: how many, else 1000,2000,5000,10000,20000; --fleet-engine: 10000."),
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Tokens a row; with --fleet: else 32,64,96; with --gpu-report one: else 2048.")
    ] = None,
    slots: Annotated[str | None, typer.Option(help="With --fleet: users at once; else 1,2,4,8,16.")] = None,
    generation: Annotated[
        bool, typer.Option("--generation", help="What --personal costs: answers with the contrast beside plain ones.")
    ] = False,
    gpu_report: Annotated[
        bool, typer.Option("--gpu-report", help="No recipe: what this GPU does with an 8B model of random weights.")
    ] = False,
    shape: Annotated[
        str | None, typer.Option(help="With --gpu-report: llama-3.1-8b (default), toy or a folder with a config.json.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(dir_okay=False, help="With --gpu-report: its table, else runs/gpu-report.md.")
    ] = None,
    serve: Annotated[
        Path | None, typer.Option(help="No recipe: the adapter here, served beside `generate`; takes --repeats.")
    ] = None,
    set_: Set = None,
    json: Json = None,
) -> None:
    """Measure time, memory and disk beside plain SFT here; or many users, answers, or what a GPU does with an 8B."""
    given = {"RECIPE": recipe, "--arms": arms, "--slots": slots, "--lengths": lengths, "--set": set_, "--shape": shape}
    given |= {"--out": out, "--users": users}
    kinds = {"--fleet": fleet, "--gpu-report": gpu_report, "--fleet-scale": fleet_scale, "--serve": serve is not None}
    _only(given, {**kinds, "--fleet-engine": fleet_engine, "--generation": generation})
    if gpu_report:
        return _report(shape, lengths, (steps or 3, warmup, repeats or 2, epochs), out or _GPU_REPORT, json)
    if recipe is None:
        return _show(*_without_recipe(serve, users, fleet_scale, repeats or 3), json)
    loaded = load_recipe(recipe, set_ or [])
    if generation:
        return _show(generating.generation_cost(loaded, repeats=repeats or 3), terminal.show_generation_cost, json)
    steps, repeats = steps or 6, repeats or 3
    if fleet:
        sizes = asked_for.lengths_of(lengths), asked_for.slots_of(slots)
        measured = fleet_benchmark.fleet_bench(loaded, *sizes, steps, warmup, repeats)
        return _show(measured, terminal.show_fleet_bench, json)
    named = asked_for.arms_of(arms)  # a wrong one is told before torch is imported
    measured = benchmark.bench(loaded, named, steps, warmup, repeats, epochs)
    return _show(measured, terminal.show_bench, json)


def _without_recipe(
    adapter: Path | None, users: str | None, scale: bool, repeats: int
) -> tuple[Any, Callable[[Any], None]]:
    """What `--serve`, `--fleet-scale` or `--fleet-engine` measures, and what shows it."""
    if adapter is not None:
        read_metadata(adapter)
        return serve_benchmark.serve_bench(adapter, repeats), terminal.show_serve_bench
    counts = _numbers(users)
    if scale:
        return fleet_scales.fleet_scale(counts or fleet_scales.USERS), terminal.show_fleet_scale
    if len(counts) > 1:
        raise typer.BadParameter(f"--users {users}: --fleet-engine takes one number")
    return fleet_engines.engine_cost(*counts), terminal.show_engine_cost


def _show(measured: Any, show: Callable[[Any], None], json: Path | None) -> None:
    """Shows what was measured; writes its figures where `--json` asks for them."""
    write(json, measured if isinstance(measured, dict) else measured.figures())
    show(measured)


def _numbers(text: str | None) -> list[int]:
    """Numbers of users such as 1000,5000; none for None."""
    try:
        numbers = [int(part) for part in (text or "").split(",") if part]
    except ValueError:
        numbers = [0]
    if any(number < 1 for number in numbers):
        raise typer.BadParameter(f"--users {text}: give whole numbers from 1 on, such as 1000,5000")
    return numbers


def _only(given: dict[str, Any], chosen: dict[str, bool]) -> None:
    """Raises typer's error for options that have no part in what is measured."""
    kinds = [name for name, on in chosen.items() if on]
    if len(kinds) > 1:
        raise typer.BadParameter(f"give one of {' and '.join(kinds)}")
    kind = kinds[0] if kinds else ""
    takes = {
        "": ("RECIPE", "--set", "--arms"),
        "--fleet": ("RECIPE", "--set", "--lengths", "--slots"),
        "--gpu-report": ("--lengths", "--shape", "--out"),
        "--fleet-scale": ("--users",),
        "--fleet-engine": ("--users",),
        "--serve": (),
        "--generation": ("RECIPE", "--set"),
    }
    for name, value in given.items():
        if value is not None and name not in takes[kind]:
            where = " or ".join(option for option, names in takes.items() if option and name in names)
            raise typer.BadParameter(f"{name} has no part in {kind}" if kind else f"{name} goes with {where}")
    if "RECIPE" in takes[kind] and given["RECIPE"] is None:
        raise typer.BadParameter("give a recipe, such as recipes/quickstart.yaml, or --gpu-report")


def _report(
    shape: str | None, length: str | None, pace: tuple[int, int, int, int], out: Path, json: Path | None
) -> None:
    """Measures at `pace` (steps, warmup, repeats, epochs), and writes the table and, beside it, the figures."""
    if out.suffix == ".json":
        raise typer.BadParameter(f"--out {out}: the table is Markdown; the figures go beside it as JSON")
    if shape is not None:
        asked_for.require_shape(shape)
    rows = [gpu_reports.LENGTH] if length is None else asked_for.lengths_of(length)
    if len(rows) != 1:
        raise typer.BadParameter(f"--lengths {length}: --gpu-report has rows of one length")
    figures = gpu_reports.gpu_report(shape or gpu_reports.SHAPE, rows[0], *pace, planned=gpu_reports.planned_parts)
    table = gpu_reports.markdown(figures)
    write_alone(out, table)
    write_alone(out.with_suffix(".json"), json_text(figures))
    write(json, figures)
    console.print(table, markup=False, soft_wrap=True)
    console.print(f"Written: {out} and {out.with_suffix('.json')}", markup=False)
