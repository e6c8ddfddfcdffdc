"""The command line `perce-lite`: its commands, in the order of work, and how each run of one ends."""

import os
import signal
import sys
from typing import Annotated

import typer

from perce_lite import __version__
from perce_lite.cli.lazy import DEFAULT_AFTER_CTRL_C, Command, LazyGroup
from perce_lite.console import errors, quiet
from perce_lite.errors import PerceLiteError
from perce_lite.files import keep_to_writable_folders

_DATA, _TRAIN, _USE, _JUDGE, _MORE = "Your data", "Train", "Use", "Judge", "Housekeeping"
_START_OVER = "Nothing was written; the same command starts over."

COMMANDS = {
    "init": Command(
        "init:init",
        "Ask what you have and want, and write a commented recipe for it; without a terminal, flags say it.",
        _DATA,
        _START_OVER,
    ),
    "import": Command(
        "importing:import_",
        "Make rows of a person's writing; shows the first ones before it writes.",
        _DATA,
        _START_OVER,
    ),
    "check": Command(
        "check:check", "Look at the rows, their lengths and one example; no training.", _DATA, _START_OVER
    ),
    "inspect": Command(
        "inspect:inspect",
        "Look at what PerContrast finds in the data, token by token, before any training.",
        _DATA,
        "What was scored under the base is kept; the same command scores the rest.",
    ),
    "plan": Command(
        "plan:plan",
        "Say whether the recipe fits a GPU, what takes the memory and what to change. Loads no weights.",
        _TRAIN,
        "Nothing was kept but scores of --probe; the same command starts over.",
    ),
    "train": Command(
        "train:train",
        "Train the recipe's adapter, or resume an earlier run of it.",
        _TRAIN,
        "The same command resumes from the last checkpoint; what was scored is kept.",
    ),
    "fleet": Command(
        "fleet:fleet",
        "Train an adapter for every user (or cohort) who is due, over one base, or resume.",
        _TRAIN,
        "Adapters that the registry has as trained stay so; the same command trains the rest.",
    ),
    "weights": Command(
        "weights:weights",
        "Write token ids, labels, PIR and weights of every row, for other trainers.",
        _TRAIN,
        "What was scored under the base is kept; the same command scores the rest.",
    ),
    "generate": Command("generate:generate", "Answer prompts with an adapter, or with its base.", _USE, _START_OVER),
    "chat": Command(
        "chat:chat",
        "Talk to an adapter in the terminal; /help lists what else can be said there.",
        _USE,
        _START_OVER,
    ),
    "serve": Command(
        "serve:serve",
        "Serve an adapter or a fleet: an OpenAI endpoint whose models are your users, and a page to look at.",
        _USE,
        "Nothing was written; who waited for an answer was sent away.",
    ),
    "export": Command(
        "export:export",
        "Take an adapter to other programs; it is loaded again and shown to do what it did in training.",
        _USE,
        "Nothing half-written stays; the same command starts over, with --all it resumes.",
    ),
    "adapters": Command("adapters:adapters", "The adapters of a fleet: list, show, who, verify, delete.", _USE),
    "eval": Command(
        "eval:evaluate",
        "Judge adapters on held-out rows: own profile, none, another user's, the best topical match.",
        _JUDGE,
        "What was scored and answered is kept; the same command does the rest.",
    ),
    "compare": Command(
        "compare:compare",
        "Train ways of weighting under one budget and judge them on held-out rows. Takes hours; resumes.",
        _JUDGE,
        "Finished trainings are kept; the same command resumes from the last checkpoint.",
    ),
    "bench": Command(
        "bench:bench",
        "Measure time, memory and disk beside plain SFT here; or many users, answers, or what a GPU does with an 8B.",
        _JUDGE,
        "Nothing is kept: measurements are compared within one run; the same command starts over.",
    ),
    "recipe": Command("recipe:recipe", "Print the reference of recipe keys and of TRL's options.", _MORE, _START_OVER),
    "store": Command(
        "store:store",
        "The log-probs kept between runs: show, clear.",
        _MORE,
        {"show": "Nothing was changed.", "clear": "What is removed stays removed; the same command removes the rest."},
    ),
}


class _Commands(LazyGroup):
    known = COMMANDS


app = typer.Typer(
    cls=_Commands,
    help="Train LoRA adapters that make a language model personal, on one GPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"perce-lite {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train LoRA adapters that make a language model personal, on one GPU."""


def main(words: list[str] | None = None) -> None:
    """The command `perce-lite WORDS`: an error of ours is one clean line and exit code 2, Ctrl-C is 130."""
    words = sys.argv[1:] if words is None else words
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    quiet()
    _let_gpu_memory_grow()
    _keep_few_cpu_kernels()
    signal.signal(signal.SIGINT, _interrupt)
    try:
        keep_to_writable_folders()
        app(words, prog_name="perce-lite")
    except PerceLiteError as error:
        _fail(str(error))
    except BrokenPipeError:  # whoever read the output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.filename is None:  # not of a file that somebody named: a fault, and its trace says where
            raise
        _fail(f"{os.fsdecode(error.filename)}: {error.strerror}. Check the path and its permissions.")
    except _Interrupted:
        errors.show_cursor(True)
        errors.print(f"Stopped. {after_ctrl_c(words)}", style="yellow", soft_wrap=True)
        sys.exit(130)


def _let_gpu_memory_grow() -> None:
    """Has torch's allocator stretch what it holds, where the user says nothing of it: rows of many lengths lose less.

    Torch reads it when it first allocates. Linux alone: elsewhere it has no effect but a warning.
    """
    if sys.platform == "linux" and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


CPU_KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "128"}
"""How many kernels oneDNN, and torch's own door to it, keep on a CPU; 1,024 each by themselves."""


def _keep_few_cpu_kernels() -> None:
    """Has kernels of lengths that are long past forgotten, unless the user says more.

    On a CPU with bf16 instructions each new length of a batch costs some 13 MiB of them at the built-in model's sizes:
    gigabytes, after some trainings. A step of one length is no slower with so few.
    """
    for name, count in CPU_KERNELS.items():
        os.environ.setdefault(name, count)


def _fail(message: str) -> None:
    """Ends the command with one line and exit code 2."""
    errors.print(f"error: {message}", style="red", markup=False, soft_wrap=True)
    sys.exit(2)


def after_ctrl_c(words: list[str]) -> str:
    """What holds after Ctrl-C in the command `perce-lite WORDS`."""
    command = COMMANDS.get(words[0]) if words else None
    note = DEFAULT_AFTER_CTRL_C if command is None else command.after_ctrl_c
    return note if isinstance(note, str) else note.get(words[1] if len(words) > 1 else "", DEFAULT_AFTER_CTRL_C)


class _Interrupted(BaseException):
    """Ctrl-C. Not a KeyboardInterrupt, which typer would turn into "Aborted!" and exit code 1."""


def _interrupt(signum: int, frame: object) -> None:
    raise _Interrupted
