"""The command line. Heavy modules are imported inside the commands, so that `--help` answers at once."""

import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from perce_lite.cli import bench as cli_bench
from perce_lite.cli import export as cli_export
from perce_lite.cli import fleet as cli_fleet
from perce_lite.cli import importing as cli_import
from perce_lite.cli import plan as cli_plan
from perce_lite.cli.options import Json, RecipePath, Set, write
from perce_lite.console import errors, quiet
from perce_lite.errors import PerceLiteError

app = typer.Typer(
    help="Train LoRA adapters that make a language model personal, on one GPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
store_app = typer.Typer(help="The log-probs kept between runs.", no_args_is_help=True)
app.add_typer(store_app, name="store")
app.command("bench")(cli_bench.bench)
app.command("export")(cli_export.export)
app.command("fleet")(cli_fleet.fleet)
app.command("import")(cli_import.import_)
app.command("plan")(cli_plan.plan)
app.add_typer(cli_fleet.adapters_app, name="adapters")

StorePath = Annotated[Path | None, typer.Option("--path", help="The store's folder; default: that of the recipes.")]


@app.command()
def train(
    recipe: RecipePath,
    set_: Set = None,
    restart: Annotated[bool, typer.Option("--restart", help="Throw an earlier run in the same folder away.")] = False,
    json: Json = None,
) -> None:
    """Train the recipe's adapter, or go on where an earlier run of it stopped."""
    from perce_lite.recipe import load_recipe

    read = load_recipe(recipe, set_ or [])
    from perce_lite.cli.views import terminal as tables
    from perce_lite.evaluation.summary import train_and_measure
    from perce_lite.planning.oom_advice import full_card_is_clear
    from perce_lite.training.run import newest_checkpoint

    with full_card_is_clear(read, partial(newest_checkpoint, read.output_dir)):
        figures = train_and_measure(read, restart)
    write(json, figures)
    tables.show_training(figures)


@app.command()
def check(recipe: RecipePath, set_: Set = None, json: Json = None) -> None:
    """Look at the rows, their lengths and one example; no training."""
    from perce_lite.recipe import load_recipe

    read = load_recipe(recipe, set_ or [])
    from perce_lite.cli.views import terminal as tables
    from perce_lite.evaluation.check import check as run

    figures = run(read)
    write(json, figures)
    tables.show_check(figures)


@app.command()
def inspect(
    recipe: RecipePath,
    adapter: Annotated[Path | None, typer.Option(help="Look with this adapter on.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Training rows at the most, spread over users.")] = 48,
    user: Annotated[str | None, typer.Option(help="Rows of this user only.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Most personal words and rows to list.")] = 20,
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="The page; else <output_dir>/inspect.html.")] = None,
    set_: Set = None,
    json: Json = None,
) -> None:
    """Look at what PerContrast finds in the data, token by token, before any training."""
    from perce_lite.recipe import load_recipe

    read = load_recipe(recipe, set_ or [])
    from perce_lite.cli.views import terminal as tables
    from perce_lite.cli.views.page import write_inspection
    from perce_lite.evaluation.inspect import inspect as run
    from perce_lite.planning.oom_advice import full_card_in_scoring

    with full_card_in_scoring(read):
        figures = run(read, adapter, rows, user, top)
    page = out or read.output_dir / "inspect.html"
    write_inspection(figures, page)
    write(json, figures)
    tables.show_inspection(figures, page)


@app.command("eval")
def evaluate(
    recipe: RecipePath,
    adapter: Annotated[list[Path], typer.Option(help="The folder of an adapter; once for each.")],
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="The page; else <output_dir>/eval.html.")] = None,
    set_: Set = None,
    json: Json = None,
) -> None:
    """Judge adapters on held-out rows: own profile, none, another user's, the best topical match."""
    from perce_lite.recipe import load_recipe

    read = load_recipe(recipe, set_ or [])
    from perce_lite.cli.views import sections
    from perce_lite.cli.views import terminal as tables
    from perce_lite.cli.views.page import write_figures
    from perce_lite.evaluation.evaluate import evaluate as run
    from perce_lite.planning.oom_advice import full_card_in_scoring

    with full_card_in_scoring(read):
        figures = run(read, adapter)
    page = out or read.output_dir / "eval.html"
    told, made = sections.evaluation_sentences(figures), sections.evaluation(figures)
    lead = f"{recipe}, {figures['model']}; the base, and the adapters {', '.join(list(figures['arms'])[1:])}."
    write_figures("Held-out texts, under controls", lead, told, made, page, figures["answers"])
    write(json, {**figures, "sentences": told})
    tables.show_sections(told, made, page)


@app.command()
def compare(
    recipe: RecipePath,
    arms: Annotated[
        str | None, typer.Option(help="Estimators, else all; with other fields of PerCEConfig as base:clip_min=0.2.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each arm at its best rate.")] = 3,
    rates: Annotated[
        str | None, typer.Option(help="Rates to choose from by validation; else half, once and twice the recipe's.")
    ] = None,
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="The page; else <output_dir>/compare.html.")] = None,
    set_: Set = None,
    json: Json = None,
) -> None:
    """Train ways of weighting under one budget and judge them on held-out rows. Takes hours; goes on where it was."""
    from perce_lite.recipe import load_recipe

    read = load_recipe(recipe, set_ or [])
    from perce_lite.cli.views import sections
    from perce_lite.cli.views import terminal as tables
    from perce_lite.cli.views.page import write_figures
    from perce_lite.evaluation.compare import ARMS, arms_of, grid
    from perce_lite.evaluation.compare import compare as run
    from perce_lite.planning.oom_advice import full_card_in_scoring

    with full_card_in_scoring(read, own_folder=True):
        figures = run(read, arms_of(read, arms or ARMS), grid(read, rates), seeds)
    page = out or read.output_dir / "compare.html"
    told, made = sections.comparison_sentences(figures), sections.comparison(figures)
    lead = f"{recipe}, {figures['model']}; {len(figures['arms'])} arms, {seeds} seeds."
    write_figures("Ways of weighting, compared", lead, told, made, page)
    write(json, {**figures, "sentences": told})
    tables.show_sections(told, made, page)


@app.command()
def generate(
    adapter: Annotated[Path, typer.Option(help="The folder of an adapter, such as runs/quickstart/adapter.")],
    prompt: Annotated[str, typer.Option(help="What to ask.")],
    profile: Annotated[str | None, typer.Option(help="The profile's text, or @FILE.")] = None,
    no_profile: Annotated[bool, typer.Option("--no-profile", help="Go without a profile.")] = False,
    user: Annotated[
        str | None, typer.Option(help="A user of the adapter's data: their texts become the profile.")
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Answer with the base, the adapter switched off.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens at the most.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus, with a temperature.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    json: Json = None,
) -> None:
    """Answer a prompt with an adapter, or with its base."""
    if sum((profile is not None, no_profile, user is not None)) > 1:
        raise typer.BadParameter("give one of --profile, --no-profile and --user")
    text = "" if no_profile else _text_or_file(profile)
    from transformers import set_seed

    from perce_lite.model.generate import generate_from_folder

    set_seed(seed)
    options = _sampling(temperature, top_p)
    figures = generate_from_folder(adapter, prompt, text, user, max_new_tokens, not base, stream=True, **options)
    write(json, figures)


@app.command()
def chat(
    adapter: Annotated[Path, typer.Argument(help="The folder of an adapter, such as runs/quickstart/adapter.")],
    profile: Annotated[str | None, typer.Option(help="The profile's text, or @FILE.")] = None,
    user: Annotated[
        str | None, typer.Option(help="A user of the adapter's data: their texts become the profile.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at the most.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus, with a temperature.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
) -> None:
    """Talk to an adapter in the terminal; /help lists what else can be said there."""
    if profile is not None and user is not None:
        raise typer.BadParameter("give one of --profile and --user")
    text = _text_or_file(profile)
    from transformers import set_seed

    from perce_lite.cli import chat as conversation
    from perce_lite.model import adapters
    from perce_lite.model.generate import load_adapter

    its = load_adapter(adapters.read_metadata(adapter))
    set_seed(seed)
    conversation.chat(its, text, user, max_new_tokens, **_sampling(temperature, top_p))


@store_app.command("show")
def store_show(path: StorePath = None, json: Json = None) -> None:
    """Entries and size, by base."""
    from perce_lite.cli.views import terminal as tables
    from perce_lite.files import home
    from perce_lite.model import logprob_store as store

    root = path or home() / "store"
    bases = store.usage(root)
    write(json, {"store": str(root), "bases": bases})
    tables.show_store(root, bases)


@store_app.command("clear")
def store_clear(path: StorePath = None, json: Json = None) -> None:
    """Remove every entry; the next run scores anew."""
    from perce_lite.files import home
    from perce_lite.model import logprob_store as store

    root = path or home() / "store"
    freed = store.clear(root)
    write(json, {"store": str(root), "bytes_freed": freed})
    errors.print(f"Cleared {root}: {freed / 2**20:.2f} MiB freed.")


def _sampling(temperature: float, top_p: float) -> dict[str, Any]:
    """Options of transformers' `generate`; greedy at 0."""
    return {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {}


def _text_or_file(given: str | None) -> str | None:
    if given is None or not given.startswith("@"):
        return given
    try:
        return Path(given[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"--profile {given}: {error}") from error


def main(words: list[str] | None = None) -> None:
    """The command `perce-lite WORDS`: an error of ours is one clean line and exit code 2, Ctrl-C is 130."""
    words = sys.argv[1:] if words is None else words
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    quiet()
    signal.signal(signal.SIGINT, _interrupt)
    try:
        app(words, prog_name="perce-lite")
    except PerceLiteError as error:
        errors.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(2)
    except _Interrupted:
        errors.show_cursor(True)
        errors.print(f"Stopped. {_after_a_stop(words)}", style="yellow", soft_wrap=True)
        sys.exit(130)


_STOPPED = {
    "train": "The same command goes on from the last checkpoint; what was scored is kept.",
    "check": "Nothing was written; the same command starts over.",
    "import": "Nothing was written; the same command starts over.",
    "plan": "Nothing was kept but scores of --probe; the same command starts over.",
    "generate": "Nothing was written; the same command starts over.",
    "chat": "Nothing was written; the same command starts over.",
    "inspect": "What was scored under the base is kept; the same command scores the rest.",
    "eval": "What was scored and answered is kept; the same command does the rest.",
    "compare": "Finished trainings are kept; the same command goes on from the last checkpoint.",
    "fleet": "Whom the book has as trained stay so; the same command trains the rest.",
    "export": "Nothing half-written stays; the same command starts over, with --all it goes on.",
    "bench": "Nothing is kept: measurements are compared within one run; the same command starts over.",
    "store show": "Nothing was changed.",
    "store clear": "What is removed stays removed; the same command removes the rest.",
}
"""What is true after Ctrl-C, by command."""


def _after_a_stop(words: list[str]) -> str:
    command = " ".join(words[: 2 if words[:1] == ["store"] else 1])
    return _STOPPED.get(command, "The same command starts over.")


class _Interrupted(BaseException):
    """Ctrl-C. Not a KeyboardInterrupt, which typer would turn into "Aborted!" and exit code 1."""


def _interrupt(signum: int, frame: object) -> None:
    raise _Interrupted
